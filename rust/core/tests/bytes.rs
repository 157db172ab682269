//! Every byte of a store: files cut at each, extended, gone, and with each byte and bit altered. What is read
//! then is a typed error or right; it is never a panic, and never ends the process.
//!
//! The work is done in children, so that a signal is told with its case. `POLYPRAG_PROOF=1` takes every byte;
//! else some are drawn from `POLYPRAG_SEED`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;
mod proof;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use common::*;
use crash::{Random, folder, full, seed};
use polyprag_core::{DocumentId, Error, Store};
use proof::answers::{Answers, Hits, ask, poke, search};
use proof::children::{self, Progress, count, job, told};
use proof::sealed::Forge;
use proof::zoo::{CODECS, IDS, QUESTIONS, known, life};

/// A store, what is right about it, and where the child is with it.
struct Victim {
    _folder: tempfile::TempDir,
    path: PathBuf,
    known: Vec<DocumentId>,
    answers: Answers,
    hits: Hits,
    needed: Vec<String>,
    random: Random,
    progress: Progress,
    cases: usize,
}

impl Victim {
    fn new(codec: &str, shape: &str) -> Self {
        let folder = folder();
        let path = folder.path().join("s");
        let store = life(&path, codec, shape).unwrap();
        store.verify().unwrap();
        let known = known(shape);
        let (answers, hits) = (
            ask(&store, &known).unwrap(),
            search(&store, &QUESTIONS).unwrap(),
        );
        assert!(hits.iter().all(|hits| !hits.is_empty()), "{hits:?}");
        let forge = Forge::new(&path);
        let manifest = forge.manifest();
        let parts = manifest["parts"].as_array().unwrap();
        let mut needed = vec!["CURRENT".to_owned(), forge.current()];
        needed.extend(parts.iter().map(|p| p["file"].as_str().unwrap().to_owned()));
        Self {
            _folder: folder,
            path,
            known,
            answers,
            hits,
            needed,
            random: Random(seed()),
            progress: Progress::open(),
            cases: 0,
        }
    }

    fn at(&mut self, case: &str) {
        self.cases += 1;
        self.progress.at(case);
    }

    /// All positions below `n`, or in the short form some of them, with the first and the last.
    fn positions(&mut self, n: usize, some: usize) -> Vec<usize> {
        if full() || n <= some {
            return (0..n).collect();
        }
        let drawn: Vec<usize> = (0..some).map(|_| self.random.below(n)).collect();
        [0, n - 1].into_iter().chain(drawn).collect()
    }

    /// After a file was cut, extended or removed.
    fn look_for_length(&self, name: &str, what: &str) {
        let is_needed = self.needed.iter().any(|n| n == name);
        let is_index = name.starts_with("bm25/");
        let store = match Store::open(&self.path) {
            Err(e) => {
                assert!(is_needed && !is_index && is_typed(&e), "{what}: {e:?}");
                return;
            }
            Ok(store) => store,
        };
        assert_eq!(ask(&store, &self.known).unwrap(), self.answers, "{what}");
        if !is_needed {
            assert_eq!(search(&store, &QUESTIONS).unwrap(), self.hits, "{what}");
            store.verify().unwrap();
            return;
        }
        assert!(is_index, "{what} was not noticed");
        let error = search(&store, &QUESTIONS).expect_err(what);
        assert!(
            matches!(error, Error::CorruptIndex { .. }),
            "{what}: {error:?}"
        );
        assert!(is_typed(&store.verify().expect_err(what)));
    }

    /// After bytes were altered: whatever is asked gives a typed error or something. Whether the damage was found.
    fn look_for_damage(&self, what: &str) -> bool {
        let store = match Store::open(&self.path) {
            Err(e) => {
                assert!(is_typed(&e), "{what}: {e:?}");
                return true;
            }
            Ok(store) => store,
        };
        for e in poke(&store, &self.known, &QUESTIONS) {
            assert!(is_typed_or_miss(&e), "{what}: {e:?}");
        }
        match store.verify() {
            Err(e) => {
                assert!(is_typed(&e), "{what}: {e:?}");
                true
            }
            Ok(_) => false,
        }
    }

    fn cuts(&mut self) {
        for name in files(&self.path) {
            let file = self.path.join(&name);
            let whole = fs::read(&file).unwrap();
            for n in self.positions(whole.len(), 6) {
                let what = format!("{name} cut to {n}");
                self.at(&what);
                fs::write(&file, &whole[..n]).unwrap();
                self.look_for_length(&name, &what);
            }
            for n in [1, 8, 16, 63, 64, 4096, 65_536] {
                let what = format!("{name} extended by {n}");
                self.at(&what);
                let more: Vec<u8> = whole
                    .iter()
                    .copied()
                    .cycle()
                    .take(whole.len() + n)
                    .collect();
                fs::write(&file, more).unwrap();
                self.look_for_length(&name, &what);
            }
            let what = format!("{name} removed");
            self.at(&what);
            fs::remove_file(&file).unwrap();
            self.look_for_length(&name, &what);
            fs::write(&file, &whole).unwrap();
        }
        self.is_as_before();
        count("cuts", self.cases);
    }

    /// The bits of a byte to flip: each where structure is dense, else some.
    fn masks(&mut self, is_dense: bool) -> Vec<u8> {
        match is_dense && full() {
            true => (0..8).map(|bit| 1 << bit).chain([0xff]).collect(),
            false => vec![[0x01, 0x80, 0xff, 0x20, 0x7f][self.random.below(5)]],
        }
    }

    fn flips(&mut self) {
        for name in self.needed.clone() {
            let file = self.path.join(&name);
            let whole = fs::read(&file).unwrap();
            for at in self.positions(whole.len(), 12) {
                for mask in self.masks(is_dense(&name, &whole, at)) {
                    let what = format!("{name}, byte {at} altered by {mask:02x}");
                    self.at(&what);
                    let mut altered = whole.clone();
                    altered[at] ^= mask;
                    fs::write(&file, &altered).unwrap();
                    assert!(self.look_for_damage(&what), "{what} was not found");
                }
            }
            fs::write(&file, &whole).unwrap();
        }
        self.is_as_before();
        count("flips", self.cases);
    }

    /// Cuts and flips of parts whose length and hash the manifest has right.
    fn sealed(&mut self) {
        let forge = Forge::new(&self.path);
        let manifest = forge.read(&forge.current());
        let restore = || forge.publish_bytes(&forge.current(), &manifest);
        let (mut cuts, mut missed) = (0, 0);
        for name in self.needed.split_off(2) {
            let whole = forge.read(&name);
            let ours = name.ends_with(".seg") || name.ends_with(".bin");
            for n in self.positions(whole.len(), 4) {
                let what = format!("{name} cut to {n}, and sealed");
                self.at(&what);
                forge.replace(&name, &whole[..n]);
                let found = self.look_for_damage(&what);
                assert!(found || name.starts_with("bm25/"), "{what} was not found");
                restore();
                cuts += 1;
            }
            for at in self.positions(whole.len(), 12) {
                let mask = self.masks(false)[0];
                let what = format!("{name}, byte {at} altered by {mask:02x}, and sealed");
                self.at(&what);
                let mut altered = whole.clone();
                altered[at] ^= mask;
                forge.replace(&name, &altered);
                let found = self.look_for_damage(&what);
                // Other files have no checksums of ours in them: other numbers are then what was meant.
                assert!(found || !ours, "{what} was not found");
                missed += usize::from(!found);
                restore();
            }
            fs::write(self.path.join(&name), &whole).unwrap();
        }
        self.is_as_before();
        count("sealed cuts", cuts);
        count("sealed flips", self.cases - cuts);
        count(
            "of them of experts, decoder, router and index that read as other numbers",
            missed,
        );
    }

    fn is_as_before(&self) {
        let store = Store::open(&self.path).unwrap();
        assert_eq!(ask(&store, &self.known).unwrap(), self.answers);
        assert_eq!(search(&store, &QUESTIONS).unwrap(), self.hits);
        store.verify().unwrap();
    }
}

/// Where each bit has a meaning of its own.
fn is_dense(name: &str, bytes: &[u8], at: usize) -> bool {
    if name.ends_with(".safetensors") {
        let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        return at < 8 + header;
    }
    let tail = match name.ends_with(".seg") || name.ends_with(".bin") {
        true => u32::from_le_bytes(*bytes[bytes.len() - 16..].first_chunk().unwrap()) as usize,
        false => 0,
    };
    !name.contains('/') && (tail == 0 || at < 64 || at >= bytes.len() - tail)
}

#[test]
#[ignore = "done by the other tests, in processes of its own"]
fn child() {
    let Some(job) = job() else { return };
    let words: Vec<&str> = job.split(' ').collect();
    let [work, codec, shape] = words[..] else {
        panic!("a job of {words:?}");
    };
    let mut victim = Victim::new(codec, shape);
    match work {
        "cuts" => victim.cuts(),
        "flips" => victim.flips(),
        _ => victim.sealed(),
    }
}

/// Every codec, and every kind of ids; in the short form three of them.
fn stores() -> Vec<String> {
    let by_codec = CODECS.iter().map(|codec| format!("{codec} {}", IDS[0]));
    let by_ids = IDS[1..].iter().map(|shape| format!("q8 {shape}"));
    let mut all: Vec<String> = by_codec.chain(by_ids).collect();
    let mut random = Random(seed());
    while !full() && all.len() > 3 {
        all.remove(random.below(all.len()));
    }
    all
}

fn in_children(work: &str) {
    let jobs = stores()
        .iter()
        .map(|store| format!("{work} {store}"))
        .collect();
    let counts = children::all("child", jobs, Duration::from_secs(6 * 3600));
    println!(
        "{} stores: {}; seed {}",
        stores().len(),
        told(&counts),
        seed()
    );
    assert!(
        counts
            .iter()
            .all(|(what, n)| *n > 0 || what.starts_with("of them"))
    );
}

#[test]
fn a_file_cut_anywhere_is_an_error_or_not_needed() {
    in_children("cuts");
}

#[test]
fn every_byte_that_is_altered_is_found_by_verify_and_harms_no_reader() {
    in_children("flips");
}

#[test]
fn parts_that_are_cut_or_altered_under_the_right_hash_harm_no_reader() {
    in_children("sealed");
}

#[test]
fn a_child_that_dies_is_told() {
    let died = std::panic::catch_unwind(|| {
        children::all("dying_child", vec!["die".into()], Duration::from_secs(600))
    });
    let message = *died.expect_err("it dies").downcast::<String>().unwrap();
    assert!(message.contains("signal 6 at the last case"), "{message}");
}

#[test]
#[ignore = "dies, for another test"]
fn dying_child() {
    if job().is_some() {
        Progress::open().at("the last case");
        std::process::abort();
    }
}
