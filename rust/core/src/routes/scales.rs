//! A centre and a scale per column, a part of its own: segments name it by hash, so equal scales are one file.

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};
use crate::routes::levels::Levels;

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
        let (centres, scales) = words.split_at(columns.min(words.len()));
        if declared != columns as u64 || scales.len() != columns || !rest.is_empty() {
            let found = format!("{declared} in {} bytes", frame.body().len());
            return Err(frame.corrupt("scales", format!("{columns} centres and scales"), found));
        }
        let numbers = |raw: &[[u8; 4]]| raw.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
        let values = ScaleValues {
            centres: numbers(centres),
            scales: numbers(scales),
        };
        // 128 is the largest magnitude of a level that a damaged record may hold.
        let fine = |(centre, scale): &(f32, f32)| {
            *scale >= 0.0 && (centre.abs() + 128.0 * *scale).is_finite()
        };
        if let Some((centre, scale)) = values.columns().find(|column| !fine(column)) {
            let expected = "scales of 0 or above, every level finite";
            return Err(frame.corrupt("scales", expected, format!("{centre} and {scale}")));
        }
        Ok(Self { values, frame })
    }

    pub fn write(dir: &Directory, name: &str, values: &ScaleValues) -> Result<Digest> {
        let fields = FieldsWriter::new().u64(values.scales.len() as u64);
        let mut frame = FrameWriter::create(dir, name, Kind::Scales)?;
        let numbers = values.centres.iter().chain(&values.scales);
        let body: Vec<u8> = numbers.flat_map(|x| x.to_le_bytes()).collect();
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

/// The scales of the columns: a number of column c is `centres[c] + scales[c] * level`.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaleValues {
    centres: Vec<f32>,
    scales: Vec<f32>,
}

/// By how much of its half width a column is widened beyond what was seen. Of rows that are drawn alike, the largest so
/// far is exceeded again and again, each time by less: without this, 100 million rows of 64 Gaussian columns, in batches
/// of 65,536, are widened 390 times, with it 77 times, and their scales end 8% wider. A first fit has no such room.
const HEAD_ROOM: f64 = 0.125;

impl ScaleValues {
    /// Those of a codec that has none.
    pub fn none() -> &'static Self {
        static NONE: ScaleValues = ScaleValues {
            centres: Vec::new(),
            scales: Vec::new(),
        };
        &NONE
    }

    /// One for each column, of the same number.
    pub fn centres(&self) -> &[f32] {
        &self.centres
    }

    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The narrowest that cover this range. A column with one value is exact.
    pub fn fit(levels: Levels, range: &ColumnRange) -> Self {
        range
            .columns()
            .map(|(low, high)| fit_column(levels, low, high))
            .collect()
    }

    /// Whether every number in this range is within half a scale of a level.
    pub fn covers(&self, levels: Levels, range: &ColumnRange) -> bool {
        self.scales.len() == range.low.len()
            && self
                .columns()
                .zip(range.columns())
                .all(|((centre, scale), (low, high))| {
                    let reach = levels.reach() * f64::from(scale);
                    high - f64::from(centre) <= reach && f64::from(centre) - low <= reach
                })
    }

    /// Scales that cover this range and what `old` was fitted to, for when `old` does not cover the range: a column
    /// that has no head room left over the range gets some, the others stay as they are. None is narrower than before.
    pub fn widen(levels: Levels, old: Option<&Self>, range: &ColumnRange) -> Self {
        let Some(old) = old else {
            return Self::fit(levels, range);
        };
        old.columns()
            .zip(range.columns())
            .map(|((centre, scale), (low, high))| {
                let outer = levels.outer() * f64::from(scale);
                let (old_low, old_high) = (f64::from(centre) - outer, f64::from(centre) + outer);
                let room = (high - low).max(0.0) / 2.0 * HEAD_ROOM;
                let (low, high) = (low - room, high + room);
                if old_low <= low && high <= old_high {
                    return (centre, scale);
                }
                let (centre, wider) = fit_column(levels, low.min(old_low), high.max(old_high));
                (centre, wider.max(scale))
            })
            .collect()
    }

    fn columns(&self) -> impl Iterator<Item = (f32, f32)> {
        self.centres
            .iter()
            .copied()
            .zip(self.scales.iter().copied())
    }
}

impl FromIterator<(f32, f32)> for ScaleValues {
    fn from_iter<I: IntoIterator<Item = (f32, f32)>>(columns: I) -> Self {
        let (centres, scales) = columns.into_iter().unzip();
        Self { centres, scales }
    }
}

/// Centre and scale, the scale rounded up where it must be for both ends to be reached.
fn fit_column(levels: Levels, low: f64, high: f64) -> (f32, f32) {
    if low > high {
        return (0.0, 0.0);
    }
    let centre = ((low + high) / 2.0) as f32;
    let half = (high - f64::from(centre)).max(f64::from(centre) - low);
    if half == 0.0 {
        return (centre, 0.0);
    }
    // A scale below the normal numbers would be too coarse.
    let scale = ((half / levels.outer()) as f32).max(f32::MIN_POSITIVE);
    match f64::from(scale) * levels.reach() < half {
        true => (centre, scale.next_up()),
        false => (centre, scale),
    }
}

/// The least and the greatest number of each column.
#[derive(Debug, Clone)]
pub struct ColumnRange {
    low: Vec<f32>,
    high: Vec<f32>,
}

impl ColumnRange {
    /// Of no row.
    pub fn new(columns: usize) -> Self {
        Self {
            low: vec![f32::INFINITY; columns],
            high: vec![f32::NEG_INFINITY; columns],
        }
    }

    pub fn extend(&mut self, row: &[f32]) {
        for ((low, high), x) in self.low.iter_mut().zip(&mut self.high).zip(row) {
            *low = low.min(*x);
            *high = high.max(*x);
        }
    }

    /// With the rows of `other`.
    pub fn union(&mut self, other: &Self) {
        self.extend(&other.low);
        self.extend(&other.high);
    }

    fn columns(&self) -> impl Iterator<Item = (f64, f64)> {
        let numbers = self.low.iter().zip(&self.high);
        numbers.map(|(low, high)| (f64::from(*low), f64::from(*high)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn scales_are_read_back_and_strange_ones_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Directory::open(tmp.path()).unwrap();
        let through_a_file = |i: usize, columns: &[(f32, f32)]| {
            let values: ScaleValues = columns.iter().copied().collect();
            let name = format!("scales-{i}");
            let digest = Scales::write(&dir, &name, &values).unwrap();
            Scales::open(dir.map(&name, digest.length).unwrap(), 2)
        };
        let fine = [(-1.5, 0.0), (f32::MAX / 4.0, f32::MAX / 512.0)];
        let scales = through_a_file(0, &fine).unwrap();
        assert_eq!(*scales.values(), fine.into_iter().collect());
        let strange = [
            (f32::NAN, 1.0),
            (f32::INFINITY, 0.0),
            (0.0, -1.0),
            (0.0, f32::NAN),
            (0.0, f32::MAX / 100.0),
            (f32::MAX, f32::MAX / 256.0),
        ];
        for (i, column) in strange.into_iter().enumerate() {
            let error = through_a_file(i + 1, &[(0.0, 1.0), column]).unwrap_err();
            assert!(error.to_string().contains("scales"), "{column:?}: {error}");
        }
        let columns = [(0.0, 1.0); 3];
        assert!(
            through_a_file(10, &columns[..1]).is_err() && through_a_file(11, &columns).is_err()
        );
    }

    /// What the head room is for: of batches that are drawn alike, few need wider scales.
    #[test]
    fn a_widened_column_has_room_for_the_next() {
        let at = |x: f32| {
            let mut range = ColumnRange::new(1);
            range.extend(&[-x]);
            range.extend(&[x]);
            range
        };
        let old = ScaleValues::fit(Levels::Bits4, &at(1.0));
        assert!(!old.covers(Levels::Bits4, &at(1.01)));
        let wider = ScaleValues::widen(Levels::Bits4, Some(&old), &at(1.01));
        assert!(wider.covers(Levels::Bits4, &at(1.01 * 1.125)));
        assert!(!wider.covers(Levels::Bits4, &at(1.01 * 1.126)));
        let same = ScaleValues::widen(Levels::Bits4, Some(&wider), &at(1.0));
        assert_eq!(same, wider, "a column that has room stays as it is");
    }
}
