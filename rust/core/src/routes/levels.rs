//! The levels to which the numbers of a scaled column are rounded, and how they lie in a record.
//!
//! A number is `centre + scale * level`: as int8 with levels from -127 to 127, or in b bits with the 2^b levels
//! -(2^b - 1) / 2, ..., -1/2, 1/2, ..., (2^b - 1) / 2. Products and sums are each rounded to f32, so that every
//! processor decodes to the same bits.

use multiversion::multiversion;

use crate::routes::scales::ScaleValues;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    Int8,
    Bits4,
    Bits2,
    Bits1,
}

impl Levels {
    /// Bytes of a record.
    pub fn record_bytes(self, columns: usize) -> usize {
        let bits = match self {
            Levels::Int8 => 8,
            Levels::Bits4 => 4,
            Levels::Bits2 => 2,
            Levels::Bits1 => 1,
        };
        columns.div_ceil(8 / bits)
    }

    /// How far from the centre a fit puts the extremes of a column, in scales.
    pub fn outer(self) -> f64 {
        match self {
            Levels::Int8 => 127.0,
            Levels::Bits4 => 8.0,
            Levels::Bits2 => 2.0,
            Levels::Bits1 => 1.0,
        }
    }

    /// How far from the centre a number is still within half a scale of a level, in scales.
    pub fn reach(self) -> f64 {
        match self {
            Levels::Int8 => 127.5,
            _ => self.outer(),
        }
    }

    /// The outermost level.
    pub fn outermost(self) -> f64 {
        match self {
            Levels::Int8 => 127.0,
            _ => self.outer() - 0.5,
        }
    }

    /// The scale of least mean square error for a Gaussian column, in its deviations (Max, 1960); numbers beyond the
    /// outermost levels are taken to these. None for int8, with which no number is that far out.
    pub fn gaussian(self) -> Option<f64> {
        match self {
            Levels::Int8 => None,
            Levels::Bits4 => Some(0.3352),
            Levels::Bits2 => Some(0.9957),
            Levels::Bits1 => Some(1.5958),
        }
    }

    /// Whether there are so few that not every number can be near one.
    pub fn few(self) -> bool {
        self.gaussian().is_some()
    }

    /// The level that `x` is kept as, of a column with this centre and scale.
    pub fn nearest(self, x: f64, (centre, scale): (f32, f32)) -> f64 {
        let units = (x - f64::from(centre)) / f64::from(scale);
        let most = self.outermost();
        let level = match self {
            Levels::Int8 => units.round_ties_even(),
            _ => units.floor() + 0.5,
        };
        // The casts of `encode` make of 0 / 0 the middle of 255 levels, or the lowest of few; all are 0 away then.
        if level.is_nan() {
            -most
        } else {
            level.clamp(-most, most)
        }
    }

    pub fn encode(self, row: &[f32], scales: &ScaleValues, record: &mut Vec<u8>) {
        let start = record.len();
        record.resize(start + self.record_bytes(row.len()), 0);
        let record = record.get_mut(start..).unwrap_or_default();
        let (centres, scales) = (scales.centres(), scales.scales());
        match self {
            Levels::Int8 => encode_int8(row, centres, scales, record),
            Levels::Bits4 => encode_bits::<4, 2>(row, centres, scales, record),
            Levels::Bits2 => encode_bits::<2, 4>(row, centres, scales, record),
            Levels::Bits1 => encode_bits::<1, 8>(row, centres, scales, record),
        }
    }

    pub fn decode(self, record: &[u8], scales: &ScaleValues, row: &mut [f32]) {
        let (centres, scales) = (scales.centres(), scales.scales());
        match self {
            Levels::Int8 => return decode_int8(record, centres, scales, row),
            Levels::Bits4 => unpack(record, &BITS4, row),
            Levels::Bits2 => unpack(record, &BITS2, row),
            Levels::Bits1 => unpack(record, &BITS1, row),
        }
        apply(centres, scales, row);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn encode_int8(row: &[f32], centres: &[f32], scales: &[f32], record: &mut [u8]) {
    for (((x, centre), scale), byte) in row.iter().zip(centres).zip(scales).zip(record) {
        let units = (f64::from(*x) - f64::from(*centre)) / f64::from(*scale);
        // 0 / 0 is NaN, which the cast makes 0.
        let level = units.round_ties_even().clamp(-127.0, 127.0) as i8;
        *byte = level.cast_unsigned();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn decode_int8(record: &[u8], centres: &[f32], scales: &[f32], row: &mut [f32]) {
    for (((x, byte), centre), scale) in row.iter_mut().zip(record).zip(centres).zip(scales) {
        *x = centre + scale * f32::from(byte.cast_signed());
    }
}

/// `PER` numbers a byte of `BITS` bits, the first in the lowest.
fn encode_bits<const BITS: usize, const PER: usize>(
    row: &[f32],
    centres: &[f32],
    scales: &[f32],
    record: &mut [u8],
) {
    let columns = row.chunks(PER).zip(centres.chunks(PER));
    for (((xs, centres), scales), byte) in columns.zip(scales.chunks(PER)).zip(record) {
        let numbers = xs.iter().zip(centres).zip(scales);
        *byte = numbers.rev().fold(0, |byte, ((x, centre), scale)| {
            let units = (f64::from(*x) - f64::from(*centre)) / f64::from(*scale);
            let lowest = f64::from(1u32 << (BITS - 1));
            // The cast rounds down, takes what is below the lowest level to it, and NaN (of 0 / 0) as well.
            let index = ((units + lowest) as u8).min(!(0xFFu8 << BITS));
            byte << BITS | index
        });
    }
}

/// The levels of the `PER` numbers in each possible byte.
const fn levels<const BITS: usize, const PER: usize>() -> [[f32; PER]; 256] {
    let mut table = [[0.0; PER]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut i = 0;
        while i < PER {
            let index = (byte >> (BITS * i)) & ((1 << BITS) - 1);
            table[byte][i] = index as f32 - ((1 << BITS) - 1) as f32 / 2.0;
            i += 1;
        }
        byte += 1;
    }
    table
}

static BITS4: [[f32; 2]; 256] = levels::<4, 2>();
static BITS2: [[f32; 4]; 256] = levels::<2, 4>();
static BITS1: [[f32; 8]; 256] = levels::<1, 8>();

fn unpack<const PER: usize>(record: &[u8], table: &[[f32; PER]; 256], row: &mut [f32]) {
    let (whole, rest) = row.as_chunks_mut::<PER>();
    // A byte is always an index into 256.
    let levels = |byte: &u8| table[usize::from(*byte)];
    let mut bytes = record.iter();
    for (xs, byte) in whole.iter_mut().zip(bytes.by_ref()) {
        *xs = levels(byte);
    }
    if let Some(byte) = bytes.next() {
        for (x, level) in rest.iter_mut().zip(levels(byte)) {
            *x = level;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn apply(centres: &[f32], scales: &[f32], row: &mut [f32]) {
    for ((x, centre), scale) in row.iter_mut().zip(centres).zip(scales) {
        *x = centre + scale * *x;
    }
}
