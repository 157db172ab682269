//! Every file of the fuzz corpus through the function that its target runs: what once broke a reader, and
//! what leads to each of its branches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "corpus/seeds.rs"]
mod seeds;

use std::path::{Path, PathBuf};

use polyprag_core::fuzzing::TARGETS;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

#[test]
fn every_target_takes_its_corpus() {
    let mut folders = Vec::new();
    for (name, run) in TARGETS {
        let (mut accepted, mut refused) = (0, 0);
        for entry in std::fs::read_dir(folder().join(name)).unwrap() {
            let path = entry.unwrap().path();
            let input = std::fs::read(&path).unwrap();
            let ran = std::panic::catch_unwind(|| run(&input));
            match ran {
                Ok(true) => accepted += 1,
                Ok(false) => refused += 1,
                Err(_) => panic!("{} of {name}", path.display()),
            }
        }
        // Otherwise the target does not look at what it should.
        assert!(accepted > 0, "{name} accepts none of its corpus");
        assert!(
            refused > 0 || name == "codecs",
            "{name} refuses none of its corpus"
        );
        folders.push(name);
    }
    let mut found: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, folders);
}

#[test]
fn what_the_writers_write_is_accepted() {
    let temporary = tempfile::tempdir().unwrap();
    let seeds = seeds::all(temporary.path());
    for (name, run) in TARGETS {
        let inputs = seeds.iter().filter(|seed| seed.target == name);
        let inputs: Vec<_> = inputs.collect();
        assert!(!inputs.is_empty(), "no seeds for {name}");
        for seed in inputs {
            assert!(run(&seed.input), "{name}: {}", seed.name);
        }
    }
}

/// `POLYPRAG_SEEDS=folder cargo test --test corpus -- --ignored`: the inputs from which fuzzing begins, a folder a
/// target.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let to = PathBuf::from(std::env::var_os("POLYPRAG_SEEDS").unwrap());
    let temporary = tempfile::tempdir().unwrap();
    for seed in seeds::all(temporary.path()) {
        let folder = to.join(seed.target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(seed.name), seed.input).unwrap();
    }
}
