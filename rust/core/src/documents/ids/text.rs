//! Strings in blocks, each but the first of a block without the bytes that it shares with the one before.
//!
//! A block is found by its offset. An entry is, as far as it is needed: the number of shared bytes (not for
//! the first), the number of its own bytes (not for the last, which goes to the end of the block), and its
//! own bytes. Numbers of bytes are LEB128. In blocks of one there is nothing but the strings.

use crate::documents::ids::numbers::{Numbers, NumbersWriter};
use crate::spec::MAX_NAME;

/// Strings that share are in blocks of so many.
pub const SHARED_BLOCK: u64 = 16;
/// The longest block that a reader takes.
pub const MAX_BLOCK: u64 = 64;

pub fn shared_bytes(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn push_length(mut n: usize, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A length of at most two bytes: none is above 512.
fn take_length(bytes: &mut &[u8]) -> Option<usize> {
    let (first, rest) = bytes.split_first()?;
    *bytes = rest;
    if *first < 0x80 {
        return Some(usize::from(*first));
    }
    let (second, rest) = bytes.split_first()?;
    *bytes = rest;
    // One byte would do for less than 128, and is then the only way to write it.
    (1..0x80)
        .contains(second)
        .then(|| usize::from(*first & 0x7f) | usize::from(*second) << 7)
}

#[derive(Debug)]
pub struct TextWriter {
    block: u64,
    rows: u64,
    bytes: u64,
    last: Vec<u8>,
    offsets: NumbersWriter,
    packed: Vec<u8>,
    /// The entry that waits for whether another follows in its block: its shared bytes.
    waiting: Option<usize>,
}

impl TextWriter {
    pub fn new(block: u64) -> Self {
        Self {
            block,
            rows: 0,
            bytes: 0,
            last: Vec::new(),
            offsets: NumbersWriter::default(),
            packed: Vec::new(),
            waiting: None,
        }
    }

    pub fn push(&mut self, id: &[u8], out: &mut Vec<u8>) {
        let first = self.rows.is_multiple_of(self.block);
        self.end_entry(first, out);
        if first {
            self.offsets.push(self.bytes, &mut self.packed);
        }
        let shared = match first {
            true => 0,
            false => shared_bytes(&self.last, id),
        };
        self.last.clear();
        self.last.extend_from_slice(id);
        self.waiting = Some(shared);
        self.rows += 1;
    }

    fn end_entry(&mut self, last_of_block: bool, out: &mut Vec<u8>) {
        let Some(shared) = self.waiting.take() else {
            return;
        };
        let start = out.len();
        if !(self.rows - 1).is_multiple_of(self.block) {
            push_length(shared, out);
        }
        let own = self.last.get(shared..).unwrap_or_default();
        if !last_of_block {
            push_length(own.len(), out);
        }
        out.extend_from_slice(own);
        self.bytes += (out.len() - start) as u64;
    }

    /// Appends what is left to `out`; returns the offsets, packed, and their directory.
    pub fn finish(mut self, out: &mut Vec<u8>) -> (Vec<u8>, Vec<u8>) {
        self.end_entry(true, out);
        self.offsets.push(self.bytes, &mut self.packed);
        let directory = self.offsets.finish(&mut self.packed);
        (self.packed, directory)
    }
}

/// Strings in the body of a part. `None` from its methods means that it is not what it promises.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'b> {
    pub text: &'b [u8],
    pub offsets: Numbers<'b>,
    pub block: u64,
    pub rows: u64,
}

impl<'b> Texts<'b> {
    pub fn walk(&self, block: u64) -> Option<Walk<'b>> {
        let start = usize::try_from(self.offsets.get(block)?).ok()?;
        let end = usize::try_from(self.offsets.get(block.checked_add(1)?)?).ok()?;
        let left = self.rows.checked_sub(block.checked_mul(self.block)?)?;
        Some(Walk {
            bytes: self.text.get(start..end)?,
            first: true,
            left: left.min(self.block),
        })
    }

    /// Replaces `out` with the string of a row.
    pub fn read(&self, row: u64, out: &mut Vec<u8>) -> Option<()> {
        let mut walk = self.walk(row.checked_div(self.block)?)?;
        for _ in 0..=row % self.block {
            walk.next(out)?;
        }
        Some(())
    }

    /// Whether offsets begin at 0, end with the text and leave nothing out.
    pub fn is_tight(&self) -> bool {
        let blocks = self.offsets.count.saturating_sub(1);
        self.offsets.is_tight()
            && self.offsets.get(0) == Some(0)
            && self.offsets.get(blocks) == Some(self.text.len() as u64)
    }
}

/// Goes through a block.
#[derive(Debug, Clone)]
pub struct Walk<'b> {
    bytes: &'b [u8],
    first: bool,
    left: u64,
}

impl Walk<'_> {
    pub fn is_over(&self) -> bool {
        self.left == 0
    }

    /// Turns `id`, which is the string before, into the next one.
    #[inline]
    pub fn next(&mut self, id: &mut Vec<u8>) -> Option<()> {
        self.left = self.left.checked_sub(1)?;
        let shared = match std::mem::take(&mut self.first) {
            true => 0,
            false => take_length(&mut self.bytes)?,
        };
        let own = match self.left {
            0 => self.bytes.len(),
            _ => take_length(&mut self.bytes)?,
        };
        let (own, rest) = self.bytes.split_at_checked(own)?;
        self.bytes = rest;
        if shared > id.len() || !(1..=MAX_NAME).contains(&(shared + own.len())) {
            return None;
        }
        id.truncate(shared);
        id.extend_from_slice(own);
        Some(())
    }
}
