//! What ids of a segment have in common, and the keys that stand for them: numbers, or fewer bytes.
//!
//! Keys have the order of their ids: u64 as numbers; strings the shorter first, and those of one length as
//! bytes. So `doc-9` comes before `doc-10`, and counted ids ascend.

use std::cmp::Ordering;

use crate::documents::DocumentId;
use crate::documents::ids::template::{Recoder, Seen, Template};
use crate::documents::ids::text::shared_bytes;
use crate::spec::{IdType, MAX_NAME};

/// An id or its key, where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'k> {
    Number(u64),
    Bytes(&'k [u8]),
}

impl<'k> From<&'k DocumentId> for Key<'k> {
    fn from(id: &'k DocumentId) -> Self {
        match id {
            DocumentId::U64(n) => Key::Number(*n),
            DocumentId::String(s) => Key::Bytes(s.as_bytes()),
        }
    }
}

impl Ord for Key<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Key::Number(a), Key::Number(b)) => a.cmp(b),
            (Key::Bytes(a), Key::Bytes(b)) => compare(a, b),
            (Key::Number(_), Key::Bytes(_)) => Ordering::Less,
            (Key::Bytes(_), Key::Number(_)) => Ordering::Greater,
        }
    }
}

impl PartialOrd for Key<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A copy of a key, to compare with the next.
#[derive(Debug, Default)]
pub struct KeptKey {
    kept: Option<Option<u64>>,
    bytes: Vec<u8>,
}

impl KeptKey {
    #[inline]
    pub fn set(&mut self, key: Key<'_>) {
        self.kept = Some(match key {
            Key::Number(n) => Some(n),
            Key::Bytes(bytes) => {
                self.bytes.clear();
                self.bytes.extend_from_slice(bytes);
                None
            }
        });
    }

    /// None before the first key.
    #[inline]
    pub fn get(&self) -> Option<Key<'_>> {
        self.kept
            .map(|number| number.map_or(Key::Bytes(&self.bytes), Key::Number))
    }
}

/// The order of strings.
#[inline]
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Space {
    /// The ids are u64: they are their keys.
    Numbers,
    /// One prefix, then a number in decimal digits without zeros before it: the number.
    Decimals(Vec<u8>),
    /// One length, each byte one of few: the number of the template, or its packed value.
    Template(Template),
    /// Any strings: they are their keys.
    Text,
}

/// How keys of a space look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Number,
    /// This many bytes.
    Packed(usize),
    Text,
}

/// `digits` as a number, if that number is written so.
fn decimal(digits: &[u8]) -> Option<u64> {
    let (first, rest) = digits.split_first()?;
    if *first == b'0' && !rest.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |n, digit| {
        let digit = digit.checked_sub(b'0').filter(|d| *d < 10)?;
        n.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

impl Space {
    /// The narrowest space that holds strings; `each` calls its argument with every one of them.
    pub fn of_strings<'i, I: Iterator<Item = &'i [u8]>>(each: impl Fn() -> I) -> Self {
        let Some(first) = each().next() else {
            return Space::Text;
        };
        // As long as they have one length, and as long as they may be decimals.
        let mut seen = Some(Seen::new(first.len()));
        let mut shared = Some(first.len());
        // Bytes of blocks in which neighbours share.
        let (mut before, mut text, mut count) = (first, 0usize, 0usize);
        for id in each() {
            if let Some(all) = &mut seen {
                match id.len() == all.length() {
                    true => all.add(id),
                    false => seen = None,
                }
            }
            if let Some(length) = shared {
                let common = first.get(..length).unwrap_or_default();
                let length = match id.starts_with(common) {
                    true => length,
                    false => shared_bytes(common, id),
                };
                let ends_in_digits = id.last().is_some_and(u8::is_ascii_digit);
                shared = ends_in_digits.then_some(length);
            }
            if seen.is_none() && shared.is_none() {
                return Space::Text;
            }
            if seen.is_some() {
                text += id.len() - shared_bytes(before, id) + 2;
                before = id;
            }
            count += 1;
        }
        if let Some(length) = shared {
            let common = first.get(..length).unwrap_or_default();
            let digits = common.iter().rev().take_while(|b| b.is_ascii_digit());
            let prefix = length - digits.count();
            let number = |id: &[u8]| id.get(prefix..).and_then(decimal);
            if each().all(|id| number(id).is_some()) {
                return Space::Decimals(first.get(..prefix).unwrap_or_default().to_vec());
            }
        }
        match seen.and_then(|seen| seen.template()) {
            Some(template) if template.width().saturating_mul(count) <= text => {
                Space::Template(template)
            }
            _ => Space::Text,
        }
    }

    /// The narrowest space that holds the ids of both; the keys of neither change their order in it.
    pub fn union(&self, other: &Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a.clone(),
            (Space::Template(a), Space::Template(b)) => {
                a.union(b).map_or(Space::Text, Space::Template)
            }
            _ => Space::Text,
        }
    }

    pub fn form(&self) -> Form {
        match self {
            Space::Numbers | Space::Decimals(_) => Form::Number,
            Space::Template(template) if template.width() == 0 => Form::Number,
            Space::Template(template) => Form::Packed(template.width()),
            Space::Text => Form::Text,
        }
    }

    /// The number of the encoding in the file.
    pub fn code(&self) -> u64 {
        match (self, self.form()) {
            (Space::Numbers, _) => 0,
            (Space::Decimals(_), _) => 1,
            (Space::Template(_), Form::Number) => 2,
            (Space::Template(_), _) => 3,
            (Space::Text, _) => 4,
        }
    }

    /// The bytes that a file needs to know the space again.
    pub fn table(&self) -> Vec<u8> {
        match self {
            Space::Numbers | Space::Text => Vec::new(),
            Space::Decimals(prefix) => prefix.clone(),
            Space::Template(template) => template.to_bytes(),
        }
    }

    pub fn parse(code: u64, table: &[u8]) -> Option<Self> {
        let space = match code {
            0 => Space::Numbers,
            1 if table.len() < MAX_NAME => Space::Decimals(table.to_vec()),
            2 | 3 => Space::Template(Template::parse(table, MAX_NAME)?),
            4 => Space::Text,
            _ => return None,
        };
        (space.code() == code && space.table().len() == table.len()).then_some(space)
    }

    pub fn id_type(&self) -> IdType {
        match self {
            Space::Numbers => IdType::U64,
            _ => IdType::String,
        }
    }

    /// The key of an id; none if the space does not hold it. `buffer` is for what is packed.
    #[inline]
    pub fn key<'k>(&self, id: Key<'k>, buffer: &'k mut Vec<u8>) -> Option<Key<'k>> {
        match (self, id) {
            (Space::Numbers, Key::Number(_)) | (Space::Text, Key::Bytes(_)) => Some(id),
            (Space::Decimals(prefix), Key::Bytes(id)) => {
                decimal(id.strip_prefix(prefix.as_slice())?).map(Key::Number)
            }
            (Space::Template(template), Key::Bytes(id)) => match template.width() {
                0 => template.number(id).map(Key::Number),
                _ => {
                    buffer.clear();
                    template.pack(id, buffer)?;
                    Some(Key::Bytes(buffer))
                }
            },
            _ => None,
        }
    }

    /// The id of a key; none if the space has no such key.
    pub fn id<'k>(&self, key: Key<'k>, buffer: &'k mut Vec<u8>) -> Option<Key<'k>> {
        match (self, key) {
            (Space::Numbers, Key::Number(_)) => return Some(key),
            (Space::Text, Key::Bytes(_)) => return Some(key),
            (Space::Decimals(prefix), Key::Number(n)) => {
                buffer.clear();
                buffer.extend_from_slice(prefix);
                push_decimal(n, buffer);
                if buffer.len() > MAX_NAME {
                    return None;
                }
            }
            (Space::Template(template), Key::Number(n)) => template.id_of_number(n, buffer)?,
            (Space::Template(template), Key::Bytes(value)) => template.unpack(value, buffer)?,
            _ => return None,
        }
        Some(Key::Bytes(buffer))
    }
}

fn push_decimal(mut n: u64, out: &mut Vec<u8>) {
    let start = out.len();
    loop {
        out.push(b'0' + (n % 10) as u8);
        n /= 10;
        if n == 0 {
            break;
        }
    }
    if let Some(digits) = out.get_mut(start..) {
        digits.reverse();
    }
}

/// Turns keys of one space into those of another that holds all its ids.
#[derive(Debug)]
pub struct Translation<'s> {
    from: &'s Space,
    to: &'s Space,
    way: Way,
    id: Vec<u8>,
}

#[derive(Debug)]
enum Way {
    Same,
    Recoded(Recoder),
    ThroughIds,
}

impl<'s> Translation<'s> {
    pub fn new(from: &'s Space, to: &'s Space) -> Self {
        let way = match (from, to) {
            _ if from == to => Way::Same,
            (Space::Template(a), Space::Template(b)) => {
                Recoder::new(a, b).map_or(Way::ThroughIds, Way::Recoded)
            }
            _ => Way::ThroughIds,
        };
        let id = Vec::new();
        Self { from, to, way, id }
    }

    /// None if the key is none of the space.
    #[inline]
    pub fn apply<'k>(&'k mut self, key: Key<'k>, buffer: &'k mut Vec<u8>) -> Option<Key<'k>> {
        match (&self.way, key) {
            (Way::Same, _) => Some(key),
            (Way::Recoded(recoder), Key::Number(n)) => recoder.recode(n).map(Key::Number),
            (Way::Recoded(_), Key::Bytes(_)) => None,
            (Way::ThroughIds, _) => {
                let id = self.from.id(key, &mut self.id)?;
                self.to.key(id, buffer)
            }
        }
    }
}
