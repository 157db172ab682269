//! Which docnos of a range have a row, and which row: a bitmap, and a directory with the number of rows
//! before every 512 bits, so that row = rank(docno) in O(1). It is left out when every docno has a row.

use crate::error::Result;
use crate::frame::{Frame, u64_at};

const BLOCK_WORDS: u64 = 8;
const BLOCK_BITS: u64 = 64 * BLOCK_WORDS;

/// A presence bitmap in the body of a part.
#[derive(Debug, Clone, Copy)]
pub struct Presence {
    /// Where the bitmap begins.
    at: u64,
    count: u64,
    rows: u64,
}

impl Presence {
    /// Its length in bytes, if that is a number: 0 when all have a row.
    pub fn length(count: u64, rows: u64) -> Option<u64> {
        match rows == count {
            true => Some(0),
            false => count.div_ceil(BLOCK_BITS).checked_mul(8 * BLOCK_WORDS + 8),
        }
    }

    /// The caller has seen that `at + length` lies within the body, and that `rows <= count`.
    pub fn new(at: u64, count: u64, rows: u64) -> Self {
        Self { at, count, rows }
    }

    fn blocks(&self) -> u64 {
        match self.rows == self.count {
            true => 0,
            false => self.count.div_ceil(BLOCK_BITS),
        }
    }

    fn word(&self, frame: &Frame, i: u64) -> Option<u64> {
        let at = self.at.checked_add(i.checked_mul(8)?)?;
        u64_at(frame.body(), usize::try_from(at).ok()?)
    }

    fn rank_before(&self, frame: &Frame, block: u64) -> Option<u64> {
        self.word(frame, self.blocks() * BLOCK_WORDS + block)
    }

    /// The row of the docno `first + i`, if it has one.
    pub fn row(&self, frame: &Frame, i: u64) -> Result<Option<u64>> {
        if i >= self.count {
            return Ok(None);
        }
        if self.rows == self.count {
            return Ok(Some(i));
        }
        let rank = || -> Option<Option<u64>> {
            let (word, bit) = (i / 64, 1u64 << (i % 64));
            let here = self.word(frame, word)?;
            if here & bit == 0 {
                return Some(None);
            }
            let block = i / BLOCK_BITS;
            let mut rank = self.rank_before(frame, block)?;
            for before in block * BLOCK_WORDS..word {
                rank = rank.checked_add(u64::from(self.word(frame, before)?.count_ones()))?;
            }
            rank.checked_add(u64::from((here & (bit - 1)).count_ones()))
                .map(Some)
        };
        match rank() {
            Some(Some(row)) if row < self.rows => Ok(Some(row)),
            Some(None) => Ok(None),
            _ => {
                let expected = format!("a row below {}", self.rows);
                let found = format!("another for position {i}");
                Err(frame.corrupt("rank directory", expected, found))
            }
        }
    }

    /// The i of the docno `first + i` that has this row.
    pub fn select(&self, frame: &Frame, row: u64) -> Result<u64> {
        if self.rows == self.count && row < self.count {
            return Ok(row);
        }
        let select = || -> Option<u64> {
            // The last block with no more rows before it than this one has.
            let (mut low, mut high) = (0, self.blocks());
            while low < high {
                let middle = low + (high - low) / 2;
                match self.rank_before(frame, middle)? <= row {
                    true => low = middle + 1,
                    false => high = middle,
                }
            }
            let block = low.checked_sub(1)?;
            let mut left = row.checked_sub(self.rank_before(frame, block)?)?;
            for i in block * BLOCK_WORDS..(block + 1) * BLOCK_WORDS {
                let mut word = self.word(frame, i)?;
                let ones = u64::from(word.count_ones());
                if left >= ones {
                    left -= ones;
                    continue;
                }
                for _ in 0..left {
                    word &= word.wrapping_sub(1);
                }
                return Some(i * 64 + u64::from(word.trailing_zeros()));
            }
            None
        };
        select().filter(|i| *i < self.count).ok_or_else(|| {
            let expected = format!("a docno for row {row}");
            frame.corrupt("rank directory", expected, "none")
        })
    }

    /// That bitmap, directory and number of rows agree.
    pub fn verify(&self, frame: &Frame) -> Result<()> {
        let mut rows = 0u64;
        for block in 0..self.blocks() {
            if self.rank_before(frame, block) != Some(rows) {
                let found = format!("another at block {block}");
                return Err(frame.corrupt("rank directory", rows, found));
            }
            for i in 0..BLOCK_WORDS {
                let word = block * BLOCK_WORDS + i;
                let bits = self.word(frame, word).unwrap_or_default();
                let used = self.count.saturating_sub(word.saturating_mul(64)).min(64);
                if used < 64 && bits >> used != 0 {
                    let expected = "no bit after the range";
                    return Err(frame.corrupt("presence bitmap", expected, "one"));
                }
                rows += u64::from(bits.count_ones());
            }
        }
        if self.blocks() > 0 && rows != self.rows {
            let expected = format!("{} bits", self.rows);
            return Err(frame.corrupt("presence bitmap", expected, rows));
        }
        Ok(())
    }
}

/// Gathers which docnos have a row, in order.
#[derive(Debug, Default, Clone)]
pub struct PresenceBuilder {
    /// Empty until the first docno without a row comes.
    words: Vec<u64>,
    count: u64,
    rows: u64,
}

impl PresenceBuilder {
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    pub fn extend_present(&mut self, n: u64) {
        if self.rows < self.count {
            self.set(self.count, n);
        }
        self.rows += n;
        self.count += n;
    }

    pub fn extend_absent(&mut self, n: u64) {
        if self.rows == self.count && n > 0 {
            self.words.clear();
            self.set(0, self.count);
        }
        self.count += n;
    }

    fn set(&mut self, from: u64, n: u64) {
        let end = from + n;
        self.words.resize(end.div_ceil(64) as usize, 0);
        let mut at = from;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                *word |= mask;
            }
            at += bits;
        }
    }

    /// Whether the `i`-th has a row.
    pub fn contains(&self, i: u64) -> bool {
        if self.rows == self.count {
            return i < self.count;
        }
        let word = self.words.get((i / 64) as usize);
        i < self.count && word.is_some_and(|word| word >> (i % 64) & 1 == 1)
    }

    /// Bitmap and directory; nothing if all have a row.
    pub fn to_bytes(&self) -> Vec<u8> {
        if self.rows == self.count {
            return Vec::new();
        }
        let blocks = self.count.div_ceil(BLOCK_BITS);
        let words = (blocks * BLOCK_WORDS) as usize;
        let mut bytes = Vec::with_capacity(8 * (words + blocks as usize));
        let mut directory = Vec::with_capacity(blocks as usize);
        let mut rank = 0u64;
        for i in 0..words {
            if i.is_multiple_of(BLOCK_WORDS as usize) {
                directory.push(rank);
            }
            let word = self.words.get(i).copied().unwrap_or_default();
            rank += u64::from(word.count_ones());
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend(directory.iter().flat_map(|rank| rank.to_le_bytes()));
        bytes
    }
}
