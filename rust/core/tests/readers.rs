//! Sixteen readers, in threads and in processes, of a store to which a writer commits, which it compacts, rolls back
//! and cleans up: whatever they are told is what some one generation holds, and they know what each does.
//!
//! What the writer does is drawn from a seed, so that a reader in another process knows it too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;
mod proof;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crash::oracle::{COMMON, State, check, document, tolerance, width, word};
use crash::session::{NAME, Session, Step, changes};
use crash::{Random, folder, full, seed};
use polyprag_core::files::Directory;
use polyprag_core::{DocumentId, Error, Kind, Result, Store};
use proof::children::{self, Progress, count, job, told};

const CODECS: [&str; 3] = ["f32", "q8", "code(3)"];
const THREADS: usize = 8;
const PROCESSES: usize = 4;
const THREADS_OF_A_PROCESS: usize = 2;
/// Generations of which a reader remembers what they hold.
const REMEMBERED: u64 = 400;
const MANY: usize = 150;

/// What makes the next generation.
#[derive(Debug)]
enum Act {
    Commit(Vec<Step>),
    Compact,
    Reindex,
    Rollback,
}

/// What each generation holds, one after the other.
#[derive(Debug)]
struct Life {
    random: Random,
    generation: u64,
    versions: usize,
    state: State,
    before: State,
}

impl Life {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            generation: 0,
            versions: 0,
            state: State::new(),
            before: State::new(),
        }
    }

    fn next(&mut self) -> Act {
        self.generation += 1;
        let act = match (self.generation, self.random.below(12)) {
            (1..=2, _) | (_, 3..) => Act::Commit(Vec::new()),
            (_, 0) => Act::Compact,
            (_, 1) => Act::Rollback,
            (_, _) => Act::Reindex,
        };
        let now = self.state.clone();
        let act = match act {
            Act::Commit(_) => Act::Commit(self.changes()),
            Act::Rollback => {
                self.state = self.before.clone();
                act
            }
            _ => act,
        };
        self.before = now;
        act
    }

    fn changes(&mut self) -> Vec<Step> {
        let mut steps = changes(&mut self.random, &mut self.state, &mut self.versions);
        if self.state.len() > MANY {
            let bulk = self.state.keys().filter(|id| id.starts_with("bulk"));
            let bulk: Vec<String> = bulk.cloned().collect();
            self.state.retain(|id, _| !id.starts_with("bulk"));
            steps.push(Step::Delete(bulk));
        }
        steps
    }
}

/// The number of the generation that comes of it.
fn act(session: &mut Session, act: Act) -> u64 {
    if let Act::Commit(steps) = act {
        steps.iter().for_each(|s| session.step(s).unwrap());
        session.step(&Step::Commit).unwrap();
        return session.acknowledged.last().unwrap().0;
    }
    let writer = session.writer.as_mut().expect("it is open");
    match act {
        Act::Compact => writer.compact().unwrap(),
        Act::Reindex => writer.reindex().unwrap(),
        _ => writer.rollback().unwrap(),
    }
}

/// Commits until it is told to stop; returns how many generations there are then.
fn write(path: &Path, seed: u64, codec: &str, until: Instant) -> u64 {
    let parent = Directory::open(path.parent().unwrap()).unwrap();
    let mut session = Session::new(parent, codec);
    let mut life = Life::new(seed);
    session.step(&Step::Create).unwrap();
    while life.generation < 3 || Instant::now() < until {
        let generation = act(&mut session, life.next());
        assert_eq!(generation, life.generation);
        session.committed = life.state.clone();
        session.staged = life.state.clone();
        session.acknowledged.clear();
        if life.generation.is_multiple_of(40) {
            session.step(&Step::Open).unwrap();
        }
        std::thread::sleep(Duration::from_millis(life.random.clone().next() % 8));
    }
    session.writer = None;
    let store = Store::open(path).unwrap();
    check(&store, &life.state, codec, life.versions.min(200)).unwrap();
    life.generation
}

/// What was seen, to be compared with what a generation holds.
type Seen = Box<dyn Fn(&State) -> std::result::Result<(), String>>;

fn same<T: PartialEq + std::fmt::Debug>(
    found: &T,
    expected: &T,
) -> std::result::Result<(), String> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("found {found:?}, expected {expected:?}")),
    }
}

/// None if there is no document of that id, or none with a route.
fn if_there<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::UnknownId { .. } | Error::Unrouted { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

struct Reader {
    path: PathBuf,
    codec: String,
    random: Random,
    life: Life,
    known: BTreeMap<u64, Arc<State>>,
    looks: usize,
    generations: BTreeSet<u64>,
}

impl Reader {
    fn new(path: &Path, codec: &str, seed: u64, number: u64) -> Self {
        Self {
            path: path.to_owned(),
            codec: codec.into(),
            random: Random(seed ^ (number + 1) << 32),
            life: Life::new(seed),
            known: BTreeMap::new(),
            looks: 0,
            generations: BTreeSet::new(),
        }
    }

    fn state(&mut self, generation: u64) -> Arc<State> {
        while self.life.generation < generation {
            self.life.next();
            let state = Arc::new(self.life.state.clone());
            self.known.insert(self.life.generation, state);
            self.known = self
                .known
                .split_off(&self.life.generation.saturating_sub(REMEMBERED));
        }
        Arc::clone(&self.known[&generation])
    }

    /// Asks something, and compares the answer with each generation that it may have come from.
    fn look(&mut self, store: &Store) {
        let before = store.generation().unwrap();
        let now = self.state(before);
        let names: Vec<&String> = now.keys().collect();
        let name = match names.is_empty() || self.random.below(6) == 0 {
            true => format!("doc{}", self.random.below(12)),
            false => names[self.random.below(names.len())].clone(),
        };
        let version = now.get(&name).map_or(0, |v| v.number);
        let what = self.random.below(24);
        let seen = self.ask(store, what, name.clone(), version).unwrap();
        let after = store.generation().unwrap();
        let found: Vec<_> = (before..=after).map(|g| seen(&self.state(g))).collect();
        if !found.iter().any(std::result::Result::is_ok) {
            panic!("question {what} about {name}, generations {before} to {after}: {found:?}");
        }
        self.looks += 1;
        self.generations.insert(before);
    }

    fn ask(&self, store: &Store, what: usize, name: String, version: usize) -> Result<Seen> {
        let ids = [DocumentId::from(name.as_str())];
        let codec = self.codec.clone();
        Ok(match what {
            0 => {
                store.verify()?;
                Box::new(|_| Ok(()))
            }
            1..=3 => {
                let ids: BTreeSet<DocumentId> = store.ids()?.collect::<Result<_>>()?;
                Box::new(move |s| same(&ids, &s.keys().map(|id| id.as_str().into()).collect()))
            }
            4..=8 => {
                let found = if_there(store.documents(&ids))?.map(|mut d| d.remove(0));
                Box::new(move |s| same(&found, &s.get(&name).map(|v| document(&name, *v))))
            }
            9..=15 => {
                let kind = match codec.starts_with("code") {
                    true => Kind::Code,
                    false => Kind::Logits,
                };
                let found = if_there(store.routes(&ids, kind))?.map(|r| r.data);
                Box::new(move |s| {
                    let version = s.get(&name).filter(|v| v.route);
                    let expected = version.map(|v| common::route(v.number, width(&codec)));
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance(&codec);
                    match (&found, &expected) {
                        (Some(a), Some(b)) if a.len() == b.len() && a.iter().zip(b).all(near) => {
                            Ok(())
                        }
                        (a, b) => same(a, b),
                    }
                })
            }
            16..=17 => {
                let found = store.search(COMMON, 10_000, None)?;
                let found: BTreeSet<DocumentId> = found.into_iter().map(|hit| hit.id).collect();
                Box::new(move |s| {
                    let with_text = s.iter().filter(|(_, v)| v.text);
                    same(
                        &found,
                        &with_text.map(|(id, _)| id.as_str().into()).collect(),
                    )
                })
            }
            18..=21 => {
                let found = store.search(&word(version), 5, None)?;
                let found: Vec<DocumentId> = found.into_iter().map(|hit| hit.id).collect();
                Box::new(move |s| {
                    let with_word = s.iter().filter(|(_, v)| v.text && v.number == version);
                    same(
                        &found,
                        &with_word.map(|(id, _)| id.as_str().into()).collect(),
                    )
                })
            }
            _ => {
                let (len, there) = (store.len()?, store.contains(&ids[0])?);
                // Two calls may fall into two generations: each by itself.
                let either = self.random.0.is_multiple_of(2);
                Box::new(move |s| match either {
                    true => same(&len, &(s.len() as u64)),
                    false => same(&there, &s.contains_key(&name)),
                })
            }
        })
    }

    /// Reads a store that others may refresh, stores of its own that stay where they are, and new ones.
    fn read(&mut self, shared: &Store, is_over: impl Fn() -> bool) {
        let mut own = Store::open(&self.path).unwrap();
        while !is_over() {
            match self.random.below(30) {
                0 => own = Store::open(&self.path).unwrap(),
                1 => drop(own.refresh().unwrap()),
                2..=3 => drop(shared.refresh().unwrap()),
                4..=16 => self.look(shared),
                _ => self.look(&own),
            }
        }
        let held = own.generation().unwrap();
        assert!(held <= Store::open(&self.path).unwrap().generation().unwrap());
        own.verify().unwrap();
    }
}

/// Threads that read one shared store, until there is a file `stop` beside the store.
fn readers(path: &Path, codec: &str, seed: u64, first: u64, threads: usize) -> [usize; 2] {
    let stop = path.with_file_name("stop");
    let over = AtomicBool::new(false);
    let (looks, generations) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let shared = Store::open(path).unwrap();
    std::thread::scope(|scope| {
        for number in 0..threads as u64 {
            let (over, looks, generations, shared) = (&over, &looks, &generations, &shared);
            scope.spawn(move || {
                let mut reader = Reader::new(path, codec, seed, first + number);
                reader.read(shared, || over.load(Ordering::Relaxed));
                looks.fetch_add(reader.looks, Ordering::Relaxed);
                generations.fetch_max(reader.generations.len(), Ordering::Relaxed);
            });
        }
        while !stop.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        over.store(true, Ordering::Relaxed);
    });
    [looks.into_inner(), generations.into_inner()]
}

#[test]
#[ignore = "done by the other tests, in processes of its own"]
fn child() {
    let Some(job) = job() else { return };
    let words: Vec<&str> = job.split(' ').collect();
    match words[..] {
        ["read", path, codec, seed, first] => {
            let (seed, first) = (seed.parse().unwrap(), first.parse().unwrap());
            let path = Path::new(path);
            let [looks, _] = readers(path, codec, seed, first, THREADS_OF_A_PROCESS);
            count("answers in other processes", looks);
        }
        ["fork", path, codec, rounds] => forks(Path::new(path), codec, rounds.parse().unwrap()),
        _ => panic!("a job of {words:?}"),
    }
}

#[test]
fn sixteen_readers_are_told_what_one_generation_holds() {
    let seconds = if full() { 90 } else { 4 };
    let codecs = match full() {
        true => CODECS.to_vec(),
        false => vec![CODECS[seed() as usize % CODECS.len()]],
    };
    for codec in codecs {
        let tmp = folder();
        let path = tmp.path().join(NAME);
        let until = Instant::now() + Duration::from_secs(seconds);
        let (path, seed) = (path.as_path(), seed());
        let (generations, [looks, seen], others) = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                // The readers end when the writer has, and also when it has failed.
                struct Stop(PathBuf);
                impl Drop for Stop {
                    fn drop(&mut self) {
                        std::fs::write(&self.0, "").unwrap();
                    }
                }
                let _stop = Stop(path.with_file_name("stop"));
                write(path, seed, codec, until)
            });
            while Store::open(path).is_err() && !writer.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
            }
            let others = scope.spawn(move || {
                let first = |i| THREADS + i * THREADS_OF_A_PROCESS;
                let job = |i| format!("read {} {codec} {seed} {}", path.display(), first(i));
                let jobs = (0..PROCESSES).map(job).collect();
                children::together("child", jobs, Duration::from_secs(seconds + 600))
            });
            let here = readers(path, codec, seed, 0, THREADS);
            (writer.join().unwrap(), here, others.join().unwrap())
        });
        println!(
            "codec {codec}: {generations} generations; {looks} answers in {THREADS} threads, of up to {seen} \
             generations each; {} ({PROCESSES} of {THREADS_OF_A_PROCESS} threads); seed {seed}",
            told(&others)
        );
        assert!(generations > 3 && looks > 0 && seen > 1);
    }
}

/// Children that were forked, and use the store that they have inherited, while other threads of the parent do.
fn forks(path: &Path, codec: &str, rounds: usize) {
    let (progress, over) = (Progress::open(), AtomicBool::new(false));
    let mut life = Life::new(seed());
    while life.generation < 12 {
        life.next();
    }
    let store = Store::open(path).unwrap();
    assert_eq!(store.generation().unwrap(), life.generation);
    let (store, state, versions) = (&store, &life.state, life.versions);
    let questions: Vec<String> = (0..versions).map(word).chain([COMMON.into()]).collect();
    let questions = questions.as_slice();
    let expected = store.search_many(questions, 100, None).unwrap();
    let expected = &expected;
    let all = move || {
        check(store, state, codec, versions)?;
        let hits = store
            .search_many(questions, 100, None)
            .map_err(|e| e.to_string())?;
        same(&hits, expected)?;
        store.refresh().map_err(|e| e.to_string())?;
        check(
            &Store::open(path).map_err(|e| e.to_string())?,
            state,
            codec,
            versions,
        )
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    all().unwrap();
                }
            });
        }
        for round in 0..rounds {
            progress.at(&format!("fork {round}"));
            in_fork(all);
        }
        over.store(true, Ordering::Relaxed);
    });
    count("children that read a store which they inherited", rounds);
}

/// Does `work` in a forked child of this process, which has none of its threads, and nothing in between.
#[allow(unsafe_code)]
fn in_fork(work: impl Fn() -> std::result::Result<(), String>) {
    // SAFETY: fork has no preconditions. The C library keeps its allocator usable in the child, and that all the
    // rest is too is what this test is about.
    match unsafe { libc::fork() } {
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let code = match result {
                Ok(Ok(())) => 0,
                Ok(Err(e)) => {
                    eprintln!("in a forked child: {e}");
                    1
                }
                Err(_) => 2,
            };
            // SAFETY: ends the process at once, without the destructors that are the parent's to run.
            unsafe { libc::_exit(code) }
        }
        -1 => panic!("{}", std::io::Error::last_os_error()),
        child => {
            let mut status = 0;
            // SAFETY: `status` is a number that may be written to, `child` is a child of this process.
            let ended = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!((ended, status), (child, 0), "the forked child failed");
        }
    }
}

#[test]
fn a_forked_child_reads_the_store_that_it_inherited() {
    let tmp = folder();
    let path = tmp.path().join(NAME);
    let parent = Directory::open(tmp.path()).unwrap();
    for codec in if full() { &CODECS[..] } else { &CODECS[..1] } {
        let _ = std::fs::remove_dir_all(&path);
        let mut session = Session::new(parent.clone(), codec);
        let mut life = Life::new(seed());
        session.step(&Step::Create).unwrap();
        while life.generation < 12 {
            act(&mut session, life.next());
        }
        session.writer = None;
        let rounds = if full() { 500 } else { 12 };
        let jobs = vec![format!("fork {} {codec} {rounds}", path.display())];
        let counts = children::all("child", jobs, Duration::from_secs(1800));
        println!("codec {codec}: {}; seed {}", told(&counts), seed());
    }
}
