//! The frame that all our own parts share: a head that says what it is, a body, a checksum for each block of
//! the body, and a checked tail with the fields of the role. What is known only at the end is written at the
//! end, so a part of any size is written in one pass.
//!
//! Opening reads head and tail and compares lengths, whatever the size of the body; [`Frame::verify`]
//! reads it all.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped, PartWriter};
use crate::watch::Progress;

pub const VERSION: u32 = 1;

const HEAD: usize = 64;
/// The end of the tail, which every role has: N, checksum of the checksums, T, 0, checksum of head and tail.
const FIXED: usize = 32;
const MAX_TAIL: usize = 4096;
const BLOCK: u32 = 1 << 16;

/// The bytes that tell one kind of part from another, in its magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Routes,
    Scales,
    Ids,
    Documents,
    Dead,
}

impl Kind {
    fn letter(self) -> u8 {
        match self {
            Kind::Routes => b'R',
            Kind::Scales => b'S',
            Kind::Ids => b'I',
            Kind::Documents => b'D',
            Kind::Dead => b'X',
        }
    }

    /// As in PNG: a high bit, both line ends and an end-of-file, which careless transfers alter.
    pub fn magic(self) -> [u8; 8] {
        [0x89, b'P', b'P', self.letter(), b'\r', b'\n', 0x1a, b'\n']
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(raw.try_into().ok()?))
}

pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(raw.try_into().ok()?))
}

/// The fields that a role puts into the tail, written one after the other.
#[derive(Debug, Default)]
pub struct FieldsWriter(Vec<u8>);

impl FieldsWriter {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }

    /// A short name, padded with zeros to 32 bytes.
    pub fn name(mut self, value: &str) -> Self {
        let mut padded = [0; 32];
        for (to, from) in padded.iter_mut().zip(value.bytes()) {
            *to = from;
        }
        self.0.extend_from_slice(&padded);
        self
    }
}

/// Reads what [`FieldsWriter`] wrote.
#[derive(Debug)]
pub struct Fields<'f> {
    rest: &'f [u8],
    path: &'f Path,
}

impl<'f> Fields<'f> {
    fn take(&mut self, n: usize) -> Result<&'f [u8]> {
        match self.rest.split_at_checked(n) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => {
                let found = format!("{} bytes", self.rest.len());
                Err(Error::corrupt(
                    self.path,
                    "tail",
                    format!("{n} more bytes"),
                    found,
                ))
            }
        }
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64_at(self.take(8)?, 0).unwrap_or_default())
    }

    pub fn hash(&mut self) -> Result<[u8; 32]> {
        let mut hash = [0; 32];
        hash.copy_from_slice(self.take(32)?);
        Ok(hash)
    }

    pub fn name(&mut self) -> Result<&'f str> {
        let padded = self.take(32)?;
        let end = padded.iter().position(|b| *b == 0).unwrap_or(padded.len());
        let (name, padding) = padded.split_at(end);
        match std::str::from_utf8(name) {
            Ok(name) if padding.iter().all(|b| *b == 0) => Ok(name),
            _ => Err(Error::corrupt(
                self.path,
                "tail",
                "a name",
                format!("{padded:?}"),
            )),
        }
    }
}

/// A part of ours, mapped, with its head and tail checked.
#[derive(Debug, Clone)]
pub struct Frame {
    map: Mapped,
    body: Range<usize>,
    block: usize,
    sums: u64,
    tail: Range<usize>,
}

impl Frame {
    pub fn open(map: Mapped, kind: Kind) -> Result<Self> {
        let path = map.path();
        let fail = |what: &str, expected: &dyn Display, found: &dyn Display| {
            Error::corrupt(path, what, expected, found)
        };
        let length = map.len();
        let head = map.get(..HEAD).ok_or_else(|| {
            fail(
                "head",
                &format!("{HEAD} bytes or more"),
                &format!("{length} bytes"),
            )
        })?;
        if !head.starts_with(&kind.magic()) {
            let found = head.get(..8).unwrap_or_default();
            let expected = format!("magic {:02x?}", kind.magic());
            return Err(fail("head", &expected, &format!("{found:02x?}")));
        }
        let version = u32_at(head, 8).unwrap_or_default();
        if version != VERSION {
            // Before the checksum, which another version may compute in another way.
            return Err(Error::UnsupportedFormat {
                file: path.to_owned(),
                what: format!("part of version {version}"),
                known: format!("version {VERSION}"),
            });
        }
        let own = u32_at(&map, length.saturating_sub(16)).unwrap_or_default() as usize;
        if !own.is_multiple_of(64) || !(64..=MAX_TAIL.min(length - HEAD)).contains(&own) {
            let expected = format!("64 to {MAX_TAIL} bytes of it");
            return Err(fail("tail", &expected, &own));
        }
        let tail = length - own..length - FIXED;
        let sum = u64_at(&map, length - 8).unwrap_or_default();
        let mut real = Xxh3::new();
        real.update(head);
        real.update(map.get(tail.start..length - 8).unwrap_or_default());
        if sum != real.digest() {
            let real = format!("{:016x}", real.digest());
            return Err(fail("tail", &format!("checksum {sum:016x}"), &real));
        }
        let block = u32_at(head, 12).unwrap_or_default();
        if block == 0 {
            return Err(fail("head", &"a block size above 0", &block));
        }
        let body = u64_at(&map, length - 32).unwrap_or_default();
        let expected = body
            .div_ceil(u64::from(block))
            .checked_mul(8)
            .and_then(|table| table.checked_add(body))
            .and_then(|n| n.checked_add((HEAD + own) as u64));
        if expected != Some(length as u64) {
            let expected = expected.map_or("a possible length".into(), |n| format!("{n} bytes"));
            return Err(fail("length", &expected, &format!("{length} bytes")));
        }
        // It fits into the file, so it fits into a usize.
        let body = HEAD..HEAD + body as usize;
        Ok(Self {
            body,
            block: block as usize,
            sums: u64_at(&map, length - 24).unwrap_or_default(),
            tail,
            map,
        })
    }

    pub fn path(&self) -> &Path {
        self.map.path()
    }

    pub fn fields(&self) -> Fields<'_> {
        Fields {
            rest: self.map.get(self.tail.clone()).unwrap_or_default(),
            path: self.map.path(),
        }
    }

    pub fn body(&self) -> &[u8] {
        self.map.get(self.body.clone()).unwrap_or_default()
    }

    /// The error for a body that is not what the tail promises.
    pub fn corrupt(
        &self,
        what: impl Display,
        expected: impl Display,
        found: impl Display,
    ) -> Error {
        Error::corrupt(self.path(), what, expected, found)
    }

    /// A section of the body as `[start, start + length)`.
    pub fn section(&self, start: u64, length: u64, what: &str) -> Result<&[u8]> {
        let range = usize::try_from(start).ok().zip(
            start
                .checked_add(length)
                .and_then(|end| usize::try_from(end).ok()),
        );
        range
            .and_then(|(start, end)| self.body().get(start..end))
            .ok_or_else(|| {
                let body = self.body().len();
                self.corrupt(
                    what,
                    format!("bytes within a body of {body}"),
                    format!("{start}+{length}"),
                )
            })
    }

    /// Compares every block with its checksum.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        let table = self.map.get(self.body.end..self.tail.start);
        let table = table.unwrap_or_default();
        if xxh3_64(table) != self.sums {
            return Err(self.corrupt("table of checksums", "its own checksum", "another"));
        }
        for (i, block) in self.body().chunks(self.block).enumerate() {
            let sum = u64_at(table, i * 8).unwrap_or_default();
            let real = xxh3_64(block);
            if sum != real {
                let (sum, real) = (format!("checksum {sum:016x}"), format!("{real:016x}"));
                return Err(self.corrupt(format!("block {i}"), sum, real));
            }
            progress.add(block.len() as u64)?;
        }
        Ok(())
    }
}

/// Writes a part from front to back; the body may come in pieces.
#[derive(Debug)]
pub struct FrameWriter {
    part: PartWriter,
    head: Vec<u8>,
    length: u64,
    buffer: Vec<u8>,
    table: Vec<u8>,
}

impl FrameWriter {
    pub fn create(dir: &Directory, name: &str, kind: Kind) -> Result<Self> {
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(&kind.magic());
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&BLOCK.to_le_bytes());
        head.resize(HEAD, 0);
        let mut part = dir.create_part(name)?;
        part.write(&head)?;
        Ok(Self {
            part,
            head,
            length: 0,
            buffer: Vec::with_capacity(BLOCK as usize),
            table: Vec::new(),
        })
    }

    /// Bytes of the body so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.length += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.buffer.is_empty() && bytes.len() >= BLOCK as usize {
                let (block, rest) = bytes.split_at(BLOCK as usize);
                self.block(block)?;
                bytes = rest;
                continue;
            }
            let room = BLOCK as usize - self.buffer.len();
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(piece);
            if self.buffer.len() == BLOCK as usize {
                self.end_block()?;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Zeros up to the next multiple of `to` bytes of the body.
    pub fn pad(&mut self, to: u64) -> Result<()> {
        let zeros = self.length.next_multiple_of(to) - self.length;
        self.write(&vec![0; zeros as usize])
    }

    fn block(&mut self, block: &[u8]) -> Result<()> {
        self.table.extend_from_slice(&xxh3_64(block).to_le_bytes());
        self.part.write(block)
    }

    fn end_block(&mut self) -> Result<()> {
        let block = std::mem::take(&mut self.buffer);
        self.block(&block)?;
        self.buffer = block;
        self.buffer.clear();
        Ok(())
    }

    pub fn finish(mut self, fields: FieldsWriter) -> Result<Digest> {
        if !self.buffer.is_empty() {
            self.end_block()?;
        }
        let length = (fields.0.len() + FIXED).next_multiple_of(64);
        let mut tail = fields.0;
        tail.resize(length - FIXED, 0);
        tail.extend_from_slice(&self.length.to_le_bytes());
        tail.extend_from_slice(&xxh3_64(&self.table).to_le_bytes());
        tail.extend_from_slice(&(length as u32).to_le_bytes());
        tail.extend_from_slice(&0u32.to_le_bytes());
        let mut sum = Xxh3::new();
        sum.update(&self.head);
        sum.update(&tail);
        tail.extend_from_slice(&sum.digest().to_le_bytes());
        self.part.write(&self.table)?;
        self.part.write(&tail)?;
        self.part.finish()
    }
}
