//! Every codec within its error bound, and every row found, whatever documents have routes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{CODE, EXPERTS, GROUPS, LOGITS, create, spec};
use polyprag_core::routes::Codec;
use polyprag_core::{CodecName, Document, DocumentId, IdType, Kind, OnDuplicate, RouteRows, Store};
use proptest::prelude::*;

const COLUMNS: usize = 5;

fn rows() -> impl Strategy<Value = Vec<f32>> {
    let number = prop_oneof![
        8 => -30.0f32..30.0,
        1 => prop_oneof![Just(0.0f32), Just(-0.0), Just(f32::MIN_POSITIVE), Just(1e-42), Just(65504.0)],
        1 => -60000.0f32..60000.0,
    ];
    (1usize..20).prop_flat_map(move |n| prop::collection::vec(number.clone(), n * COLUMNS))
}

/// As the writer fits them: the largest magnitude of a column is 127 units.
fn scales(rows: &[f32]) -> Vec<f32> {
    (0..COLUMNS)
        .map(|c| {
            let max = rows.chunks(COLUMNS).map(|r| r[c].abs()).fold(0.0, f32::max);
            if max == 0.0 {
                0.0
            } else {
                (max / 127.0).max(f32::MIN_POSITIVE)
            }
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_stays_within_the_bound(rows in rows()) {
        for name in ["f32", "f16", "q8", "code(5)"] {
            let codec: Box<dyn Codec> = name.parse::<CodecName>().unwrap().build(COLUMNS);
            let scales = scales(&rows);
            for row in rows.chunks(COLUMNS) {
                let mut record = Vec::new();
                codec.encode(row, &scales, &mut record);
                prop_assert_eq!(record.len(), codec.record_bytes());
                let mut back = vec![f32::NAN; COLUMNS];
                codec.decode(&record, &scales, &mut back);
                for ((value, decoded), scale) in row.iter().zip(&back).zip(&scales) {
                    let bound = codec.error_bound(*value, *scale);
                    prop_assert!((decoded - value).abs() <= bound, "{name}: {value} became {decoded}");
                }
                if name == "f32" {
                    prop_assert_eq!(row.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                        back.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn any_bytes_decode(record in prop::collection::vec(any::<u8>(), 4 * COLUMNS)) {
        for name in ["f32", "f16", "q8", "code(5)"] {
            let codec = name.parse::<CodecName>().unwrap().build(COLUMNS);
            let mut row = vec![0.0; COLUMNS];
            codec.decode(&record[..codec.record_bytes()], &[1.0; COLUMNS], &mut row);
        }
    }
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
