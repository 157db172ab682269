//! Power loss: whatever of the unsynced is on the disk afterwards, the store is the one that was
//! acknowledged last, or the one that was being committed; and each sync is needed for that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crash::disk::{Bytes, Change, Disk, Names, Node, Recorder, Trace};
use crash::oracle::{self, State, check, check_nothing_left_over, check_previous};
use crash::session::{NAME, Session, Step, drawn, short, verbs};
use crash::{Random, folder, full, kind, seed};
use polyprag_core::files::Directory;
use polyprag_core::{OnDuplicate, Store};

/// What a session did to the disk, and what it was told.
struct Recorded {
    trace: Trace,
    acknowledged: Vec<(u64, State)>,
    versions: usize,
    codec: &'static str,
    parent: PathBuf,
}

fn record(steps: &[Step], codec: &'static str) -> Recorded {
    let tmp = folder();
    let (recorder, dir) = Recorder::new(tmp.path());
    let mut session = Session::new(dir, codec);
    for step in steps {
        session.step(step).unwrap();
        if step.commits() {
            recorder.acknowledge(session.acknowledged.len());
            let store = Store::open(tmp.path().join(NAME)).unwrap();
            let found = check(&store, &session.committed, codec, session.versions);
            found.expect("nothing was lost yet");
        }
    }
    session.writer = None;
    let known = Disk::after(&recorder.trace()).image(&(Names::All, Bytes::All));
    let real = Node::read(tmp.path());
    assert_eq!(known.hash(), real.hash(), "something went past the tap");
    Recorded {
        trace: recorder.trace(),
        acknowledged: session.acknowledged,
        versions: session.versions,
        codec,
        parent: tmp.path().to_owned(),
    }
}

impl Recorded {
    /// How many commits were acknowledged before each event, and at the end.
    fn acknowledged_before(&self) -> Vec<usize> {
        let mut n = 0;
        let mut before = vec![0];
        for event in &self.trace.events {
            n += usize::from(matches!(event.change, Change::Acknowledged(_)));
            before.push(n);
        }
        before
    }

    /// Whether an image keeps the promise; the number of the commit that it holds, 0 for nothing.
    fn look(&self, parent: &Path, acknowledged: usize) -> Result<usize, String> {
        let path = parent.join(NAME);
        if acknowledged == 0 && !path.exists() {
            return Ok(0);
        }
        let store = Store::open(&path).map_err(|e| e.to_string())?;
        let generation = store.generation().map_err(|e| e.to_string())?;
        let candidates = [acknowledged.checked_sub(1), Some(acknowledged)];
        for at in candidates.into_iter().flatten() {
            match self.acknowledged.get(at) {
                Some((number, state)) if *number == generation => {
                    check(&store, state, self.codec, self.versions)?;
                    check_previous(&path)?;
                    return Ok(at + 1);
                }
                _ => {}
            }
        }
        let last = acknowledged
            .checked_sub(1)
            .map(|at| self.acknowledged[at].0);
        Err(format!(
            "generation {generation} is in force, acknowledged was {last:?}"
        ))
    }

    /// Whether a writer can go on from an image, and leaves nothing behind that no generation needs.
    fn go_on(&self, parent: &Path, commit: usize) -> Result<(), String> {
        let told = |e: polyprag_core::Error| e.to_string();
        let mut session = Session::new(Directory::open(parent).map_err(told)?, self.codec);
        match commit.checked_sub(1) {
            None => session.step(&Step::Create).map_err(told)?,
            Some(at) => {
                session.committed = self.acknowledged[at].1.clone();
                session.step(&Step::Open).map_err(told)?;
            }
        }
        let version = oracle::Version {
            number: self.versions,
            text: true,
            route: true,
        };
        if let Some(id) = session.committed.keys().next() {
            let delete = Step::Delete(vec![id.clone()]);
            session.step(&delete).map_err(told)?;
        }
        let add = Step::Add("after".into(), version, OnDuplicate::Replace);
        session.step(&add).map_err(told)?;
        session.step(&Step::Commit).map_err(told)?;
        session.writer = None;
        let path = parent.join(NAME);
        let store = Store::open(&path).map_err(told)?;
        check(&store, &session.committed, self.codec, session.versions)?;
        check_nothing_left_over(&path)?;
        match std::fs::read_dir(parent)
            .map_err(|e| e.to_string())?
            .count()
        {
            1 => Ok(()),
            n => Err(format!("{} entries beside the store", n - 1)),
        }
    }

    /// Puts an image on a real disk, and looks at it.
    fn replay(&self, image: &Node, acknowledged: usize, write: bool) -> Result<(), String> {
        let tmp = folder();
        image.write(tmp.path());
        let commit = self.look(tmp.path(), acknowledged)?;
        match write {
            true => self
                .go_on(tmp.path(), commit)
                .map_err(|e| format!("going on from commit {commit}: {e}")),
            false => Ok(()),
        }
    }
}

/// Tries images after each `stride`-th event of a session: `share` of them in thousandths, `writes` of those with
/// a writer.
fn survives(
    recorded: &Recorded,
    seed: u64,
    rounds: usize,
    share: usize,
    writes: usize,
    stride: usize,
) -> [usize; 3] {
    let before = recorded.acknowledged_before();
    let events = &recorded.trace.events;
    let seen = Mutex::new(HashSet::new());
    let counts = [const { AtomicUsize::new(0) }; 3];
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (seen, counts, before) = (&seen, &counts, &before);
            scope.spawn(move || {
                let mut disk = Disk::new(&recorded.trace);
                for at in 0..=events.len() {
                    if at > 0 {
                        disk.apply(&events[at - 1].change);
                    }
                    if at % threads != thread || !(at / threads).is_multiple_of(stride) {
                        continue;
                    }
                    let mut random = Random(seed ^ (at as u64) << 32);
                    for choice in disk.choices(&mut random, rounds) {
                        let drawn = random.below(1000);
                        let usual = matches!(choice, (Names::None | Names::All, _));
                        if !usual && drawn >= share {
                            continue;
                        }
                        counts[0].fetch_add(1, Ordering::Relaxed);
                        let image = disk.image(&choice);
                        if !seen.lock().unwrap().insert((image.hash(), before[at])) {
                            continue;
                        }
                        counts[1].fetch_add(1, Ordering::Relaxed);
                        let write = random.below(1000) < writes;
                        counts[2].fetch_add(usize::from(write), Ordering::Relaxed);
                        if let Err(e) = recorded.replay(&image, before[at], write) {
                            let last = at.checked_sub(1).map(|at| &events[at].what);
                            panic!("power lost after call {at}, {last:?}, {choice:?}: {e}");
                        }
                    }
                }
            });
        }
    });
    counts.map(AtomicUsize::into_inner)
}

#[test]
fn an_acknowledged_commit_survives_whatever_was_not_synced() {
    let runs: Vec<(Vec<Step>, &str)> = match full() {
        false => vec![(short(), "q8"), (verbs(), "code(3)")],
        true => vec![
            (short(), "q8"),
            (verbs(), "code(3)"),
            (drawn(seed(), 12), "f32"),
            (drawn(seed() + 1, 12), "q8"),
        ],
    };
    let (rounds, share, writes, stride) = match full() {
        true => (4, 1000, 50, 1),
        false => (2, 50, 30, 3),
    };
    for (steps, codec) in runs {
        let recorded = record(&steps, codec);
        let [drawn, different, written] =
            survives(&recorded, seed(), rounds, share, writes, stride);
        println!(
            "codec {codec}: {} calls, {} commits: {drawn} images drawn, {different} different, \
             {written} written on; seed {}",
            recorded.trace.events.len(),
            recorded.acknowledged.len(),
            seed(),
        );
        assert!(different > recorded.trace.events.len() / stride);
    }
}

impl Recorded {
    /// Every sync that was made.
    fn syncs(&self) -> impl Iterator<Item = (&Self, usize)> {
        let is_sync =
            |change: &Change| matches!(change, Change::SyncFile(_) | Change::SyncFolder(_));
        let events = self.trace.events.iter().enumerate();
        events
            .filter(move |(_, event)| is_sync(&event.change))
            .map(move |(at, _)| (self, at))
    }

    /// Whether the file that this call syncs is gone when the next commit is acknowledged, or even before
    /// the call: a thread of the index may still be at work when a writer gives up.
    fn is_in_vain(&self, sync: usize) -> bool {
        let Change::SyncFile(file) = self.trace.events[sync].change else {
            return false;
        };
        let mut names = BTreeSet::new();
        for (at, event) in self.trace.events.iter().enumerate() {
            match &event.change {
                Change::Names(folder, changes) => {
                    for (name, object) in changes {
                        match *object == Some(file) {
                            true => names.insert((*folder, name)),
                            false => names.remove(&(*folder, name)),
                        };
                    }
                }
                Change::Acknowledged(_) if at > sync => break,
                _ => {}
            }
        }
        names.is_empty()
    }

    /// An image that breaks the promise if this sync never happened.
    fn broken_without(&self, sync: usize) -> Option<String> {
        let before = self.acknowledged_before();
        let events = &self.trace.events;
        // Up to the commit after the next: then all that it was for is superseded.
        let end = (sync..=events.len())
            .find(|at| before[*at] > before[sync] + 1)
            .unwrap_or(events.len());
        let mut order: Vec<usize> = (sync + 1..=end).collect();
        order.sort_by_key(|at| before[*at] == before[at - 1]);
        let mut seen = HashSet::new();
        for at in order {
            let mut disk = Disk::new(&self.trace);
            for (i, event) in events[..at].iter().enumerate() {
                if i != sync {
                    disk.apply(&event.change);
                }
            }
            for choice in disk.choices(&mut Random(0), 0) {
                let image = disk.image(&choice);
                if !seen.insert((image.hash(), before[at])) {
                    continue;
                }
                if let Err(e) = self.replay(&image, before[at], false) {
                    return Some(format!("after call {at}, {choice:?}: {e}"));
                }
            }
        }
        None
    }
}

#[test]
fn each_sync_is_needed() {
    let mut kinds: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    let mut redundant = Vec::new();
    let mut recordings = vec![record(&short(), "q8")];
    if full() {
        recordings.push(record(&verbs(), "code(3)"));
    }
    for (recorded, at) in recordings.iter().flat_map(Recorded::syncs) {
        let event = &recorded.trace.events[at];
        let kind = kind(
            Path::new(event.what.split_once(' ').unwrap().1),
            &recorded.parent,
        );
        let [needed, in_vain] = kinds.entry(kind.clone()).or_default();
        if recorded.is_in_vain(at) {
            *in_vain += 1;
            continue;
        }
        match recorded.broken_without(at) {
            Some(_) => *needed += 1,
            None => redundant.push(format!("{at}: {}", event.what)),
        }
    }
    for (kind, [needed, in_vain]) in &kinds {
        println!("{kind}: {needed} needed, {in_vain} of files that did not stay");
    }
    assert!(
        redundant.is_empty(),
        "nothing breaks without {redundant:#?}"
    );
    let expected = [
        "CURRENT.new",
        "bm25/*.fast",
        "bm25/*.fieldnorm",
        "bm25/*.idx",
        "bm25/*.store",
        "bm25/*.term",
        "bm25/meta",
        "dead",
        "documents",
        "experts",
        "folder above",
        "folder of the index",
        "folder of the store",
        "ids",
        "manifest",
        "routes",
        "scales",
    ];
    for kind in expected {
        let needed = kinds.get(kind).is_some_and(|[needed, _]| *needed > 0);
        assert!(needed, "the session must sync a {kind}");
    }
}
