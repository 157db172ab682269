//! A disk that fails: at each call that alters it in turn. What comes is an error with the system's number,
//! and the generation that was in force stays so, whole; a new writer then works and tidies up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crash::oracle::{Version, check, check_nothing_left_over, check_previous};
use crash::session::{NAME, Session, Step, committed_once, recoding, short, verbs};
use crash::{Random, folder, full, seed};
use polyprag_core::files::Directory;
use polyprag_core::tap::{Call, Op, Outcome, Tap};
use polyprag_core::{Error, OnDuplicate, Result, Store};
use rustix::io::Errno;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// One call is refused.
    Once(Errno),
    /// One call is made, and then said to have failed.
    Made(Errno),
    /// Half of a write is made, and the rest of it is refused.
    Short(Errno),
    /// From here on nothing new fits on the disk, but files can be removed.
    Full,
    /// From here on every call is refused.
    Dead,
}

const FAULTS: [Fault; 6] = [
    Fault::Once(Errno::IO),
    Fault::Once(Errno::NOSPC),
    Fault::Made(Errno::IO),
    Fault::Short(Errno::NOSPC),
    Fault::Full,
    Fault::Dead,
];

impl Fault {
    fn errno(self) -> Errno {
        match self {
            Fault::Once(errno) | Fault::Made(errno) | Fault::Short(errno) => errno,
            Fault::Full => Errno::NOSPC,
            Fault::Dead => Errno::IO,
        }
    }

    /// That an error says what the disk said.
    fn expect_told(self, error: &Error, about: &str) {
        let errno = match error {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        };
        assert_eq!(
            errno,
            Some(self.errno().raw_os_error()),
            "{about}: {error:?}"
        );
    }
}

/// Lets calls pass until one, which goes wrong.
#[derive(Debug, Default)]
struct Failing {
    plan: Mutex<Option<(usize, Fault)>>,
    calls: AtomicUsize,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default, Clone)]
struct Seen {
    /// The call that went wrong first, and whether a failure of it may go unnoticed.
    failed: Option<(String, bool)>,
    /// Whether the new generation got its name since the last commit.
    switched: bool,
    /// The file whose write was cut short.
    cut: bool,
}

impl Failing {
    fn at(call: usize, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            plan: Mutex::new(Some((call, fault))),
            ..Self::default()
        })
    }

    /// The disk works again.
    fn heal(&self) {
        *self.plan.lock().unwrap() = None;
    }

    /// Whatever failed was of no account.
    fn given_up(&self) {
        if let Some((_, unnoticed)) = &mut self.seen.lock().unwrap().failed {
            *unnoticed = true;
        }
    }

    fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    fn make(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome, n: usize) -> Outcome {
        let outcome = make(n)?;
        if let Op::Rename(_, to) = call.op
            && (to == "CURRENT" || to == NAME)
        {
            // Of a new store only the second of these counts; the session knows which it is.
            self.seen.lock().unwrap().switched = to == NAME || !is_new(call.path);
        }
        Ok(outcome)
    }
}

fn is_new(store: &Path) -> bool {
    store.file_name().is_some_and(|name| name != NAME)
}

impl Tap for Failing {
    fn call(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome) -> Outcome {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let Some((at, fault)) = *self.plan.lock().unwrap() else {
            return self.make(call, make, usize::MAX);
        };
        if number < at {
            return self.make(call, make, usize::MAX);
        }
        let first = number == at;
        let length = match call.op {
            Op::Write { bytes, .. } => bytes.len(),
            _ => 0,
        };
        let grows = matches!(
            call.op,
            Op::Write { .. } | Op::Create(_) | Op::OpenOrCreate(_) | Op::MakeFolder(_)
        );
        let cut = self.seen.lock().unwrap().cut;
        match fault {
            Fault::Once(_) | Fault::Made(_) if !first => {
                return self.make(call, make, usize::MAX);
            }
            Fault::Full if !grows => return self.make(call, make, usize::MAX),
            Fault::Short(_) if !(first || cut && length > 0) => {
                return self.make(call, make, usize::MAX);
            }
            Fault::Short(_) if first && length > 1 => {
                self.seen.lock().unwrap().cut = true;
                return self.make(call, make, length / 2);
            }
            Fault::Short(_) => self.seen.lock().unwrap().cut = false,
            _ => {}
        }
        let tidying = matches!(call.op, Op::Remove(_) | Op::RemoveFolder(_));
        let message = call.path.ends_with("LOCK") && !matches!(call.op, Op::OpenOrCreate(_));
        let mut seen = self.seen.lock().unwrap();
        if seen.failed.as_ref().is_none_or(|(_, unnoticed)| *unnoticed) {
            let told = format!("{:?} {}", call.op, call.path.display());
            let told = told.chars().take(200).collect();
            seen.failed = Some((told, tidying || message));
        }
        drop(seen);
        if let Fault::Made(_) = fault {
            // It may have been refused for another reason: a folder that is there already.
            let _ = self.make(call, make, usize::MAX);
        }
        Err(fault.errno())
    }
}

/// Runs the session against a disk that fails at a call; false if it has no such call.
fn fails(steps: &[Step], codec: &str, at: usize, fault: Fault) -> bool {
    let tmp = folder();
    let tap = Failing::at(at, fault);
    let dir = Directory::open(tmp.path()).unwrap().with_tap(tap.clone());
    let path = tmp.path().join(NAME);
    let mut session = Session::new(dir, codec);
    let mut reader = None;
    let mut failure = None;
    for (i, step) in steps.iter().enumerate() {
        if step.commits() {
            tap.seen.lock().unwrap().switched = false;
        }
        if let Err(error) = session.step(step) {
            failure = Some((step, error));
            break;
        }
        let seen = tap.seen();
        let ends = step.commits() || *step == Step::Discard;
        if let (true, Some((call, unnoticed))) = (ends, &seen.failed) {
            let given_up = *step == Step::Discard;
            assert!(*unnoticed || given_up, "step {i} went well without {call}");
            tap.given_up();
        }
        if step.commits() {
            reader = Some(Store::open(&path).unwrap());
        }
    }
    let seen = tap.seen();
    let Some((told, _)) = &seen.failed else {
        assert!(failure.is_none(), "{failure:?}");
        return false;
    };
    let about = format!("call {at}, {fault:?}: {told}");

    if let Some((step, error)) = failure {
        fault.expect_told(&error, &about);
        tap.heal();
        if step.commits() && seen.switched {
            session.committed = session.outcome(step);
        }
        // Nothing that failed half way is committed after all.
        match session.writer.as_mut().map(|writer| writer.commit()) {
            None => {}
            Some(Err(Error::StoreClosed { reason, .. })) => {
                let denied = reason.contains("nothing of what it staged was committed");
                let happened = step.commits() && seen.switched;
                assert!(!(denied && happened), "{about}: {reason}");
            }
            Some(Ok(_)) if !step.commits() => {
                session.committed = session.staged.clone();
            }
            other => panic!("{about}: then a commit gave {other:?}"),
        }
    }
    tap.heal();
    session.writer = None;
    if let (Some(reader), Some((_, state))) = (&reader, session.acknowledged.last()) {
        check(reader, state, codec, session.versions).expect(&about);
    }
    drop(reader);

    // Another writer, on a disk that works.
    let versions = session.versions;
    let mut after = Session::new(Directory::open(tmp.path()).unwrap(), codec);
    if path.exists() {
        let store = Store::open(&path).expect(&about);
        check(&store, &session.committed, codec, versions).expect(&about);
        check_previous(&path).expect(&about);
        after.committed = session.committed.clone();
        after.step(&Step::Open).expect(&about);
    } else {
        assert!(session.committed.is_empty(), "{about}: the store is gone");
        after.step(&Step::Create).expect(&about);
    }
    let version = Version {
        number: versions,
        text: true,
        route: true,
    };
    let add = Step::Add("after".into(), version, OnDuplicate::Error);
    after.step(&add).expect(&about);
    after.step(&Step::Commit).expect(&about);
    after.writer = None;
    let store = Store::open(&path).expect(&about);
    check(&store, &after.committed, codec, after.versions).expect(&about);
    check_nothing_left_over(&path).expect(&about);
    let beside = std::fs::read_dir(tmp.path()).unwrap().count() - 1;
    assert_eq!(beside, 0, "{about}: something is left beside the store");
    true
}

#[test]
fn a_failure_at_any_call_is_an_error_and_harms_nothing() {
    let sessions = [(short(), "q8"), (verbs(), "code(3)")];
    let stride = if full() { 1 } else { 23 };
    for (steps, codec) in &sessions {
        let (done, longest) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for (i, fault) in FAULTS.into_iter().enumerate() {
                let (done, longest) = (&done, &longest);
                scope.spawn(move || {
                    let mut at = (seed() as usize + i * 2) % stride;
                    while fails(steps, codec, at, fault) {
                        done.fetch_add(1, Ordering::Relaxed);
                        longest.fetch_max(at + 1, Ordering::Relaxed);
                        at += stride;
                    }
                });
            }
        });
        let (done, longest) = (done.into_inner(), longest.into_inner());
        println!(
            "codec {codec}: {done} failures of {longest} calls; seed {}",
            seed()
        );
        assert!(longest > 300 && done >= FAULTS.len() * longest / stride / 2);
    }
}

/// Copies of every kind, onto a disk that fails at a call; false if there is no such call.
fn ships(source: &Session, folder_of_source: &Path, at: usize, fault: Fault) -> bool {
    let tmp = folder();
    let tap = Failing::at(at, fault);
    let dir = Directory::open(tmp.path()).unwrap().with_tap(tap.clone());
    let store = Store::open(folder_of_source.join(NAME)).unwrap();
    let archive = folder_of_source.join("archive");
    type Way<'w> = &'w dyn Fn(&OsStr) -> Result<()>;
    let ways: [(&str, Way<'_>); 4] = [
        ("copy", &|name| store.snapshot_in(dir.clone(), name)),
        ("packed", &|name| store.pack_in(dir.clone(), name)),
        ("unpacked", &|name| {
            Store::unpack_in(&archive, dir.clone(), name)
        }),
        ("recoded", &|name| {
            store.recode_in(dir.clone(), name, &recoding())
        }),
    ];
    for (name, way) in ways {
        let outcome = way(OsStr::new(name));
        let seen = tap.seen();
        let about = format!("call {at}, {fault:?}: {:?}", seen.failed);
        let path = tmp.path().join(name);
        match outcome {
            Ok(()) => assert!(
                seen.failed.is_none_or(|(_, unnoticed)| unnoticed),
                "{about}"
            ),
            Err(error) => {
                fault.expect_told(&error, &about);
                tap.heal();
                tap.given_up();
                if !path.exists() {
                    way(OsStr::new(name)).expect(&about);
                }
            }
        }
        let whole = match name {
            "packed" => {
                let unpacked = folder();
                Store::unpack(&path, unpacked.path().join(NAME)).expect(&about);
                Store::open(unpacked.path().join(NAME)).and_then(|s| s.verify())
            }
            _ => Store::open(&path).and_then(|store| {
                check(&store, &source.committed, "q8", source.versions).expect(&about);
                store.verify()
            }),
        };
        whole.expect(&about);
    }
    let left = std::fs::read_dir(tmp.path()).unwrap().count();
    assert_eq!(
        left,
        ways.len(),
        "call {at}, {fault:?}: something is left over"
    );
    tap.seen().failed.is_some()
}

#[test]
fn a_copy_onto_a_failing_disk_is_an_error_or_whole() {
    let tmp = folder();
    let source = committed_once(Directory::open(tmp.path()).unwrap(), "q8");
    let store = Store::open(tmp.path().join(NAME)).unwrap();
    store.pack(tmp.path().join("archive")).unwrap();
    let stride = if full() { 1 } else { 13 };
    let mut done = 0;
    for (i, fault) in FAULTS.into_iter().enumerate() {
        let mut at = (seed() as usize + i * 2) % stride;
        while ships(&source, tmp.path(), at, fault) {
            done += 1;
            at += stride;
        }
    }
    println!("{done} failures of copies; seed {}", seed());
    assert!(done >= 600 / stride);
}

/// Takes as little at once as a system may, and is interrupted often.
#[derive(Debug)]
struct Grudging(Mutex<(Random, bool)>);

impl Tap for Grudging {
    fn call(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome) -> Outcome {
        let mut state = self.0.lock().unwrap();
        let (random, refused) = &mut *state;
        let may_be_interrupted =
            matches!(call.op, Op::Write { .. } | Op::SyncFile | Op::SyncFolder);
        if may_be_interrupted && random.below(4) == 0 {
            return Err(Errno::INTR);
        }
        if let Op::Rename(_, to) = call.op
            && to == NAME
            && !*refused
        {
            // A file system that cannot refuse to replace.
            *refused = true;
            return Err(Errno::INVAL);
        }
        make(1 + random.below(100))
    }
}

#[test]
fn short_writes_and_interrupts_change_nothing() {
    for round in 0..if full() { 40 } else { 2 } {
        let tmp = folder();
        let tap = Grudging(Mutex::new((Random(seed() + round), false)));
        let dir = Directory::open(tmp.path()).unwrap();
        let mut session = Session::new(dir.with_tap(Arc::new(tap)), "code(3)");
        for step in if round % 2 == 0 { short() } else { verbs() } {
            session.step(&step).unwrap();
            if step.commits() {
                let store = Store::open(tmp.path().join(NAME)).unwrap();
                check(&store, &session.committed, "code(3)", session.versions).unwrap();
            }
        }
    }
}
