//! The codecs that keep each number as a level of its column: q8, q4, q2, q1, and the codes.

use crate::routes::codec::{Codec, Keeps, check_numbers};
use crate::routes::levels::Levels;
use crate::routes::scales::ScaleValues;

#[derive(Debug)]
pub struct Quantised {
    keeps: Keeps,
    columns: usize,
    levels: Levels,
}

impl Quantised {
    pub fn new(keeps: Keeps, columns: usize, levels: Levels) -> Self {
        Self {
            keeps,
            columns,
            levels,
        }
    }
}

/// So far from the largest f32 that |centre| + 128 * scale, which a part of scales promises, is finite however coarse the
/// levels (those of q1 are a scale apart, and the scale as large as half the column) and after widening.
const LIMIT: f32 = f32::MAX / 256.0;

impl Codec for Quantised {
    fn keeps(&self) -> Keeps {
        self.keeps
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        self.levels.record_bytes(self.columns)
    }

    fn levels(&self) -> Option<Levels> {
        Some(self.levels)
    }

    fn check(&self, row: &[f32]) -> Result<(), String> {
        check_numbers(row, LIMIT)
    }

    fn encode(&self, row: &[f32], scales: &ScaleValues, record: &mut Vec<u8>) {
        self.levels.encode(row, scales, record);
    }

    fn decode(&self, record: &[u8], scales: &ScaleValues, row: &mut [f32]) {
        self.levels.decode(record, scales, row);
    }

    /// Half a level, and the rounding of its product with the scale and of the sum with the centre.
    fn error_bound(&self, value: f32, scale: f32) -> f32 {
        scale * 0.500_02 + value.abs() * f32::EPSILON
    }
}
