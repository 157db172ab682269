//! Small stores for the tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::path::Path;

use polyprag_core::bm25::AnalyserSpec;
use polyprag_core::files::Directory;
use polyprag_core::{
    Combination, DecoderInput, Document, DocumentId, Dtype, Error, IdType, Mixing, Module,
    OnDuplicate, Phi, RouteRows, Store, StoreSpec, Tensor, Writer,
};

pub const GROUPS: usize = 2;
pub const EXPERTS: usize = 4;
pub const LOGITS: usize = GROUPS * EXPERTS;
pub const CODE: usize = 3;

pub fn spec(codec: &str) -> StoreSpec {
    let module = |name: &str, group| Module {
        name: name.into(),
        in_features: 6,
        out_features: 5,
        group,
    };
    StoreSpec {
        modules: vec![
            module("layers.0.up", 0),
            module("layers.0.down", 1),
            module("layers.1.up", 1),
        ],
        experts: EXPERTS as u32,
        rank: 2,
        alpha: 32.0,
        codec: codec.parse().unwrap(),
        phi: Phi::Sigmoid,
        top_k: None,
        mixing: Mixing::Exact,
        combination: Combination::default(),
        id_type: IdType::String,
        keep_title: true,
        keep_text: true,
        keep_metadata: true,
        analyser: AnalyserSpec {
            name: "unicode-v1".into(),
            stemmer: None,
        },
        filters: Vec::new(),
        base_model: serde_json::Map::new(),
        recipe: serde_json::Map::new(),
    }
}

pub fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Expert data for a spec, f32, and the shapes to go with it.
pub fn expert_data(spec: &StoreSpec) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let (k, r) = (spec.experts as usize, spec.rank as usize);
    let mut all = Vec::new();
    for (i, m) in spec.modules.iter().enumerate() {
        for (end, shape) in [
            ("A", vec![k, r, m.in_features as usize]),
            ("B", vec![m.out_features as usize, k, r]),
        ] {
            let n: usize = shape.iter().product();
            let data: Vec<f32> = (0..n).map(|j| (i * 1000 + j) as f32 * 0.25).collect();
            all.push((format!("{}.{end}", m.name), shape, bytes(&data)));
        }
    }
    all
}

/// An amortised router for codes of three numbers.
pub fn router_data() -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let named = [
        ("hidden.weight", vec![3, 4]),
        ("norm.weight", vec![4]),
        ("out.bias", vec![CODE]),
    ];
    let tensors = named.into_iter().map(|(name, shape)| {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n).map(|i| (i as f32 * 0.23).sin()).collect();
        (name.to_owned(), shape, bytes(&data))
    });
    tensors.collect()
}

pub fn tensors(data: &[(String, Vec<usize>, Vec<u8>)]) -> Vec<Tensor<'_>> {
    data.iter()
        .map(|(name, shape, data)| Tensor {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
            data,
        })
        .collect()
}

pub fn create(path: &Path, spec: StoreSpec) -> Writer {
    let parent = Directory::open(path.parent().unwrap()).unwrap();
    create_in(parent, path.file_name().unwrap(), spec).unwrap()
}

pub fn create_in(
    parent: Directory,
    name: &OsStr,
    spec: StoreSpec,
) -> polyprag_core::Result<Writer> {
    let data = expert_data(&spec);
    let (logits, columns) = (spec.logits(), CODE);
    let v: Vec<f32> = (0..logits * columns)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    let b: Vec<f32> = (0..logits).map(|i| (i as f32 * 0.11).cos()).collect();
    let (v, b) = (bytes(&v), bytes(&b));
    let decoder = DecoderInput {
        v: &v,
        v_shape: &[logits, columns],
        b: &b,
        b_shape: &[logits],
    };
    let needs = spec.codec.to_string().starts_with("code");
    let decoder = needs.then_some(&decoder);
    let mut writer = Store::create_in(parent, name, spec, &tensors(&data), decoder, None)?;
    if needs {
        writer.keep_router(&tensors(&router_data()))?;
    }
    Ok(writer)
}

pub fn id(id: &str) -> DocumentId {
    id.into()
}

pub fn ids(names: &[&str]) -> Vec<DocumentId> {
    names.iter().map(|n| id(n)).collect()
}

/// The route of the `seed`-th document.
pub fn route(seed: usize, width: usize) -> Vec<f32> {
    (0..width)
        .map(|i| ((seed * 31 + i * 7) as f32 * 0.61).sin() * 3.0)
        .collect()
}

pub fn passage(name: &str, text: &str) -> Document {
    Document::new(name)
        .with_title(format!("About {name}"))
        .with_text(text)
        .with_metadata(format!("{{\"name\": {name:?}}}"))
}

/// Adds one document with the route of `seed`.
pub fn add(
    writer: &mut Writer,
    document: Document,
    seed: usize,
    on: OnDuplicate,
) -> polyprag_core::Result<usize> {
    let spec = writer.spec()?;
    let code = spec.codec.to_string().starts_with("code");
    let (shape, width): (Vec<usize>, usize) = match code {
        true => (vec![1, CODE], CODE),
        false => (vec![1, GROUPS, EXPERTS], LOGITS),
    };
    let data = route(seed, width);
    writer.add(
        &[document],
        Some(RouteRows {
            shape: &shape,
            data: &data,
        }),
        on,
    )
}

/// Two generations: five documents, one of them unrouted; then one replaced, one deleted, one new.
pub fn small(path: &Path, codec: &str) -> Store {
    let mut writer = create(path, spec(codec));
    for (seed, name) in ["ada", "bob", "cyd", "dan"].iter().enumerate() {
        let text = format!("{name} lives in house {seed} by the harbour");
        add(&mut writer, passage(name, &text), seed, OnDuplicate::Error).unwrap();
    }
    let unrouted = passage("eve", "eve has no house");
    writer.add(&[unrouted], None, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    let renewed = passage("bob", "bob moved to the lighthouse");
    add(&mut writer, renewed, 10, OnDuplicate::Replace).unwrap();
    writer.delete(&ids(&["cyd"])).unwrap();
    add(
        &mut writer,
        passage("fay", "fay keeps bees"),
        11,
        OnDuplicate::Error,
    )
    .unwrap();
    writer.commit().unwrap();
    drop(writer);
    Store::open(path).unwrap()
}

/// Every file of a store but the lock, relative to it.
pub fn files(path: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for (folder, prefix) in [(path.to_owned(), ""), (path.join("bm25"), "bm25/")] {
        // A store without words has no index.
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if entry.file_type().unwrap().is_file() && name != "LOCK" {
                all.push(format!("{prefix}{name}"));
            }
        }
    }
    all.sort();
    all
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("bm25")).unwrap();
    for name in files(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// What a damaged store may be refused with.
pub fn is_typed(error: &Error) -> bool {
    matches!(
        error,
        Error::CorruptStore { .. }
            | Error::CorruptIndex { .. }
            | Error::IndexTooOld { .. }
            | Error::UnsupportedFormat { .. }
            | Error::NotAStore { .. }
    )
}

/// What altered bytes may make of a lookup in a store that was not verified.
pub fn is_typed_or_miss(error: &Error) -> bool {
    is_typed(error) || matches!(error, Error::UnknownId { .. } | Error::Unrouted { .. })
}
