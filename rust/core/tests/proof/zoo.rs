//! Small stores that have lived: several generations, texts and none, routes and none, deleted and replaced
//! documents, compacted ranges with gaps, and what came after.

use std::path::Path;

use polyprag_core::{
    Document, DocumentId, IdType, OnDuplicate, Phi, Result, RouteRows, Store, StoreSpec, Writer,
    route_weights,
};

use crate::common::{CODE, EXPERTS, GROUPS, LOGITS, create, route, spec};

/// Every codec, each in the way of keeping that it has.
pub const CODECS: [&str; 9] = [
    "f32",
    "f16",
    "q8",
    "q4",
    "q2",
    "q1",
    "code(3)",
    "code(3,int4)",
    "sparse(2)",
];

/// What the ids look like, which decides how they are kept.
pub const IDS: [&str; 6] = [
    "words",
    "numbered",
    "scattered",
    "counted",
    "decimals",
    "hashes",
];

pub fn id(shape: &str, n: usize) -> DocumentId {
    match shape {
        "words" => {
            let word = ["ada", "Zürich", "b", "x/y#z", "北京", "eve and adam"][n * 7 % 6];
            format!("{word}{}", n * n % 1009).into()
        }
        "numbered" => format!("wiki-{n:06}#p").into(),
        "scattered" => (n as u64)
            .wrapping_add(3)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .into(),
        "counted" => (n as u64 + 40).into(),
        "decimals" => format!("doc-{}", n * n).into(),
        // Too many digits for a number.
        "hashes" => blake3::hash(&[n as u8]).to_hex().as_str().into(),
        other => panic!("no ids {other}"),
    }
}

pub fn document(shape: &str, n: usize, version: usize) -> Document {
    let id = id(shape, n);
    let text = format!("number {n} lives in house {version} by the harbour. ").repeat(1 + n % 3);
    Document {
        metadata: n
            .is_multiple_of(2)
            .then(|| format!("{{\"n\": {n}, \"version\": {version}}}")),
        ..Document::new(id)
            .with_title(format!("About {n}"))
            .with_text(text)
    }
}

pub const QUESTIONS: [&str; 3] = ["Who lives by the harbour?", "house 9", "About 2"];

/// The numbers of all documents that ever were in the store, and one that never was.
pub fn known(shape: &str) -> Vec<DocumentId> {
    (0..34).map(|n| id(shape, n)).collect()
}

pub fn spec_of(codec: &str, shape: &str) -> StoreSpec {
    let id_type = match id(shape, 0) {
        DocumentId::String(_) => IdType::String,
        DocumentId::U64(_) => IdType::U64,
    };
    StoreSpec {
        id_type,
        ..spec(codec)
    }
}

fn rows(codec: &str, seeds: &[usize]) -> (Vec<usize>, Vec<f32>) {
    let n = seeds.len();
    let (shape, width) = match codec.starts_with("code") {
        true => (vec![n, CODE], CODE),
        false => (vec![n, GROUPS, EXPERTS], LOGITS),
    };
    let mut data: Vec<f32> = seeds.iter().flat_map(|seed| route(*seed, width)).collect();
    if codec.starts_with("sparse") {
        route_weights(Phi::Sigmoid, None, EXPERTS, &mut data);
    }
    (shape, data)
}

pub fn add(writer: &mut Writer, document: Document, codec: &str, seed: usize) -> Result<usize> {
    let (shape, data) = rows(codec, &[seed]);
    let rows = RouteRows {
        shape: &shape,
        data: &data,
    };
    writer.add(&[document], Some(rows), OnDuplicate::Replace)
}

/// Six generations; the last two are on the disk.
pub fn life(path: &Path, codec: &str, shape: &str) -> Result<Store> {
    let mut writer = create(path, spec_of(codec, shape));
    for n in 0..6 {
        add(&mut writer, document(shape, n, n), codec, n)?;
    }
    writer.add(&[document(shape, 6, 6)], None, OnDuplicate::Error)?;
    writer.commit()?;
    add(&mut writer, document(shape, 1, 9), codec, 101)?;
    writer.delete(&[id(shape, 2)])?;
    writer.commit()?;
    let many: Vec<DocumentId> = (7..30).map(|n| id(shape, n)).collect();
    let (rows_shape, data) = rows(codec, &(7..30).collect::<Vec<_>>());
    let many_rows = RouteRows {
        shape: &rows_shape,
        data: &data,
    };
    writer.add_arrays(&many, many_rows, OnDuplicate::Error)?;
    writer.add(&[Document::new(id(shape, 30))], None, OnDuplicate::Error)?;
    writer.commit()?;
    let dead: Vec<DocumentId> = [8, 9, 15, 29].map(|n| id(shape, n)).to_vec();
    writer.delete(&dead)?;
    writer.commit()?;
    writer.compact()?;
    add(&mut writer, document(shape, 3, 9), codec, 103)?;
    add(&mut writer, document(shape, 31, 31), codec, 31)?;
    add(&mut writer, document(shape, 32, 32), codec, 32)?;
    writer.delete(&[id(shape, 20), id(shape, 32)])?;
    writer.commit()?;
    drop(writer);
    Store::open(path)
}
