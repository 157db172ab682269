//! `CURRENT` and manifests.

use std::path::Path;

use serde::Deserialize;

use crate::files::is_part_name;
use crate::manifest::{Current, Manifest};

#[derive(Deserialize)]
struct Numbered {
    generation: u64,
}

pub fn current(data: &[u8]) -> bool {
    let Ok(current) = Current::parse(data, Path::new("CURRENT")) else {
        return false;
    };
    // There is one way to write it.
    assert_eq!(current.to_text().as_bytes(), data);
    assert!(is_part_name(&current.manifest));
    assert!(Manifest::generation_of(&current.manifest).is_some());
    true
}

pub fn manifest(data: &[u8]) -> bool {
    // Any other name is refused, which the second call tries.
    let generation = serde_json::from_slice::<Numbered>(data).map_or(0, |n| n.generation);
    let name = Manifest::name(generation);
    let Ok(manifest) = Manifest::parse(data, Path::new(&name)) else {
        return false;
    };
    let other = Manifest::name(generation.wrapping_add(1));
    assert!(Manifest::parse(data, Path::new(&other)).is_err());

    assert!(manifest.unrouted <= manifest.documents && manifest.documents <= manifest.next_docno);
    assert!(manifest.parts.iter().all(|part| is_part_name(&part.file)));
    let spec = &manifest.spec;
    assert!(spec.validate().is_ok());
    assert!(spec.groups() <= spec.modules.len());
    assert!(spec.logits() >= spec.experts as usize);
    let codec = spec.build_codec();
    assert!(codec.columns() > 0 && codec.record_bytes() > 0);
    assert!(spec.lora_bytes(4) > 0);
    let _ = manifest.check_writable(Path::new(&name));

    // Written and read again it says the same.
    let Ok(json) = manifest.to_json(Path::new(&name)) else {
        return false;
    };
    let again = Manifest::parse(&json, Path::new(&name));
    assert!(again.is_ok(), "{again:?}");
    if let Ok(again) = again {
        assert_eq!(again.to_json(Path::new(&name)).ok(), Some(json));
    }
    true
}
