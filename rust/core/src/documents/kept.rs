//! What is kept of a range of documents (title, text, metadata), in compressed blocks.
//!
//! Body: an index with an entry a block and one more at the end, each {first position, offset, length
//! when unpacked}; then the blocks, zstd frames. An unpacked block holds for each document a byte that
//! says which fields follow, then each field as length (u32) and bytes.

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind, u32_at, u64_at};

/// A block is closed when it has this many bytes; a longer document has a block of its own.
const BLOCK: usize = 32 << 10;
/// Three fields of the largest size, their lengths, and a block that was almost full before.
const MAX_BLOCK: u64 = 64 << 20;
const ENTRY: u64 = 24;
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
        let index = blocks.checked_add(1).and_then(|n| n.checked_mul(ENTRY));
        if index.is_none_or(|n| n > frame.body().len() as u64) || blocks > count {
            return Err(frame.corrupt(
                "header",
                "an index within the body",
                format!("{blocks} blocks"),
            ));
        }
        if first.checked_add(count).is_none() {
            return Err(frame.corrupt(
                "docno range",
                "an end within 64 bits",
                format!("{first}+{count}"),
            ));
        }
        Ok(Self {
            frame,
            first,
            count,
            blocks,
        })
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    fn entry(&self, block: u64) -> Result<Entry> {
        let raw = self
            .frame
            .section(block.saturating_mul(ENTRY), ENTRY, "index")?;
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

    fn unpack(&self, block: u64, entry: Entry) -> Result<Vec<u8>> {
        let next = self.entry(block + 1)?;
        let packed = next.offset.checked_sub(entry.offset);
        let start = (self.blocks + 1)
            .saturating_mul(ENTRY)
            .checked_add(entry.offset);
        let (Some(start), Some(packed)) = (start, packed) else {
            return Err(self.frame.corrupt(
                "index",
                "ascending offsets",
                format!("others at block {block}"),
            ));
        };
        let packed = self.frame.section(start, packed, "index")?;
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
    pub fn verify(&self) -> Result<()> {
        self.frame.verify()?;
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
        }
        let end = self.entry(self.blocks)?;
        let data = (self.frame.body().len() as u64).saturating_sub((self.blocks + 1) * ENTRY);
        if position != self.count || end.position != self.count || end.offset != data {
            let expected = format!("{} documents in {data} bytes", self.count);
            return Err(self.frame.corrupt(
                "index",
                expected,
                format!("{position} in {}", end.offset),
            ));
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
                let length = u32_at(self.take(4)?, 0).unwrap_or_default();
                *field = Some(self.take(length as usize)?);
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

/// Writes what is kept of the docnos from `first` on.
pub fn write_kept(
    dir: &Directory,
    name: &str,
    first: u64,
    documents: &[&Contents],
) -> Result<Digest> {
    let mut packer =
        zstd::bulk::Compressor::new(LEVEL).map_err(|e| Error::io(dir.path_of(name), e))?;
    let (mut index, mut data, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    let mut blocks = 0u64;
    let mut start = 0;
    let entry = |position: usize, offset: usize, unpacked: usize, index: &mut Vec<u8>| {
        for n in [position, offset, unpacked] {
            index.extend_from_slice(&(n as u64).to_le_bytes());
        }
    };
    for (position, contents) in documents.iter().enumerate() {
        let fields = contents.fields();
        let flags = fields
            .iter()
            .enumerate()
            .fold(0u8, |flags, (bit, f)| flags | u8::from(f.is_some()) << bit);
        raw.push(flags);
        for field in fields.into_iter().flatten() {
            raw.extend_from_slice(&(field.len() as u32).to_le_bytes());
            raw.extend_from_slice(field.as_bytes());
        }
        if raw.len() >= BLOCK || position + 1 == documents.len() {
            let packed = packer
                .compress(&raw)
                .map_err(|e| Error::io(dir.path_of(name), e))?;
            entry(start, data.len(), raw.len(), &mut index);
            data.extend_from_slice(&packed);
            raw.clear();
            blocks += 1;
            start = position + 1;
        }
    }
    entry(documents.len(), data.len(), 0, &mut index);
    let fields = FieldsWriter::new()
        .u64(first)
        .u64(documents.len() as u64)
        .u64(blocks);
    let mut frame = FrameWriter::create(dir, name, Kind::Documents)?;
    frame.write(&index)?;
    frame.write(&data)?;
    frame.finish(fields)
}
