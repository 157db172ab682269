//! What a store must hold, kept in plain maps.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use polyprag_core::{Document, DocumentId, Kind, Store};

use crate::common::{CODE, LOGITS, route};

/// One version of a document; everything in it follows from the number of the version and its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub number: usize,
    pub text: bool,
    pub route: bool,
}

pub type State = BTreeMap<String, Version>;

/// A word that only this version has.
pub fn word(number: usize) -> String {
    format!("version{number}word")
}

/// A word that every text has.
pub const COMMON: &str = "harbour";

pub fn document(id: &str, version: Version) -> Document {
    let document = Document::new(id);
    if !version.text {
        return document;
    }
    let number = version.number;
    // Some are longer than a sector.
    let text = format!("{} lies at the {COMMON} ", word(number)).repeat(1 + number % 5 * 10);
    document
        .with_title(format!("Title of {id}"))
        .with_text(text)
        .with_metadata(format!("{{\"version\": {number}}}"))
}

pub fn width(codec: &str) -> usize {
    if codec.starts_with("code") {
        CODE
    } else {
        LOGITS
    }
}

/// How far a number may be from the one that was given.
pub fn tolerance(codec: &str) -> f32 {
    match codec {
        "f32" => 0.0,
        "f16" => 0.002,
        // The numbers are within 3, and scales may be a little wider than they need to be.
        _ => 3.0 / 127.0,
    }
}

type Check = Result<(), String>;

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Check {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what}: found {found:?}, expected {expected:?}")),
    }
}

/// Whether the store is whole and holds this and nothing else. `versions` is how many were ever given out.
pub fn check(store: &Store, state: &State, codec: &str, versions: usize) -> Check {
    let told = |e: polyprag_core::Error| e.to_string();
    let report = store.verify().map_err(told)?;
    same("verified documents", report.documents, state.len() as u64)?;
    same("documents", store.len().map_err(told)?, state.len() as u64)?;
    let listed: BTreeSet<DocumentId> = store.ids().and_then(Iterator::collect).map_err(told)?;
    let ids: Vec<DocumentId> = state.keys().map(|id| id.as_str().into()).collect();
    same("ids", listed, ids.iter().cloned().collect())?;
    let expected: Vec<Document> = state.iter().map(|(id, v)| document(id, *v)).collect();
    same("contents", store.documents(&ids).map_err(told)?, expected)?;

    let kind = match codec.starts_with("code") {
        true => Kind::Code,
        false => Kind::Logits,
    };
    let width = width(codec);
    for (id, (name, version)) in ids.iter().zip(state) {
        same(name, store.is_routed(id).map_err(told)?, version.route)?;
        if !version.route {
            continue;
        }
        let row = store.routes(std::slice::from_ref(id), kind).map_err(told)?;
        let expected = route(version.number, width);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance(codec);
        if row.data.len() != width || !row.data.iter().zip(&expected).all(near) {
            let found = row.data;
            return Err(format!("route of {name}: {found:?}, expected {expected:?}"));
        }
    }

    let by_version: BTreeMap<usize, &String> = state
        .iter()
        .filter(|(_, v)| v.text)
        .map(|(id, v)| (v.number, id))
        .collect();
    let hits = |question: &str| -> Result<BTreeSet<DocumentId>, String> {
        let hits = store.search(question, 10_000, None).map_err(told)?;
        Ok(hits.into_iter().map(|hit| hit.id).collect())
    };
    let all = by_version.values().map(|id| id.as_str().into()).collect();
    same("hits of the common word", hits(COMMON)?, all)?;
    for number in 0..versions {
        let expected = by_version.get(&number).map(|id| id.as_str().into());
        let found = hits(&word(number))?;
        same(&word(number), found, expected.into_iter().collect())?;
    }
    Ok(())
}

/// Whether the generation before the one in force, kept for going back to it, is whole too.
pub fn check_previous(path: &Path) -> Check {
    let read = |name: &str| std::fs::read(path.join(name)).map_err(|e| format!("{name}: {e}"));
    let manifest = |name: &str| -> Result<serde_json::Value, String> {
        serde_json::from_slice(&read(name)?).map_err(|e| format!("{name}: {e}"))
    };
    let current = String::from_utf8(read("CURRENT")?).map_err(|e| e.to_string())?;
    let name = current.split_whitespace().nth(3).ok_or("no manifest")?;
    let Some(previous) = manifest(name)?["previous"].as_u64() else {
        return Ok(());
    };
    let previous = manifest(&format!("manifest-{previous:08}.json"))?;
    for part in previous["parts"].as_array().ok_or("no parts")? {
        let file = part["file"].as_str().ok_or("no file")?;
        let hash = blake3::hash(&read(file)?).to_hex();
        same(
            file,
            hash.as_str(),
            part["blake3"].as_str().unwrap_or_default(),
        )?;
    }
    Ok(())
}

/// Whether only what the generation in force and the one before need is left in the folder of a store.
pub fn check_nothing_left_over(path: &Path) -> Check {
    let current = std::fs::read_to_string(path.join("CURRENT")).map_err(|e| e.to_string())?;
    let mut name = current.split_whitespace().nth(3).map(str::to_owned);
    let mut needed: BTreeSet<String> = BTreeSet::from(["CURRENT".into()]);
    for _ in 0..2 {
        let Some(manifest) = name else { break };
        let json = std::fs::read(path.join(&manifest)).map_err(|e| format!("{manifest}: {e}"))?;
        let json: serde_json::Value = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
        let parts = json["parts"].as_array().ok_or("no parts")?;
        needed.extend(
            parts
                .iter()
                .filter_map(|p| p["file"].as_str().map(str::to_owned)),
        );
        needed.insert(manifest);
        name = json["previous"]
            .as_u64()
            .map(|n| format!("manifest-{n:08}.json"));
    }
    let found: BTreeSet<String> = crate::common::files(path).into_iter().collect();
    same("files", found, needed)
}
