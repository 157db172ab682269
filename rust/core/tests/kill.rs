//! SIGKILL, at any time and at exact places: what was acknowledged is there, whole, and the next writer goes
//! on from it. One store lives through many kills.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crash::oracle::{State, Version, check, check_nothing_left_over, check_previous, document};
use crash::session::{NAME, Session, Step, changes};
use crash::{Random, folder, full, kind, seed};
use polyprag_core::files::Directory;
use polyprag_core::tap::{Call, Op, Outcome, Tap};
use polyprag_core::{OnDuplicate, Store};

// What the child is told: the folder of the store, its codec and seed, and the place at which to end itself.
const FOLDER: &str = "POLYPRAG_KILL_FOLDER";
const CODEC: &str = "POLYPRAG_KILL_CODEC";
const SEED: &str = "POLYPRAG_KILL_SEED";
const PLACE: &str = "POLYPRAG_KILL_PLACE";
/// What is passed once in the life of a store, or matters most; the first child of a store ends at one of them.
const DECISIVE: [&str; 7] = [
    "rename to CURRENT",
    "rename to folder of the store",
    "sync of CURRENT.new",
    "sync of experts",
    "sync of folder above",
    "sync of folder of the store",
    "sync of manifest",
];

/// Lines by which the child says that it begins, that it holds a commit, that it is about to go back to the one
/// before, and where it ends itself.
const READY: &str = "polyprag ready";
const GOES_BACK: &str = "polyprag goes back";
const ACKNOWLEDGED: &str = "polyprag acknowledged ";
const ENDS: &str = "polyprag ends ";

/// The document whose version tells how many commits there were.
const COUNTER: &str = "counter";

/// All that happens to one store, commit by commit; it follows from the seed.
#[derive(Debug, Clone)]
struct History {
    seed: u64,
    commits: usize,
    state: State,
    versions: usize,
}

impl History {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            commits: 0,
            state: State::new(),
            versions: 0,
        }
    }

    /// After so many commits.
    fn after(seed: u64, commits: usize) -> Self {
        let mut history = Self::new(seed);
        while history.commits < commits {
            history.advance();
        }
        history
    }

    /// The steps of the next commit.
    fn advance(&mut self) -> Vec<Step> {
        let mut random = Random(
            self.seed
                .wrapping_mul(0x1_0001)
                .wrapping_add(self.commits as u64),
        );
        let mut steps = changes(&mut random, &mut self.state, &mut self.versions);
        let version = Version {
            number: self.versions,
            text: true,
            route: true,
        };
        self.versions += 1;
        self.commits += 1;
        self.state.insert(COUNTER.into(), version);
        steps.push(Step::Add(COUNTER.into(), version, OnDuplicate::Replace));
        steps.push(Step::Commit);
        steps
    }

    /// That of which a store holds the end, by its counter.
    fn of(store: &Store, seed: u64) -> Self {
        let found = store.documents(&[COUNTER.into()]).unwrap();
        let wanted = found[0].metadata.clone();
        let mut history = Self::new(seed);
        for _ in 0..100_000 {
            history.advance();
            let version = history.state[COUNTER];
            if document(COUNTER, version).metadata == wanted {
                return history;
            }
        }
        panic!("no such counter: {wanted:?}");
    }
}

/// Ends the process before or after the n-th call of those that decide what is durable, or visible; or the first
/// of a name.
#[derive(Debug)]
struct Ending {
    place: String,
    passed: AtomicUsize,
    parent: std::path::PathBuf,
}

impl Ending {
    fn pass(&self, when: &str, call: &Call<'_>) {
        let (what, path) = match call.op {
            Op::Rename(_, to) => ("rename to", call.path.join(to)),
            _ => ("sync of", call.path.to_owned()),
        };
        let name = format!("{when} {what} {}", kind(&path, &self.parent));
        let number = self.passed.fetch_add(1, Ordering::SeqCst);
        if self.place == name || self.place == number.to_string() {
            say(&format!("{ENDS}{name}"));
            let process = rustix::process::getpid();
            rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
            std::thread::park();
        }
    }
}

impl Tap for Ending {
    fn call(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome) -> Outcome {
        let decides = matches!(call.op, Op::SyncFile | Op::SyncFolder | Op::Rename(..));
        if decides {
            self.pass("before", call);
        }
        let outcome = make(usize::MAX);
        if decides {
            self.pass("after", call);
        }
        outcome
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// Commits until it is killed.
fn child(parent: &Path) -> ! {
    let told = |name| std::env::var(name).unwrap();
    let dir = Directory::open(parent).unwrap();
    let dir = dir.with_tap(Arc::new(Ending {
        place: told(PLACE),
        passed: AtomicUsize::new(0),
        parent: parent.to_owned(),
    }));
    let mut session = Session::new(dir, &told(CODEC));
    let seed = told(SEED).parse().unwrap();
    let mut history = History::new(seed);
    say(READY);
    match parent.join(NAME).exists() {
        true => {
            let store = Store::open(parent.join(NAME)).unwrap();
            history = History::of(&store, seed);
            session.committed = history.state.clone();
            session.step(&Step::Open).unwrap();
        }
        false => session.step(&Step::Create).unwrap(),
    }
    // What no commit depends on differs from child to child.
    let mut random = Random(u64::from(std::process::id()));
    loop {
        for step in history.advance() {
            session.step(&step).unwrap();
        }
        say(&format!("{ACKNOWLEDGED}{}", history.commits));
        match random.below(10) {
            0 => session.step(&Step::Compact).unwrap(),
            1 => session.step(&Step::Reindex).unwrap(),
            2 if session.acknowledged.len() > 1 => {
                say(GOES_BACK);
                session.step(&Step::Rollback).unwrap();
                history = History::after(seed, history.commits - 1);
                say(&format!("{ACKNOWLEDGED}{}", history.commits));
            }
            _ => {}
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    kills: usize,
    commits: usize,
    /// Kills after which the generation in force was one that had not been acknowledged.
    in_flight: usize,
    /// Kills before the store was there.
    before: usize,
    places: BTreeMap<String, usize>,
}

/// How a child is ended.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    AnyTime,
    Places,
}

/// Held while a child is started, and while this process writes: a child has every lock of this process until it
/// begins to be itself.
static ALONE: Mutex<()> = Mutex::new(());

/// One store and its children.
fn live(name: &str, seed: u64, codec: &str, kills: usize, manner: Manner, counts: &mut Counts) {
    let tmp = folder();
    let path = tmp.path().join(NAME);
    let mut random = Random(seed);
    let mut history = History::new(seed);
    for kill in 0..kills {
        let place = match manner {
            Manner::AnyTime => "nowhere".into(),
            Manner::Places if kill == 0 => {
                let n = (seed % 1000) as usize;
                let when = ["before", "after"][n / DECISIVE.len() % 2];
                format!("{when} {}", DECISIVE[n % DECISIVE.len()])
            }
            Manner::Places => random.below(100).to_string(),
        };
        let alone = ALONE.lock().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(FOLDER, tmp.path())
            .env(CODEC, codec)
            .env(SEED, seed.to_string())
            .env(PLACE, place)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(alone);
        let out = BufReader::new(child.stdout.take().unwrap());
        let (lines, said) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let deadline = Duration::from_secs(120);
        let mut heard = Vec::new();
        if manner == Manner::AnyTime {
            // Most in the middle of the work, some while the child starts.
            let lines = [0, 1, 1, 1, 2, 2, 3, 4][random.below(8)];
            let said_by_it = |line: &&String| line.starts_with("polyprag");
            while heard.iter().filter(said_by_it).count() < lines {
                heard.push(said.recv_timeout(deadline).expect("the child works"));
            }
            std::thread::sleep(Duration::from_micros(random.next() % 30_000));
            child.kill().unwrap();
        }
        loop {
            match said.recv_timeout(deadline) {
                Ok(line) => heard.push(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(_) => panic!("the child neither ends nor goes on"),
            }
        }
        let status = child.wait().unwrap();
        let killed = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(killed, Some(9), "{status}: {heard:?}");
        reader.join().unwrap();

        let mut acknowledged = history.commits;
        let mut next = acknowledged + 1;
        for line in &heard {
            if let Some(n) = line.strip_prefix(ACKNOWLEDGED) {
                acknowledged = n.parse().unwrap();
                next = acknowledged + 1;
                counts.commits += 1;
            } else if line == GOES_BACK {
                next = acknowledged - 1;
            }
        }
        if let Some(place) = heard.iter().find_map(|line| line.strip_prefix(ENDS)) {
            *counts.places.entry(place.into()).or_default() += 1;
        }
        let about = format!("seed {seed}, after {acknowledged} commits, {heard:?}");
        counts.kills += 1;
        if !path.exists() {
            assert_eq!(acknowledged, 0, "{about}: the store is gone");
            counts.before += 1;
            continue;
        }
        let store = Store::open(&path).expect(&about);
        history = History::of(&store, seed);
        let held = history.commits;
        assert!(
            held == acknowledged || held == next,
            "{about}: it holds commit {held}"
        );
        counts.in_flight += usize::from(held == next);
        check(&store, &history.state, codec, history.versions).expect(&about);
        check_previous(&path).expect(&about);
        if random.coin() {
            let _alone = ALONE.lock().unwrap();
            drop(store.writer().expect(&about));
            check_nothing_left_over(&path).expect(&about);
        }
    }
    if path.exists() {
        // The child that made the store tidied up after those that did not come so far.
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1);
    }
}

fn many(name: &str, manner: Manner, stores: u64, kills: usize) {
    if let Some(folder) = std::env::var_os(FOLDER) {
        child(Path::new(&folder));
    }
    let mut counts = Counts::default();
    for store in 0..stores {
        let codec = ["q8", "f32", "code(3)"][store as usize % 3];
        live(
            name,
            seed() * 1000 + store,
            codec,
            kills,
            manner,
            &mut counts,
        );
    }
    let Counts {
        kills,
        commits,
        in_flight,
        before,
        places,
    } = counts;
    println!(
        "{kills} kills, {stores} stores, {commits} commits acknowledged; {in_flight} times a commit \
         not yet acknowledged was in force, {before} times the store was not there yet; seed {}",
        seed()
    );
    for (place, n) in &places {
        println!("{n:5} {place}");
    }
    assert!(commits > 0);
    if manner == Manner::Places && full() {
        for place in DECISIVE {
            for when in ["before", "after"] {
                assert!(
                    places.contains_key(&format!("{when} {place}")),
                    "{when} {place}"
                );
            }
        }
    }
}

#[test]
fn a_store_lives_through_kills_at_any_time() {
    let (stores, kills) = if full() { (20, 60) } else { (1, 20) };
    many(
        "a_store_lives_through_kills_at_any_time",
        Manner::AnyTime,
        stores,
        kills,
    );
}

#[test]
fn a_store_lives_through_kills_at_each_sync_and_rename() {
    let (stores, kills) = if full() { (20, 60) } else { (1, 30) };
    let name = "a_store_lives_through_kills_at_each_sync_and_rename";
    many(name, Manner::Places, stores, kills);
}
