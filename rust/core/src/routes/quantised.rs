//! The codecs that keep each number as a level of its column: q8, q4, q2, q1, and the codes.

use crate::routes::codec::{Codec, Keeps, check_numbers};
use crate::routes::levels::Levels;
use crate::routes::scales::{LARGEST, ScaleValues};

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
        check_numbers(row, LARGEST)
    }

    fn encode(&self, row: &[f32], scales: &ScaleValues, record: &mut Vec<u8>) {
        self.levels.encode(row, scales, record);
    }

    fn decode(&self, record: &[u8], scales: &ScaleValues, row: &mut [f32]) {
        self.levels.decode(record, scales, row);
    }

    /// Half a level, or what a number lies beyond the outermost one; and the rounding of the product of level and scale,
    /// and of its sum with the centre.
    fn error_bound(&self, value: f32, centre: f32, scale: f32) -> f32 {
        let off = (f64::from(value) - f64::from(centre)).abs();
        let scale = f64::from(scale);
        let of_level = (off - self.levels.outermost() * scale).max(scale / 2.0);
        let rounding = f64::from(value.abs().max(centre.abs()) * f32::EPSILON) + scale * 2e-5;
        ((of_level + rounding) as f32).next_up()
    }
}
