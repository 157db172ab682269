//! Codecs, scales and phi, on any record, any scales that a part may hold, and any row.

use super::input::Input;
use crate::routes::{
    Codec, CodecName, ColumnRange, Keeps, Levels, Phi, ScaleValues, route_weights,
};

/// Names, groups and experts. The last one needs two bytes for an index.
const CODECS: [(CodecName, usize, usize); 12] = [
    (CodecName::F32, 2, 4),
    (CodecName::F16, 2, 4),
    (CodecName::Q8, 2, 4),
    (CodecName::Q4, 1, 7),
    (CodecName::Q2, 1, 7),
    (CodecName::Q1, 1, 11),
    (CodecName::Code(1), 2, 4),
    (CodecName::Code(13), 2, 4),
    (CodecName::CodeInt4(13), 2, 4),
    (CodecName::Sparse(1), 2, 4),
    (CodecName::Sparse(3), 2, 4),
    (CodecName::Sparse(2), 1, 300),
];

pub fn codecs(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    if let Ok(text) = std::str::from_utf8(input.rest)
        && let Ok(name) = text.parse::<CodecName>()
    {
        // One spelling a codec.
        assert_eq!(name.to_string(), text);
    }
    let chosen = usize::from(input.flavour) % CODECS.len();
    let Some((name, groups, experts)) = CODECS.get(chosen).copied() else {
        return false;
    };
    let codec = name.build(groups, experts);
    assert_eq!(codec.keeps(), name.keeps());
    let mut numbers = input.rest.chunks(4).map(|raw| {
        let mut word = [0; 4];
        word.iter_mut().zip(raw).for_each(|(to, from)| *to = *from);
        f32::from_le_bytes(word)
    });
    let mut row = || -> Vec<f32> {
        let next = || numbers.next().unwrap_or_default();
        std::iter::repeat_with(next).take(codec.columns()).collect()
    };
    let (centres, scales) = (row(), row());
    decode(codec.as_ref(), &any_scales(&centres, &scales), input.rest);
    let rows = [row(), row()];
    match (codec.levels(), codec.keeps()) {
        (Some(levels), _) => scaled(codec.as_ref(), levels, &rows),
        (None, Keeps::Weights) => rows.into_iter().for_each(|mut row| {
            row.iter_mut()
                .filter(|z| !z.is_finite())
                .for_each(|z| *z = 0.0);
            sparse(codec.as_ref(), experts, &row);
        }),
        (None, _) => rows.iter().for_each(|row| alone(codec.as_ref(), row)),
    }
    true
}

/// As far as a part of scales may hold them.
fn any_scales(centres: &[f32], scales: &[f32]) -> ScaleValues {
    let allowed = |(centre, scale): (&f32, &f32)| {
        let fine = (centre.abs() + 128.0 * scale.abs()).is_finite();
        if fine {
            (*centre, scale.abs())
        } else {
            (0.0, 1.0)
        }
    };
    centres.iter().zip(scales).map(allowed).collect()
}

fn decoded(codec: &dyn Codec, record: &[u8], scales: &ScaleValues) -> Vec<f32> {
    let mut row = vec![f32::NAN; codec.columns()];
    codec.decode(record, scales, &mut row);
    row
}

fn encoded(codec: &dyn Codec, row: &[f32], scales: &ScaleValues) -> Vec<u8> {
    let mut record = Vec::new();
    codec.encode(row, scales, &mut record);
    assert_eq!(record.len(), codec.record_bytes());
    record
}

fn decode(codec: &dyn Codec, scales: &ScaleValues, bytes: &[u8]) {
    let mut record = bytes.to_vec();
    record.resize(codec.record_bytes(), 0x81);
    let row = decoded(codec, &record, scales);
    let weights = codec.keeps() == Keeps::Weights;
    if codec.scaled() || weights {
        assert!(row.iter().all(|x| x.is_finite()));
    }
    if weights {
        assert!(row.iter().all(|w| (0.0..=1.0).contains(w)));
    }
}

/// What is kept with scales comes back within the bound, with scales that are fitted and with ones that are widened.
fn scaled(codec: &dyn Codec, levels: Levels, rows: &[Vec<f32>; 2]) {
    let [first, second] = rows;
    if codec.check(first).is_err() || codec.check(second).is_err() {
        return;
    }
    let mut range = ColumnRange::new(codec.columns());
    range.extend(first);
    let narrow = ScaleValues::fit(levels, &range);
    within(codec, levels, &narrow, &range, &[first]);
    range.extend(second);
    within(
        codec,
        levels,
        &ScaleValues::fit(levels, &range),
        &range,
        &[first, second],
    );
    let mut wide = ScaleValues::widen(levels, Some(&narrow), &range);
    for (before, after) in narrow.scales().iter().zip(wide.scales()) {
        assert!(after >= before || levels != Levels::Int8);
    }
    // With few levels what came before has its weight, so once may not be enough.
    for _ in 0..16 {
        if levels != Levels::Int8 && !wide.covers(levels, &range) {
            wide = ScaleValues::widen(levels, Some(&wide), &range);
        }
    }
    within(codec, levels, &wide, &range, &[first, second]);
}

fn within(
    codec: &dyn Codec,
    levels: Levels,
    scales: &ScaleValues,
    range: &ColumnRange,
    rows: &[&Vec<f32>],
) {
    assert!(scales.covers(levels, range));
    let columns = scales.centres().iter().zip(scales.scales());
    for (centre, scale) in columns.clone() {
        assert!(*scale >= 0.0 && (centre.abs() + 128.0 * scale).is_finite());
    }
    for row in rows {
        let back = decoded(codec, &encoded(codec, row, scales), scales);
        for ((x, y), (centre, scale)) in row.iter().zip(&back).zip(columns.clone()) {
            let error = (f64::from(*x) - f64::from(*y)).abs();
            let bound = f64::from(codec.error_bound(*x, *centre, *scale));
            assert!(
                error <= bound,
                "{x:e} became {y:e}, centre {centre:e}, scale {scale:e}"
            );
        }
    }
}

/// A record that was decoded gives the same record again.
fn alone(codec: &dyn Codec, row: &[f32]) {
    if codec.check(row).is_err() {
        return;
    }
    let none = ScaleValues::none();
    let record = encoded(codec, row, none);
    let back = decoded(codec, &record, none);
    for (x, y) in row.iter().zip(&back) {
        let error = (f64::from(*x) - f64::from(*y)).abs();
        assert!(
            error <= f64::from(codec.error_bound(*x, 0.0, 0.0)),
            "{x:e} became {y:e}"
        );
    }
    assert_eq!(record, encoded(codec, &back, none));
}

fn sparse(codec: &dyn Codec, experts: usize, logits: &[f32]) {
    for (phi, top_k) in [
        (Phi::Sigmoid, None),
        (Phi::Softmax, None),
        (Phi::Sigmoid, Some(2)),
    ] {
        let mut weights = logits.to_vec();
        route_weights(phi, top_k, experts, &mut weights);
        whole(&weights, experts, top_k.map_or(experts, |k| k as usize));
        assert_eq!(codec.check(&weights), Ok(()));
        let none = ScaleValues::none();
        let back = decoded(codec, &encoded(codec, &weights, none), none);
        whole(&back, experts, codec.record_bytes());
        assert_eq!(back, decoded(codec, &encoded(codec, &back, none), none));
    }
}

/// Weights of groups that sum to 1, so many of each above 0 at most.
fn whole(weights: &[f32], experts: usize, most: usize) {
    for group in weights.chunks(experts) {
        let sum: f64 = group.iter().map(|w| f64::from(*w)).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{group:?}");
        assert!(group.iter().all(|w| *w >= 0.0));
        assert!(group.iter().filter(|w| **w > 0.0).count() <= most);
    }
}
