//! Every codec within its error bound, and every row found, whatever documents have routes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{CODE, EXPERTS, GROUPS, LOGITS, create, spec};
use polyprag_core::routes::{Codec, ColumnRange, ScaleValues};
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

/// A column: constant, subnormal, of mixed signs or far from 0, huge.
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
    numbers.prop_flat_map(move |(low, high)| {
        // The ends themselves often, and what is drawn in f64 lies between them.
        let number = prop_oneof![
            1 => Just(low),
            1 => Just(high),
            6 => (0.0f64..=1.0).prop_map(move |t| {
                let x = f64::from(low) + t * (f64::from(high) - f64::from(low));
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
            let scale = scales.scales().get(i).copied().unwrap_or_default();
            let error = (f64::from(*decoded) - f64::from(*value)).abs();
            let bound = f64::from(codec.error_bound(*value, scale));
            assert!(
                error <= bound,
                "{codec:?}: {value} became {decoded}, scale {scale}"
            );
        }
    }
}

/// The largest number that every scaled codec keeps.
const HUGE: f32 = f32::MAX / 256.0;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_stays_within_the_bound(rows in rows(HUGE)) {
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

    #[test]
    fn binary16_stays_within_the_bound(rows in rows(65504.0)) {
        within_bounds(&*codec("f16"), ScaleValues::none(), &rows);
    }

    #[test]
    fn any_record_decodes(
        rows in rows(HUGE),
        record in prop::collection::vec(any::<u8>(), 4 * COLUMNS),
    ) {
        for (name, width) in CODECS {
            let codec = codec(name);
            let scales = fit(&*codec, &rows);
            let row = decode(&*codec, &scales, &record[..width]);
            prop_assert!(!codec.scaled() || row.iter().all(|x| x.is_finite()), "{}: {:?}", name, row);
        }
    }

    /// A batch that the scales do not cover widens them; what they covered stays covered, and no level comes closer.
    #[test]
    fn widening_covers_both(before in rows(HUGE), after in rows(HUGE)) {
        for (name, _) in CODECS {
            let codec = codec(name);
            let Some(levels) = codec.levels() else { continue };
            let old = ScaleValues::fit(levels, &range(&before));
            prop_assert!(old.covers(levels, &range(&before)));
            let new = ScaleValues::widen(levels, Some(&old), &range(&after));
            prop_assert!(new.covers(levels, &range(&before)) && new.covers(levels, &range(&after)));
            prop_assert!(new.scales().iter().zip(old.scales()).all(|(new, old)| new >= old));
            within_bounds(&*codec, &new, &before);
            within_bounds(&*codec, &new, &after);
            let mut both = range(&before);
            both.union(&range(&after));
            prop_assert!(new.covers(levels, &both));
            // Covered by chance or not: the answer is that of the numbers themselves.
            let reach = if levels.outer() == 127.0 { 127.5 } else { levels.outer() };
            let all = after.iter().all(|row| row.iter().enumerate().all(|(c, x)| {
                let off = (f64::from(*x) - f64::from(old.centres()[c])).abs();
                off <= reach * f64::from(old.scales()[c])
            }));
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
                prop_assert!((kept[*i] - value).abs() <= codec.error_bound(value, 0.0));
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
    assert_eq!(packed("q4", -8.0, 8.0, &[-7.5, 7.5, 0.5]), [0xF0, 0x08]);
    assert_eq!(packed("q2", 0.0, 4.0, &[0.5, 2.5, 3.5]), [0b11_10_00]);
    assert_eq!(packed("q1", 0.0, 2.0, &[1.5, 0.5, 1.5]), [0b101]);
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
