//! Copies of a store: after a power loss there is nothing at their path, or a whole one; and a whole one if the
//! call had returned. Each sync is needed for that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;

use crash::disk::{Change, Disk, Recorder, Trace};
use crash::oracle::{State, check};
use crash::session::{NAME, committed_once, recoding};
use crash::{Random, folder, full, seed};
use polyprag_core::Store;

const COPY: &str = "copy";
const PACKED: &str = "packed";
const UNPACKED: &str = "unpacked";
const RECODED: &str = "recoded";

struct Shipped {
    trace: Trace,
    /// Where the first copy begins in it.
    start: usize,
    state: State,
    versions: usize,
}

fn ship() -> Shipped {
    let tmp = folder();
    let (recorder, dir) = Recorder::new(tmp.path());
    let session = committed_once(dir.clone(), "q8");
    let start = recorder.trace().events.len();
    let store = Store::open(tmp.path().join(NAME)).unwrap();
    store.snapshot_in(dir.clone(), OsStr::new(COPY)).unwrap();
    recorder.acknowledge(1);
    store.pack_in(dir.clone(), OsStr::new(PACKED)).unwrap();
    recorder.acknowledge(2);
    Store::unpack_in(tmp.path().join(PACKED), dir.clone(), OsStr::new(UNPACKED)).unwrap();
    recorder.acknowledge(3);
    store
        .recode_in(dir, OsStr::new(RECODED), &recoding())
        .unwrap();
    recorder.acknowledge(4);
    Shipped {
        trace: recorder.trace(),
        start,
        state: session.committed,
        versions: session.versions,
    }
}

impl Shipped {
    fn look(&self, parent: &Path, done: usize) -> Result<(), String> {
        for (n, name) in [COPY, PACKED, UNPACKED, RECODED].into_iter().enumerate() {
            let mut path = parent.join(name);
            match path.exists() {
                false if n < done => return Err(format!("{name} is gone")),
                false => continue,
                true => {}
            }
            let tmp = folder();
            if name == PACKED {
                let whole = tmp.path().join(NAME);
                Store::unpack(&path, &whole).map_err(|e| format!("{name}: {e}"))?;
                path = whole;
            }
            let store = Store::open(&path).map_err(|e| format!("{name}: {e}"))?;
            check(&store, &self.state, "q8", self.versions)?;
        }
        Ok(())
    }

    /// The first image that breaks the promise, if this call never happened; and how many were looked at.
    /// They are taken after the events that `at_event` picks.
    fn broken(
        &self,
        without: Option<usize>,
        rounds: usize,
        at_event: impl Fn(usize, &Change) -> bool,
    ) -> (Option<String>, usize) {
        let mut random = Random(seed());
        let mut seen = HashSet::new();
        let mut disk = Disk::new(&self.trace);
        let mut done = 0;
        for (at, event) in self.trace.events.iter().enumerate() {
            if without != Some(at) {
                disk.apply(&event.change);
            }
            if let Change::Acknowledged(n) = event.change {
                done = n;
            }
            if at < without.unwrap_or(self.start) || !at_event(at, &event.change) {
                continue;
            }
            for choice in disk.choices(&mut random, rounds) {
                let image = disk.image(&choice);
                if !seen.insert((image.hash(), done)) {
                    continue;
                }
                let tmp = folder();
                image.write(tmp.path());
                if let Err(e) = self.look(tmp.path(), done) {
                    let about = format!("after {} with {choice:?}: {e}", event.what);
                    return (Some(about), seen.len());
                }
            }
        }
        (None, seen.len())
    }
}

#[test]
fn a_copy_is_whole_or_not_there_and_each_sync_of_it_is_needed() {
    let shipped = ship();
    let (rounds, stride) = if full() { (8, 1) } else { (1, 7) };
    let (broken, images) = shipped.broken(None, rounds, |at, _| at % stride == 0);
    assert_eq!(broken, None);
    let mut needed = 0;
    for (at, event) in shipped.trace.events.iter().enumerate().skip(shipped.start) {
        if matches!(event.change, Change::SyncFile(_) | Change::SyncFolder(_)) {
            // Most are missed as soon as the call has returned.
            let returned = |_: usize, change: &Change| matches!(change, Change::Acknowledged(_));
            let (broken, _) = shipped.broken(Some(at), 0, returned);
            let broken = broken.or_else(|| shipped.broken(Some(at), 0, |_, _| true).0);
            assert!(broken.is_some(), "nothing breaks without {}", event.what);
            needed += 1;
        }
    }
    let calls = shipped.trace.events.len() - shipped.start;
    println!(
        "{calls} calls of 4 copies, {images} images, {needed} syncs needed; seed {}",
        seed()
    );
}
