//! Stores that were written once and for all: every later version reads them as the first one did. And stores
//! of later versions, which are refused in words that help.
//!
//! `fixtures/v1/NAME.tar.zst` is a packed store, `NAME.json` what it answers; `tests/test_format.py` reads them too, with a
//! reader of its own. New ones are made by
//!
//! ```text
//! cargo test --release -p polyprag-core --test fixtures -- --ignored make_what_is_missing
//! ```
//!
//! which leaves alone what is there: a fixture that changes proves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod proof;

use std::fs;
use std::path::{Path, PathBuf};

use common::copy;
use polyprag_core::{DocumentId, Dtype, Error, Keeps, Kind, Recoding, Store};
use proof::sealed::Forge;
use proof::zoo::{QUESTIONS, known, life};
use serde_json::{Map, Value, json};

/// Codec, ids and number type of the experts of each.
const FIXTURES: [(&str, &str, &str, Dtype); 6] = [
    ("f32-words", "f32", "words", Dtype::F32),
    ("q8-numbered", "q8", "numbered", Dtype::Int8),
    ("q4-hashes", "q4", "hashes", Dtype::Bf16),
    ("code-int8-scattered", "code(3)", "scattered", Dtype::F16),
    ("code-int4-counted", "code(3,int4)", "counted", Dtype::Int8),
    ("sparse-decimals", "sparse(2)", "decimals", Dtype::F32),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn id_of(id: &DocumentId) -> Value {
    match id {
        DocumentId::String(id) => id.as_str().into(),
        DocumentId::U64(id) => (*id).into(),
    }
}

fn answers(store: &Store, shape: &str) -> Value {
    let spec = store.spec().unwrap();
    let documents = known(shape).into_iter().map(|id| {
        let one = std::slice::from_ref(&id);
        if !store.contains(&id).unwrap() {
            return json!({"id": id_of(&id), "missing": true});
        }
        let document = store.documents(one).unwrap().remove(0);
        let mut answer = json!({
            "id": id_of(&id), "title": document.title, "text": document.text, "metadata": document.metadata
        });
        if store.is_routed(&id).unwrap() {
            let rows = |kind| store.routes(one, kind).unwrap().data;
            let kept = match spec.codec.keeps() {
                Keeps::Logits => Kind::Logits,
                Keeps::Code => Kind::Code,
                Keeps::Weights => Kind::Weights,
            };
            answer["record"] = hex(&store.records(one).unwrap().0).into();
            answer["kept"] = rows(kept).into();
            answer["weights"] = rows(Kind::Weights).into();
        }
        answer
    });
    let hits = QUESTIONS.iter().map(|question| {
        let hits = store.search(question, 10, None).unwrap().into_iter();
        let hits: Vec<Value> = hits
            .map(|h| json!([id_of(&h.id), h.docno, h.score]))
            .collect();
        ((*question).to_owned(), Value::from(hits))
    });
    let decoder = store
        .decoder()
        .unwrap()
        .into_iter()
        .flat_map(|(v, b)| [v, b]);
    let router = store.router().unwrap().into_iter().flatten();
    let tensors = store.experts().unwrap().into_iter();
    let tensors = tensors
        .flat_map(|t| [Some(t.raw), t.scale])
        .flatten()
        .chain(decoder)
        .chain(router);
    let tensors = tensors.map(|t| {
        let hash = blake3::hash(t.bytes()).to_hex();
        json!([t.name, t.dtype.name(), t.shape, hash.as_str()])
    });
    json!({
        "codec": spec.codec.to_string(),
        "ids": store.ids().unwrap().map(|id| id_of(&id.unwrap())).collect::<Vec<_>>(),
        "documents": documents.collect::<Vec<_>>(),
        "hits": hits.collect::<Map<_, _>>(),
        "tensors": tensors.collect::<Vec<_>>(),
    })
}

/// Equal; numbers that are not whole within what another machine's exponential function may differ by.
fn compare(found: &Value, expected: &Value, at: &str) {
    match (found, expected) {
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{at}: {found} and {expected}");
            a.iter()
                .for_each(|(key, a)| compare(a, &b[key], &format!("{at}.{key}")));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            let each = a.iter().zip(b).enumerate();
            each.for_each(|(i, (a, b))| compare(a, b, &format!("{at}[{i}]")));
        }
        (Value::Number(a), Value::Number(b)) if a.is_f64() || b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!(
                (a - b).abs() <= 1e-6 * b.abs().max(1.0),
                "{at}: {a} and {b}"
            );
        }
        _ => assert_eq!(found, expected, "{at}"),
    }
}

fn unpacked(name: &str, at: &Path) {
    let packed = fs::read(folder().join(format!("{name}.tar.zst"))).unwrap();
    let file = at.with_extension("tar");
    fs::write(&file, zstd::decode_all(packed.as_slice()).unwrap()).unwrap();
    Store::unpack(&file, at).unwrap();
}

#[test]
fn the_first_stores_are_read_as_they_were() {
    for (name, _, shape, _) in FIXTURES {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        unpacked(name, &path);
        let store = Store::open(&path).unwrap();
        store.verify().unwrap();
        let expected = fs::read(folder().join(format!("{name}.json"))).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let found = answers(&store, shape);
        compare(&found, &expected, name);
        // They can be written on, too.
        let mut writer = store.writer().unwrap();
        writer.compact().unwrap();
        writer.delete(&[known(shape).remove(0)]).unwrap();
        writer.commit().unwrap();
        assert!(store.refresh().unwrap());
        store.verify().unwrap();
    }
}

#[test]
#[ignore = "writes into the repository"]
fn make_what_is_missing() {
    fs::create_dir_all(folder()).unwrap();
    for (name, codec, shape, dtype) in FIXTURES {
        let json = folder().join(format!("{name}.json"));
        if json.exists() {
            println!("{name} is there");
            continue;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (path, packed) = (tmp.path().join("s"), tmp.path().join("packed"));
        let made = life(&path, codec, shape).unwrap();
        let recoding = Recoding {
            codec: codec.parse().unwrap(),
            decoder: None,
            expert_dtype: Some(dtype),
        };
        let recoded = tmp.path().join("recoded");
        made.recode(&recoded, &recoding).unwrap();
        let store = Store::open(&recoded).unwrap();
        store.pack(&packed).unwrap();
        let packed = zstd::encode_all(fs::read(packed).unwrap().as_slice(), 19).unwrap();
        fs::write(folder().join(format!("{name}.tar.zst")), packed).unwrap();
        fs::write(json, format!("{:#}\n", answers(&store, shape))).unwrap();
    }
}

#[test]
fn a_store_of_a_later_version_is_refused_with_advice() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    unpacked("q8-numbered", &path);
    let later = |name: &str,
                 word: &str,
                 change: &dyn Fn(&Forge),
                 refuses: &dyn Fn(&Path) -> Option<Error>| {
        let other = tmp.path().join(name);
        copy(&path, &other);
        change(&Forge::new(&other));
        let error = refuses(&other).unwrap_or_else(|| panic!("{name} was not refused"));
        assert!(
            matches!(error, Error::UnsupportedFormat { .. }),
            "{name}: {error:?}"
        );
        let told = error.to_string();
        assert!(
            told.contains(word) && told.contains("use a newer polyprag"),
            "{name}: {told}"
        );
    };
    let reading = |path: &Path| Store::open(path).err();
    let writing = |path: &Path| Store::open(path).unwrap().writer().err();
    let alter = |change: fn(&mut Value)| move |f: &Forge| f.alter(change);
    later(
        "line",
        "format 2",
        &|f| fs::write(f.path.join("CURRENT"), "polyprag store 2\nwhatever").unwrap(),
        &reading,
    );
    later(
        "format",
        "format 2",
        &alter(|m| m["format"] = 2.into()),
        &reading,
    );
    later(
        "reader",
        "time-travel",
        &alter(|m| m["reader_features"] = json!(["time-travel"])),
        &reading,
    );
    later(
        "writer",
        "undo-log",
        &alter(|m| m["writer_features"] = json!(["undo-log"])),
        &writing,
    );
    later(
        "encoding",
        "lora",
        &alter(|m| m["encoding"] = "lora".into()),
        &reading,
    );
    later(
        "codec",
        "q3",
        &alter(|m| m["spec"]["codec"] = "q3".into()),
        &reading,
    );
    later(
        "analyser",
        "unicode-v2",
        &alter(|m| m["spec"]["analyser"]["name"] = "unicode-v2".into()),
        &reading,
    );
    for role in ["routes", "ids", "documents", "scales", "dead"] {
        later(
            role,
            "version 2",
            &|f| f.edit_first(role, |part| part.head[8] = 2),
            &reading,
        );
    }
}
