//! A list of u64 in blocks of 128, any of them found in O(1).
//!
//! A block is a line and the differences from it: number i is base + slope * i + difference i, modulo 2^64,
//! the differences packed at the width of the largest. A run of consecutive numbers has width 0. Any line
//! gives some numbers, so a reader need only check that the packed bytes are there.

use crate::documents::ids::bits::{BitPacker, bits_at, packed_bytes, width_of};
use crate::frame::u64_at;

pub const BLOCK: usize = 128;
const ENTRY: usize = 16;
const MANTISSA_BITS: u32 = 11;
/// Where the parts of the second word of an entry begin; the width is below.
const EXPONENT: u32 = 7;
const MANTISSA: u32 = EXPONENT + 6;
const OFFSET: u32 = MANTISSA + MANTISSA_BITS;
/// Bytes in which offsets count: those of a full block of one bit.
const UNIT: u64 = 16;

/// Bytes of the directory of `count` numbers, if that is a number.
pub fn directory_bytes(count: u64) -> Option<u64> {
    count.div_ceil(BLOCK as u64).checked_mul(ENTRY as u64)
}

#[derive(Debug, Clone, Copy)]
struct Line {
    base: u64,
    mantissa: u64,
    exponent: u32,
    width: u32,
}

impl Line {
    fn slope(&self) -> u64 {
        self.mantissa.checked_shl(self.exponent).unwrap_or(0)
    }

    fn at(&self, i: u64) -> u64 {
        self.base.wrapping_add(self.slope().wrapping_mul(i))
    }

    /// The line with the smallest differences of two: a level one, and one from the first to the last.
    fn under(numbers: &[u64]) -> Self {
        let (min, max) = numbers
            .iter()
            .fold((u64::MAX, 0), |(min, max), n| (min.min(*n), max.max(*n)));
        let level = Line {
            base: min,
            mantissa: 0,
            exponent: 0,
            width: width_of(max.saturating_sub(min)),
        };
        let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else {
            return Line { base: 0, ..level };
        };
        let steps = numbers.len() as u64 - 1;
        let Some(slope) = last.saturating_sub(*first).checked_div(steps) else {
            return level;
        };
        let exponent = width_of(slope).saturating_sub(MANTISSA_BITS);
        let mut line = Line {
            base: *first,
            mantissa: slope >> exponent,
            exponent,
            width: 0,
        };
        // As signed numbers modulo 2^64: whatever they are, base and differences add up again.
        let (mut low, mut high) = (i64::MAX, i64::MIN);
        for (i, n) in (0..).zip(numbers) {
            let off = n.wrapping_sub(line.at(i)).cast_signed();
            (low, high) = (low.min(off), high.max(off));
        }
        line.width = width_of(high.wrapping_sub(low).cast_unsigned());
        line.base = line.base.wrapping_add(low.cast_unsigned());
        match line.mantissa > 0 && line.width < level.width {
            true => line,
            false => level,
        }
    }
}

/// Writes a list as it comes; the directory stays in memory (an eighth of a byte a number) until the end.
#[derive(Debug, Default)]
pub struct NumbersWriter {
    block: Vec<u64>,
    directory: Vec<u8>,
    units: u64,
}

impl NumbersWriter {
    /// Appends to `out` what is packed.
    #[inline]
    pub fn push(&mut self, number: u64, out: &mut Vec<u8>) {
        self.block.push(number);
        if self.block.len() == BLOCK {
            self.end_block(out);
        }
    }

    fn end_block(&mut self, out: &mut Vec<u8>) {
        let line = Line::under(&self.block);
        let word = u64::from(line.width)
            | u64::from(line.exponent) << EXPONENT
            | line.mantissa << MANTISSA
            | self.units << OFFSET;
        self.directory.extend_from_slice(&line.base.to_le_bytes());
        self.directory.extend_from_slice(&word.to_le_bytes());
        self.units += u64::from(line.width);
        let mut packer = BitPacker::default();
        for (i, number) in (0..).zip(self.block.drain(..)) {
            packer.push(number.wrapping_sub(line.at(i)), line.width, out);
        }
        packer.finish(out);
    }

    /// Appends the last block to `out`, and returns the directory.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Vec<u8> {
        if !self.block.is_empty() {
            self.end_block(out);
        }
        self.directory
    }
}

/// A list in the body of a part. `None` from its methods means that it is not what its count promises.
#[derive(Debug, Clone, Copy)]
pub struct Numbers<'b> {
    pub packed: &'b [u8],
    pub directory: &'b [u8],
    pub count: u64,
}

impl<'b> Numbers<'b> {
    #[inline]
    fn entry(&self, block: u64) -> Option<(Line, u64)> {
        let at = usize::try_from(block).ok()?.checked_mul(ENTRY)?;
        let (base, word) = (u64_at(self.directory, at)?, u64_at(self.directory, at + 8)?);
        let line = Line {
            base,
            mantissa: word >> MANTISSA & ((1 << MANTISSA_BITS) - 1),
            exponent: (word >> EXPONENT & 63) as u32,
            width: (word & 127) as u32,
        };
        (line.width <= 64).then_some((line, (word >> OFFSET) * UNIT))
    }

    #[inline]
    pub fn get(&self, i: u64) -> Option<u64> {
        if i >= self.count {
            return None;
        }
        let (line, offset) = self.entry(i / BLOCK as u64)?;
        let i = i % BLOCK as u64;
        let difference = bits_at(
            self.packed,
            offset * 8 + i * u64::from(line.width),
            line.width,
        )?;
        Some(line.at(i).wrapping_add(difference))
    }

    /// Replaces `out` with the numbers of many places, in two passes: so each pass waits for many at once.
    pub fn get_many(&self, places: &[u64], out: &mut Vec<u64>) -> Option<()> {
        out.clear();
        for i in places {
            let (line, offset) = self.entry(i / BLOCK as u64)?;
            let i = i % BLOCK as u64;
            let at = offset * 8 + i * u64::from(line.width);
            // Both in one word: offsets are below 2^47.
            out.push(line.at(i));
            out.push(at << 8 | u64::from(line.width));
        }
        for at in 0..places.len() {
            let (number, packed) = (*out.get(2 * at)?, *out.get(2 * at + 1)?);
            let difference = bits_at(self.packed, packed >> 8, (packed & 0xff) as u32)?;
            *out.get_mut(at)? = number.wrapping_add(difference);
        }
        out.truncate(places.len());
        Some(())
    }

    /// The numbers of a block, all but the last of which have 128.
    pub fn block(&self, block: u64, out: &mut Vec<u64>) -> Option<()> {
        out.clear();
        let first = block.checked_mul(BLOCK as u64)?;
        let count = self.count.checked_sub(first)?.min(BLOCK as u64);
        let (line, offset) = self.entry(block)?;
        let bytes = packed_bytes(count, line.width)?;
        let start = usize::try_from(offset).ok()?;
        let packed = self
            .packed
            .get(start..start.checked_add(usize::try_from(bytes).ok()?)?)?;
        let slope = line.slope();
        let mut here = line.base;
        for i in 0..count {
            let difference = bits_at(packed, i * u64::from(line.width), line.width)?;
            out.push(here.wrapping_add(difference));
            here = here.wrapping_add(slope);
        }
        Some(())
    }

    /// Whether the blocks lie one after the other, fill the packed bytes, and end in zeros.
    pub fn is_tight(&self) -> bool {
        let mut expected = 0u64;
        let blocks = self.count.div_ceil(BLOCK as u64);
        for block in 0..blocks {
            let Some((line, offset)) = self.entry(block) else {
                return false;
            };
            let count = (self.count - block * BLOCK as u64).min(BLOCK as u64);
            let bits = count * u64::from(line.width);
            let spare = (bits.next_multiple_of(64) - bits) as u32;
            let Some(end) = packed_bytes(count, line.width).and_then(|n| n.checked_add(offset))
            else {
                return false;
            };
            if offset != expected || bits_at(self.packed, offset * 8 + bits, spare) != Some(0) {
                return false;
            }
            expected = end;
        }
        expected == self.packed.len() as u64
            && directory_bytes(self.count) == Some(self.directory.len() as u64)
    }
}
