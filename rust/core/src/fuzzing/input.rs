//! From the bytes of an input to the bytes of a file.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::files::Mapped;
use crate::frame::{Kind, VERSION, u32_at, u64_at};

/// The first byte of an input, and the rest.
#[derive(Debug, Clone, Copy)]
pub struct Input<'d> {
    form: u8,
    /// Chosen freely by the input: what the file is opened with.
    pub flavour: u8,
    pub rest: &'d [u8],
}

/// How an input becomes a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// It is the file.
    Raw,
    /// It is the file, but for checksums, which are computed anew.
    Summed,
    /// It is fields and body: the frame around them is made.
    Framed,
    /// It is what the target says.
    Built,
}

impl<'d> Input<'d> {
    pub fn split(data: &'d [u8]) -> Option<Self> {
        let (first, rest) = data.split_first()?;
        Some(Self {
            form: first & 3,
            flavour: first >> 2,
            rest,
        })
    }

    pub fn form(&self) -> Form {
        match self.form {
            0 => Form::Raw,
            1 => Form::Summed,
            2 => Form::Framed,
            _ => Form::Built,
        }
    }

    /// A part of ours; of [`Form::Built`], `build` makes fields and body from those of the input.
    pub fn part(
        &self,
        kind: Kind,
        build: impl FnOnce(&[u8], &[u8]) -> (Vec<u8>, Vec<u8>),
    ) -> Mapped {
        let file = match self.form() {
            Form::Raw => return Mapped::from_bytes(self.rest),
            Form::Summed => summed(self.rest.to_vec()),
            form => {
                let (fields, body) = self.fields();
                match form {
                    Form::Framed => framed(kind, fields, body),
                    _ => {
                        let (fields, body) = build(fields, body);
                        framed(kind, &fields, &body)
                    }
                }
            }
        };
        Mapped::from_bytes(&file)
    }

    /// The fields: a byte says how many words of 8 bytes; and what is after them.
    fn fields(&self) -> (&'d [u8], &'d [u8]) {
        let (words, rest) = self.rest.split_first().unwrap_or((&0, &[]));
        // A tail holds at most 4,064 bytes of fields.
        let length = 8 * usize::from(*words).min(500);
        rest.split_at_checked(length).unwrap_or((rest, &[]))
    }
}

/// For parts that have no form of their own to be built in.
pub fn as_it_is(fields: &[u8], body: &[u8]) -> (Vec<u8>, Vec<u8>) {
    (fields.to_vec(), body.to_vec())
}

/// Puts `value` at `at`, if that is within.
pub fn put(file: &mut [u8], at: usize, value: &[u8]) {
    let place = at
        .checked_add(value.len())
        .and_then(|end| file.get_mut(at..end));
    if let Some(place) = place {
        place.copy_from_slice(value);
    }
}

/// The part with these fields and this body, as [`crate::frame::FrameWriter`] would write it.
fn framed(kind: Kind, fields: &[u8], body: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 1 << 12;
    let mut file = Vec::with_capacity(body.len() + fields.len() + 256);
    file.extend_from_slice(&kind.magic());
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&(BLOCK as u32).to_le_bytes());
    file.resize(64, 0);
    file.extend_from_slice(body);
    // The sums are put in below.
    file.resize(file.len() + 8 * body.len().div_ceil(BLOCK), 0);
    let tail = (fields.len() + 32).next_multiple_of(64);
    let end = file.len() + tail;
    file.extend_from_slice(fields);
    file.resize(end - 32, 0);
    file.extend_from_slice(&(body.len() as u64).to_le_bytes());
    file.extend_from_slice(&0u64.to_le_bytes());
    file.extend_from_slice(&(tail as u64).to_le_bytes());
    file.extend_from_slice(&0u64.to_le_bytes());
    summed(file)
}

/// A file with the checksums that its own head and tail ask for, as far as they are possible.
fn summed(mut file: Vec<u8>) -> Vec<u8> {
    let length = file.len();
    let number = |file: &[u8], back: usize| u64_at(file, length.checked_sub(back)?);
    let block = u32_at(&file, 12).unwrap_or_default() as usize;
    let body = number(&file, 32).and_then(|n| usize::try_from(n).ok());
    let own = u32_at(&file, length.saturating_sub(16)).unwrap_or_default() as usize;
    if let Some(body) = body
        && let Some(end) = body.checked_add(64)
        && let Some(body) = file.get(64..end)
        && block > 0
    {
        let table: Vec<u8> = body
            .chunks(block)
            .flat_map(|block| xxh3_64(block).to_le_bytes())
            .collect();
        // Only where the table is expected: otherwise it would overwrite the tail.
        if end
            .checked_add(table.len())
            .and_then(|n| n.checked_add(own))
            == Some(length)
        {
            put(&mut file, end, &table);
            put(&mut file, length - 24, &xxh3_64(&table).to_le_bytes());
        }
    }
    if let Some(tail) = length.checked_sub(own)
        && let Some(end) = length.checked_sub(8)
    {
        let mut sum = Xxh3::new();
        sum.update(file.get(..64).unwrap_or_default());
        sum.update(file.get(tail..end).unwrap_or_default());
        let sum = sum.digest();
        put(&mut file, end, &sum.to_le_bytes());
    }
    file
}
