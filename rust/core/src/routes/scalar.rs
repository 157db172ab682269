//! Codecs that keep each logit as a number by itself: f32 and f16.

use half::f16;

use crate::routes::codec::{Codec, Keeps, check_numbers};
use crate::routes::levels::Levels;
use crate::routes::scales::ScaleValues;

#[derive(Debug)]
pub struct F32 {
    columns: usize,
}

impl F32 {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for F32 {
    fn keeps(&self) -> Keeps {
        Keeps::Logits
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        4 * self.columns
    }

    fn levels(&self) -> Option<Levels> {
        None
    }

    fn check(&self, row: &[f32]) -> Result<(), String> {
        check_numbers(row, f32::MAX)
    }

    fn encode(&self, row: &[f32], _: &ScaleValues, record: &mut Vec<u8>) {
        record.extend(row.iter().flat_map(|x| x.to_le_bytes()));
    }

    fn decode(&self, record: &[u8], _: &ScaleValues, row: &mut [f32]) {
        let (words, _) = record.as_chunks::<4>();
        for (x, raw) in row.iter_mut().zip(words) {
            *x = f32::from_le_bytes(*raw);
        }
    }

    fn error_bound(&self, _: f32, _: f32, _: f32) -> f32 {
        0.0
    }
}

#[derive(Debug)]
pub struct F16 {
    columns: usize,
}

impl F16 {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for F16 {
    fn keeps(&self) -> Keeps {
        Keeps::Logits
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        2 * self.columns
    }

    fn levels(&self) -> Option<Levels> {
        None
    }

    fn check(&self, row: &[f32]) -> Result<(), String> {
        check_numbers(row, f16::MAX.to_f32())
    }

    fn encode(&self, row: &[f32], _: &ScaleValues, record: &mut Vec<u8>) {
        record.extend(row.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
    }

    fn decode(&self, record: &[u8], _: &ScaleValues, row: &mut [f32]) {
        let (words, _) = record.as_chunks::<2>();
        for (x, raw) in row.iter_mut().zip(words) {
            *x = f16::from_le_bytes(*raw).to_f32();
        }
    }

    /// Half a unit in the last of 11 bits, or half the smallest subnormal.
    fn error_bound(&self, value: f32, _: f32, _: f32) -> f32 {
        (value.abs() / 2048.0).max(f32::from_bits(0x3300_0000))
    }
}
