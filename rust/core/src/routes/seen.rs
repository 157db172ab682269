//! What is known of the numbers of each column, from which its scale is fitted.

use xxhash_rust::xxh3::xxh3_64;

/// From so many rows on, scales of few levels are fitted to the numbers themselves. What suits fewer of them suits the next
/// ones less well: freely fitted to 256 numbers, a Gaussian column in 4 bits has 12% more error than it need have.
pub const MANY: u64 = 512;
/// So many of them are looked at,
const SAMPLE_ROWS: usize = 1024;
/// and fewer of wide rows, so that they take little memory.
const SAMPLE_NUMBERS: usize = 1 << 23;

/// Gathers it row by row.
#[derive(Debug, Clone)]
pub struct ColumnRange {
    rows: u64,
    low: Vec<f32>,
    high: Vec<f32>,
    /// The first row: sums are of what differs from it, so that a column far from 0 does not lose its deviation.
    first: Vec<f32>,
    sums: Vec<f64>,
    squares: Vec<f64>,
    /// Rows drawn by chance, at most `room`.
    sample: Vec<f32>,
    room: u64,
}

impl ColumnRange {
    /// Of no row.
    pub fn new(columns: usize) -> Self {
        Self {
            rows: 0,
            low: vec![f32::INFINITY; columns],
            high: vec![f32::NEG_INFINITY; columns],
            first: vec![0.0; columns],
            sums: vec![0.0; columns],
            squares: vec![0.0; columns],
            sample: Vec::new(),
            room: (SAMPLE_NUMBERS / columns.max(1)).min(SAMPLE_ROWS) as u64,
        }
    }

    /// Whether it has seen no row.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Whether scales of few levels are to be fitted to the numbers themselves.
    pub(super) fn is_many(&self) -> bool {
        self.rows.min(self.room) >= MANY
    }

    /// Numbers of column `i`.
    pub(super) fn sample(&self, i: usize) -> impl Iterator<Item = f32> + Clone {
        self.sample
            .iter()
            .skip(i)
            .step_by(self.low.len().max(1))
            .copied()
    }

    /// Each row is in the sample with the same chance; the draws are the same each time.
    fn draw(&mut self, row: &[f32]) {
        if self.rows < self.room {
            return self.sample.extend_from_slice(row);
        }
        let draw = xxh3_64(&self.rows.to_le_bytes()) % (self.rows + 1);
        if draw < self.room {
            let from = draw as usize * row.len();
            if let Some(place) = self.sample.get_mut(from..from + row.len()) {
                place.copy_from_slice(row);
            }
        }
    }

    pub fn extend(&mut self, row: &[f32]) {
        if self.rows == 0 {
            for (first, x) in self.first.iter_mut().zip(row) {
                *first = *x;
            }
        }
        self.draw(row);
        self.rows += 1;
        for ((low, high), x) in self.low.iter_mut().zip(&mut self.high).zip(row) {
            *low = low.min(*x);
            *high = high.max(*x);
        }
        let sums = self.sums.iter_mut().zip(&mut self.squares);
        for (((sum, squares), first), x) in sums.zip(&self.first).zip(row) {
            let off = f64::from(*x) - f64::from(*first);
            *sum += off;
            *squares += off * off;
        }
    }

    pub(super) fn seen(&self) -> Seen {
        if self.rows == 0 {
            return Seen {
                rows: 0,
                columns: vec![Column::default(); self.low.len()],
            };
        }
        let rows = self.rows as f64;
        let ranges = self.low.iter().zip(&self.high).zip(&self.first);
        let columns = ranges.zip(self.sums.iter().zip(&self.squares));
        let columns = columns.map(|(((low, high), first), (sum, squares))| {
            let off = sum / rows;
            let variance = squares / rows - off * off;
            Column::new(*low, *high, f64::from(*first) + off, variance)
        });
        Seen {
            rows: self.rows,
            columns: columns.collect(),
        }
    }
}

/// What was found. With no row, of each column that it is 0.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Seen {
    /// How many rows it counts for.
    pub rows: u64,
    pub columns: Vec<Column>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Column {
    pub low: f32,
    pub high: f32,
    pub mean: f64,
    pub deviation: f64,
}

/// Rows of old that count beside fewer new ones.
const MEMORY: u64 = 1024;

impl Seen {
    /// These rows, after the `old` ones. Old rows count for no more than the new ones, or [`MEMORY`]: so a few new rows
    /// are judged by what is known, and many by themselves, however long the history of a store is.
    pub fn after(&self, old: &Self) -> Self {
        let counted = old.rows.min(self.rows.max(MEMORY));
        if self.rows == 0 || counted == 0 {
            let known = if self.rows == 0 { old } else { self };
            return known.clone();
        }
        let share = self.rows as f64 / (self.rows as f64 + counted as f64);
        let columns = self.columns.iter().zip(&old.columns);
        let columns = columns.map(|(new, old)| {
            let apart = new.mean - old.mean;
            let variance = new.deviation.powi(2) * share
                + old.deviation.powi(2) * (1.0 - share)
                + apart * apart * share * (1.0 - share);
            let (low, high) = (new.low.min(old.low), new.high.max(old.high));
            Column::new(low, high, old.mean + apart * share, variance)
        });
        Self {
            rows: self.rows.saturating_add(counted),
            columns: columns.collect(),
        }
    }
}

impl Column {
    /// Bytes in a file.
    pub const BYTES: usize = 24;

    /// With what rounding made of mean and variance put right.
    fn new(low: f32, high: f32, mean: f64, variance: f64) -> Self {
        let (least, greatest) = (f64::from(low), f64::from(high));
        Self {
            low,
            high,
            mean: mean.max(least).min(greatest),
            deviation: variance.max(0.0).sqrt().min((greatest - least) / 2.0),
        }
    }

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let fields = self.low.to_le_bytes().into_iter();
        let fields = fields
            .chain(self.high.to_le_bytes())
            .chain(self.mean.to_le_bytes())
            .chain(self.deviation.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, b)| *to = b);
        bytes
    }

    /// From a file; None unless it could be of numbers up to `limit`.
    pub fn from_bytes(raw: &[u8; Self::BYTES], limit: f32) -> Option<Self> {
        let (low, rest) = raw.split_first_chunk()?;
        let (high, rest) = rest.split_first_chunk()?;
        let (mean, rest) = rest.split_first_chunk()?;
        let column = Self {
            low: f32::from_le_bytes(*low),
            high: f32::from_le_bytes(*high),
            mean: f64::from_le_bytes(*mean),
            deviation: f64::from_le_bytes(*rest.first_chunk()?),
        };
        let (low, high) = (f64::from(column.low), f64::from(column.high));
        let fine = column.low >= -limit
            && column.high <= limit
            && (low..=high).contains(&column.mean)
            && (0.0..=(high - low) / 2.0).contains(&column.deviation);
        fine.then_some(column)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    fn of(numbers: &[f32]) -> Seen {
        let mut range = ColumnRange::new(1);
        numbers.iter().for_each(|x| range.extend(&[*x]));
        range.seen()
    }

    fn numbers() -> impl Strategy<Value = Vec<f32>> {
        let far = prop_oneof![Just(0.0f32), Just(-6e4), Just(1e30), Just(1e-39)];
        (far, 1usize..50).prop_flat_map(|(centre, n)| {
            let number =
                (-1.0f32..1.0).prop_map(move |x| centre + x * centre.abs().max(1e-38) * 1e-3);
            prop::collection::vec(number, n)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn mean_and_deviation_are_those_of_two_passes(a in numbers(), b in numbers()) {
            let both = [a.as_slice(), &b].concat();
            for (seen, numbers) in [(of(&a), &a), (of(&b).after(&of(&a)), &both)] {
                let n = numbers.len() as f64;
                let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
                let variance = numbers.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
                let column = seen.columns[0];
                prop_assert_eq!(seen.rows, numbers.len() as u64);
                let (low, high) = numbers.iter().fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
                prop_assert_eq!((column.low, column.high), (low, high));
                let size = mean.abs() + variance.sqrt();
                prop_assert!((column.mean - mean).abs() <= 1e-12 * size);
                prop_assert!((column.deviation - variance.sqrt()).abs() <= 1e-6 * variance.sqrt() + 1e-12 * size);
                prop_assert_eq!(Column::from_bytes(&column.to_bytes(), f32::MAX), Some(column));
            }
        }
    }

    #[test]
    fn old_rows_do_not_outweigh_many_new_ones() {
        let mean = |old: usize, new: usize| {
            let seen = of(&vec![1.0; new]).after(&of(&vec![0.0; old]));
            (seen.rows, seen.columns[0].mean)
        };
        assert_eq!(mean(50_000, 2_000), (4_000, 0.5));
        assert_eq!(mean(50_000, 1_024), (2_048, 0.5));
        assert_eq!(mean(50_000, 1).0, 1_025);
        assert_eq!(mean(0, 3), (3, 1.0));
        assert_eq!(mean(3, 0), (3, 0.0));
    }

    #[test]
    fn what_no_numbers_have_is_refused() {
        let fine = Column {
            low: -1.0,
            high: 2.0,
            mean: 0.5,
            deviation: 1.5,
        };
        let read = |column: Column| Column::from_bytes(&column.to_bytes(), 2.0);
        assert_eq!(read(fine), Some(fine));
        for strange in [
            Column { low: 0.6, ..fine },
            Column { low: -2.1, ..fine },
            Column { high: 2.1, ..fine },
            Column {
                low: f32::NAN,
                ..fine
            },
            Column {
                high: f32::INFINITY,
                ..fine
            },
            Column {
                mean: f64::NAN,
                ..fine
            },
            Column { mean: -1.1, ..fine },
            Column {
                deviation: -0.1,
                ..fine
            },
            Column {
                deviation: 1.6,
                ..fine
            },
            Column {
                deviation: f64::NAN,
                ..fine
            },
        ] {
            assert_eq!(read(strange), None, "{strange:?}");
        }
    }
}
