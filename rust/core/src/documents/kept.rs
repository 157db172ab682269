//! What is kept of a range of documents (title, text, metadata), in compressed blocks.
//!
//! Body: the blocks, zstd frames; then an index with an entry a block and one more at the end, each {first
//! position, offset, length when unpacked}. An unpacked block holds for each document a byte that says
//! which fields follow, then each field as length (u32) and bytes.

use std::path::PathBuf;

use zstd::bulk::Compressor;

use crate::documents::MAX_FIELD;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind, u32_at, u64_at};
use crate::watch::Progress;

/// A block is closed when it has this many bytes; a longer document has a block of its own.
const BLOCK: usize = 32 << 10;
/// Three fields of the largest size, their lengths, and a block that was almost full before.
const MAX_BLOCK: u64 = 64 << 20;
const ENTRY: u64 = 24;
/// The index begins at a multiple of it.
const ALIGNMENT: u64 = 8;
const LEVEL: i32 = 6;
const FIELDS: usize = 3;

/// The kept fields of one document.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    pub title: Option<String>,
    pub text: Option<String>,
    pub metadata: Option<String>,
}

impl Contents {
    pub fn is_empty(&self) -> bool {
        self.fields().iter().all(|f| f.is_none())
    }

    /// In the order of their bits.
    fn fields(&self) -> [Option<&str>; FIELDS] {
        [
            self.title.as_deref(),
            self.text.as_deref(),
            self.metadata.as_deref(),
        ]
    }
}

#[derive(Debug)]
pub struct KeptSegment {
    frame: Frame,
    first: u64,
    count: u64,
    blocks: u64,
    /// Where the index begins.
    index: u64,
}

/// The block that was unpacked last, for calls that read neighbours.
#[derive(Debug, Default)]
pub struct LastBlock {
    of: Option<(u64, u64)>,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    position: u64,
    offset: u64,
    unpacked: u64,
}

impl KeptSegment {
    pub fn open(map: Mapped) -> Result<Self> {
        let frame = Frame::open(map, Kind::Documents)?;
        let mut fields = frame.fields();
        let (first, count, blocks) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let index = blocks
            .checked_add(1)
            .and_then(|n| n.checked_mul(ENTRY))
            .and_then(|n| (frame.body().len() as u64).checked_sub(n))
            .filter(|at| blocks <= count && at.is_multiple_of(ALIGNMENT));
        let Some(index) = index else {
            let found = format!("{blocks} blocks");
            return Err(frame.corrupt("tail", "an index within the body", found));
        };
        if first.checked_add(count).is_none() {
            return Err(frame.corrupt(
                "docno range",
                "an end within 64 bits",
                format!("{first}+{count}"),
            ));
        }
        let segment = Self {
            frame,
            first,
            count,
            blocks,
            index,
        };
        // The last entry says again what the tail says.
        let end = segment.entry(blocks)?;
        let data = end.offset.checked_next_multiple_of(ALIGNMENT);
        if end.position != count || data != Some(index) {
            let expected = format!("{count} documents in {index} bytes");
            let found = format!("{} in {}", end.position, end.offset);
            return Err(segment.frame.corrupt("index", expected, found));
        }
        Ok(segment)
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    fn entry(&self, block: u64) -> Result<Entry> {
        let at = self.index.saturating_add(block.saturating_mul(ENTRY));
        let raw = self.frame.section(at, ENTRY, "index")?;
        let number = |at| u64_at(raw, at).unwrap_or_default();
        Ok(Entry {
            position: number(0),
            offset: number(8),
            unpacked: number(16),
        })
    }

    /// What is kept of a docno of this range.
    pub fn read(&self, docno: u64, last: &mut LastBlock) -> Result<Option<Contents>> {
        let Some(position) = docno.checked_sub(self.first).filter(|i| *i < self.count) else {
            return Ok(None);
        };
        // The last block that begins at or before the position.
        let (mut low, mut high) = (0, self.blocks);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.entry(middle)?.position <= position {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        let Some(block) = low.checked_sub(1) else {
            return Err(self
                .frame
                .corrupt("index", "a block from position 0 on", "none"));
        };
        let entry = self.entry(block)?;
        if last.of != Some((self.first, block)) {
            last.of = None;
            last.bytes = self.unpack(block, entry)?;
            last.of = Some((self.first, block));
        }
        let mut documents = Documents {
            rest: &last.bytes,
            frame: &self.frame,
        };
        for _ in entry.position..position {
            documents.skip()?;
        }
        documents.next().map(Some)
    }

    /// The zstd frame of a block.
    fn packed(&self, block: u64, entry: Entry) -> Result<&[u8]> {
        let end = self.entry(block + 1)?.offset;
        match end.checked_sub(entry.offset).filter(|_| end <= self.index) {
            Some(length) => self.frame.section(entry.offset, length, "index"),
            None => {
                let found = format!("others at block {block}");
                Err(self.frame.corrupt("index", "ascending offsets", found))
            }
        }
    }

    fn unpack(&self, block: u64, entry: Entry) -> Result<Vec<u8>> {
        let packed = self.packed(block, entry)?;
        if entry.unpacked > MAX_BLOCK {
            let expected = format!("a block of at most {MAX_BLOCK} bytes");
            return Err(self.frame.corrupt("index", expected, entry.unpacked));
        }
        let unpacked = entry.unpacked as usize;
        let bytes = zstd::bulk::decompress(packed, unpacked).map_err(|e| {
            self.frame
                .corrupt(format!("block {block}"), "a zstd frame", e)
        })?;
        if bytes.len() != unpacked {
            return Err(self
                .frame
                .corrupt(format!("block {block}"), unpacked, bytes.len()));
        }
        Ok(bytes)
    }

    /// Checksums, and that every block holds whole documents, as many as the index says.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.frame.verify(progress)?;
        let mut position = 0;
        for block in 0..self.blocks {
            let (entry, next) = (self.entry(block)?, self.entry(block + 1)?);
            if entry.position != position || next.position <= position {
                return Err(self.frame.corrupt(
                    "index",
                    format!("position {position}"),
                    entry.position,
                ));
            }
            let bytes = self.unpack(block, entry)?;
            let mut documents = Documents {
                rest: &bytes,
                frame: &self.frame,
            };
            for _ in entry.position..next.position {
                documents.next()?;
            }
            if !documents.rest.is_empty() {
                return Err(self.frame.corrupt(
                    format!("block {block}"),
                    "no more bytes",
                    documents.rest.len(),
                ));
            }
            position = next.position;
            progress.add(next.offset.saturating_sub(entry.offset))?;
        }
        if position != self.count {
            return Err(self.frame.corrupt("index", self.count, position));
        }
        Ok(())
    }
}

/// Walks through an unpacked block.
struct Documents<'b> {
    rest: &'b [u8],
    frame: &'b Frame,
}

impl<'b> Documents<'b> {
    fn take(&mut self, n: usize) -> Result<&'b [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or_else(|| {
            self.frame
                .corrupt("document", format!("{n} more bytes"), self.rest.len())
        })?;
        self.rest = rest;
        Ok(head)
    }

    fn raw(&mut self) -> Result<[Option<&'b [u8]>; FIELDS]> {
        let flags = self.take(1)?.first().copied().unwrap_or_default();
        if flags >> FIELDS != 0 {
            return Err(self
                .frame
                .corrupt("document", "flags of three fields", flags));
        }
        let mut fields = [None; FIELDS];
        for (bit, field) in fields.iter_mut().enumerate() {
            if flags & (1 << bit) != 0 {
                let length = u32_at(self.take(4)?, 0).unwrap_or_default() as usize;
                if length > MAX_FIELD {
                    let expected = format!("fields of at most {MAX_FIELD} bytes");
                    return Err(self.frame.corrupt("document", expected, length));
                }
                *field = Some(self.take(length)?);
            }
        }
        Ok(fields)
    }

    fn skip(&mut self) -> Result<()> {
        self.raw().map(drop)
    }

    fn next(&mut self) -> Result<Contents> {
        let frame = self.frame;
        let text = |raw: Option<&[u8]>| -> Result<Option<String>> {
            match raw.map(std::str::from_utf8) {
                None => Ok(None),
                Some(Ok(text)) => Ok(Some(text.to_owned())),
                Some(Err(e)) => Err(frame.corrupt("document", "UTF-8", e)),
            }
        };
        let [title, body, metadata] = self.raw()?;
        Ok(Contents {
            title: text(title)?,
            text: text(body)?,
            metadata: text(metadata)?,
        })
    }
}

/// Writes what is kept of the docnos from `first` on, one after the other.
pub struct KeptWriter {
    frame: FrameWriter,
    path: PathBuf,
    packer: Compressor<'static>,
    first: u64,
    /// Documents so far, and those of them that are in packed blocks.
    count: u64,
    packed: u64,
    blocks: u64,
    index: Vec<u8>,
    raw: Vec<u8>,
}

impl std::fmt::Debug for KeptWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptWriter")
            .field("file", &self.path)
            .field("first", &self.first)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl KeptWriter {
    pub fn create(dir: &Directory, name: &str, first: u64) -> Result<Self> {
        let path = dir.path_of(name);
        Ok(Self {
            packer: Compressor::new(LEVEL).map_err(|e| Error::io(&path, e))?,
            frame: FrameWriter::create(dir, name, Kind::Documents)?,
            path,
            first,
            count: 0,
            packed: 0,
            blocks: 0,
            index: Vec::new(),
            raw: Vec::new(),
        })
    }

    /// What is kept of `docno`, which is above all before; nothing is kept of those between.
    pub fn add(&mut self, docno: u64, contents: &Contents) -> Result<()> {
        self.skip_to(docno)?;
        let fields = contents.fields();
        let flags = fields
            .iter()
            .enumerate()
            .fold(0u8, |flags, (bit, f)| flags | u8::from(f.is_some()) << bit);
        self.raw.push(flags);
        for field in fields.into_iter().flatten() {
            self.raw
                .extend_from_slice(&(field.len() as u32).to_le_bytes());
            self.raw.extend_from_slice(field.as_bytes());
        }
        self.end_document()
    }

    fn skip_to(&mut self, docno: u64) -> Result<()> {
        while self.first + self.count < docno {
            self.raw.push(0);
            self.end_document()?;
        }
        Ok(())
    }

    fn end_document(&mut self) -> Result<()> {
        self.count += 1;
        match self.raw.len() >= BLOCK {
            true => self.end_block(),
            false => Ok(()),
        }
    }

    fn end_block(&mut self) -> Result<()> {
        if self.count == self.packed {
            return Ok(());
        }
        let raw = std::mem::take(&mut self.raw);
        let packed = self
            .packer
            .compress(&raw)
            .map_err(|e| Error::io(&self.path, e))?;
        self.block(&packed, raw.len() as u64, self.count)?;
        self.raw = raw;
        self.raw.clear();
        Ok(())
    }

    /// Writes a packed block of the documents before the `end`-th.
    fn block(&mut self, packed: &[u8], unpacked: u64, end: u64) -> Result<()> {
        self.entry(unpacked);
        self.frame.write(packed)?;
        self.blocks += 1;
        self.packed = end;
        Ok(())
    }

    fn entry(&mut self, unpacked: u64) {
        for n in [self.packed, self.frame.length(), unpacked] {
            self.index.extend_from_slice(&n.to_le_bytes());
        }
    }

    /// What a segment keeps of the docnos that `keep` allows; blocks that stay whole are copied as they are.
    pub fn copy(
        &mut self,
        segment: &KeptSegment,
        keep: &dyn Fn(u64) -> bool,
        progress: &Progress,
    ) -> Result<()> {
        self.skip_to(segment.first)?;
        for block in 0..segment.blocks {
            let (entry, next) = (segment.entry(block)?, segment.entry(block + 1)?);
            let start = segment.first.saturating_add(entry.position);
            let end = segment.first.saturating_add(next.position);
            let in_order = start == self.first + self.count && start < end && end <= segment.end();
            // Each document has a byte of its own, so a few blocks cannot stand for docnos without end.
            if !in_order || end - start > entry.unpacked.min(MAX_BLOCK) {
                let found = format!("{start} to {end}");
                return Err(segment.frame.corrupt("index", "ascending positions", found));
            }
            progress.add(end - start)?;
            if entry.unpacked >= BLOCK as u64 / 2 && (start..end).all(keep) {
                self.end_block()?;
                self.count += end - start;
                let packed = segment.packed(block, entry)?;
                self.block(packed, entry.unpacked, self.count)?;
                continue;
            }
            let bytes = segment.unpack(block, entry)?;
            let mut documents = Documents {
                rest: &bytes,
                frame: &segment.frame,
            };
            for docno in start..end {
                let contents = documents.next()?;
                match keep(docno) {
                    true => self.add(docno, &contents)?,
                    false => self.add(docno, &Contents::default())?,
                }
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<Digest> {
        self.end_block()?;
        self.entry(0);
        self.frame.pad(ALIGNMENT)?;
        self.frame.write(&self.index)?;
        let fields = FieldsWriter::new()
            .u64(self.first)
            .u64(self.count)
            .u64(self.blocks);
        self.frame.finish(fields)
    }
}
