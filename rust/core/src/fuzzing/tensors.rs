//! The safetensors files: experts, decoder and router.

use std::sync::LazyLock;

use super::input::{Form, Input};
use crate::dtype::Dtype;
use crate::experts::Experts;
use crate::files::Mapped;
use crate::routes::{Decoder, Router};
use crate::spec::StoreSpec;
use crate::tensors::TensorView;
use crate::watch::Progress;

const LOGITS: usize = 4;
const COLUMNS: usize = 3;
const ROUTER: usize = 19;

/// The length of the header is made right; in [`Form::Built`], the numbers after it are as many as are asked
/// for, so that an input need not hold them.
fn file(input: &Input<'_>, numbers: usize) -> Mapped {
    let form = input.form();
    if form == Form::Raw {
        return Mapped::from_bytes(input.rest);
    }
    // The header and the rest are told apart by the first line end, which is a space in the file.
    let mut parts = input.rest.splitn(2, |b| *b == b'\n');
    let header = parts.next().unwrap_or_default();
    let mut data = parts.next().unwrap_or_default().to_vec();
    if form == Form::Built {
        data.resize(numbers, 0);
    }
    let length = (header.len() + 1).next_multiple_of(8);
    let mut file = (length as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(8 + length, b' ');
    file.extend_from_slice(&data);
    Mapped::from_bytes(&file)
}

fn check(view: &TensorView) {
    let numbers: usize = view.shape.iter().product();
    assert_eq!(view.bytes().len(), numbers * view.dtype.width());
}

pub fn experts(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    // Made once: it would take longer than the rest.
    static SPEC: LazyLock<Option<StoreSpec>> = LazyLock::new(spec);
    let Some(spec) = SPEC.as_ref() else {
        return false;
    };
    // Two modules of [2, 1, 3] and [2, 2, 1]; with int8, four times two scales.
    let numbers = match input.flavour & 3 {
        0 => 20 * 4,
        1 => 20 * 2,
        _ => 4 * 2 * 4 + 20,
    };
    let Ok(experts) = Experts::open(file(&input, numbers), spec) else {
        return false;
    };
    let verified = experts.verify(&Progress::unseen()).is_ok();
    assert_eq!(experts.tensors().len(), 4);
    for tensor in experts.tensors() {
        check(&tensor.raw);
        assert_eq!(tensor.raw.dtype, experts.dtype());
        assert_eq!(tensor.scale.is_some(), experts.dtype() == Dtype::Int8);
        tensor.scale.iter().for_each(check);
        let numbers = tensor.to_f32();
        assert_eq!(numbers.len(), tensor.raw.shape.iter().product::<usize>());
        assert!(!verified || numbers.iter().all(|x| x.is_finite()));
    }
    assert!(experts.lora_bytes(spec) > 0);
    verified
}

fn spec() -> Option<StoreSpec> {
    let module = |name: &str, group: u32| serde_json::json!({"name": name, "in_features": 3, "out_features": 2, "group": group});
    let json = serde_json::json!({
        "modules": [module("up", 0), module("down", 1)],
        "experts": 2, "rank": 1, "alpha": 1.0, "codec": "f32", "phi": "sigmoid", "mixing": "exact",
        "combination": {"k": 1, "rule": "mean", "temperature": 1.0},
        "id_type": "u64", "keep_title": false, "keep_text": false, "keep_metadata": false,
        "analyser": {"name": crate::bm25::UNICODE_V1, "stemmer": null},
    });
    serde_json::from_value(json).ok()
}

pub fn decoder(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let numbers = 4 * (LOGITS * COLUMNS + LOGITS);
    let Ok(decoder) = Decoder::open(file(&input, numbers), LOGITS, COLUMNS) else {
        return false;
    };
    let views = decoder.views();
    assert!(views.is_some());
    if let Some((v, b)) = views {
        check(&v);
        check(&b);
    }
    let mut logits = [0.0; 2 * LOGITS];
    assert!(decoder.decode(&[0.5; 2 * COLUMNS], &mut logits).is_ok());
    assert!(decoder.decode(&[0.5; COLUMNS], &mut logits).is_err());
    assert!(
        decoder
            .decode(&[0.5; 2 * COLUMNS + 1], &mut logits)
            .is_err()
    );
    decoder.verify(&Progress::unseen()).is_ok()
}

pub fn router(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    // As many numbers as the tests' router has.
    let Ok(router) = Router::open(file(&input, 4 * ROUTER)) else {
        return false;
    };
    let views = router.views();
    assert!((1..=64).contains(&views.len()));
    assert!(views.is_sorted_by(|a, b| a.name < b.name));
    for view in views {
        check(view);
        assert_eq!(view.dtype, Dtype::F32);
        assert!((1..=2).contains(&view.shape.len()));
        assert!((1..=128).contains(&view.name.len()) && view.name.is_ascii());
    }
    router.verify(&Progress::unseen()).is_ok()
}
