//! The footprint of a store: bytes of every role, in all and a document.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::error::Result;
use crate::generation::Generation;
use crate::manifest::role;

/// Bytes of one role in one generation.
#[derive(Debug, Clone, PartialEq)]
pub struct PartInfo {
    pub role: String,
    pub files: u64,
    pub bytes: u64,
    pub bytes_per_document: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StoreInfo {
    pub path: PathBuf,
    pub generation: u64,
    pub documents: u64,
    pub unrouted: u64,
    /// Everything that a reader of this generation needs.
    pub total_bytes: u64,
    pub bytes_per_document: f64,
    pub route_bytes_per_document: f64,
    /// What one LoRA of the same rank and modules would take, in the dtype of the experts, with the scales of int8.
    pub lora_bytes_per_document: u64,
    pub parts: Vec<PartInfo>,
}

/// The order in which roles are told; unknown ones follow.
const ORDER: [&str; 10] = [
    role::EXPERTS,
    role::DECODER,
    role::ROUTER,
    role::SCALES,
    role::ROUTES,
    role::IDS,
    role::DOCUMENTS,
    role::DEAD,
    role::BM25,
    role::MANIFEST,
];

pub fn info(generation: &Generation) -> Result<StoreInfo> {
    let manifest = generation.manifest();
    let mut roles: HashMap<&str, (u64, u64)> = HashMap::new();
    let mut add = |role, bytes: u64| {
        let (files, sum) = roles.entry(role).or_default();
        *files += 1;
        *sum = sum.saturating_add(bytes);
    };
    for part in &manifest.parts {
        add(part.role.as_str(), part.length);
    }
    add(role::MANIFEST, generation.pinned.length);
    add(role::MANIFEST, generation.current().to_text().len() as u64);

    let documents = manifest.documents;
    let each = |bytes: u64| match documents {
        0 => 0.0,
        n => bytes as f64 / n as f64,
    };
    let place = |role: &str| ORDER.iter().position(|r| *r == role).unwrap_or(ORDER.len());
    let mut parts: Vec<PartInfo> = roles
        .into_iter()
        .map(|(role, (files, bytes))| PartInfo {
            role: role.to_owned(),
            files,
            bytes,
            bytes_per_document: each(bytes),
        })
        .collect();
    parts.sort_by(|a, b| (place(&a.role), &a.role).cmp(&(place(&b.role), &b.role)));
    let total = parts
        .iter()
        .fold(0u64, |sum, p| sum.saturating_add(p.bytes));
    let routes = parts.iter().find(|p| p.role == role::ROUTES);
    Ok(StoreInfo {
        path: generation.dir.path().to_owned(),
        generation: manifest.generation,
        documents,
        unrouted: manifest.unrouted,
        total_bytes: total,
        bytes_per_document: each(total),
        route_bytes_per_document: routes.map_or(0.0, |p| p.bytes_per_document),
        lora_bytes_per_document: generation.experts.lora_bytes(&generation.spec),
        parts,
    })
}
