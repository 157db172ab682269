//! Numbers of a few bits each, one after the other from the lowest bit of little-endian 64-bit words.

use crate::frame::u64_at;

/// Bits that a number needs.
pub fn width_of(number: u64) -> u32 {
    u64::BITS - number.leading_zeros()
}

/// Bytes of `count` numbers, if that is a number: whole words.
pub fn packed_bytes(count: u64, width: u32) -> Option<u64> {
    count
        .checked_mul(u64::from(width))?
        .div_ceil(64)
        .checked_mul(8)
}

/// The number of `width` bits, at most 64, that begins at bit `at`; none if the bytes end before.
#[inline]
pub fn bits_at(bytes: &[u8], at: u64, width: u32) -> Option<u64> {
    if width == 0 {
        return Some(0);
    }
    let (word, shift) = ((at / 64).checked_mul(8)?, (at % 64) as u32);
    let word = usize::try_from(word).ok()?;
    let mut number = u64_at(bytes, word)? >> shift;
    if shift + width > 64 {
        number |= u64_at(bytes, word.checked_add(8)?)? << (64 - shift);
    }
    Some(number & (u64::MAX >> (64 - width)))
}

/// Packs numbers; what is packed is appended by whole words.
#[derive(Debug, Default)]
pub struct BitPacker {
    pending: u64,
    used: u32,
}

impl BitPacker {
    /// `number` has `width` bits at most, and `width` is at most 64.
    #[inline]
    pub fn push(&mut self, number: u64, width: u32, out: &mut Vec<u8>) {
        if width == 0 {
            return;
        }
        self.pending |= number << self.used;
        let used = self.used + width;
        if used < 64 {
            self.used = used;
            return;
        }
        out.extend_from_slice(&self.pending.to_le_bytes());
        self.pending = match self.used {
            0 => 0,
            before => number >> (64 - before),
        };
        // A whole number of 64 bits after 0 leaves nothing; the shift above keeps what did not fit.
        self.used = used - 64;
        if self.used == 0 {
            self.pending = 0;
        }
    }

    /// The last word, filled with zeros.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.used > 0 {
            out.extend_from_slice(&self.pending.to_le_bytes());
        }
        *self = Self::default();
    }
}
