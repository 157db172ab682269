//! How long it takes to read routes, on one machine: `cargo run --release -p polyprag-core --example routes`.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use polyprag_core::{
    DecoderInput, DocumentId, Dtype, IdType, Kind, Module, OnDuplicate, RouteRows, Store,
    StoreSpec, Tensor,
};

const GROUPS: usize = 90;
const EXPERTS: usize = 16;
const LOGITS: usize = GROUPS * EXPERTS;
const D: usize = 64;
const N: usize = 10_000;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    let noise = |i: usize| (i * 7919 + seed * 104_729) % 10_007;
    (0..n).map(|i| noise(i) as f32 / 2500.0 - 2.0).collect()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn spec(codec: &str) -> StoreSpec {
    let modules = (0..GROUPS).map(|g| Module {
        name: format!("m{g}"),
        in_features: 1,
        out_features: 1,
        group: g as u32,
    });
    StoreSpec {
        modules: modules.collect(),
        experts: EXPERTS as u32,
        codec: codec.parse().unwrap(),
        id_type: IdType::U64,
        ..serde_json::from_value(serde_json::json!({
            "modules": [], "experts": 1, "rank": 1, "alpha": 1.0, "codec": "f32", "phi": "sigmoid",
            "mixing": "exact", "combination": {"k": 1, "rule": "mean", "temperature": 1.0}, "id_type": "u64",
            "keep_title": false, "keep_text": false, "keep_metadata": false,
            "analyser": {"name": "unicode-v1", "stemmer": null},
        }))
        .unwrap()
    }
}

fn main() {
    for codec in [
        "code(64)",
        "code(64,int4)",
        "f32",
        "f16",
        "q8",
        "q4",
        "q2",
        "q1",
        "sparse(4)",
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let code = codec.starts_with("code");
        let one = bytes(&[1.0; EXPERTS]);
        let experts: Vec<Tensor> = (0..GROUPS)
            .flat_map(|g| {
                [("A", vec![EXPERTS, 1, 1]), ("B", vec![1, EXPERTS, 1])].map(|(end, shape)| {
                    Tensor {
                        name: format!("m{g}.{end}"),
                        dtype: Dtype::F32,
                        shape,
                        data: &one,
                    }
                })
            })
            .collect();
        let (v, b) = (bytes(&numbers(LOGITS * D, 1)), bytes(&numbers(LOGITS, 2)));
        let decoder = DecoderInput {
            v: &v,
            v_shape: &[LOGITS, D],
            b: &b,
            b_shape: &[LOGITS],
        };
        let mut writer =
            Store::create(&path, spec(codec), &experts, code.then_some(&decoder), None).unwrap();
        let (shape, mut rows) = match code {
            true => (vec![N, D], numbers(N * D, 3)),
            false => (vec![N, GROUPS, EXPERTS], numbers(N * LOGITS, 3)),
        };
        if codec.starts_with("sparse") {
            polyprag_core::route_weights(polyprag_core::Phi::Sigmoid, None, EXPERTS, &mut rows);
        }
        let ids: Vec<DocumentId> = (0..N as u64).map(DocumentId::U64).collect();
        let start = Instant::now();
        let rows = RouteRows {
            shape: &shape,
            data: &rows,
        };
        writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let written = start.elapsed();
        let store = Store::open(&path).unwrap();
        let best = |ids: &[DocumentId], times: usize| {
            let once = |_| {
                let start = Instant::now();
                std::hint::black_box(store.routes(ids, Kind::Weights).unwrap());
                start.elapsed()
            };
            (0..times).map(once).min().unwrap()
        };
        let some: Vec<DocumentId> = ids.iter().step_by(N / 10).cloned().collect();
        let (ten, all) = (best(&some, 2000), best(&ids, 10));
        println!("{codec:14} w of 10: {ten:8.1?}  of {N}: {all:8.1?}  written in {written:8.1?}");
    }
}
