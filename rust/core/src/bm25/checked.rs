//! A checksum for every block of Tantivy's files, which Tantivy itself never sees.
//!
//! Tantivy believes what it reads: a length that was altered on the disk becomes an allocation, and an
//! allocation that fails ends the process. So it only ever gets bytes that were written. A trailer of
//! our own follows its bytes, and each block is compared with its checksum before the first byte of it
//! is handed out. With N bytes of Tantivy's, a file is:
//!
//! ```text
//! 0        N      Tantivy's bytes
//! N        8*m    xxh3 of each of the m = ceil(N / 65,536) blocks
//! N+8m     8      N
//! N+8m+8   8      xxh3 of the 8*m + 8 bytes before
//! ```

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tantivy::HasLen;
use tantivy::directory::{FileHandle, OwnedBytes};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::files::Mapped;
use crate::frame::u64_at;
use crate::watch::Progress;

const BLOCK: usize = 1 << 16;
/// The length of the content and the checksum of the trailer.
const TAIL: usize = 16;

/// Sums up a file while it is written.
#[derive(Default)]
pub(super) struct TrailerWriter {
    length: u64,
    block: Xxh3,
    in_block: usize,
    trailer: Vec<u8>,
}

impl TrailerWriter {
    pub(super) fn write(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at((BLOCK - self.in_block).min(bytes.len()));
            self.block.update(head);
            self.in_block += head.len();
            if self.in_block == BLOCK {
                self.end_block();
            }
            bytes = rest;
        }
    }

    fn end_block(&mut self) {
        let sum = self.block.digest();
        self.trailer.extend_from_slice(&sum.to_le_bytes());
        self.block.reset();
        self.in_block = 0;
    }

    /// What follows the bytes that were written.
    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.in_block > 0 {
            self.end_block();
        }
        self.trailer.extend_from_slice(&self.length.to_le_bytes());
        let own = xxh3_64(&self.trailer);
        self.trailer.extend_from_slice(&own.to_le_bytes());
        self.trailer
    }
}

/// The first failure below Tantivy, whose errors and threads lose it on the way up. A clone is another
/// handle to the same.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    fn slot(&self) -> MutexGuard<'_, Option<Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers it, and puts it into words that Tantivy can carry.
    pub(super) fn report(&self, error: Error) -> io::Error {
        let words = match &error {
            Error::Io { source, .. } => io::Error::new(source.kind(), error.to_string()),
            _ => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
        };
        self.slot().get_or_insert(error);
        words
    }

    pub(super) fn take(&self) -> Option<Error> {
        self.slot().take()
    }
}

/// A map in the form in which Tantivy keeps it alive.
struct StableMap(Mapped);

impl Deref for StableMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

// SAFETY: the bytes are a map (or shared bytes in memory), whose address does not change when the
// handle to it moves, and which lives as long as the handle.
#[allow(unsafe_code)]
unsafe impl stable_deref_trait::StableDeref for StableMap {}

/// A file of the index. What was found whole once stays so for as long as the file is open.
pub(super) struct CheckedFile {
    map: Mapped,
    /// Tantivy's part of the map.
    content: OwnedBytes,
    /// One bit a block: whether it was compared.
    checked: Box<[AtomicU64]>,
    failure: Failure,
}

impl fmt::Debug for CheckedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CheckedFile")
            .field(&self.map.path())
            .finish()
    }
}

impl CheckedFile {
    pub(super) fn open(map: Mapped, failure: Failure) -> Result<Self> {
        let corrupt = |expected: String, found: String| {
            let reason = format!("trailer: expected {expected}, found {found}");
            Err(Error::corrupt_index(map.path(), reason))
        };
        let Some(own_at) = map.len().checked_sub(8).filter(|_| map.len() >= TAIL) else {
            return corrupt(format!("{TAIL} bytes"), format!("{}", map.len()));
        };
        let content = u64_at(&map, own_at - 8).unwrap_or_default();
        let blocks = content.div_ceil(BLOCK as u64);
        let expected = blocks
            .checked_mul(8)
            .and_then(|sums| sums.checked_add(content))
            .and_then(|n| n.checked_add(TAIL as u64));
        if expected != Some(map.len() as u64) {
            let expected = format!("{} bytes in all", map.len());
            return corrupt(expected, format!("{content} bytes of content"));
        }
        // It fits into the map, so it fits into a usize.
        let content = content as usize;
        let real = xxh3_64(map.get(content..own_at).unwrap_or_default());
        let own = u64_at(&map, own_at).unwrap_or_default();
        if real != own {
            return corrupt(format!("checksum {own:016x}"), format!("{real:016x}"));
        }
        let words = (blocks as usize).div_ceil(64);
        Ok(Self {
            content: OwnedBytes::new(StableMap(map.clone())).slice(0..content),
            checked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            map,
            failure,
        })
    }

    /// Compares one block, whatever was found of it before.
    fn compare(&self, block: usize) -> Result<()> {
        let start = block * BLOCK;
        let end = self.content.len().min(start + BLOCK);
        let real = xxh3_64(self.content.get(start..end).unwrap_or_default());
        match u64_at(&self.map, self.content.len() + block * 8) {
            Some(sum) if sum == real => Ok(()),
            sum => {
                let sum = sum.unwrap_or_default();
                let reason =
                    format!("block {block}: expected checksum {sum:016x}, found {real:016x}");
                Err(Error::corrupt_index(self.map.path(), reason))
            }
        }
    }

    /// Compares those blocks of a range that were not compared before.
    fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (first, last) = (range.start / BLOCK, (range.end - 1) / BLOCK);
        for (word, bits) in self
            .checked
            .iter()
            .enumerate()
            .take(last / 64 + 1)
            .skip(first / 64)
        {
            let from = first.max(word * 64) % 64;
            let to = last.min(word * 64 + 63) % 64;
            let wanted = (u64::MAX << from) & (u64::MAX >> (63 - to));
            // Relaxed: the bytes are the same for everyone, and a bit that is seen late is compared again.
            let mut missing = wanted & !bits.load(Ordering::Relaxed);
            while missing != 0 {
                let bit = missing.trailing_zeros();
                self.compare(word * 64 + bit as usize)?;
                bits.fetch_or(1 << bit, Ordering::Relaxed);
                missing &= missing - 1;
            }
        }
        Ok(())
    }

    /// Compares every block.
    pub(super) fn verify(&self, progress: &Progress) -> Result<()> {
        (0..self.content.len().div_ceil(BLOCK)).try_for_each(|block| {
            self.compare(block)?;
            progress.add(BLOCK as u64)
        })
    }
}

impl HasLen for CheckedFile {
    fn len(&self) -> usize {
        self.content.len()
    }
}

impl FileHandle for CheckedFile {
    fn read_bytes(&self, range: Range<usize>) -> io::Result<OwnedBytes> {
        if range.start > range.end || range.end > self.content.len() {
            let reason = format!("bytes {range:?} of {} were asked for", self.content.len());
            let error = Error::corrupt_index(self.map.path(), reason);
            return Err(self.failure.report(error));
        }
        self.check(&range)
            .map_err(|error| self.failure.report(error))?;
        Ok(self.content.slice(range))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::files::Directory;

    fn file(bytes: &[u8], pieces: usize) -> Vec<u8> {
        let mut trailer = TrailerWriter::default();
        for piece in bytes.chunks(pieces) {
            trailer.write(piece);
        }
        [bytes, &trailer.finish()].concat()
    }

    fn open(dir: &Directory, bytes: &[u8]) -> Result<CheckedFile> {
        std::fs::write(dir.path_of("x"), bytes).unwrap();
        let map = dir.map("x", bytes.len() as u64).unwrap();
        CheckedFile::open(map, Failure::default())
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 7_u64;
        (0..length)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, ..Default::default() })]

        #[test]
        fn what_was_written_is_read(
            length in prop_oneof![0..300_usize, (0..4_usize).prop_map(|n| n * BLOCK), 0..300_000_usize],
            pieces in 1..100_000_usize,
            from in 0.0..1.0_f64,
            to in 0.0..1.0_f64,
        ) {
            let tmp = tempfile::tempdir().unwrap();
            let dir = Directory::open(tmp.path()).unwrap();
            let content = noise(length);
            let checked = open(&dir, &file(&content, pieces)).unwrap();
            let at = |share: f64| (share * (length + 1) as f64) as usize;
            let range = at(from.min(to))..at(from.max(to));
            prop_assert!(*checked.read_bytes(range.clone()).unwrap() == content[range]);
            checked.verify(&Progress::unseen()).unwrap();
            prop_assert!(checked.read_bytes(0..length + 1).is_err());
        }

        #[test]
        fn an_altered_byte_is_not_handed_out(
            length in 1..200_000_usize,
            place in 0.0..1.0_f64,
            bit in 0..8_u8,
        ) {
            let tmp = tempfile::tempdir().unwrap();
            let dir = Directory::open(tmp.path()).unwrap();
            let content = noise(length);
            let mut altered = file(&content, 10_000);
            let at = (place * altered.len() as f64) as usize;
            altered[at] ^= 1 << bit;
            let Ok(checked) = open(&dir, &altered) else {
                prop_assert!(at >= length, "the trailer is in order, but was refused");
                return Ok(());
            };
            prop_assert!(at < length, "byte {} of the trailer was altered", at - length);
            let error = checked.verify(&Progress::unseen()).unwrap_err().to_string();
            let block = at / BLOCK;
            prop_assert!(error.contains(&format!("/x: corrupt BM25 index: block {block}: ")), "{}", error);
            for start in (0..length).step_by(BLOCK) {
                let end = length.min(start + BLOCK);
                let read = checked.read_bytes(start..end);
                if start / BLOCK == block {
                    prop_assert!(read.unwrap_err().to_string().contains("block"));
                } else {
                    prop_assert!(*read.unwrap() == content[start..end]);
                }
            }
        }
    }

    /// All lengths that the trailer could claim, with a checksum that is right.
    #[test]
    fn a_forged_length_is_compared_with_the_real_one() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Directory::open(tmp.path()).unwrap();
        let whole = file(b"content", 7);
        let at = whole.len() - TAIL;
        for forged in [0, 6, 8, 15, u64::MAX, u64::MAX - 15, 1 << 63, 1 << 40] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(forged));
            let own = xxh3_64(&bytes[7..at + 8]).to_le_bytes();
            bytes[at + 8..].copy_from_slice(&own);
            let error = open(&dir, &bytes).unwrap_err();
            assert!(
                matches!(error, Error::CorruptIndex { .. }),
                "{forged}: {error}"
            );
        }
        for length in 0..whole.len() {
            assert!(open(&dir, &whole[..length]).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn a_block_that_was_found_whole_is_not_read_again() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Directory::open(tmp.path()).unwrap();
        let content = noise(130 * BLOCK);
        let checked = open(&dir, &file(&content, BLOCK)).unwrap();
        let done = || -> Vec<usize> {
            (0..130)
                .filter(|b| checked.checked[b / 64].load(Ordering::Relaxed) >> (b % 64) & 1 == 1)
                .collect()
        };
        assert_eq!(done(), [] as [usize; 0]);
        checked.read_bytes(10..10).unwrap();
        assert_eq!(done(), [] as [usize; 0]);
        checked.read_bytes(BLOCK - 1..BLOCK + 1).unwrap();
        assert_eq!(done(), [0, 1]);
        checked.read_bytes(63 * BLOCK..128 * BLOCK + 1).unwrap();
        assert_eq!(
            done(),
            [0, 1].into_iter().chain(63..129).collect::<Vec<_>>()
        );
        checked.read_bytes(0..content.len()).unwrap();
        assert_eq!(done().len(), 130);
    }
}
