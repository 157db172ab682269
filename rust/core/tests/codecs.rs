//! Every codec within its error bound, and every row found, whatever documents have routes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{CODE, EXPERTS, GROUPS, LOGITS, create, spec};
use polyprag_core::routes::{Codec, ColumnRange, LARGEST, Levels, ScaleValues};
use polyprag_core::{CodecName, Document, DocumentId, IdType, Kind, OnDuplicate, RouteRows, Store};
use proptest::prelude::*;

/// Not a multiple of 8, so that the last byte of a record in bits is not full.
const COLUMNS: usize = 11;

/// Each codec of numbers, and the bytes of its record.
const CODECS: [(&str, usize); 8] = [
    ("f32", 44),
    ("f16", 22),
    ("q8", 11),
    ("q4", 6),
    ("q2", 3),
    ("q1", 2),
    ("code(11)", 11),
    ("code(11,int4)", 6),
];

fn codec(name: &str) -> Box<dyn Codec> {
    name.parse::<CodecName>().unwrap().build(1, COLUMNS)
}

/// A column: constant, subnormal, of mixed signs or far from 0, huge; even, of two values, or of a few far ones.
fn column(n: usize, limit: f32) -> impl Strategy<Value = Vec<f32>> {
    let around = |centre: f32, half: f32| centre - half..=centre + half;
    let numbers = prop_oneof![
        (-60000.0f32..60000.0).prop_map(|x| (x, x)),
        Just((-1e-40, 1e-39)),
        Just((0.0, f32::MIN_POSITIVE)),
        (-30.0f32..30.0, 0.0f32..30.0).prop_map(move |(c, h)| around(c, h).into_inner()),
        (-60000.0f32..60000.0, 0.0f32..1e-2).prop_map(move |(c, h)| around(c, h).into_inner()),
        Just((-limit, limit)),
        Just((limit * 0.5, limit)),
        Just((-0.0, 1.0)),
    ];
    let shapes = prop_oneof![Just((6u32, 1i32)), Just((0, 1)), Just((60, 9))];
    (numbers, shapes).prop_flat_map(move |((low, high), (between, power))| {
        // The ends themselves often, and what is drawn in f64 lies between them.
        let number = prop_oneof![
            1 => Just(low),
            1 => Just(high),
            between => (0.0f64..=1.0).prop_map(move |t| {
                let x = f64::from(low) + t.powi(power) * (f64::from(high) - f64::from(low));
                (x as f32).clamp(low.min(high), high.max(low))
            }),
        ];
        prop::collection::vec(number, n)
    })
}

fn rows(limit: f32) -> impl Strategy<Value = Vec<Vec<f32>>> {
    (1usize..20)
        .prop_flat_map(move |n| prop::collection::vec(column(n, limit), COLUMNS))
        .prop_map(|columns| {
            let n = columns[0].len();
            (0..n)
                .map(|i| columns.iter().map(|c| c[i]).collect())
                .collect()
        })
}

fn range(rows: &[Vec<f32>]) -> ColumnRange {
    let mut range = ColumnRange::new(COLUMNS);
    rows.iter().for_each(|row| range.extend(row));
    range
}

fn fit(codec: &dyn Codec, rows: &[Vec<f32>]) -> ScaleValues {
    match codec.levels() {
        Some(levels) => ScaleValues::fit(levels, &range(rows)),
        None => ScaleValues::none().clone(),
    }
}

fn encode(codec: &dyn Codec, scales: &ScaleValues, row: &[f32]) -> Vec<u8> {
    let mut record = Vec::new();
    codec.encode(row, scales, &mut record);
    record
}

fn decode(codec: &dyn Codec, scales: &ScaleValues, record: &[u8]) -> Vec<f32> {
    let mut row = vec![f32::NAN; codec.columns()];
    codec.decode(record, scales, &mut row);
    row
}

fn within_bounds(codec: &dyn Codec, scales: &ScaleValues, rows: &[Vec<f32>]) {
    for row in rows {
        assert_eq!(codec.check(row), Ok(()));
        let back = decode(codec, scales, &encode(codec, scales, row));
        for (i, (value, decoded)) in row.iter().zip(&back).enumerate() {
            let of_column = |numbers: &[f32]| numbers.get(i).copied().unwrap_or_default();
            let (centre, scale) = (of_column(scales.centres()), of_column(scales.scales()));
            let error = (f64::from(*decoded) - f64::from(*value)).abs();
            let bound = f64::from(codec.error_bound(*value, centre, scale));
            assert!(
                error <= bound,
                "{codec:?}: {value} became {decoded}, centre {centre}, scale {scale}"
            );
            let Some(levels) = codec.levels() else {
                continue;
            };
            // And the bound is no larger than it need be.
            let (value, centre, scale) = (f64::from(*value), f64::from(centre), f64::from(scale));
            let beyond = (value - centre).abs() - levels.reach() * scale;
            let exact = scale / 2.0 + beyond.max(0.0);
            let size = value.abs() + centre.abs() + scale + f64::from(f32::MIN_POSITIVE);
            assert!(bound <= exact + 3e-5 * scale + 1e-6 * size);
            assert!(levels != Levels::Int8 || beyond <= 0.0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_stays_within_the_bound(rows in rows(LARGEST)) {
        for (name, width) in CODECS.iter().filter(|(name, _)| *name != "f16") {
            let codec = codec(name);
            prop_assert_eq!(codec.record_bytes(), *width);
            let scales = fit(&*codec, &rows);
            within_bounds(&*codec, &scales, &rows);
            prop_assert_eq!(encode(&*codec, &scales, &rows[0]).len(), *width);
            for c in 0..COLUMNS {
                if rows.iter().all(|row| row[c] == rows[0][c]) {
                    let back = decode(&*codec, &scales, &encode(&*codec, &scales, &rows[0]));
                    prop_assert_eq!(back[c], rows[0][c], "{}: a constant column is exact", name);
                }
            }
        }
        let f32s = codec("f32");
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for row in &rows {
            let back = decode(&*f32s, ScaleValues::none(), &encode(&*f32s, ScaleValues::none(), row));
            prop_assert_eq!(bits(row), bits(&back));
        }
    }

    /// From so many on, scales are fitted to the numbers themselves.
    #[test]
    fn many_rows_stay_within_the_bound(few in rows(LARGEST), n in 500usize..600) {
        let rows: Vec<Vec<f32>> = few.iter().cycle().take(n).cloned().collect();
        for (name, _) in CODECS.iter().filter(|(name, _)| *name != "f16") {
            let codec = codec(name);
            let scales = fit(&*codec, &rows);
            within_bounds(&*codec, &scales, &few);
            let Some(levels) = codec.levels() else { continue };
            prop_assert!(scales.covers(levels, &range(&rows)));
            for (centre, scale) in scales.centres().iter().zip(scales.scales()) {
                prop_assert!(*scale >= 0.0 && (centre.abs() + 128.0 * scale).is_finite());
            }
            // Of all rows, so that the sample is them: no column is worse than its mean.
            for c in 0..COLUMNS {
                let column: Vec<f64> = few.iter().map(|row| f64::from(row[c])).collect();
                let back = few.iter().map(|row| decode(&*codec, &scales, &encode(&*codec, &scales, row))[c]);
                let squares = |others: &mut dyn Iterator<Item = f64>| -> f64 {
                    column.iter().zip(others).map(|(x, y)| (x - y).powi(2)).sum()
                };
                let mean = column.iter().sum::<f64>() / column.len() as f64;
                let of_mean = squares(&mut std::iter::repeat(mean));
                let got = squares(&mut back.map(f64::from));
                let size = column.iter().fold(f64::from(f32::MIN_POSITIVE), |most, x| most.max(x.abs()));
                // The last round of the cycle may be short.
                let size = 1e-5 * size + f64::from(f32::MIN_POSITIVE);
                let tolerance = size.powi(2) * column.len() as f64;
                prop_assert!(levels == Levels::Int8 || got <= 1.1 * of_mean + tolerance, "{name} {c}: {got} of {of_mean}");
            }
        }
    }

    #[test]
    fn binary16_stays_within_the_bound(rows in rows(65504.0)) {
        within_bounds(&*codec("f16"), ScaleValues::none(), &rows);
    }

    #[test]
    fn any_record_decodes(
        rows in rows(LARGEST),
        record in prop::collection::vec(any::<u8>(), 4 * COLUMNS),
    ) {
        for (name, width) in CODECS {
            let codec = codec(name);
            let scales = fit(&*codec, &rows);
            let row = decode(&*codec, &scales, &record[..width]);
            prop_assert!(!codec.scaled() || row.iter().all(|x| x.is_finite()), "{}: {:?}", name, row);
        }
    }

    /// A batch that the scales do not cover widens them.
    #[test]
    fn widening_suits_both(before in rows(LARGEST), after in rows(LARGEST)) {
        for (name, _) in CODECS {
            let codec = codec(name);
            let Some(levels) = codec.levels() else { continue };
            let old = ScaleValues::fit(levels, &range(&before));
            prop_assert!(old.covers(levels, &range(&before)));
            prop_assert!(old.covers(levels, &ColumnRange::new(COLUMNS)));
            let nothing = ScaleValues::widen(levels, Some(&old), &ColumnRange::new(COLUMNS));
            prop_assert_eq!(&nothing, &old);
            let mut new = ScaleValues::widen(levels, Some(&old), &range(&after));
            within_bounds(&*codec, &new, &before);
            within_bounds(&*codec, &new, &after);
            let all = after.iter().all(|row| row.iter().enumerate().all(|(c, x)| {
                let off = (f64::from(*x) - f64::from(old.centres()[c])).abs();
                off <= levels.reach() * f64::from(old.scales()[c])
            }));
            if levels != Levels::Int8 {
                prop_assert!(!all || old.covers(levels, &range(&after)));
                // Rows like these do not widen it for ever.
                for _ in 0..8 {
                    if !new.covers(levels, &range(&after)) {
                        new = ScaleValues::widen(levels, Some(&new), &range(&after));
                    }
                }
                prop_assert!(new.covers(levels, &range(&after)));
                continue;
            }
            // What was covered stays covered, and no level comes closer.
            prop_assert!(new.covers(levels, &range(&before)) && new.covers(levels, &range(&after)));
            prop_assert!(new.scales().iter().zip(old.scales()).all(|(new, old)| new >= old));
            let both = [before.as_slice(), &after].concat();
            prop_assert!(new.covers(levels, &range(&both)));
            // Covered by chance or not: the answer is that of the numbers themselves.
            prop_assert_eq!(old.covers(levels, &range(&after)), all);
        }
    }

    #[test]
    fn sparse_keeps_the_largest_weights(
        experts in prop_oneof![1usize..20, 250usize..300],
        k in 1usize..12,
        seeds in prop::collection::vec(0u32..50, 600),
    ) {
        let k = k.min(experts);
        let codec = CodecName::Sparse(k as u32).build(2, experts);
        let index = if experts <= 256 { 1 } else { 2 };
        prop_assert_eq!(codec.record_bytes(), 2 * k * (index + 1));
        // Small whole numbers, so that some are equal and some are 0.
        let row: Vec<f32> = seeds[..2 * experts]
            .chunks(experts)
            .flat_map(|group| {
                let total = (group.iter().sum::<u32>() + 1) as f32;
                group.iter().enumerate().map(move |(i, n)| (n + u32::from(i == 0)) as f32 / total)
            })
            .collect();
        prop_assert_eq!(codec.check(&row), Ok(()));
        let record = encode(&*codec, ScaleValues::none(), &row);
        prop_assert_eq!(record.len(), codec.record_bytes());
        let back = decode(&*codec, ScaleValues::none(), &record);
        for (given, kept) in row.chunks(experts).zip(back.chunks(experts)) {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|a, b| given[*b].total_cmp(&given[*a]));
            let (largest, others) = order.split_at(k);
            let sum: f64 = kept.iter().map(|w| f64::from(*w)).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5, "{}", sum);
            prop_assert!(others.iter().all(|i| kept[*i] == 0.0));
            let share: f32 = largest.iter().map(|i| given[*i]).sum();
            for i in largest {
                let value = given[*i] / share;
                prop_assert!((kept[*i] - value).abs() <= codec.error_bound(value, 0.0, 0.0));
            }
        }
    }

    #[test]
    fn any_sparse_record_decodes(experts in prop_oneof![Just(3usize), Just(300)], bytes in prop::collection::vec(any::<u8>(), 12)) {
        let codec = CodecName::Sparse(2).build(2, experts);
        let row = decode(&*codec, ScaleValues::none(), &bytes[..codec.record_bytes()]);
        prop_assert!(row.iter().all(|w| (0.0..=1.0).contains(w)));
    }

    #[test]
    fn names_have_one_spelling(n in 0u32..70_000, padding in "0{0,2}|\\+| ") {
        for name in [format!("code({n})"), format!("code({n},int4)"), format!("sparse({n})")] {
            let max = if name.starts_with("code") { 65_536 } else { 65_535 };
            let parsed = name.parse::<CodecName>();
            prop_assert_eq!(parsed.is_ok(), (1..=max).contains(&n));
            if let Ok(codec) = parsed {
                prop_assert_eq!(codec.to_string(), name.as_str());
            }
            let padded = name.replacen('(', &format!("({padding}"), 1);
            prop_assert!(padding.is_empty() || padded.parse::<CodecName>().is_err());
        }
    }
}

#[test]
fn names_of_one_word_and_what_is_none() {
    for name in ["f32", "f16", "q8", "q4", "q2", "q1"] {
        assert_eq!(name.parse::<CodecName>().unwrap().to_string(), name);
    }
    for name in [
        "",
        "q3",
        "Q8",
        "q8 ",
        "code",
        "code()",
        "code(1,int8)",
        "code(1, int4)",
        "sparse()",
        "sparse(1",
        "sparse(1,2)",
    ] {
        assert!(name.parse::<CodecName>().is_err(), "{name:?}");
    }
}

/// Numbers from 0 to 1 that look drawn, the same at every run.
struct Draws(u64);

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// By the method of Box and Muller.
    fn gaussian(&mut self) -> f64 {
        let (radius, angle) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    fn laplace(&mut self) -> f64 {
        let (size, sign) = (-(1.0 - self.uniform()).ln(), self.uniform() - 0.5);
        size.copysign(sign)
    }
}

/// With few levels, and the least error of a Gaussian column, in deviations (Max, 1960).
const FEW_LEVELS: [(&str, u32, f64); 4] = [
    ("q4", 4, 0.1074),
    ("code(d,int4)", 4, 0.1074),
    ("q2", 2, 0.3447),
    ("q1", 1, 0.6028),
];

fn few_levels(name: &str, columns: usize) -> (Box<dyn Codec>, Levels) {
    let name = name.replace("(d", &format!("({columns}"));
    let codec = name.parse::<CodecName>().unwrap().build(1, columns);
    let levels = codec.levels().unwrap();
    (codec, levels)
}

fn range_of(numbers: &[f32]) -> ColumnRange {
    let mut range = ColumnRange::new(1);
    numbers.iter().for_each(|x| range.extend(&[*x]));
    range
}

/// Root mean square.
fn error(codec: &dyn Codec, scales: &ScaleValues, numbers: &[f32]) -> f64 {
    let squares = numbers.chunks(codec.columns()).flat_map(|row| {
        let back = decode(codec, scales, &encode(codec, scales, row));
        let off = back.into_iter().zip(row);
        off.map(|(back, x)| (f64::from(back) - f64::from(*x)).powi(2))
    });
    (squares.sum::<f64>() / numbers.len() as f64).sqrt()
}

/// That of 2^bits levels of equal distance, between the ends of a range that 2^bits steps fill.
fn error_of_range(bits: u32, numbers: &[f32]) -> f64 {
    let numbers = numbers.iter().copied().map(f64::from);
    let ends = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = numbers.clone().fold(ends, |(l, h), x| (l.min(x), h.max(x)));
    let levels = f64::from(1u32 << bits);
    let step = (high - low) / levels;
    let n = numbers.len() as f64;
    let squares = numbers.map(|x| {
        // 0 / 0 of a constant column is none.
        let index = ((x - low) / step).floor().max(0.0).min(levels - 1.0);
        (low + (index + 0.5) * step - x).powi(2)
    });
    (squares.sum::<f64>() / n).sqrt()
}

type Shape<'s> = (&'s str, Box<dyn Fn(&mut Draws) -> f64>);

/// How the numbers of a column may be drawn.
fn shapes() -> Vec<Shape<'static>> {
    let around_two =
        |off: f64| move |d: &mut Draws| (d.uniform() - 0.5).signum() + off * d.gaussian();
    let rarely = |chance: f64, d: &mut Draws| d.uniform() < chance;
    vec![
        ("Gaussian", Box::new(|d| 40.0 + 3.0 * d.gaussian())),
        ("uniform", Box::new(|d| 7.0 * d.uniform())),
        ("Laplace", Box::new(|d| d.laplace())),
        ("two values", Box::new(|d| (d.uniform() - 0.5).signum())),
        ("constant", Box::new(|_| 2.7)),
        ("three values", Box::new(|d| (3.0 * d.uniform()).floor())),
        ("four values", Box::new(|d| (4.0 * d.uniform()).floor())),
        ("close to two", Box::new(around_two(0.05))),
        ("around two", Box::new(around_two(0.25))),
        ("around one, and rarely another", {
            let far = move |d: &mut Draws| 10.0 * f64::from(u8::from(rarely(0.1, d)));
            Box::new(move |d| far(d) + d.gaussian())
        }),
        ("exponential", Box::new(|d| d.laplace().abs())),
        ("positive or 0", Box::new(|d| d.gaussian().max(0.0))),
        ("mostly 0", {
            let there = move |d: &mut Draws| f64::from(u8::from(rarely(0.1, d)));
            Box::new(move |d| there(d) * d.gaussian())
        }),
        ("heavy tails", Box::new(|d| d.gaussian() / d.gaussian())),
        ("some far off", {
            let far = move |d: &mut Draws| 1e4 * f64::from(u8::from(rarely(1e-4, d)));
            Box::new(move |d| far(d) + d.gaussian())
        }),
    ]
}

fn deviation(numbers: &[f32]) -> f64 {
    let n = numbers.len() as f64;
    let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let squares = numbers.iter().map(|x| (f64::from(*x) - mean).powi(2));
    (squares.sum::<f64>() / n).sqrt()
}

#[test]
fn few_levels_lie_where_the_numbers_are() {
    let mut draws = Draws(1);
    for (shape, draw) in shapes() {
        let numbers: Vec<f32> = (0..65_536).map(|_| draw(&mut draws) as f32).collect();
        let sigma = deviation(&numbers);
        let unit = sigma.max(f64::from(f32::MIN_POSITIVE));
        for (name, bits, _) in FEW_LEVELS {
            let (codec, levels) = few_levels(name, 1);
            let scales = ScaleValues::fit(levels, &range_of(&numbers));
            let (got, range) = (
                error(&*codec, &scales, &numbers),
                error_of_range(bits, &numbers),
            );
            println!(
                "{shape} {name}: {:.3} deviations, from the range {:.3}",
                got / unit,
                range / unit
            );
            // No worse than the mean of the column, nor than levels from end to end.
            assert!(got <= 1.001 * sigma, "{name} {shape}: {got} of {sigma}");
            assert!(got <= 1.06 * range, "{name} {shape}: {got} of {range}");
            let most = match (shape, bits) {
                ("Gaussian", 4) => 0.115,
                ("Gaussian", 2) => 0.37,
                ("Gaussian", _) => 0.63,
                ("Laplace", 4) => 0.185,
                ("Laplace", 2) => 0.47,
                ("exponential", 4) => 0.15,
                ("exponential", 2) => 0.41,
                ("around one, and rarely another", 1) => 0.33,
                ("mostly 0", 4) => 0.15,
                ("mostly 0", 2) => 0.42,
                ("two values" | "constant", _) => 0.0,
                ("three values" | "four values", 2 | 4) => 1e-6,
                _ => 1.0,
            };
            let got = got / unit;
            assert!(got <= most, "{name} {shape}: {got} deviations");
        }
    }
}

/// A first fit to a few numbers, too.
#[test]
fn few_numbers_are_kept_no_worse_than_by_their_mean() {
    let mut draws = Draws(5);
    for (shape, draw) in shapes().into_iter().take(5) {
        for n in [1, 2, 3, 5, 17, 100, 511, 512, 513] {
            for _ in 0..20 {
                let numbers: Vec<f32> = (0..n).map(|_| draw(&mut draws) as f32).collect();
                for (name, ..) in FEW_LEVELS {
                    let (codec, levels) = few_levels(name, 1);
                    let scales = ScaleValues::fit(levels, &range_of(&numbers));
                    let (got, sigma) = (error(&*codec, &scales, &numbers), deviation(&numbers));
                    assert!(
                        got <= 1.0001 * sigma + 1e-6,
                        "{name} {shape}, {n}: {got} of {sigma}"
                    );
                }
            }
        }
    }
}

/// What little was known of a column at first does not stay when more is.
#[test]
fn many_numbers_after_few_are_looked_at() {
    let mut draws = Draws(6);
    let mut batch = |n: usize| -> Vec<f32> {
        let mut number = || draws.gaussian() + if draws.uniform() < 0.1 { 10.0 } else { 0.0 };
        (0..n).map(|_| number() as f32).collect()
    };
    let (few, many) = (range_of(&batch(10)), batch(20_000));
    let (codec, levels) = few_levels("q1", 1);
    let first = ScaleValues::fit(levels, &few);
    assert!(!first.covers(levels, &range_of(&many)));
    let next = ScaleValues::widen(levels, Some(&first), &range_of(&many));
    let got = error(&*codec, &next, &many) / deviation(&many);
    assert!(got <= 0.33, "{got}");
    assert!(next.covers(levels, &range_of(&batch(20_000))));
    assert!(next.covers(levels, &range_of(&batch(10))));
}

#[test]
fn two_values_are_exact_or_nearly() {
    for (name, ..) in FEW_LEVELS {
        let (codec, levels) = few_levels(name, 1);
        for (low, high) in [(-1.5f32, 1.5f32), (0.0, 1.0), (100.0, 103.0)] {
            for period in [2, 10, 1000] {
                let value = |i| if i % period == 0 { high } else { low };
                let numbers: Vec<f32> = (0..2 * period).map(value).collect();
                let scales = ScaleValues::fit(levels, &range_of(&numbers));
                let got = error(&*codec, &scales, &numbers);
                assert!(
                    got <= 1e-7 * f64::from(high),
                    "{name}: {got} of {low} and {high}"
                );
            }
        }
    }
}

/// Rows that are drawn alike: however many come, and however few at once, they soon need no other scales.
#[test]
fn a_steady_column_keeps_its_scales() {
    const N: usize = 4;
    let mut draws = Draws(2);
    let numbers: Vec<f32> = (0..N * 2_000_000)
        .map(|_| 5.0 + draws.gaussian() as f32)
        .collect();
    let few = &numbers[..N * 20_000];
    for (name, _, least) in FEW_LEVELS {
        let (codec, levels) = few_levels(name, N);
        for (numbers, rows, most) in [
            (numbers.as_slice(), 65_536, 1),
            (&numbers, 2_912, 1),
            (few, 100, 6),
            (few, 1, 60),
        ] {
            let mut held: Option<ScaleValues> = None;
            let mut fits = 0;
            for batch in numbers.chunks(rows * N) {
                let mut range = ColumnRange::new(N);
                batch.chunks(N).for_each(|row| range.extend(row));
                if !held
                    .as_ref()
                    .is_some_and(|held| held.covers(levels, &range))
                {
                    held = Some(ScaleValues::widen(levels, held.as_ref(), &range));
                    fits += 1;
                }
            }
            let got = error(&*codec, &held.unwrap(), few);
            assert!(fits <= most, "{name}, {rows} rows at once: {fits} fits");
            // One row at a time, a column is known by the few dozen rows that needed other scales.
            let factor = if rows == 1 { 1.35 } else { 1.06 };
            assert!(got <= factor * least, "{name}, {rows} rows at once: {got}");
        }
    }
}

/// What rows of another kind need, they get, though many came before.
#[test]
fn a_column_that_changes_gets_other_scales() {
    let mut draws = Draws(3);
    let mut batch = |centre: f64, size: f64| -> Vec<f32> {
        (0..20_000)
            .map(|_| (centre + size * draws.gaussian()) as f32)
            .collect()
    };
    for (name, _, least) in FEW_LEVELS {
        let (codec, levels) = few_levels(name, 1);
        let mut held = ScaleValues::fit(levels, &range_of(&batch(0.0, 1.0)));
        let mut last = f64::INFINITY;
        for _ in 0..6 {
            let numbers = batch(6.0, 2.0);
            if !held.covers(levels, &range_of(&numbers)) {
                held = ScaleValues::widen(levels, Some(&held), &range_of(&numbers));
            }
            last = error(&*codec, &held, &numbers) / 2.0;
        }
        assert!(last <= 1.06 * least, "{name}: {last}");
    }
}

#[test]
fn the_largest_numbers_outlive_a_store() {
    for name in ["q8", "q4", "q2", "q1"] {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let mut writer = create(&path, spec(name));
        let ids = [DocumentId::from("a"), DocumentId::from("b")];
        let data = [[LARGEST; LOGITS], [-LARGEST; LOGITS]].concat();
        let rows = RouteRows {
            shape: &[2, GROUPS, EXPERTS],
            data: &data,
        };
        writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        let z = store.routes(&ids, Kind::Logits).unwrap();
        for (got, given) in z.data.iter().zip(&data) {
            assert!((got - given).abs() <= 1e-6 * LARGEST, "{name}: {got}");
        }
    }
}

/// What scales were fitted to is known to the next writer: documents that come a few at a time are kept as well as others.
#[test]
fn scales_are_fitted_across_commits() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    create(&path, spec("q4")).commit().unwrap();
    let mut draws = Draws(4);
    let mut late = 0.0;
    for commit in 0..40 {
        let ids: Vec<DocumentId> = (0..4)
            .map(|i| format!("{commit}-{i}").as_str().into())
            .collect();
        let data: Vec<f32> = (0..4 * LOGITS).map(|_| draws.gaussian() as f32).collect();
        let rows = RouteRows {
            shape: &[4, GROUPS, EXPERTS],
            data: &data,
        };
        let mut writer = Store::open(&path).unwrap().writer().unwrap();
        writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        let z = store.routes(&ids, Kind::Logits).unwrap();
        let off = z
            .data
            .iter()
            .zip(&data)
            .map(|(a, b)| f64::from(a - b).powi(2));
        if commit >= 20 {
            late += off.sum::<f64>() / (20.0 * 4.0 * LOGITS as f64);
        }
    }
    let scales = Store::open(&path).unwrap().info().unwrap().parts;
    let scales = scales.iter().find(|p| p.role == "scales").unwrap().files;
    assert!(
        scales <= 20 && late.sqrt() <= 0.16,
        "{scales} scales, {late}"
    );
}

/// The bytes that docs/format.md describes.
#[test]
fn records_are_packed_as_the_format_says() {
    let range = |low: f32, high: f32| {
        let mut range = ColumnRange::new(3);
        range.extend(&[low; 3]);
        range.extend(&[high; 3]);
        range
    };
    let packed = |name: &str, low, high, row: &[f32]| {
        let codec = name.parse::<CodecName>().unwrap().build(1, 3);
        let scales = ScaleValues::fit(codec.levels().unwrap(), &range(low, high));
        let record = encode(&*codec, &scales, row);
        assert_eq!(decode(&*codec, &scales, &record), row, "{name}");
        record
    };
    assert_eq!(
        packed("q8", -127.0, 127.0, &[-127.0, 0.0, 1.0]),
        [0x81, 0, 1]
    );
    assert_eq!(packed("q4", -7.5, 7.5, &[-7.5, 7.5, 0.5]), [0xF0, 0x08]);
    assert_eq!(packed("q2", 0.5, 3.5, &[0.5, 2.5, 3.5]), [0b11_10_00]);
    assert_eq!(packed("q1", 0.5, 1.5, &[1.5, 0.5, 1.5]), [0b101]);
    let sparse = |k, row: &[f32]| {
        encode(
            &*CodecName::Sparse(k).build(1, row.len()),
            ScaleValues::none(),
            row,
        )
    };
    assert_eq!(sparse(2, &[0.5, 0.1, 0.4]), [0, 2, 255, 204]);
    let mut long = vec![0.0; 300];
    (long[258], long[7]) = (0.5, 0.5);
    assert_eq!(sparse(1, &long), [7, 0, 255], "of equal weights the first");
    assert_eq!(sparse(2, &long), [7, 0, 2, 1, 255, 255]);
}

#[test]
fn a_codec_says_what_it_cannot_keep() {
    let refuses = |name: &str, row: &[f32], words: &str| {
        let codec = name.parse::<CodecName>().unwrap().build(1, row.len());
        let reason = codec.check(row).unwrap_err();
        assert!(reason.contains(words), "{reason}");
    };
    for (name, _) in CODECS {
        refuses(name, &[0.0, f32::NAN], "number 1 is NaN");
        refuses(name, &[f32::INFINITY, 0.0], "number 0 is inf");
    }
    refuses("f16", &[1.0, 65536.0], "number 1 is 65536");
    refuses("q4", &[1.0, f32::MAX], "finite numbers up to");
    refuses("sparse(1)", &[1.5, -0.5], "number 1 is -0.5");
    refuses("sparse(1)", &[f32::NAN, 0.5], "number 0 is NaN");
    refuses("sparse(1)", &[0.5, 0.4], "sum to 0.9");
}

#[test]
fn a_store_of_weights_has_no_logits() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("sparse(2)"));
    let ids = [DocumentId::from("a")];
    let w = [0.0, 0.75, 0.25, 0.0, 0.25, 0.25, 0.25, 0.25];
    let shape = [1, GROUPS, EXPERTS];
    let rows = |data| RouteRows {
        shape: &shape,
        data,
    };
    let logits = [1.0; LOGITS];
    let refused = writer.add_arrays(&ids, rows(&logits), OnDuplicate::Error);
    assert!(refused.unwrap_err().to_string().contains("weights"));
    writer
        .add_arrays(&ids, rows(&w), OnDuplicate::Error)
        .unwrap();
    writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    let got = store.routes(&ids, Kind::Weights).unwrap();
    assert_eq!(got.shape, [1, GROUPS, EXPERTS]);
    assert_eq!(got.data, [0.0, 0.75, 0.25, 0.0, 0.5, 0.5, 0.0, 0.0]);
    assert_eq!(store.combined_route(&ids, None).unwrap().data, got.data);
    for kind in [Kind::Logits, Kind::Code] {
        let error = store.routes(&ids, kind).unwrap_err();
        assert!(matches!(error, polyprag_core::Error::InvalidInput(_)));
        let error = error.to_string();
        assert!(
            error.contains("sparse(2)") && error.contains("keeps weights"),
            "{error}"
        );
    }
    let nothing = store.routes(&[], Kind::Logits).unwrap_err();
    assert!(nothing.to_string().contains("keeps weights"));
    store.verify().unwrap();
}

/// More rows than one thread takes: what is found does not depend on how many are asked for.
#[test]
fn many_routes_are_as_each_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("code(3)"));
    let n = 2_500;
    let ids: Vec<DocumentId> = (0..n).map(|i| format!("d{i}").as_str().into()).collect();
    let data = common::route(5, n * CODE);
    let rows = RouteRows {
        shape: &[n, CODE],
        data: &data,
    };
    writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
    for name in ["unrouted", "unrouted too"] {
        writer
            .add(&[Document::new(name)], None, OnDuplicate::Error)
            .unwrap();
    }
    writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for kind in [Kind::Weights, Kind::Logits, Kind::Code] {
        let all = store.routes(&ids, kind).unwrap();
        let width = all.data.len() / n;
        for (id, row) in ids.iter().zip(all.data.chunks(width)) {
            let alone = store.routes(std::slice::from_ref(id), kind).unwrap();
            assert_eq!(bits(&alone.data), bits(row));
        }
        let mut asked = ids.clone();
        asked.insert(1_700, "unrouted too".into());
        asked.insert(900, "unrouted".into());
        let error = store.routes(&asked, kind).unwrap_err();
        let first = DocumentId::from("unrouted").to_string();
        let named = matches!(&error, polyprag_core::Error::Unrouted { id } if *id == first);
        assert!(named, "{error}");
    }
    // A mean over more than are held at once.
    let mut asked = ids.clone();
    asked.extend_from_slice(&ids);
    let (twice, once) = (
        store.combined_route(&asked, None).unwrap(),
        store.combined_route(&ids, None).unwrap(),
    );
    assert!(
        twice
            .data
            .iter()
            .zip(&once.data)
            .all(|(a, b)| (a - b).abs() < 1e-6)
    );
    let (sum, w) = (
        vec![1.0; ids.len()],
        store.routes(&ids, Kind::Weights).unwrap(),
    );
    let sum = store.combined_route(&ids, Some(&sum)).unwrap();
    for (c, sum) in sum.data.iter().enumerate() {
        let expected: f64 = w
            .data
            .iter()
            .skip(c)
            .step_by(LOGITS)
            .map(|w| f64::from(*w))
            .sum();
        assert!((f64::from(*sum) - expected).abs() <= 1e-6 * expected);
    }
}

#[test]
fn a_group_cannot_keep_more_weights_than_it_has() {
    assert!(spec(&format!("sparse({EXPERTS})")).validate().is_ok());
    let error = spec(&format!("sparse({})", EXPERTS + 1))
        .validate()
        .unwrap_err();
    assert!(error.to_string().contains("sparse(5)"), "{error}");
}

/// Of these batches, the second alone needs wider scales.
#[test]
fn routes_outlive_a_widening() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("q8"));
    let spec = spec("q8");
    let batches = [1.0f32, 100.0, 50.0];
    for (batch, size) in batches.iter().enumerate() {
        let ids: Vec<DocumentId> = (0..40)
            .map(|i| format!("{batch}-{i}").as_str().into())
            .collect();
        let data: Vec<f32> = (0..40 * LOGITS)
            .map(|i| (i as f32 * 0.7).sin() * size)
            .collect();
        let rows = RouteRows {
            shape: &[40, spec.groups(), EXPERTS],
            data: &data,
        };
        writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        let z = store.routes(&ids, Kind::Logits).unwrap();
        for (got, given) in z.data.iter().zip(&data) {
            assert!(
                (got - given).abs() <= size.max(100.0 * f32::from(u8::from(batch > 0))) / 100.0
            );
        }
    }
    let scales = std::fs::read_dir(&path)
        .unwrap()
        .filter(|e| {
            e.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("scales-")
        })
        .count();
    assert_eq!(
        scales, 2,
        "the third batch is covered by the scales of the second"
    );
}

proptest! {
    // Each case writes and syncs a store.
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_route_is_found_by_rank(
        present in prop::collection::vec(prop::bool::weighted(0.4), 1..2000),
        all in prop::bool::weighted(0.2),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let spec = polyprag_core::StoreSpec { id_type: IdType::U64, ..spec("f32") };
        let mut writer = create(&path, spec);
        let routed = |i: &usize| all || present[*i];
        // Runs of documents with or without a route, added call by call as a caller would.
        let mut start = 0;
        while start < present.len() {
            let kind = routed(&start);
            let end = (start..present.len()).find(|i| routed(i) != kind).unwrap_or(present.len());
            let ids: Vec<DocumentId> = (start..end).map(|i| DocumentId::U64(i as u64 * 3)).collect();
            if kind {
                let data: Vec<f32> = (start..end).flat_map(|i| [i as f32; LOGITS]).collect();
                let rows = RouteRows { shape: &[ids.len(), GROUPS, EXPERTS], data: &data };
                writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
            } else {
                let documents: Vec<Document> = ids.into_iter().map(Document::new).collect();
                writer.add(&documents, None, OnDuplicate::Error).unwrap();
            }
            start = end;
        }
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        for i in 0..present.len() {
            let id = DocumentId::U64(i as u64 * 3);
            prop_assert_eq!(store.is_routed(&id).unwrap(), routed(&i));
            if routed(&i) {
                let z = store.routes(&[id], Kind::Logits).unwrap();
                prop_assert!(z.data.iter().all(|x| *x == i as f32));
            }
        }
        prop_assert!(!store.contains(&DocumentId::U64(1)).unwrap());
        store.verify().unwrap();
    }

    #[test]
    fn ids_are_found_in_any_order(names in prop::collection::hash_set("[a-zé日]{1,12}", 1..200)) {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let mut writer = create(&path, spec("code(3)"));
        let names: Vec<String> = names.into_iter().collect();
        let documents: Vec<Document> = names.iter().map(|n| Document::new(n.as_str()).with_title(n)).collect();
        let data = common::route(1, CODE * names.len());
        let half = names.len() / 2;
        for (part, rows) in [(&documents[..half], &data[..half * CODE]), (&documents[half..], &data[half * CODE..])] {
            let rows = RouteRows { shape: &[part.len(), CODE], data: rows };
            writer.add(part, Some(rows), OnDuplicate::Error).unwrap();
            writer.commit().unwrap();
        }
        let store = Store::open(&path).unwrap();
        let ids: Vec<DocumentId> = names.iter().map(|n| n.as_str().into()).collect();
        prop_assert_eq!(store.documents(&ids).unwrap(), documents);
        prop_assert_eq!(store.ids().unwrap().map(Result::unwrap).collect::<Vec<_>>(), ids);
        store.verify().unwrap();
    }
}
