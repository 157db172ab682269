//! phi and combined routes against the float64 fixture that the torch twin is held to as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{bytes, expert_data, id, tensors};
use polyprag_core::{
    DecoderInput, DocumentId, Kind, Module, OnDuplicate, Phi, RouteRows, Store, route_weights,
};
use serde_json::Value;

fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/phi.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn flat(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(flat).collect(),
        number => vec![number.as_f64().unwrap()],
    }
}

fn flat32(value: &Value) -> Vec<f32> {
    flat(value).into_iter().map(|x| x as f32).collect()
}

fn phi(case: &Value) -> (Phi, Option<u32>) {
    let phi = match case["phi"].as_str().unwrap() {
        "sigmoid" => Phi::Sigmoid,
        "linear" => Phi::Linear,
        _ => Phi::Softmax,
    };
    (phi, case["top_k"].as_u64().map(|k| k as u32))
}

fn assert_close(got: &[f32], expected: &[f64], tolerance: f64, case: &Value) {
    assert_eq!(got.len(), expected.len());
    for (g, e) in got.iter().zip(expected) {
        assert!(
            (f64::from(*g) - e).abs() <= tolerance,
            "{g} instead of {e} in {case}"
        );
    }
}

#[test]
fn phi_is_the_one_of_the_fixture() {
    let fixture = fixture();
    let tolerance = fixture["tolerance"].as_f64().unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let experts = case["z"][0].as_array().unwrap().len();
        let (phi, top_k) = phi(case);
        let mut z = flat32(&case["z"]);
        route_weights(phi, top_k, experts, &mut z);
        assert_close(&z, &flat(&case["w"]), tolerance, case);
    }
}

#[test]
fn combined_routes_are_those_of_the_fixture() {
    let fixture = fixture();
    let tolerance = fixture["tolerance"].as_f64().unwrap();
    for case in fixture["combinations"].as_array().unwrap() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let (groups, experts) = (
            case["groups"].as_u64().unwrap(),
            case["experts"].as_u64().unwrap(),
        );
        let codes = flat32(&case["codes"]);
        let n = case["codes"].as_array().unwrap().len();
        let d = codes.len() / n;
        let (phi, top_k) = phi(case);
        let modules = (0..groups)
            .map(|group| Module {
                name: format!("m{group}"),
                in_features: 2,
                out_features: 2,
                group: group as u32,
            })
            .collect();
        let spec = polyprag_core::StoreSpec {
            modules,
            phi,
            top_k,
            ..common::spec(&format!("code({d})"))
        };
        let data = expert_data(&spec);
        let (v, b) = (bytes(&flat32(&case["V"])), bytes(&flat32(&case["b"])));
        let logits = (groups * experts) as usize;
        let decoder = DecoderInput {
            v: &v,
            v_shape: &[logits, d],
            b: &b,
            b_shape: &[logits],
        };
        let mut writer = Store::create(&path, spec, &tensors(&data), Some(&decoder), None).unwrap();
        let ids: Vec<DocumentId> = (0..n).map(|i| id(&format!("d{i}"))).collect();
        let rows = RouteRows {
            shape: &[n, d],
            data: &codes,
        };
        // With this row, every column reaches from -127 to 127, and a level is 1.
        let ends = RouteRows {
            shape: &[1, d],
            data: &vec![-127.0; d],
        };
        let end = [id("ends")];
        writer.add_arrays(&end, ends, OnDuplicate::Error).unwrap();
        writer.add_arrays(&ids, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();

        let store = Store::open(&path).unwrap();
        assert_eq!(
            store.routes(&ids, Kind::Code).unwrap().data,
            codes,
            "whole numbers are exact"
        );
        let w = store.routes(&ids, Kind::Weights).unwrap();
        assert_close(&w.data, &flat(&case["w"]), tolerance, case);
        let z = store.routes(&ids, Kind::Logits).unwrap();
        for (got, expected) in z.data.iter().zip(flat(&case["z"])) {
            assert!((f64::from(*got) - expected).abs() <= 1e-6 * expected.abs().max(1.0));
        }
        let mean = store.combined_route(&ids, None).unwrap();
        assert_eq!(mean.shape, [groups as usize, experts as usize]);
        assert_close(&mean.data, &flat(&case["mean"]), tolerance, case);
        let weighted = store
            .combined_route(&ids, Some(&flat(&case["weights"])))
            .unwrap();
        assert_close(&weighted.data, &flat(&case["weighted"]), tolerance, case);
    }
}
