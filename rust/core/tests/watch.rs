//! A watch over long work: it hears how far the work is, up to its end, and may stop it at any of its calls.
//! Then nothing of it is there, as after any other failure, and a second try works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{LOGITS, create, ids, passage, route, spec};
use polyprag_core::{
    Document, DocumentId, Dtype, Error, OnDuplicate, Recoding, Result, RouteRows, Store, Watch,
    Writer,
};

/// Notes what it hears, and stops the work at one of its calls.
#[derive(Debug, Default)]
struct Notes {
    heard: Mutex<Vec<(u64, u64)>>,
    stop_at: Option<usize>,
}

impl Watch for Notes {
    fn at(&self, done: u64, total: u64) -> ControlFlow<()> {
        let mut heard = self.heard.lock().unwrap();
        heard.push((done, total));
        match self.stop_at.is_some_and(|stop| heard.len() > stop) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// In memory where there is some: these tests write many small files.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// In a folder of its own: `store`, the one that is worked on, and `other`, which has some of its documents.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// With as many commits as it takes for the next one to join their segments.
    fn new() -> Self {
        let place = Self { folder: folder() };
        let mut writer = create(&place.path("store"), spec("q8"));
        for i in 0..34 {
            for j in 0..3 {
                let name = format!("d{i}-{j}");
                let text = format!("words of {i} and {j}, amber and silver");
                add(&mut writer, passage(&name, &text), 3 * i + j);
            }
            writer.commit().unwrap();
        }
        writer
            .delete(&ids(&["d0-0", "d7-1", "d8-0", "d8-1", "d8-2"]))
            .unwrap();
        writer.commit().unwrap();
        drop(writer);
        place.store().snapshot(place.path("other")).unwrap();
        place.store().pack(place.path("packed")).unwrap();
        place
    }

    /// The same again, elsewhere.
    fn copy(&self) -> Self {
        let folder = folder();
        for store in ["store", "other"] {
            let from = Store::open(self.path(store)).unwrap();
            from.snapshot(folder.path().join(store)).unwrap();
        }
        std::fs::copy(self.path("packed"), folder.path().join("packed")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn store(&self) -> Store {
        Store::open(self.path("store")).unwrap()
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        let mut all = BTreeSet::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                all.insert(path);
            }
        }
        // It comes with the first writer, and stays.
        all.remove(&self.path("store").join("LOCK"));
        all
    }
}

/// One piece of work, and how many documents the store has after it.
struct Work {
    name: &'static str,
    documents: u64,
    /// Whether threads share it: then the one that asked for it may get nothing to do, and tells only of the end.
    threads: bool,
    run: fn(&Place, Arc<dyn Watch>) -> Result<()>,
}

const BEFORE: u64 = 34 * 3 - 5;

fn add(writer: &mut Writer, document: Document, seed: usize) {
    common::add(writer, document, seed, OnDuplicate::Error).unwrap();
}

fn rows(n: usize) -> Vec<f32> {
    (0..n).flat_map(|i| route(i, LOGITS)).collect()
}

fn add_arrays(writer: &mut Writer, n: usize, on_duplicate: OnDuplicate) -> Result<()> {
    let names: Vec<DocumentId> = (0..n)
        .map(|i| DocumentId::from(format!("d{i}-0").as_str()))
        .collect();
    let rows = rows(n);
    let rows = RouteRows {
        shape: &[n, 2, 4],
        data: &rows,
    };
    writer.add_arrays(&names, rows, on_duplicate).map(drop)
}

/// Stages what makes a commit do all that a commit may do.
fn stage(writer: &mut Writer) {
    writer.delete(&ids(&["d3-0"])).unwrap();
    add(writer, passage("new", "a passage about brass"), 1);
    add_arrays(writer, 50, OnDuplicate::Replace).unwrap();
}

const WORK: [Work; 13] = [
    Work {
        name: "verify",
        documents: BEFORE,
        threads: false,
        run: |place, watch| place.store().watched(watch).verify().map(drop),
    },
    Work {
        name: "search_many",
        documents: BEFORE,
        threads: true,
        run: |place, watch| {
            let texts: Vec<String> = (0..400).map(|i| format!("amber {i}")).collect();
            let found = place.store().watched(watch).search_many(&texts, 3, None)?;
            assert_eq!(found.len(), 400);
            Ok(())
        },
    },
    Work {
        name: "snapshot",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let to = place.path("new");
            place.store().watched(watch).snapshot(&to)?;
            same(&to, place);
            Ok(())
        },
    },
    Work {
        name: "pack",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let to = place.path("new");
            place.store().watched(watch).pack(&to)?;
            let packed = std::fs::read(place.path("packed")).unwrap();
            assert!(std::fs::read(to).unwrap() == packed);
            Ok(())
        },
    },
    Work {
        name: "unpack",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let to = place.path("new");
            Store::unpack_watched(place.path("packed"), &to, watch)?;
            same(&to, place);
            Ok(())
        },
    },
    Work {
        name: "recode",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let recoding = Recoding {
                codec: "q4".parse().unwrap(),
                decoder: None,
                expert_dtype: None,
            };
            let to = place.path("new");
            place.store().watched(watch).recode(&to, &recoding)?;
            let report = Store::open(to).unwrap().verify().unwrap();
            assert_eq!(report.documents, BEFORE);
            Ok(())
        },
    },
    Work {
        name: "add",
        documents: BEFORE + 60,
        threads: false,
        run: |place, watch| {
            let documents: Vec<_> = (0..60)
                .map(|i| passage(&format!("new{i}"), "silver"))
                .collect();
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            writer.add(&documents, None, OnDuplicate::Error)?;
            unwatched(writer)
        },
    },
    Work {
        name: "add_arrays",
        documents: BEFORE + 66 + 2,
        threads: false,
        run: |place, watch| {
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            add_arrays(&mut writer, 100, OnDuplicate::Replace)?;
            unwatched(writer)
        },
    },
    Work {
        name: "delete",
        documents: BEFORE - 3,
        threads: false,
        run: |place, watch| {
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            writer.delete(&ids(&["d1-0", "d2-0", "d3-0"]))?;
            unwatched(writer)
        },
    },
    Work {
        name: "merge",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let other = Store::open(place.path("other")).unwrap();
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            writer.merge(&other, OnDuplicate::Replace)?;
            unwatched(writer)
        },
    },
    Work {
        name: "commit",
        documents: BEFORE + 1 + 2 + 16,
        threads: false,
        run: |place, watch| {
            let mut writer = place.store().writer()?;
            stage(&mut writer);
            writer.watch(watch);
            writer.commit().map(drop)
        },
    },
    Work {
        name: "compact",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            writer.compact().map(drop)
        },
    },
    Work {
        name: "reindex",
        documents: BEFORE,
        threads: false,
        run: |place, watch| {
            let mut writer = place.store().writer()?;
            writer.watch(watch);
            writer.reindex().map(drop)
        },
    },
];

/// Commits, whatever the watch over what was staged.
fn unwatched(mut writer: Writer) -> Result<()> {
    writer.watch(Arc::new(polyprag_core::Unwatched));
    writer.commit().map(drop)
}

fn same(copy: &Path, place: &Place) {
    let copy = Store::open(copy).unwrap();
    assert_eq!(copy.digest().unwrap(), place.store().digest().unwrap());
    copy.verify().unwrap();
}

/// Runs it whole; returns what the watch heard.
fn whole(work: &Work, place: &Place) -> Vec<(u64, u64)> {
    let notes = Arc::new(Notes::default());
    (work.run)(place, notes.clone()).unwrap();
    let report = place.store().verify().unwrap();
    assert_eq!(report.documents, work.documents, "{}", work.name);
    let found = place.store().search("amber", 200, None).unwrap();
    assert!(!found.is_empty());
    notes.heard.lock().unwrap().clone()
}

#[test]
fn it_hears_of_all_the_work_in_order() {
    let model = Place::new();
    for work in &WORK {
        let name = work.name;
        let heard = whole(work, &model.copy());
        assert!(
            heard.is_sorted_by_key(|(done, _)| *done),
            "{name}: {heard:?}"
        );
        // Only of a packed store the total is not known at once.
        let known = heard.iter().position(|(_, total)| *total > 0).unwrap();
        assert!(known <= usize::from(name == "unpack"), "{name}: {heard:?}");
        let total = heard.last().unwrap().1;
        let known = heard.get(known..).unwrap();
        assert!(known.iter().all(|(_, t)| *t == total), "{name}: {heard:?}");
        assert_eq!(known.first().unwrap().0, 0, "{name}");
        assert_eq!(heard.last().unwrap().0, total, "{name}");
        // It is told of on the way, and comes near the total before the end says so.
        let before = known.get(known.len() - 2).unwrap().0;
        if !work.threads {
            assert!(known.len() > 4, "{name}: {heard:?}");
            assert!(before * 10 >= total * 6, "{name}: {before} of {total}");
        }
    }
}

#[test]
fn it_stops_the_work_at_any_call() {
    let all = std::env::var_os("POLYPRAG_PROOF").is_some();
    let model = Place::new();
    for work in &WORK {
        let calls = whole(work, &model.copy()).len();
        let each = if all { 1 } else { calls.div_ceil(6).max(1) };
        let last = calls - 1;
        let stops = (0..calls).filter(|n| n % each == 0 || *n == last);
        let mut stopped = 0;
        let place = model.copy();
        let (before, generation) = (place.files(), place.store().generation().unwrap());
        let digest = place.store().digest().unwrap();
        for stop in stops {
            let about = format!("{} at call {stop} of {calls}", work.name);
            let notes = Arc::new(Notes {
                stop_at: Some(stop),
                ..Notes::default()
            });
            match (work.run)(&place, notes.clone()) {
                Err(Error::Interrupted) => stopped += 1,
                // How often other threads are waited for differs.
                Ok(()) if notes.heard.lock().unwrap().len() <= stop => break,
                other => panic!("{about}: {other:?}"),
            }
            let after = place.files();
            let differing: Vec<_> = after.symmetric_difference(&before).collect();
            assert!(differing.is_empty(), "{about}: {differing:?}");
            let store = place.store();
            assert_eq!(store.generation().unwrap(), generation, "{about}");
            assert_eq!(store.digest().unwrap(), digest, "{about}");
            assert_eq!(store.verify().unwrap().documents, BEFORE, "{about}");
        }
        let least = if work.threads { 1 } else { 4 };
        assert!(stopped >= least, "{}: {stopped} of {calls}", work.name);
        if place.store().digest().unwrap() == digest {
            whole(work, &place);
        }
    }
}

#[test]
fn it_hears_of_experts_on_the_way() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let mut spec = spec("f32");
    spec.modules[0].in_features = 200_000;
    create(&at("store"), spec.clone()).commit().unwrap();
    let hears = |what: &str, work: &dyn Fn(&Store) -> Result<()>| {
        let notes = Arc::new(Notes::default());
        work(&Store::open(at("store")).unwrap().watched(notes.clone())).unwrap();
        let heard = notes.heard.lock().unwrap();
        let total = heard.last().unwrap().1;
        let steps = heard.windows(2).map(|pair| pair[1].0 - pair[0].0);
        let longest = steps.max().unwrap();
        assert!(longest * 4 <= total, "{what}: {longest} of {total} unheard");
    };
    hears("verify", &|store| store.verify().map(drop));
    for dtype in [Dtype::Int8, Dtype::Bf16] {
        hears(dtype.name(), &|store| {
            let recoding = Recoding {
                codec: spec.codec,
                decoder: None,
                expert_dtype: Some(dtype),
            };
            store.recode(at(dtype.name()), &recoding)
        });
    }
}

#[test]
fn a_writer_that_was_stopped_half_way_says_so() {
    let place = Place::new();
    let mut writer = place.store().writer().unwrap();
    writer.watch(Arc::new(Notes {
        stop_at: Some(3),
        ..Notes::default()
    }));
    assert!(matches!(writer.compact(), Err(Error::Interrupted)));
    let again = writer.commit().unwrap_err();
    assert!(matches!(again, Error::StoreClosed { .. }), "{again}");
    assert!(again.to_string().contains("as was asked"), "{again}");
}
