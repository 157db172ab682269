//! One scale per column, a part of its own: segments name it by hash, so equal scales are one file.

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};

#[derive(Debug, Clone)]
pub struct Scales {
    values: ScaleValues,
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
        Ok(Self {
            values: ScaleValues(values),
            frame,
        })
    }

    pub fn write(dir: &Directory, name: &str, values: &ScaleValues) -> Result<Digest> {
        let fields = FieldsWriter::new().u64(values.0.len() as u64);
        let mut frame = FrameWriter::create(dir, name, Kind::Scales)?;
        let body: Vec<u8> = values.0.iter().flat_map(|s| s.to_le_bytes()).collect();
        frame.write(&body)?;
        frame.finish(fields)
    }

    pub fn values(&self) -> &ScaleValues {
        &self.values
    }

    pub fn verify(&self) -> Result<()> {
        self.frame.verify()
    }
}

#[derive(Debug, Clone)]
pub struct ScaleValues(pub Vec<f32>);
#[derive(Debug, Clone)]
pub struct ColumnRange(Vec<f32>);
impl ColumnRange {
    pub fn new(columns: usize) -> Self {
        Self(vec![0.0; columns])
    }
    pub fn extend(&mut self, row: &[f32]) {
        for (max, x) in self.0.iter_mut().zip(row) {
            *max = max.max(x.abs());
        }
    }
}
impl ScaleValues {
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }
    pub fn fit(range: &ColumnRange) -> Self {
        Self::widen(None, range)
    }
    pub fn covers(&self, range: &ColumnRange) -> bool {
        self.0
            .iter()
            .zip(&range.0)
            .all(|(scale, max)| f64::from(*max) <= 127.5 * f64::from(*scale))
    }
    pub fn widen(old: Option<&Self>, range: &ColumnRange) -> Self {
        let mut scales: Vec<f32> = range
            .0
            .iter()
            .map(|max| match *max {
                0.0 => 0.0,
                max => (max / 127.0).max(f32::MIN_POSITIVE),
            })
            .collect();
        for (scale, old) in scales
            .iter_mut()
            .zip(old.map(|o| o.as_slice()).unwrap_or_default())
        {
            *scale = scale.max(*old);
        }
        Self(scales)
    }
}
