//! The centre and the scale of a column, from its numbers or from what is known of them.

use crate::routes::levels::Levels;
use crate::routes::seen::Column;

/// With so much of the variance that numbers between two ends can have, a column is taken to have two values: what lies
/// between the ends adds at most the rest to the mean square error.
const TWO_VALUED: f64 = 0.95;

/// A scale of few levels stays while it is between so many times that of a new fit, and its centre no further from the
/// new one than this share of the deviation: then the error of a Gaussian column is at most 1.19 times the least.
const NEAR: [f64; 2] = [0.85, 1.25];
const NEAR_CENTRE: f64 = 0.25;
/// The same as a mean square error.
const AS_GOOD: f64 = 1.19 * 1.19;

/// From where a fit to numbers starts, in the scales that suit a Gaussian column.
const STARTS: [f64; 3] = [0.5, 1.0, 1.5];
/// So often is a start improved at most, and as long as it becomes so much better.
const STEPS: usize = 16;
const BETTER: f64 = 0.995;
/// What is known of a column is left aside for what some of its numbers say only where the mean square error falls below so
/// much: by chance alone, the error of these falls by a few per cent, and that of the others grows.
const CLEARLY: f64 = 0.9;

/// From its range, mean and deviation: centre and scale of least error, of those that suit a Gaussian column, a uniform
/// one, or one of two values.
pub fn to_column(levels: Levels, column: &Column) -> (f32, f32) {
    let (low, high) = (f64::from(column.low), f64::from(column.high));
    let Some(gaussian) = levels.gaussian().filter(|_| low < high) else {
        return to_range(levels, low, high);
    };
    let most = (high - column.mean) * (column.mean - low);
    if column.deviation.powi(2) >= TWO_VALUED * most {
        return to_ends(levels, low, high);
    }
    // For two levels the deviation tells more than the range, whichever is smaller: the error of a uniform column is 1%
    // larger, and that of numbers near two values far smaller.
    let scale = gaussian * column.deviation;
    if levels == Levels::Bits1 || scale < (high - low) / 2.0 / levels.outer() {
        return (column.mean as f32, normal(scale));
    }
    to_range(levels, low, high)
}

/// The narrowest scale with which every number is within half a scale of a level, rounded up where it must be for both
/// ends to be reached.
pub fn to_range(levels: Levels, low: f64, high: f64) -> (f32, f32) {
    let centre = ((low + high) / 2.0) as f32;
    let half = (high - f64::from(centre)).max(f64::from(centre) - low);
    if half == 0.0 {
        return (centre, 0.0);
    }
    let scale = normal(half / levels.outer());
    match f64::from(scale) * levels.reach() < half {
        true => (centre, scale.next_up()),
        false => (centre, scale),
    }
}

/// The outermost levels at the ends.
fn to_ends(levels: Levels, low: f64, high: f64) -> (f32, f32) {
    let scale = (high - low) / (2.0 * levels.outermost());
    (((low + high) / 2.0) as f32, normal(scale))
}

/// A scale below the normal numbers would be too coarse.
fn normal(scale: f64) -> f32 {
    (scale as f32).max(f32::MIN_POSITIVE)
}

/// From some of its numbers, drawn by chance: whatever the column is like, the mean square error on these is no larger
/// than with the fit to what is known of it, nor than with their mean alone.
pub fn to_numbers(
    levels: Levels,
    column: &Column,
    numbers: impl Iterator<Item = f32>,
) -> (f32, f32) {
    let known = to_column(levels, column);
    let mut numbers: Vec<f64> = numbers.map(f64::from).collect();
    let Some(gaussian) = levels.gaussian().filter(|_| column.low < column.high) else {
        return known;
    };
    numbers.sort_unstable_by(f64::total_cmp);
    let (Some(low), Some(high), Some(median)) = (
        numbers.first(),
        numbers.last(),
        numbers.get(numbers.len() / 2),
    ) else {
        return known;
    };
    let mean = mean(numbers.iter().copied());
    let deviation = square(&numbers, |x| x - mean).sqrt();
    let ranges = [
        to_range(levels, column.low.into(), column.high.into()),
        to_ends(levels, *low, *high),
    ];
    let scales = STARTS.map(|factor| factor * gaussian);
    let around = scales.map(|scale| (mean as f32, normal(scale * deviation)));
    // With a level on the commonest number, if there is one.
    let on = scales.map(|scale| {
        let scale = scale * column.deviation;
        ((median - scale / 2.0) as f32, normal(scale))
    });
    let starts = ranges.into_iter().chain(around).chain(on);
    let of_known = error(levels, known, &numbers);
    let limit = match of_known <= deviation.powi(2) {
        true => CLEARLY * of_known,
        false => of_known,
    };
    let mut best = (known, limit);
    for start in std::iter::once(known).chain(starts) {
        let found = improved(levels, start, mean, &numbers);
        if found.1 < best.1 {
            best = found;
        }
    }
    best.0
}

/// Levels for numbers and numbers for levels, by turns (Lloyd, 1957): each number goes to its nearest level, then centre
/// and scale are those of the line of least squares through them.
fn improved(levels: Levels, start: (f32, f32), mean: f64, numbers: &[f64]) -> ((f32, f32), f64) {
    let mut best = (start, error(levels, start, numbers));
    for _ in 0..STEPS {
        let of = |x: &f64| levels.nearest(*x, best.0);
        let middle = self::mean(numbers.iter().map(of));
        let (mut both, mut own) = (0.0, 0.0);
        for x in numbers {
            let off = of(x) - middle;
            both += off * (x - mean);
            own += off * off;
        }
        let scale = both / own;
        // Nor where all have the same level.
        if scale.is_nan() || scale <= 0.0 {
            break;
        }
        let next = ((mean - scale * middle) as f32, normal(scale));
        let next = (next, error(levels, next, numbers));
        let before = best.1;
        if next.1 < before {
            best = next;
        }
        if next.1 >= BETTER * before {
            break;
        }
    }
    best
}

fn mean(numbers: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = numbers.len() as f64;
    numbers.sum::<f64>() / n
}

fn square(numbers: &[f64], of: impl Fn(f64) -> f64) -> f64 {
    mean(numbers.iter().map(|x| of(*x).powi(2)))
}

/// The mean of its square.
fn error(levels: Levels, fit: (f32, f32), numbers: &[f64]) -> f64 {
    let (centre, scale) = (f64::from(fit.0), f64::from(fit.1));
    square(numbers, |x| centre + scale * levels.nearest(x, fit) - x)
}

/// Whether what is known of a column now leads to much the same centre and scale as what was known when they were fitted.
pub fn is_near(levels: Levels, fitted: &Column, now: &Column) -> bool {
    let (centre, scale) = to_column(levels, fitted);
    let (its_centre, its_scale) = to_column(levels, now);
    let (centre, its_centre) = (f64::from(centre), f64::from(its_centre));
    let [least, most] = NEAR.map(|factor| factor * f64::from(its_scale));
    // And the rounding of a centre.
    let off = NEAR_CENTRE * now.deviation + f64::from(f32::EPSILON) * centre.abs();
    (least..=most).contains(&f64::from(scale)) && (centre - its_centre).abs() <= off
}

/// Whether a new fit to these numbers would have much the same error.
pub fn is_as_good(
    levels: Levels,
    held: (f32, f32),
    column: &Column,
    numbers: impl Iterator<Item = f32> + Clone,
) -> bool {
    let new = to_numbers(levels, column, numbers.clone());
    let numbers: Vec<f64> = numbers.map(f64::from).collect();
    error(levels, held, &numbers) <= AS_GOOD * error(levels, new, &numbers)
}
