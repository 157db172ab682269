//! Ids of one length whose bytes each take few values, as numbers that keep their order: the digits of a
//! number, each in the base of its position. `wiki-000000123` is 123, and the dashes of a UUID cost nothing.

use crate::documents::ids::bits::width_of;

/// Ranks are looked up by byte; this one is no rank.
const NONE: u16 = u16::MAX;
/// Numbers in a table that turns several digits at once into those of another template.
const MAX_GROUP: u64 = 1 << 12;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    positions: Vec<Position>,
    /// Bytes of a packed value: those of the digits in whole bits, or 0 if the value is a u64.
    width: usize,
    /// Digits in whole bits.
    bits: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Position {
    /// The bytes that occur, ascending; one or more.
    symbols: Vec<u8>,
    /// The rank of each byte among the symbols; empty if there is one symbol only.
    ranks: Vec<u16>,
    bits: u32,
}

impl Position {
    fn new(symbols: Vec<u8>) -> Self {
        let mut ranks = Vec::new();
        if symbols.len() > 1 {
            ranks.resize(256, NONE);
            for (rank, symbol) in (0..).zip(&symbols) {
                if let Some(to) = ranks.get_mut(usize::from(*symbol)) {
                    *to = rank;
                }
            }
        }
        let bits = width_of(symbols.len() as u64 - 1);
        Self {
            symbols,
            ranks,
            bits,
        }
    }

    fn base(&self) -> u64 {
        self.symbols.len() as u64
    }

    #[inline]
    fn rank(&self, byte: u8) -> Option<u64> {
        match self.ranks.get(usize::from(byte)) {
            Some(&NONE) => None,
            Some(rank) => Some(u64::from(*rank)),
            None => (self.symbols.first() == Some(&byte)).then_some(0),
        }
    }

    fn symbol(&self, rank: u64) -> Option<u8> {
        self.symbols.get(usize::try_from(rank).ok()?).copied()
    }
}

/// Which bytes occur at each position of ids of one length.
#[derive(Debug, Clone)]
pub struct Seen(Vec<[bool; 256]>);

impl Seen {
    pub fn new(length: usize) -> Self {
        Self(vec![[false; 256]; length])
    }

    pub fn length(&self) -> usize {
        self.0.len()
    }

    #[inline]
    pub fn add(&mut self, id: &[u8]) {
        for (seen, byte) in self.0.iter_mut().zip(id) {
            if let Some(seen) = seen.get_mut(usize::from(*byte)) {
                *seen = true;
            }
        }
    }

    /// None unless at least one id was added.
    pub fn template(&self) -> Option<Template> {
        let symbols = |seen: &[bool; 256]| {
            let bytes = (0..=u8::MAX).zip(seen);
            bytes.filter(|(_, seen)| **seen).map(|(b, _)| b).collect()
        };
        Template::new(self.0.iter().map(symbols).collect())
    }
}

impl Template {
    /// From the symbols of each position, ascending; none if a position has none.
    fn new(positions: Vec<Vec<u8>>) -> Option<Self> {
        if positions.is_empty() || positions.iter().any(Vec::is_empty) {
            return None;
        }
        let positions: Vec<Position> = positions.into_iter().map(Position::new).collect();
        let bits: usize = positions.iter().map(|p| p.bits as usize).sum();
        let values = positions
            .iter()
            .fold(1u128, |n, p| n.saturating_mul(u128::from(p.base())));
        let width = match values <= 1 << 64 {
            true => 0,
            false => bits.div_ceil(8),
        };
        Some(Self {
            positions,
            width,
            bits,
        })
    }

    pub fn length(&self) -> usize {
        self.positions.len()
    }

    /// Bytes of a packed value; 0 if the values are numbers.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The template of the ids of both; none if their lengths differ.
    pub fn union(&self, other: &Self) -> Option<Self> {
        if self.length() != other.length() {
            return None;
        }
        let mut seen = Seen::new(self.length());
        for template in [self, other] {
            for (seen, position) in seen.0.iter_mut().zip(&template.positions) {
                for symbol in &position.symbols {
                    if let Some(seen) = seen.get_mut(usize::from(*symbol)) {
                        *seen = true;
                    }
                }
            }
        }
        seen.template()
    }

    /// For each position a byte with the number of symbols less one, and the symbols.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for position in &self.positions {
            bytes.push((position.symbols.len() - 1) as u8);
            bytes.extend_from_slice(&position.symbols);
        }
        bytes
    }

    pub fn parse(mut bytes: &[u8], max_length: usize) -> Option<Self> {
        let mut positions = Vec::new();
        while let Some((count, rest)) = bytes.split_first() {
            let (symbols, rest) = rest.split_at_checked(usize::from(*count) + 1)?;
            if !symbols.is_sorted_by(|a, b| a < b) || positions.len() == max_length {
                return None;
            }
            positions.push(symbols.to_vec());
            bytes = rest;
        }
        Self::new(positions)
    }

    /// The value of an id as a number, if the values are numbers and the id is of this template.
    #[inline]
    pub fn number(&self, id: &[u8]) -> Option<u64> {
        if id.len() != self.length() || self.width != 0 {
            return None;
        }
        let mut value = 0u64;
        for (position, byte) in self.positions.iter().zip(id) {
            let rank = position.rank(*byte)?;
            if position.bits > 0 {
                value = value.wrapping_mul(position.base()).wrapping_add(rank);
            }
        }
        Some(value)
    }

    /// Replaces `out` with the id of a value; none if there is none.
    pub fn id_of_number(&self, mut value: u64, out: &mut Vec<u8>) -> Option<()> {
        out.clear();
        out.resize(self.length(), 0);
        for (position, byte) in self.positions.iter().zip(out.iter_mut()).rev() {
            let mut rank = 0;
            if position.bits > 0 {
                (value, rank) = (value / position.base(), value % position.base());
            }
            *byte = position.symbol(rank)?;
        }
        (value == 0).then_some(())
    }

    /// Appends the packed value of an id, if values are packed and the id is of this template: the digits in
    /// whole bits, the highest first, with zeros before them.
    pub fn pack(&self, id: &[u8], out: &mut Vec<u8>) -> Option<()> {
        if id.len() != self.length() || self.width == 0 {
            return None;
        }
        let (mut pending, mut used) = (0u64, (self.width * 8 - self.bits) as u32);
        for (position, byte) in self.positions.iter().zip(id) {
            let rank = position.rank(*byte)?;
            pending = pending << position.bits | rank;
            used += position.bits;
            while used >= 8 {
                used -= 8;
                out.push((pending >> used) as u8);
            }
        }
        Some(())
    }

    /// Replaces `out` with the id of a packed value; none if there is none.
    pub fn unpack(&self, value: &[u8], out: &mut Vec<u8>) -> Option<()> {
        out.clear();
        if value.len() != self.width || self.width == 0 {
            return None;
        }
        let spare = (self.width * 8 - self.bits) as u32;
        let mut bytes = value.iter();
        let (mut pending, mut used) = (0u64, 0);
        let mut take = |bits: u32| {
            while used < bits {
                pending = pending << 8 | u64::from(*bytes.next()?);
                used += 8;
            }
            used -= bits;
            Some(pending >> used & ((1 << bits) - 1))
        };
        if take(spare)? != 0 {
            return None;
        }
        for position in &self.positions {
            out.push(position.symbol(take(position.bits)?)?);
        }
        Some(())
    }
}

/// Turns numbers of one template into those of a wider one, without going through the ids.
#[derive(Debug)]
pub struct Recoder {
    /// The lowest digits, which are the same in both: a divisor, and nothing to look up.
    same: u64,
    /// The other digits in groups from the lowest: what each value of a group adds.
    groups: Vec<Vec<u64>>,
}

impl Recoder {
    /// None unless both have numbers, and `to` has every symbol of `from`.
    pub fn new(from: &Template, to: &Template) -> Option<Self> {
        if from.length() != to.length() || from.width > 0 || to.width > 0 {
            return None;
        }
        // A base of 2^64 in all is met after the last digit only, where it is not used.
        let (mut same, mut weight) = (1u64, 1u64);
        let mut groups: Vec<Vec<u64>> = Vec::new();
        for (from, to) in from.positions.iter().zip(&to.positions).rev() {
            if groups.is_empty() && from.symbols == to.symbols {
                match same.checked_mul(from.base()) {
                    Some(product) => same = product,
                    // Only if the highest digit ends exactly at 2^64: then all are the same.
                    None => same = 0,
                }
                weight = weight.wrapping_mul(to.base());
                continue;
            }
            let added: Vec<u64> = from
                .symbols
                .iter()
                .map(|s| Some(to.rank(*s)?.wrapping_mul(weight)))
                .collect::<Option<_>>()?;
            weight = weight.wrapping_mul(to.base());
            match groups.last_mut() {
                Some(group) if group.len() as u64 * from.base() <= MAX_GROUP => {
                    *group = added
                        .iter()
                        .flat_map(|high| group.iter().map(move |low| low.wrapping_add(*high)))
                        .collect();
                }
                _ => groups.push(added),
            }
        }
        Some(Self { same, groups })
    }

    #[inline]
    pub fn recode(&self, value: u64) -> Option<u64> {
        let Some(mut high) = value.checked_div(self.same) else {
            return Some(value);
        };
        let mut recoded = value - high * self.same;
        for group in &self.groups {
            let base = group.len() as u64;
            let digit = usize::try_from(high % base).ok()?;
            recoded = recoded.wrapping_add(*group.get(digit)?);
            high /= base;
        }
        (high == 0).then_some(recoded)
    }
}
