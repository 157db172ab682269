//! Sessions of a writer, step by step, beside an oracle.

use std::collections::BTreeSet;
use std::ffi::OsStr;

use polyprag_core::files::Directory;
use polyprag_core::{DocumentId, Dtype, OnDuplicate, Recoding, Result, RouteRows, Store, Writer};

use super::Random;
use super::oracle::{State, Version, document, width};
use crate::common::{EXPERTS, GROUPS, create_in, route, spec};

/// The name of the store in its parent folder.
pub const NAME: &str = "s";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Create,
    /// A writer for the store that is there.
    Open,
    Add(String, Version, OnDuplicate),
    /// Many ids with routes and nothing else, all new.
    Arrays(Vec<String>, usize),
    Delete(Vec<String>),
    /// The documents of another store, which come in place of those with the same ids.
    Merge(Vec<String>, usize),
    Discard,
    Commit,
    Compact,
    Reindex,
    Rollback,
}

impl Step {
    /// Whether a generation comes of it.
    pub fn commits(&self) -> bool {
        matches!(
            self,
            Step::Commit | Step::Compact | Step::Reindex | Step::Rollback
        )
    }
}

/// One commit of every kind, and a writer that gave up.
pub fn short() -> Vec<Step> {
    let mut numbers = 0..;
    let mut add = |id: &str, text, route, on| {
        let number = numbers.next().unwrap();
        Step::Add(
            id.into(),
            Version {
                number,
                text,
                route,
            },
            on,
        )
    };
    use OnDuplicate::{Error, Replace, Skip};
    let mut steps = vec![
        Step::Create,
        add("ada", true, true, Error),
        add("bob", true, true, Error),
        add("cyd", true, true, Error),
        add("dan", true, false, Error),
        Step::Commit,
        add("bob", true, true, Replace),
        Step::Delete(vec!["cyd".into()]),
        add("eve", true, true, Error),
        Step::Commit,
    ];
    let many = |first: usize| (first..first + 100).map(|i| format!("bulk{i}")).collect();
    steps.push(Step::Arrays(many(0), 100));
    steps.push(Step::Commit);
    steps.extend([
        Step::Open,
        add("fay", true, true, Error),
        Step::Delete(vec!["ada".into()]),
        Step::Discard,
        Step::Open,
        Step::Delete(vec!["ada".into(), "bulk7".into()]),
        Step::Commit,
        add("dan", true, true, Replace),
        add("bob", true, true, Skip),
        add("ada", false, true, Error),
        Step::Commit,
    ]);
    steps
}

/// A store with one commit.
pub fn committed_once(parent: Directory, codec: &str) -> Session {
    let mut session = Session::new(parent, codec);
    for step in short() {
        session.step(&step).unwrap();
        if step == Step::Commit {
            break;
        }
    }
    session.writer = None;
    session
}

/// The same documents with routes and experts kept in another way.
pub fn recoding() -> Recoding<'static> {
    Recoding {
        codec: spec("f32").codec,
        decoder: None,
        expert_dtype: Some(Dtype::F16),
    }
}

/// What changes a whole store, each on top of what another left.
pub fn verbs() -> Vec<Step> {
    let mut numbers = 0..;
    let mut add = |id: &str| {
        let version = Version {
            number: numbers.next().unwrap(),
            text: true,
            route: true,
        };
        Step::Add(id.into(), version, OnDuplicate::Replace)
    };
    let delete = |id: &str| Step::Delete(vec![id.into()]);
    let mut steps = vec![Step::Create];
    steps.extend(["ada", "bob", "cyd", "dan", "eve", "fay"].map(&mut add));
    steps.extend([Step::Commit, delete("ada"), Step::Commit]);
    // As many changes from the same state: the index would give its files the same names again.
    steps.extend([Step::Rollback, delete("bob"), Step::Commit]);
    steps.extend([add("cyd"), delete("dan"), Step::Commit]);
    steps.extend([
        Step::Compact,
        add("gus"),
        delete("eve"),
        Step::Commit,
        Step::Rollback,
    ]);
    steps.extend([
        Step::Open,
        Step::Rollback,
        Step::Reindex,
        Step::Rollback,
        Step::Rollback,
    ]);
    let ids = ["dan", "eve", "fay"].map(String::from).to_vec();
    steps.extend([Step::Merge(ids, 100), Step::Commit, Step::Compact]);
    steps
}

/// `commits` commits with steps drawn from a seed.
pub fn drawn(seed: u64, commits: usize) -> Vec<Step> {
    let mut random = Random(seed);
    let mut steps = vec![Step::Create];
    let mut state = State::new();
    let mut before;
    let mut number = 0;
    for commit in 0..commits {
        if commit > 0 && random.below(3) == 0 {
            steps.push(Step::Open);
        }
        before = state.clone();
        steps.extend(changes(&mut random, &mut state, &mut number));
        steps.push(Step::Commit);
        match random.below(8) {
            0 => steps.push(Step::Compact),
            1 => steps.push(Step::Reindex),
            2 if commit > 0 => {
                steps.push(Step::Rollback);
                state = before.clone();
            }
            _ => {}
        }
    }
    steps
}

/// Some changes that can be made to a store in this state, and makes them to the state.
pub fn changes(random: &mut Random, state: &mut State, number: &mut usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for _ in 0..1 + random.below(4) {
        let id = format!("doc{}", random.below(12));
        if random.below(4) == 0 && state.contains_key(&id) {
            steps.push(Step::Delete(vec![id.clone()]));
            state.remove(&id);
            continue;
        }
        let version = Version {
            number: *number,
            text: random.below(5) > 0,
            route: random.below(5) > 0,
        };
        *number += 1;
        state.insert(id.clone(), version);
        steps.push(Step::Add(id, version, OnDuplicate::Replace));
    }
    if random.below(6) == 0 {
        let ids: Vec<String> = (0..30).map(|i| format!("bulk{}-{i}", *number)).collect();
        for (i, id) in ids.iter().enumerate() {
            state.insert(id.clone(), bulk(*number + i));
        }
        steps.push(Step::Arrays(ids, *number));
        *number += 30;
    }
    if random.below(6) == 0 {
        let ids = (0..3).map(|_| format!("doc{}", random.below(12)));
        let ids: Vec<String> = BTreeSet::from_iter(ids).into_iter().collect();
        for (i, id) in ids.iter().enumerate() {
            state.insert(id.clone(), merged(*number + i));
        }
        steps.push(Step::Merge(ids, *number));
        *number += 3;
    }
    steps
}

fn merged(number: usize) -> Version {
    Version {
        number,
        text: true,
        route: true,
    }
}

pub fn bulk(number: usize) -> Version {
    Version {
        number,
        text: false,
        route: true,
    }
}

/// Does steps, and knows what the store must hold after each.
#[derive(Debug)]
pub struct Session {
    parent: Directory,
    pub codec: String,
    pub writer: Option<Writer>,
    pub committed: State,
    pub staged: State,
    /// How many versions were given out.
    pub versions: usize,
    /// The generations that were acknowledged.
    pub acknowledged: Vec<(u64, State)>,
}

impl Session {
    /// Of the store [`NAME`] in this directory.
    pub fn new(parent: Directory, codec: &str) -> Self {
        Self {
            parent,
            codec: codec.into(),
            writer: None,
            committed: State::new(),
            staged: State::new(),
            versions: 0,
            acknowledged: Vec::new(),
        }
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("the steps open a writer first")
    }

    pub fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Create => {
                self.writer = None;
                let name = OsStr::new(NAME);
                let codec = spec(&self.codec);
                self.writer = Some(create_in(self.parent.clone(), name, codec)?);
            }
            Step::Open => {
                self.writer = None;
                let store = Store::open_in(self.parent.folder(NAME)?)?;
                self.writer = Some(store.writer()?);
                self.staged = self.committed.clone();
            }
            Step::Add(id, version, on) => {
                self.versions = self.versions.max(version.number + 1);
                let numbers = route(version.number, width(&self.codec));
                let shape = self.shape(1);
                let rows = RouteRows {
                    shape: &shape,
                    data: &numbers,
                };
                let rows = version.route.then_some(rows);
                let n = self.writer().add(&[document(id, *version)], rows, *on)?;
                if n == 1 {
                    self.staged.insert(id.clone(), *version);
                }
            }
            Step::Arrays(ids, first) => {
                self.versions = self.versions.max(first + ids.len());
                let width = width(&self.codec);
                let data: Vec<f32> = (0..ids.len())
                    .flat_map(|i| route(first + i, width))
                    .collect();
                let shape = self.shape(ids.len());
                let rows = RouteRows {
                    shape: &shape,
                    data: &data,
                };
                let names: Vec<DocumentId> = ids.iter().map(|id| id.as_str().into()).collect();
                self.writer().add_arrays(&names, rows, OnDuplicate::Error)?;
                for (i, id) in ids.iter().enumerate() {
                    self.staged.insert(id.clone(), bulk(first + i));
                }
            }
            Step::Delete(ids) => {
                let names: Vec<DocumentId> = ids.iter().map(|id| id.as_str().into()).collect();
                self.writer().delete(&names)?;
                ids.iter().for_each(|id| {
                    self.staged.remove(id);
                });
            }
            Step::Merge(ids, first) => {
                self.versions = self.versions.max(first + ids.len());
                let tmp = super::folder();
                let dir = Directory::open(tmp.path()).unwrap();
                let mut other = Session::new(dir, &self.codec);
                other.step(&Step::Create).unwrap();
                for (i, id) in ids.iter().enumerate() {
                    let add = Step::Add(id.clone(), merged(first + i), OnDuplicate::Error);
                    other.step(&add).unwrap();
                }
                other.step(&Step::Commit).unwrap();
                let other = Store::open(tmp.path().join(NAME)).unwrap();
                self.writer().merge(&other, OnDuplicate::Replace)?;
                for (i, id) in ids.iter().enumerate() {
                    self.staged.insert(id.clone(), merged(first + i));
                }
            }
            Step::Commit | Step::Compact | Step::Reindex | Step::Rollback => {
                let generation = match step {
                    Step::Compact => self.writer().compact()?,
                    Step::Reindex => self.writer().reindex()?,
                    Step::Rollback => self.writer().rollback()?,
                    _ => self.writer().commit()?,
                };
                self.committed = self.outcome(step);
                self.staged = self.committed.clone();
                self.acknowledged.push((generation, self.committed.clone()));
            }
            Step::Discard => {
                self.writer().discard();
                self.writer = None;
                self.staged = self.committed.clone();
            }
        }
        Ok(())
    }

    /// What the store holds after a step that commits.
    pub fn outcome(&self, step: &Step) -> State {
        let before = self.acknowledged.iter().rev().nth(1);
        match step {
            Step::Commit => self.staged.clone(),
            Step::Rollback => before.map(|(_, state)| state.clone()).unwrap_or_default(),
            _ => self.committed.clone(),
        }
    }

    fn shape(&self, n: usize) -> Vec<usize> {
        match self.codec.starts_with("code") {
            true => vec![n, width(&self.codec)],
            false => vec![n, GROUPS, EXPERTS],
        }
    }
}
