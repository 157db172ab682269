//! Inputs for the targets, made of what the writers write.

use std::io::Read;
use std::path::Path;

use polyprag_core::files::Directory;
use polyprag_core::{
    Document, DocumentId, Dtype, IdType, OnDuplicate, RouteRows, Store, StoreSpec,
};

use crate::common;

#[derive(Debug)]
pub struct Seed {
    pub target: &'static str,
    pub name: String,
    pub input: Vec<u8>,
}

const CODECS: [&str; 8] = [
    "f32",
    "f16",
    "q8",
    "q4",
    "q2",
    "q1",
    "code(3)",
    "code(3,int4)",
];
const RAW: u8 = 0;
const SUMMED: u8 = 1;
const FRAMED: u8 = 2;
const BUILT: u8 = 3;

/// The seeds of all targets; `folder` is for the stores that they come from.
pub fn all(folder: &Path) -> Vec<Seed> {
    let mut seeds = Vec::new();
    for codec in CODECS {
        let path = folder.join(codec);
        drop(common::small(&path, codec));
        of_store(&path, codec, IdType::String, &mut seeds);
    }
    let path = folder.join("weights");
    weights(&path);
    of_store(&path, "weights", IdType::String, &mut seeds);
    let path = folder.join("gaps");
    gaps(&path);
    of_store(&path, "gaps", IdType::U64, &mut seeds);
    for (name, ids) in id_lists() {
        let path = folder.join(name);
        named(&path, &ids);
        seeds.extend(of_ids(&path, name));
    }
    blocks(&mut seeds);
    let path = folder.join("tiny");
    tiny(&path);
    of_store(&path, "tiny", IdType::String, &mut seeds);
    small_tensors(&path, 0, &mut seeds);
    for (flavour, dtype) in [(1, Dtype::F16), (1, Dtype::Bf16), (2, Dtype::Int8)] {
        let path = folder.join(dtype.name());
        tiny_in(&path, dtype);
        small_tensors(&path, flavour, &mut seeds);
    }
    packed(&path, &mut seeds);
    codecs(&mut seeds);
    seeds
}

fn push(seeds: &mut Vec<Seed>, target: &'static str, name: String, head: u8, rest: &[u8]) {
    let input = [&[head], rest].concat();
    seeds.push(Seed {
        target,
        name,
        input,
    });
}

fn of_store(path: &Path, from: &str, ids: IdType, seeds: &mut Vec<Seed>) {
    for file in common::files(path) {
        let bytes = std::fs::read(path.join(&file)).unwrap();
        let name = format!("{from}-{file}");
        let flavour = u8::from(ids == IdType::U64);
        match file.split('-').next().unwrap() {
            "CURRENT" => seeds.push(Seed {
                target: "current",
                name,
                input: bytes,
            }),
            "manifest" => seeds.push(Seed {
                target: "manifest",
                name,
                input: shortened(&bytes),
            }),
            "routes" => part(seeds, "routes", name, 0, &bytes),
            "scales" => part(seeds, "scales", name, 0, &bytes),
            "ids" => part(seeds, "ids", name, flavour, &bytes),
            "documents" => part(seeds, "documents", name, 0, &bytes),
            "dead" => part(seeds, "dead", name, 0, &bytes),
            _ => {}
        }
    }
}

/// A manifest without blanks, and with one file of the index only.
fn shortened(manifest: &[u8]) -> Vec<u8> {
    let mut json: serde_json::Value = serde_json::from_slice(manifest).unwrap();
    let mut index = 0;
    json["parts"].as_array_mut().unwrap().retain(|part| {
        index += usize::from(part["role"] == "bm25");
        part["role"] != "bm25" || index == 1
    });
    serde_json::to_vec(&json).unwrap()
}

/// A part as it is, and as its fields and its body.
fn part(seeds: &mut Vec<Seed>, target: &'static str, name: String, flavour: u8, file: &[u8]) {
    let number = |back: usize| {
        let at = file.len() - back;
        u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize
    };
    let tail = file.len() - number(16);
    let fields = &file[tail..file.len() - 32];
    let body = &file[64..64 + number(32)];
    let framed = [&[(fields.len() / 8) as u8], fields, body].concat();
    push(
        seeds,
        target,
        format!("{name}-raw"),
        flavour << 2 | RAW,
        file,
    );
    push(
        seeds,
        target,
        format!("{name}-framed"),
        flavour << 2 | FRAMED,
        &framed,
    );
}

/// Routes that are kept as weights.
fn weights(path: &Path) {
    let mut writer = common::create(path, common::spec("sparse(2)"));
    let documents: Vec<Document> = ["a", "b", "c"].map(Document::new).into();
    let group = [[0.5f32, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]];
    let data = [group[0], group[1], group[1], group[0], group[0], group[0]].concat();
    let shape = [3, common::GROUPS, common::EXPERTS];
    let routes = RouteRows {
        shape: &shape,
        data: &data,
    };
    writer
        .add(&documents, Some(routes), OnDuplicate::Error)
        .unwrap();
    writer.commit().unwrap();
}

/// Ids that are numbers, neither in order nor without gaps; documents with some fields; routes of some.
fn gaps(path: &Path) {
    let spec = StoreSpec {
        id_type: IdType::U64,
        ..common::spec("q8")
    };
    let mut writer = common::create(path, spec);
    for i in 0..700u64 {
        let id = (i * 7919) % 1009;
        let mut document = Document::new(id);
        if i % 5 == 0 {
            document = document.with_title(format!("no {i}"));
        }
        match i % 50 {
            0 => common::add(&mut writer, document, i as usize, OnDuplicate::Replace).map(drop),
            _ => writer
                .add(&[document], None, OnDuplicate::Replace)
                .map(drop),
        }
        .unwrap();
    }
    writer.delete(&[1u64.into(), 5u64.into()]).unwrap();
    writer.commit().unwrap();
}

/// Ids of each encoding, in order and not.
fn id_lists() -> Vec<(&'static str, Vec<DocumentId>)> {
    let strings = |of: &dyn Fn(u64) -> String, n: u64| -> Vec<DocumentId> {
        (0..n).map(|i| of(i).into()).collect()
    };
    let scattered = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    vec![
        ("consecutive", (5..150u64).map(DocumentId::U64).collect()),
        ("scattered", (0..20).map(|i| scattered(i).into()).collect()),
        ("counted", strings(&|i| format!("doc-{i}"), 140)),
        ("uncounted", strings(&|i| format!("doc-{}", i * 7 % 31), 31)),
        ("padded", strings(&|i| format!("wiki-{:06}", i * 3), 60)),
        (
            "hexadecimal",
            strings(&|i| format!("{:04x}-{:012x}", i, scattered(i)), 6),
        ),
        (
            "wide",
            strings(
                &|i| format!("{:016x}-{:016x}", scattered(i), scattered(i + 99)),
                40,
            ),
        ),
        (
            "words",
            strings(
                &|i| format!("{}/section {i}", ["é", "alpha", "a"][i as usize % 3]),
                40,
            ),
        ),
    ]
}

fn named(path: &Path, ids: &[DocumentId]) {
    let spec = StoreSpec {
        id_type: ids[0].kind(),
        ..common::spec("q8")
    };
    let mut writer = common::create(path, spec);
    let documents: Vec<Document> = ids.iter().cloned().map(Document::new).collect();
    writer.add(&documents, None, OnDuplicate::Error).unwrap();
    // One id more than once.
    writer
        .add(&documents[3..4], None, OnDuplicate::Replace)
        .unwrap();
    writer.commit().unwrap();
}

fn of_ids(path: &Path, name: &str) -> Vec<Seed> {
    let kind = match name {
        "consecutive" | "scattered" => IdType::U64,
        _ => IdType::String,
    };
    let mut seeds = Vec::new();
    of_store(path, name, kind, &mut seeds);
    seeds.retain(|seed| seed.target == "ids");
    seeds
}

/// Blocks of documents before they are compressed.
fn blocks(seeds: &mut Vec<Seed>) {
    let document = |fields: [Option<&str>; 3]| {
        let mut raw = vec![0u8];
        for (bit, field) in fields.iter().enumerate() {
            if let Some(text) = field {
                raw[0] |= 1 << bit;
                raw.extend((text.len() as u32).to_le_bytes());
                raw.extend(text.as_bytes());
            }
        }
        raw
    };
    let first = [
        document([Some("title"), Some("some text"), Some("{\"a\": 1}")]),
        document([None, Some("only text"), None]),
        document([None, None, None]),
    ];
    let second = [document([Some(""), None, Some("{}")])];
    let mut input = vec![1u8, 7, 0, 0, 0, 0, 0, 0, 0];
    for block in [&first[..], &second[..]] {
        let raw = block.concat();
        input.push(block.len() as u8);
        input.extend((raw.len() as u16).to_le_bytes());
        input.extend(raw);
    }
    push(seeds, "documents", "blocks".into(), BUILT, &input);
}

/// A store with the shapes that the targets of tensors expect. Without words there is no index, which keeps
/// it small.
fn tiny(path: &Path) {
    let mut writer = common::create(path, tiny_spec("code(3)"));
    common::add(&mut writer, Document::new("a"), 0, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
}

fn tiny_in(path: &Path, dtype: Dtype) {
    let spec = tiny_spec("f32");
    let experts = common::expert_data(&spec);
    let parent = Directory::open(path.parent().unwrap()).unwrap();
    let name = path.file_name().unwrap();
    let experts = common::tensors(&experts);
    let mut writer = Store::create_in(parent, name, spec, &experts, None, Some(dtype)).unwrap();
    writer.commit().unwrap();
}

fn tiny_spec(codec: &str) -> StoreSpec {
    let mut spec = common::spec(codec);
    for (i, (module, name)) in spec.modules.iter_mut().zip(["up", "down"]).enumerate() {
        module.name = name.into();
        (module.in_features, module.out_features) = (3, 2);
        module.group = i as u32;
    }
    spec.modules.truncate(2);
    (spec.experts, spec.rank) = (2, 1);
    spec
}

fn small_tensors(path: &Path, flavour: u8, seeds: &mut Vec<Seed>) {
    for file in common::files(path) {
        let target = match file.split('-').next().unwrap() {
            "experts" => "experts",
            "decoder" => "decoder",
            "router" => "router",
            _ => continue,
        };
        let bytes = std::fs::read(path.join(&file)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (header, data) = bytes[8..].split_at(length);
        let header = header.trim_ascii_end();
        let of = path.file_name().unwrap().to_str().unwrap();
        for (form, rest) in [
            (RAW, bytes.clone()),
            (FRAMED, [header, b"\n", data].concat()),
            (BUILT, [header, b"\n"].concat()),
        ] {
            push(
                seeds,
                target,
                format!("{of}-{form}"),
                flavour << 2 | form,
                &rest,
            );
        }
    }
}

fn packed(path: &Path, seeds: &mut Vec<Seed>) {
    let file = path.with_extension("tar");
    Store::open(path).unwrap().pack(&file).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    push(seeds, "packed", "raw".into(), RAW, &bytes);
    push(seeds, "packed", "summed".into(), SUMMED, &bytes);
    let mut list = Vec::new();
    let mut archive = tar::Archive::new(bytes.as_slice());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let name = entry.path_bytes();
        list.extend([b'0', name.len() as u8]);
        list.extend((content.len() as u16).to_le_bytes());
        list.extend(name.as_ref());
        list.extend(content);
    }
    push(seeds, "packed", "built".into(), BUILT, &list);
}

fn codecs(seeds: &mut Vec<Seed>) {
    for flavour in 0..12u8 {
        let numbers: Vec<u8> = (0..52)
            .flat_map(|i| ((i as f32 - 7.5) * 0.25).to_le_bytes())
            .collect();
        push(
            seeds,
            "codecs",
            format!("numbers-{flavour}"),
            flavour << 2,
            &numbers,
        );
    }
}
