//! Ids in memory, on their way into a segment.

use std::mem::size_of;

use crate::documents::DocumentId;
use crate::documents::ids::segment::SegmentWriter;
use crate::documents::ids::space::{Form, Key, Space, compare};
use crate::documents::ids::text::{SHARED_BLOCK, shared_bytes};
use crate::error::{Error, Result};
use crate::files::{Digest, Directory};
use crate::presence::PresenceBuilder;
use crate::spec::{IdType, MAX_NAME};

/// Ids of one chunk in memory, in docno order.
#[derive(Debug, Clone)]
pub struct IdsChunk {
    ids: Ids,
}

#[derive(Debug, Clone)]
enum Ids {
    U64(Vec<u64>),
    /// One after the other, and where each ends.
    Strings {
        bytes: Vec<u8>,
        ends: Vec<usize>,
    },
}

impl IdsChunk {
    pub fn new(id_type: IdType) -> Self {
        let ids = match id_type {
            IdType::U64 => Ids::U64(Vec::new()),
            IdType::String => Ids::Strings {
                bytes: Vec::new(),
                ends: Vec::new(),
            },
        };
        Self { ids }
    }

    pub fn push(&mut self, id: &DocumentId) -> Result<()> {
        match (&mut self.ids, id) {
            (Ids::U64(ids), DocumentId::U64(id)) => ids.push(*id),
            (Ids::Strings { bytes, ends }, DocumentId::String(id))
                if (1..=MAX_NAME).contains(&id.len()) =>
            {
                bytes.extend_from_slice(id.as_bytes());
                ends.push(bytes.len());
            }
            _ => return Err(Error::invalid(format!("id {id} is none of this store"))),
        }
        Ok(())
    }

    pub fn extend_u64(&mut self, more: &[u64]) -> Result<()> {
        match &mut self.ids {
            Ids::U64(ids) => ids.extend_from_slice(more),
            Ids::Strings { .. } => {
                return Err(Error::invalid(
                    "this store takes strings as ids, not integers",
                ));
            }
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        match &self.ids {
            Ids::U64(ids) => ids.len(),
            Ids::Strings { ends, .. } => ends.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it takes in memory, but for spare capacity.
    pub fn bytes(&self) -> usize {
        match &self.ids {
            Ids::U64(ids) => size_of::<u64>() * ids.len(),
            Ids::Strings { bytes, ends } => bytes.len() + size_of::<usize>() * ends.len(),
        }
    }

    /// Writes them as the segment of the docnos from `first` on.
    pub fn write(&self, dir: &Directory, name: &str, first: u64) -> Result<Digest> {
        let mut presence = PresenceBuilder::default();
        presence.extend_present(self.len() as u64);
        match &self.ids {
            Ids::U64(ids) => {
                let mut writer = SegmentWriter::create(dir, name, &Space::Numbers, 0)?;
                for id in ids {
                    writer.push(Key::Number(*id))?;
                }
                if !writer.end_rows(first, &presence)? {
                    write_sorted(&mut writer, ids.iter().copied())?;
                }
                writer.finish()
            }
            Ids::Strings { bytes, ends } => {
                let strings = Strings { bytes, ends };
                let space = Space::of_strings(|| strings.iter());
                let block = strings.best_block(&space);
                let mut writer = SegmentWriter::create(dir, name, &space, block)?;
                let (mut numbers, mut packed) = (Vec::new(), Vec::new());
                let mut buffer = Vec::new();
                let form = space.form();
                for id in strings.iter() {
                    let key = space.key(Key::Bytes(id), &mut buffer);
                    let key = key.ok_or_else(|| Error::invalid("an id outside its template"))?;
                    writer.push(key)?;
                    match (form, key) {
                        (_, Key::Number(n)) => numbers.push(n),
                        (Form::Packed(width), Key::Bytes(value)) if width <= 16 => {
                            packed.push(wide(value));
                        }
                        _ => {}
                    }
                }
                if !writer.end_rows(first, &presence)? {
                    match form {
                        Form::Number => write_sorted(&mut writer, numbers.into_iter())?,
                        Form::Packed(width) if width <= 16 => {
                            write_sorted(&mut writer, packed.into_iter())?;
                        }
                        _ => strings.write_sorted(&mut writer)?,
                    }
                }
                writer.finish()
            }
        }
    }
}

/// A packed value of at most 16 bytes as a number.
pub(super) fn wide(value: &[u8]) -> u128 {
    value.iter().fold(0, |n, b| n << 8 | u128::from(*b))
}

fn write_sorted<K: Ord + Copy>(
    writer: &mut SegmentWriter,
    keys: impl Iterator<Item = K>,
) -> Result<()> {
    let mut pairs: Vec<(K, u32)> = (0..).zip(keys).map(|(row, key)| (key, row)).collect();
    pairs.sort_unstable();
    pairs
        .iter()
        .try_for_each(|(_, row)| writer.push_order(u64::from(*row)))
}

fn string<'b>(bytes: &'b [u8], ends: &[usize], i: usize) -> Option<&'b [u8]> {
    let start = match i.checked_sub(1) {
        Some(before) => *ends.get(before)?,
        None => 0,
    };
    bytes.get(start..*ends.get(i)?)
}

#[derive(Debug, Clone, Copy)]
struct Strings<'c> {
    bytes: &'c [u8],
    ends: &'c [usize],
}

impl<'c> Strings<'c> {
    fn get(&self, i: usize) -> &'c [u8] {
        string(self.bytes, self.ends, i).unwrap_or_default()
    }

    fn iter(&self) -> impl Iterator<Item = &'c [u8]> + use<'c> {
        let bytes = self.bytes;
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let id = bytes.get(start..*end).unwrap_or_default();
            start = *end;
            id
        })
    }

    /// Blocks in which neighbours share bytes, if they do; else blocks of one, which are found faster.
    fn best_block(&self, space: &Space) -> u64 {
        if *space != Space::Text {
            return 0;
        }
        let (mut before, mut shared) = (&[][..], 0);
        for id in self.iter() {
            shared += shared_bytes(before, id);
            before = id;
        }
        // A shared block takes about two bytes for an id in place of one, and the first shares nothing.
        let saved = (shared - shared / SHARED_BLOCK as usize).saturating_sub(self.ends.len());
        match saved > self.bytes.len() / 10 {
            true => SHARED_BLOCK,
            false => 1,
        }
    }

    fn write_sorted(&self, writer: &mut SegmentWriter) -> Result<()> {
        const PREFIX: u32 = 54;
        let first = self.get(0);
        let shared = self.iter().fold(first.len(), |n, id| {
            shared_bytes(first.get(..n).unwrap_or_default(), id)
        });
        // The length, and what comes first of what they do not share: enough for most comparisons.
        let head = |id: &[u8]| {
            let after = id.get(shared..).unwrap_or_default();
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(after) {
                *to = *from;
            }
            (id.len() as u64) << PREFIX | u64::from_be_bytes(word) >> (u64::BITS - PREFIX)
        };
        let mut rows: Vec<(u64, u32)> = (0..)
            .zip(self.iter())
            .map(|(row, id)| (head(id), row))
            .collect();
        rows.sort_unstable_by(|a, b| {
            a.0.cmp(&b.0)
                .then_with(|| compare(self.get(a.1 as usize), self.get(b.1 as usize)))
                .then(a.1.cmp(&b.1))
        });
        rows.iter()
            .try_for_each(|(_, row)| writer.push_order(u64::from(*row)))
    }
}
