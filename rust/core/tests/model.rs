//! A store against a model of it: any sequence of changes leaves what a map in memory would hold.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::*;
use polyprag_core::{Document, DocumentId, Error, Kind, OnDuplicate, RouteRows, Store, Writer};
use proptest::prelude::*;

/// What is known of a document: its route's seed, and its text.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    route: Option<usize>,
    text: Option<String>,
}

type Model = BTreeMap<String, Known>;

#[derive(Debug, Clone)]
enum Step {
    Add(Vec<(u8, bool)>, OnDuplicate),
    AddArrays(Vec<u8>, OnDuplicate),
    Delete(Vec<u8>),
    Commit,
    Compact,
    Reindex,
    Rollback,
    /// Of a store with these documents.
    Merge(Vec<u8>, OnDuplicate),
    Reopen,
}

fn policy() -> impl Strategy<Value = OnDuplicate> {
    prop_oneof![
        Just(OnDuplicate::Error),
        Just(OnDuplicate::Replace),
        Just(OnDuplicate::Skip)
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let names = || prop::collection::vec(0u8..24, 0..6);
    let pairs = prop::collection::vec((0u8..24, any::<bool>()), 0..6);
    prop_oneof![
        4 => (pairs, policy()).prop_map(|(n, p)| Step::Add(n, p)),
        4 => (names(), policy()).prop_map(|(n, p)| Step::AddArrays(n, p)),
        3 => prop::collection::vec(0u8..24, 0..3).prop_map(Step::Delete),
        4 => Just(Step::Commit),
        2 => Just(Step::Compact),
        1 => Just(Step::Reindex),
        1 => Just(Step::Rollback),
        2 => (names(), policy()).prop_map(|(n, p)| Step::Merge(n, p)),
        1 => Just(Step::Reopen),
    ]
}

fn name(n: u8) -> String {
    // Neighbours share beginnings, and some are beginnings of others.
    format!("wiki-{}", "x".repeat(n as usize % 3) + &(n / 3).to_string())
}

fn word(n: u8, seed: usize) -> String {
    format!("word{n} seed{seed} common")
}

/// The rows of these seeds.
fn rows(seeds: &[usize], width: usize) -> Vec<f32> {
    seeds.iter().flat_map(|s| route(*s, width)).collect()
}

struct Run {
    model: Model,
    committed: Vec<Model>,
    seed: usize,
    writer: Writer,
    width: usize,
}

impl Run {
    fn add_one(model: &mut Model, name: String, known: Known, on: OnDuplicate) -> Result<(), ()> {
        match (model.contains_key(&name), on) {
            (true, OnDuplicate::Error) => Err(()),
            (true, OnDuplicate::Skip) => Ok(()),
            _ => {
                model.insert(name, known);
                Ok(())
            }
        }
    }

    /// Whether the writer goes on.
    fn step(&mut self, path: &Path, step: &Step, other: &Path) -> bool {
        match step {
            Step::Add(names, on) => {
                let mut distinct = names.clone();
                distinct.sort_unstable();
                distinct.dedup_by_key(|(n, _)| *n);
                for (n, routed) in distinct {
                    self.seed += 1;
                    let text = word(n, self.seed);
                    let document = Document::new(name(n)).with_text(&text).with_title("t");
                    let shape: Vec<usize> = match self.width {
                        LOGITS => vec![1, GROUPS, EXPERTS],
                        d => vec![1, d],
                    };
                    let data = route(self.seed, self.width);
                    let routes = RouteRows {
                        shape: &shape,
                        data: &data,
                    };
                    let known = Known {
                        route: routed.then_some(self.seed),
                        text: Some(text),
                    };
                    let expected = Self::add_one(&mut self.model, name(n), known, *on);
                    let got = self.writer.add(&[document], routed.then_some(routes), *on);
                    match (expected, got) {
                        (Ok(()), Ok(_)) => {}
                        (Err(()), Err(Error::DuplicateId { .. })) => {}
                        other => panic!("{other:?}"),
                    }
                }
                true
            }
            Step::AddArrays(names, on) => {
                let seeds: Vec<usize> = names
                    .iter()
                    .map(|_| {
                        self.seed += 1;
                        self.seed
                    })
                    .collect();
                let ids: Vec<DocumentId> = names.iter().map(|n| name(*n).into()).collect();
                let shape: Vec<usize> = match self.width {
                    LOGITS => vec![ids.len(), GROUPS, EXPERTS],
                    d => vec![ids.len(), d],
                };
                let data = rows(&seeds, self.width);
                let routes = RouteRows {
                    shape: &shape,
                    data: &data,
                };
                self.writer.add_arrays(&ids, routes, *on).unwrap();
                let mut all_fine = true;
                for (n, seed) in names.iter().zip(seeds) {
                    let known = Known {
                        route: Some(seed),
                        text: None,
                    };
                    all_fine &= Self::add_one(&mut self.model, name(*n), known, *on).is_ok();
                }
                if !all_fine {
                    let failed = self.writer.commit().unwrap_err();
                    assert!(matches!(failed, Error::DuplicateId { .. }), "{failed}");
                    let closed = self.writer.commit().unwrap_err();
                    assert!(matches!(closed, Error::StoreClosed { .. }), "{closed}");
                }
                all_fine
            }
            Step::Delete(names) => {
                let ids: Vec<DocumentId> = names.iter().map(|n| name(*n).into()).collect();
                let distinct: BTreeSet<String> = names.iter().map(|n| name(*n)).collect();
                let all_known = distinct.iter().all(|id| self.model.contains_key(id));
                match (all_known, self.writer.delete(&ids)) {
                    (true, Ok(n)) if n == distinct.len() => {
                        self.model.retain(|id, _| !distinct.contains(id));
                    }
                    (false, Err(Error::UnknownId { .. })) => {}
                    other => panic!("{other:?}"),
                }
                true
            }
            Step::Commit => {
                let before = self.committed.len();
                let number = self.writer.commit().unwrap();
                if Some(&self.model) != self.committed.last() || number as usize > before {
                    self.committed.push(self.model.clone());
                }
                true
            }
            Step::Compact => self.verb(|w| w.compact(), |models| models.last().cloned()),
            Step::Reindex => self.verb(|w| w.reindex(), |models| models.last().cloned()),
            Step::Rollback => self.verb(
                |w| w.rollback(),
                |models| models.len().checked_sub(2).map(|i| models[i].clone()),
            ),
            Step::Merge(names, on) => {
                let store = self.other(path, other, names);
                self.writer.merge(&store, *on).unwrap();
                let mut all_fine = true;
                let mut distinct = names.clone();
                distinct.sort_unstable();
                distinct.dedup();
                for n in distinct {
                    let known = Known {
                        route: Some(7000 + n as usize),
                        text: Some(word(n, 7000)),
                    };
                    all_fine &= Self::add_one(&mut self.model, name(n), known, *on).is_ok();
                }
                if !all_fine {
                    let failed = self.writer.commit().unwrap_err();
                    assert!(matches!(failed, Error::DuplicateId { .. }), "{failed}");
                }
                all_fine
            }
            Step::Reopen => false,
        }
    }

    fn verb(
        &mut self,
        work: impl FnOnce(&mut Writer) -> polyprag_core::Result<u64>,
        result: impl FnOnce(&[Model]) -> Option<Model>,
    ) -> bool {
        let number = self.writer.commit().unwrap();
        if number as usize > self.committed.len() {
            self.committed.push(self.model.clone());
        }
        match (work(&mut self.writer), result(&self.committed)) {
            (Ok(_), Some(model)) => {
                self.model = model.clone();
                self.committed.push(model);
            }
            (Err(Error::InvalidInput(_)), None) => {}
            other => panic!("{other:?}"),
        }
        true
    }

    /// A store with the same experts and these documents.
    fn other(&self, path: &Path, other: &Path, names: &[u8]) -> Store {
        let _ = std::fs::remove_dir_all(other);
        let codec = Store::open(path).unwrap().spec().unwrap().codec;
        let mut writer = create(other, spec(&codec.to_string()));
        let mut distinct = names.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        for n in distinct {
            let document = Document::new(name(n))
                .with_text(word(n, 7000))
                .with_title("t");
            add(&mut writer, document, 7000 + n as usize, OnDuplicate::Error).unwrap();
        }
        writer.commit().unwrap();
        Store::open(other).unwrap()
    }
}

/// The store holds what the model holds, whole.
fn check(store: &Store, model: &Model, width: usize) {
    store.verify().unwrap();
    assert_eq!(store.len().unwrap() as usize, model.len());
    let mut all: Vec<String> = store
        .ids()
        .unwrap()
        .map(|id| match id.unwrap() {
            DocumentId::String(id) => id,
            DocumentId::U64(_) => panic!(),
        })
        .collect();
    all.sort();
    assert_eq!(all, model.keys().cloned().collect::<Vec<_>>());
    let exact = store.spec().unwrap().codec.to_string() == "f32";
    for (id, known) in model {
        let id = [DocumentId::from(id.as_str())];
        let document = &store.documents(&id).unwrap()[0];
        assert_eq!(document.text, known.text);
        assert_eq!(store.is_routed(&id[0]).unwrap(), known.route.is_some());
        let kind = if width == LOGITS {
            Kind::Logits
        } else {
            Kind::Code
        };
        match known.route {
            Some(seed) => {
                let got = store.routes(&id, kind).unwrap().data;
                let put = route(seed, width);
                let bound = if exact { 0.0 } else { 0.03 };
                assert!(got.iter().zip(&put).all(|(a, b)| (a - b).abs() <= bound));
            }
            None => assert!(store.routes(&id, kind).is_err()),
        }
        if let Some(text) = &known.text {
            let hits = store.search(text, 1, None).unwrap();
            assert_eq!(hits[0].id, id[0], "{text}");
        }
    }
    let with_text = model.values().filter(|k| k.text.is_some()).count();
    assert_eq!(
        store.search("common", 1_000, None).unwrap().len(),
        with_text
    );
    let unrouted = model.values().filter(|k| k.route.is_none()).count();
    assert_eq!(store.info().unwrap().unrouted as usize, unrouted);
}

fn run(codec: &str, steps: &[Step]) {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec(codec));
    writer.commit().unwrap();
    let width = if codec.starts_with("code") {
        CODE
    } else {
        LOGITS
    };
    let mut run = Run {
        model: Model::new(),
        committed: vec![Model::new()],
        seed: 0,
        writer,
        width,
    };
    let reader = Store::open(&path).unwrap();
    for step in steps {
        if !run.step(&path, step, &tmp.path().join("other")) {
            // What was staged is gone, with its files.
            run.model = run.committed.last().unwrap().clone();
            run.writer.discard();
            run.writer = Store::open(&path).unwrap().writer().unwrap();
        }
        reader.refresh().unwrap();
        check(&reader, run.committed.last().unwrap(), width);
    }
    run.writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    check(&store, &run.model, width);

    let copied = tmp.path().join("copy");
    store.snapshot(&copied).unwrap();
    let packed = tmp.path().join("packed");
    Store::open(&copied).unwrap().pack(&packed).unwrap();
    let unpacked = tmp.path().join("unpacked");
    Store::unpack(&packed, &unpacked).unwrap();
    let again = Store::open_expecting(&unpacked, &store.digest().unwrap()).unwrap();
    check(&again, &run.model, width);
    // Nothing is there that no manifest of the store lists.
    drop(run);
    drop(store.writer().unwrap());
    for name in files(&unpacked) {
        assert!(path.join(&name).exists(), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn a_store_is_what_its_model_is(
        codec in prop_oneof![Just("f32"), Just("q8"), Just("code(3)")],
        steps in prop::collection::vec(step(), 1..25),
    ) {
        run(codec, &steps);
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|n| n.parse::<u32>().ok())
        .map_or(24, |n| n.min(2_000))
}

#[test]
fn many_small_commits_leave_few_segments() {
    for codec in ["f32", "q8"] {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let mut writer = create(&path, spec(codec));
        let mut model = Model::new();
        for n in 0..80u32 {
            let name = format!("document {n}");
            let text = format!("word{n} common");
            let document = Document::new(name.as_str())
                .with_text(&text)
                .with_title("t");
            add(&mut writer, document, n as usize % 5, OnDuplicate::Error).unwrap();
            let known = Known {
                route: Some(n as usize % 5),
                text: Some(text),
            };
            model.insert(name, known);
            if n % 4 == 3 {
                let gone = format!("document {}", n - 2);
                writer.delete(&[gone.as_str().into()]).unwrap();
                model.remove(&gone);
            }
            writer.commit().unwrap();
        }
        let store = Store::open(&path).unwrap();
        check(&store, &model, LOGITS);
        for part in store.info().unwrap().parts {
            // The index has up to eight segments of several files.
            let few = if part.role == "bm25" { 64 } else { 40 };
            assert!(part.files <= few, "{part:?}");
        }
        writer.compact().unwrap();
        store.refresh().unwrap();
        check(&store, &model, LOGITS);
        for part in store.info().unwrap().parts {
            let few = if part.role == "bm25" { 10 } else { 6 };
            assert!(part.files <= few, "{part:?}");
        }
    }
}
