//! The frame that all our own parts share: a checked header, a body, a checksum for each block of the body.
//!
//! Opening reads the header and compares lengths, whatever the size of the body; [`Frame::verify`]
//! reads it all.

use std::ops::Range;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped, PartWriter};

pub const VERSION: u32 = 1;

const FIXED: usize = 32;
const MAX_HEADER: usize = 4096;
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
    fn magic(self) -> [u8; 8] {
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

/// The fields that a role puts into the header, written one after the other.
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
                    "header",
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
                "header",
                "a name",
                format!("{padded:?}"),
            )),
        }
    }
}

/// A part of ours, mapped, with its header checked.
#[derive(Debug, Clone)]
pub struct Frame {
    map: Mapped,
    header: usize,
    body: Range<usize>,
    block: usize,
}

impl Frame {
    pub fn open(map: Mapped, kind: Kind) -> Result<Self> {
        let path = map.path();
        let fail = |expected: &dyn std::fmt::Display, found: &dyn std::fmt::Display| {
            Error::corrupt(path, "header", expected, found)
        };
        let fixed = map.get(..FIXED).ok_or_else(|| {
            fail(
                &format!("{FIXED} bytes or more"),
                &format!("{} bytes", map.len()),
            )
        })?;
        if !fixed.starts_with(&kind.magic()) {
            let found = fixed.get(..8).unwrap_or_default();
            return Err(fail(
                &format!("magic {:02x?}", kind.magic()),
                &format!("{found:02x?}"),
            ));
        }
        let word = |at| u32_at(fixed, at).unwrap_or_default();
        if word(8) != VERSION {
            // Before the checksum, which another version may compute in another way.
            return Err(Error::UnsupportedFormat {
                file: path.to_owned(),
                what: format!("part of version {}", word(8)),
                known: format!("version {VERSION}"),
            });
        }
        let header = word(12) as usize;
        if !header.is_multiple_of(64) || !(64..=MAX_HEADER.min(map.len())).contains(&header) {
            return Err(fail(
                &format!("a header of 64 to {MAX_HEADER} bytes"),
                &header,
            ));
        }
        let sum = u64_at(&map, header - 8).unwrap_or_default();
        let real = xxh3_64(map.get(..header - 8).unwrap_or_default());
        if sum != real {
            return Err(fail(
                &format!("checksum {sum:016x}"),
                &format!("{real:016x}"),
            ));
        }
        let body = u64_at(fixed, 16).unwrap_or_default();
        let block = word(24);
        if block == 0 {
            return Err(fail(&"a block size above 0", &block));
        }
        let expected = body
            .div_ceil(u64::from(block))
            .checked_mul(8)
            .and_then(|table| table.checked_add(body))
            .and_then(|n| n.checked_add(header as u64 + 8));
        if expected != Some(map.len() as u64) {
            let expected = expected.map_or("a possible length".into(), |n| format!("{n} bytes"));
            return Err(Error::corrupt(
                path,
                "length",
                expected,
                format!("{} bytes", map.len()),
            ));
        }
        // It fits into the file, so it fits into a usize.
        let body = header..header + body as usize;
        Ok(Self {
            header,
            body,
            block: block as usize,
            map,
        })
    }

    pub fn path(&self) -> &Path {
        self.map.path()
    }

    pub fn fields(&self) -> Fields<'_> {
        Fields {
            rest: self.map.get(FIXED..self.header - 8).unwrap_or_default(),
            path: self.map.path(),
        }
    }

    pub fn body(&self) -> &[u8] {
        self.map.get(self.body.clone()).unwrap_or_default()
    }

    /// The error for a body that is not what the header promises.
    pub fn corrupt(
        &self,
        what: impl std::fmt::Display,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
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
    pub fn verify(&self) -> Result<()> {
        let after = self.map.get(self.body.end..).unwrap_or_default();
        let (table, own) = after.split_at(after.len().saturating_sub(8));
        if u64_at(own, 0) != Some(xxh3_64(table)) {
            return Err(self.corrupt("table of checksums", "its own checksum", "another"));
        }
        for (i, block) in self.body().chunks(self.block).enumerate() {
            let sum = u64_at(table, i * 8).unwrap_or_default();
            let real = xxh3_64(block);
            if sum != real {
                let (sum, real) = (format!("checksum {sum:016x}"), format!("{real:016x}"));
                return Err(self.corrupt(format!("block {i}"), sum, real));
            }
        }
        Ok(())
    }
}

/// Writes a part whose body length is known beforehand; the body may come in pieces.
pub struct FrameWriter {
    part: PartWriter,
    left: u64,
    block: Xxh3,
    in_block: usize,
    table: Vec<u8>,
}

impl FrameWriter {
    pub fn create(
        dir: &Directory,
        name: &str,
        kind: Kind,
        fields: FieldsWriter,
        body: u64,
    ) -> Result<Self> {
        let length = (FIXED + fields.0.len() + 8).next_multiple_of(64);
        let mut header = Vec::with_capacity(length);
        header.extend_from_slice(&kind.magic());
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(length as u32).to_le_bytes());
        header.extend_from_slice(&body.to_le_bytes());
        header.extend_from_slice(&BLOCK.to_le_bytes());
        header.resize(FIXED, 0);
        header.extend_from_slice(&fields.0);
        header.resize(length - 8, 0);
        let sum = xxh3_64(&header);
        header.extend_from_slice(&sum.to_le_bytes());
        let mut part = dir.create_part(name)?;
        part.write(&header)?;
        Ok(Self {
            part,
            left: body,
            block: Xxh3::new(),
            in_block: 0,
            table: Vec::new(),
        })
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| Error::invalid("a part is longer than its header says"))?;
        self.part.write(bytes)?;
        while !bytes.is_empty() {
            let room = BLOCK as usize - self.in_block;
            let (head, rest) = bytes.split_at(room.min(bytes.len()));
            self.block.update(head);
            self.in_block += head.len();
            if self.in_block == BLOCK as usize {
                self.end_block();
            }
            bytes = rest;
        }
        Ok(())
    }

    fn end_block(&mut self) {
        self.table
            .extend_from_slice(&self.block.digest().to_le_bytes());
        self.block.reset();
        self.in_block = 0;
    }

    pub fn finish(mut self) -> Result<Digest> {
        if self.left != 0 {
            return Err(Error::invalid("a part is shorter than its header says"));
        }
        if self.in_block > 0 {
            self.end_block();
        }
        let own = xxh3_64(&self.table).to_le_bytes();
        self.part.write(&self.table)?;
        self.part.write(&own)?;
        self.part.finish()
    }
}
