//! A centre and a scale per column, and what they were fitted to, a part of its own: segments name it by hash, so equal
//! scales are one file.

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};
use crate::routes::fit;
use crate::routes::levels::Levels;
use crate::routes::seen::{Column, ColumnRange, MANY, Seen};
use crate::watch::Progress;

#[derive(Debug, Clone)]
pub struct Scales {
    values: ScaleValues,
    frame: Frame,
}

/// The largest magnitude that a column may hold, so far from the largest f32 that no level of any record overflows.
pub const LARGEST: f32 = f32::MAX / 1024.0;

impl Scales {
    pub fn open(map: Mapped, columns: usize) -> Result<Self> {
        let frame = Frame::open(map, Kind::Scales)?;
        let mut fields = frame.fields();
        let (declared, rows) = (fields.u64()?, fields.u64()?);
        let body = frame.body();
        let width = 8 + Column::BYTES;
        if declared != columns as u64 || columns.checked_mul(width) != Some(body.len()) {
            let found = format!("{declared} in {} bytes", body.len());
            return Err(frame.corrupt("scales", format!("{columns} of {width} bytes"), found));
        }
        let (numbers, seen) = body.split_at(8 * columns);
        let (words, _) = numbers.as_chunks::<4>();
        let (centres, scales) = words.split_at(columns);
        let numbers = |raw: &[[u8; 4]]| raw.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
        let (seen, _) = seen.as_chunks::<{ Column::BYTES }>();
        let seen = seen.iter().enumerate().map(|(i, raw)| {
            Column::from_bytes(raw, LARGEST).ok_or_else(|| {
                let expected = format!("a range up to {LARGEST:e} that holds mean and deviation");
                frame.corrupt("scales", expected, format!("others in column {i}"))
            })
        });
        let values = ScaleValues {
            seen: Seen {
                rows,
                columns: seen.collect::<Result<_>>()?,
            },
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
        let fields = FieldsWriter::new()
            .u64(values.scales.len() as u64)
            .u64(values.seen.rows);
        let mut frame = FrameWriter::create(dir, name, Kind::Scales)?;
        let numbers = values.centres.iter().chain(&values.scales);
        let seen = values.seen.columns.iter().flat_map(|c| c.to_bytes());
        let body: Vec<u8> = numbers.flat_map(|x| x.to_le_bytes()).chain(seen).collect();
        frame.write(&body)?;
        frame.finish(fields)
    }

    pub fn values(&self) -> &ScaleValues {
        &self.values
    }

    pub fn verify(&self) -> Result<()> {
        self.frame.verify(&Progress::unseen())
    }
}

/// The scales of the columns: a number of column c is `centres[c] + scales[c] * level`.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaleValues {
    centres: Vec<f32>,
    scales: Vec<f32>,
    /// What they were fitted to.
    seen: Seen,
}

/// By how much of its half width a column of int8 is widened beyond what was seen. Of rows that are drawn alike, the
/// largest so far is exceeded again and again, each time by less: without this, 100 million rows of 64 Gaussian columns,
/// in batches of 65,536, are widened 390 times, with it 77 times, and their scales end 8% wider. A first fit has no such
/// room.
const HEAD_ROOM: f64 = 0.125;

impl ScaleValues {
    /// Those of a codec that has none.
    pub fn none() -> &'static Self {
        static NONE: ScaleValues = ScaleValues {
            centres: Vec::new(),
            scales: Vec::new(),
            seen: Seen {
                rows: 0,
                columns: Vec::new(),
            },
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

    /// Those of little error on such columns. A column with one value is exact, and with int8 every number is within
    /// half a scale of a level.
    pub fn fit(levels: Levels, range: &ColumnRange) -> Self {
        let seen = range.seen();
        if !levels.few() || !range.is_many() {
            return Self::fit_seen(levels, seen);
        }
        let columns = seen.columns.iter().enumerate();
        let columns = columns.map(|(i, column)| fit::to_numbers(levels, column, range.sample(i)));
        let (centres, scales) = columns.unzip();
        Self {
            centres,
            scales,
            seen,
        }
    }

    fn fit_seen(levels: Levels, mut seen: Seen) -> Self {
        let columns = seen.columns.iter().map(|c| fit::to_column(levels, c));
        let (centres, scales) = columns.unzip();
        if levels.few() {
            // More rows would say that the numbers themselves were looked at.
            seen.rows = seen.rows.min(MANY - 1);
        }
        Self {
            centres,
            scales,
            seen,
        }
    }

    /// Whether these rows can be kept with the same scales: every number of a column is within half a scale of a level,
    /// or, with fewer levels than int8 has, a new fit would be much the same. Scales that were fitted to few rows are
    /// not for many.
    pub fn covers(&self, levels: Levels, range: &ColumnRange) -> bool {
        let new = range.seen();
        if self.scales.len() != new.columns.len() {
            return false;
        }
        if new.rows == 0 {
            return true;
        }
        if levels.few() && range.is_many() && self.seen.rows < MANY {
            return false;
        }
        let all = new.after(&self.seen);
        let fitted = self.seen.columns.iter().zip(&all.columns);
        let columns = self.columns().zip(&new.columns).zip(fitted).enumerate();
        let mut columns = columns.map(|(i, ((held, new), (fitted, all)))| {
            let (centre, scale) = (f64::from(held.0), f64::from(held.1));
            let reach = levels.reach() * scale;
            let reached =
                f64::from(new.high) - centre <= reach && centre - f64::from(new.low) <= reach;
            reached
                || levels.few()
                    && (fit::is_near(levels, fitted, all)
                        || range.is_many() && fit::is_as_good(levels, held, new, range.sample(i)))
        });
        columns.all(|covered| covered)
    }

    /// Scales for when `old` does not cover these rows. With int8 they cover these rows and what `old` covers: a column
    /// that has no head room left gets some, the others stay as they are, and none is narrower than before. With fewer
    /// levels they are those of a new fit: to these rows if they are many, else to what is known of these and the ones
    /// before.
    pub fn widen(levels: Levels, old: Option<&Self>, range: &ColumnRange) -> Self {
        let Some(old) = old else {
            return Self::fit(levels, range);
        };
        let new = range.seen();
        if new.rows == 0 {
            return old.clone();
        }
        if levels.few() {
            return match range.is_many() {
                true => Self::fit(levels, range),
                false => Self::fit_seen(levels, new.after(&old.seen)),
            };
        }
        let seen = new.after(&old.seen);
        let columns = old.columns().zip(&new.columns);
        let columns = columns.map(|((centre, scale), new)| {
            let (low, high) = (f64::from(new.low), f64::from(new.high));
            let outer = levels.outer() * f64::from(scale);
            let (old_low, old_high) = (f64::from(centre) - outer, f64::from(centre) + outer);
            let room = (high - low) / 2.0 * HEAD_ROOM;
            let (low, high) = (low - room, high + room);
            if old_low <= low && high <= old_high {
                return (centre, scale);
            }
            // No writer makes wider ones, and what is widened beyond could not be read again.
            if old_low.min(-old_high) < -2.0 * f64::from(LARGEST) {
                return fit::to_range(levels, low, high);
            }
            let (centre, wider) = fit::to_range(levels, low.min(old_low), high.max(old_high));
            (centre, wider.max(scale))
        });
        let (centres, scales) = columns.unzip();
        Self {
            centres,
            scales,
            seen,
        }
    }

    fn columns(&self) -> impl Iterator<Item = (f32, f32)> {
        self.centres
            .iter()
            .copied()
            .zip(self.scales.iter().copied())
    }
}

/// Of centres and scales from elsewhere: what they were fitted to is not known.
impl FromIterator<(f32, f32)> for ScaleValues {
    fn from_iter<I: IntoIterator<Item = (f32, f32)>>(columns: I) -> Self {
        let (centres, scales): (Vec<f32>, Vec<f32>) = columns.into_iter().unzip();
        let seen = Seen {
            rows: 0,
            columns: vec![Column::default(); scales.len()],
        };
        Self {
            centres,
            scales,
            seen,
        }
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
        let seen = Column {
            low: -2.0,
            high: LARGEST,
            mean: -1.0,
            deviation: 0.25,
        };
        let of = |columns: &[(f32, f32)], seen: Column| {
            let (centres, scales) = columns.iter().copied().unzip();
            let seen = Seen {
                rows: 7,
                columns: vec![seen; columns.len()],
            };
            ScaleValues {
                centres,
                scales,
                seen,
            }
        };
        let write = |i: usize, values: &ScaleValues| {
            let name = format!("scales-{i}");
            let digest = Scales::write(&dir, &name, values).unwrap();
            Scales::open(dir.map(&name, digest.length).unwrap(), 2)
        };
        let through_a_file = |i: usize, columns: &[(f32, f32)]| write(i, &of(columns, seen));
        let fine = [(-1.5, 0.0), (f32::MAX / 4.0, f32::MAX / 512.0)];
        let scales = through_a_file(0, &fine).unwrap();
        assert_eq!(*scales.values(), of(&fine, seen));
        let outside = Column { mean: -3.0, ..seen };
        let error = write(20, &of(&fine, outside)).unwrap_err();
        assert!(error.to_string().contains("mean"), "{error}");
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
        let old = ScaleValues::fit(Levels::Int8, &at(1.0));
        assert!(!old.covers(Levels::Int8, &at(1.01)));
        let wider = ScaleValues::widen(Levels::Int8, Some(&old), &at(1.01));
        // Half a scale beyond the outermost levels, too.
        assert!(wider.covers(Levels::Int8, &at(1.01 * 1.125 * 127.4 / 127.0)));
        assert!(!wider.covers(Levels::Int8, &at(1.01 * 1.125 * 127.6 / 127.0)));
        let same = ScaleValues::widen(Levels::Int8, Some(&wider), &at(1.0));
        let stay = (same.centres(), same.scales()) == (wider.centres(), wider.scales());
        assert!(stay, "a column that has room stays as it is");
    }
}
