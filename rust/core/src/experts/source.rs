//! Numbers of experts, read as f32 and written in a dtype a piece at a time.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::experts::Place;
use crate::tensors::Body;
use crate::watch::Progress;

/// How many numbers are taken at a time.
pub const CHUNK: usize = 1 << 16;
const LARGEST: f32 = 127.0;
/// The largest scale whose largest number is finite.
pub const MAX_SCALE: f32 = (f32::MAX / LARGEST).next_down();

/// Which of the K * r rows each number of a tensor belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub experts: usize,
    pub rank: usize,
    /// How many numbers of one row stand side by side.
    pub run: usize,
}

impl Rows {
    fn count(self) -> usize {
        self.experts * self.rank
    }

    /// The rows of the numbers from `start` on, in C order.
    fn from(self, start: usize) -> impl Iterator<Item = usize> {
        let (count, run) = (self.count(), self.run);
        let (mut row, mut within) = (start / run % count, start % run);
        std::iter::from_fn(move || {
            let this = row;
            within += 1;
            if within == run {
                within = 0;
                row = if row + 1 == count { 0 } else { row + 1 };
            }
            Some(this)
        })
    }
}

/// Numbers that can be read as f32 a piece at a time, wherever they are.
pub struct Source<'s> {
    pub place: &'s Place,
    pub dtype: Dtype,
    pub data: &'s [u8],
    /// For int8, one a row.
    pub scales: Vec<f32>,
}

impl Source<'_> {
    /// Pieces, each with the place of its first number.
    pub fn chunks(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let chunks = self.data.chunks(CHUNK * self.dtype.width());
        chunks.enumerate().map(|(i, bytes)| (i * CHUNK, bytes))
    }

    /// Appends the numbers in `bytes`, of which the first is number `start` of the tensor.
    pub fn decode(&self, start: usize, bytes: &[u8], numbers: &mut Vec<f32>) {
        let before = numbers.len();
        self.dtype.decode(bytes, numbers);
        if self.dtype == Dtype::Int8 {
            let new = numbers.iter_mut().skip(before);
            for (x, row) in new.zip(self.place.rows.from(start)) {
                *x *= self.scales.get(row).copied().unwrap_or_default();
            }
        }
    }

    /// For each row the scale that makes its largest number 127. Counts bytes.
    pub fn fitted_scales(&self, progress: &Progress) -> Result<Vec<f32>> {
        if self.dtype == Dtype::Int8 {
            return Ok(self.scales.clone());
        }
        let mut largest = vec![0f32; self.place.rows.count()];
        let mut numbers = Vec::new();
        for (start, bytes) in self.chunks() {
            numbers.clear();
            self.decode(start, bytes, &mut numbers);
            for (x, row) in numbers.iter().zip(self.place.rows.from(start)) {
                if let Some(most) = largest.get_mut(row) {
                    *most = most.max(x.abs());
                }
            }
            progress.add(bytes.len() as u64)?;
        }
        Ok(largest.into_iter().map(scale_for).collect())
    }

    /// Writes all numbers as `dtype`, with `scales` for int8. Counts the bytes that they have here.
    pub fn write_as(
        &self,
        dtype: Dtype,
        scales: &[f32],
        body: &mut Body,
        progress: &Progress,
    ) -> Result<()> {
        if dtype == self.dtype {
            // Integers keep their scales.
            return body.write(self.data);
        }
        let (mut numbers, mut out) = (Vec::new(), Vec::new());
        for (start, bytes) in self.chunks() {
            numbers.clear();
            out.clear();
            self.decode(start, bytes, &mut numbers);
            if dtype == Dtype::Int8 {
                for (x, row) in numbers.iter_mut().zip(self.place.rows.from(start)) {
                    *x = integer(*x, scales.get(row).copied().unwrap_or_default());
                }
            }
            dtype.encode(&numbers, &mut out).map_err(|x| {
                Error::invalid(format!(
                    "experts {:?}: {x:e} is too large for {dtype}: choose another dtype",
                    self.place.name
                ))
            })?;
            body.write(&out)?;
            progress.add(bytes.len() as u64)?;
        }
        Ok(())
    }
}

/// The scale for a row whose largest number is `most`: no number is further than half of it from an integer
/// times it.
pub fn scale_for(most: f32) -> f32 {
    let scale = (f64::from(most) / f64::from(LARGEST)) as f32;
    // Of the smallest numbers that there are, the nearest scale may be too small, even 0.
    let short = f64::from(scale) * (f64::from(LARGEST) + 0.5) < f64::from(most);
    let scale = if short { scale.next_up() } else { scale };
    scale.min(MAX_SCALE)
}

fn integer(x: f32, scale: f32) -> f32 {
    if scale == 0.0 {
        return 0.0;
    }
    let steps = (f64::from(x) / f64::from(scale)).round() as f32;
    steps.clamp(-LARGEST, LARGEST)
}
