//! One scale per column, a part of its own: segments name it by hash, so equal scales are one file.

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};

#[derive(Debug, Clone)]
pub struct Scales {
    values: Vec<f32>,
    frame: Frame,
}

impl Scales {
    pub fn open(map: Mapped, columns: usize) -> Result<Self> {
        let frame = Frame::open(map, Kind::Scales)?;
        let declared = frame.fields().u64()?;
        let (words, rest) = frame.body().as_chunks::<4>();
        if declared != columns as u64 || words.len() != columns || !rest.is_empty() {
            let found = format!("{declared} in {} bytes", frame.body().len());
            return Err(frame.corrupt("scales", format!("{columns} numbers"), found));
        }
        let values: Vec<f32> = words.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
        if let Some(bad) = values.iter().find(|s| !(s.is_finite() && **s >= 0.0)) {
            return Err(frame.corrupt("scales", "finite numbers, 0 or above", bad));
        }
        Ok(Self { values, frame })
    }

    pub fn write(dir: &Directory, name: &str, values: &[f32]) -> Result<Digest> {
        let fields = FieldsWriter::new().u64(values.len() as u64);
        let mut frame = FrameWriter::create(dir, name, Kind::Scales)?;
        let body: Vec<u8> = values.iter().flat_map(|s| s.to_le_bytes()).collect();
        frame.write(&body)?;
        frame.finish(fields)
    }

    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub fn verify(&self) -> Result<()> {
        self.frame.verify()
    }
}

/// The largest magnitude in each column of `rows`.
pub fn column_maxima<'r>(columns: usize, rows: impl Iterator<Item = &'r [f32]>) -> Vec<f32> {
    let mut maxima = vec![0.0f32; columns];
    for row in rows {
        for (max, x) in maxima.iter_mut().zip(row) {
            *max = max.max(x.abs());
        }
    }
    maxima
}

/// Whether int8 in units of `scales` reaches these magnitudes with at most half a unit of error.
pub fn fits(scales: &[f32], maxima: &[f32]) -> bool {
    scales.len() == maxima.len()
        && scales
            .iter()
            .zip(maxima)
            .all(|(scale, max)| f64::from(*max) <= 127.5 * f64::from(*scale))
}

/// The scales for these magnitudes, none narrower than `old`.
pub fn widen(old: Option<&[f32]>, maxima: &[f32]) -> Vec<f32> {
    let mut scales: Vec<f32> = maxima
        .iter()
        .map(|max| match *max {
            0.0 => 0.0,
            // A scale of a subnormal column must not round to 0.
            max => (max / 127.0).max(f32::MIN_POSITIVE),
        })
        .collect();
    for (scale, old) in scales.iter_mut().zip(old.unwrap_or_default()) {
        *scale = scale.max(*old);
    }
    scales
}
