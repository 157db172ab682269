//! A disk as it may be after a power loss.
//!
//! A [`Recorder`] takes down every call that alters the disk. Played back up to any call, the [`Disk`] knows
//! what is surely on it: bytes of files that were synced, and names in directories that were synced. All
//! else may be there or not: a [`Choice`] says which names, and how much of the bytes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use polyprag_core::files::Directory;
use polyprag_core::tap::{Call, Op, Outcome, Tap};
use rustix::fs::AtFlags;

use super::Random;

const SECTOR: usize = 512;

/// A file or directory, by the order in which they came to be; 0 is the directory above all.
pub type Object = usize;

#[derive(Debug, Clone)]
pub enum Change {
    /// Names given and taken away by one call, all of them or none.
    Names(Object, Vec<(OsString, Option<Object>)>),
    Write(Object, usize, Vec<u8>),
    Length(Object, usize),
    SyncFile(Object),
    SyncFolder(Object),
    /// The commit with this number returned.
    Acknowledged(usize),
}

#[derive(Debug, Clone)]
pub struct Event {
    pub change: Change,
    /// In words.
    pub what: String,
}

#[derive(Debug, Default)]
struct Recording {
    events: Vec<Event>,
    /// Which object an inode is now; a system may use its number again.
    objects: HashMap<(u64, u64), Object>,
    folders: Vec<bool>,
}

/// Takes down what is done below one directory.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Mutex<Recording>>);

impl Recorder {
    /// A recorder, and the directory of which it will tell.
    pub fn new(path: &Path) -> (Self, Directory) {
        let mut recording = Recording::default();
        let file = std::fs::File::open(path).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        recording.objects.insert((stat.st_dev, stat.st_ino), 0);
        recording.folders.push(true);
        let recorder = Self(Arc::new(Mutex::new(recording)));
        let dir = Directory::open(path).unwrap();
        let dir = dir.with_tap(Arc::new(recorder.clone()));
        (recorder, dir)
    }

    pub fn acknowledge(&self, n: usize) {
        let mut recording = self.0.lock().unwrap();
        recording.events.push(Event {
            change: Change::Acknowledged(n),
            what: format!("acknowledge commit {n}"),
        });
    }

    pub fn trace(&self) -> Trace {
        let recording = self.0.lock().unwrap();
        Trace {
            events: recording.events.clone(),
            folders: recording.folders.clone(),
        }
    }
}

/// What was done, in order.
#[derive(Debug)]
pub struct Trace {
    pub events: Vec<Event>,
    folders: Vec<bool>,
}

impl Recording {
    fn known(&self, at: BorrowedFd<'_>) -> Object {
        let stat = rustix::fs::fstat(at).unwrap();
        let object = self.objects.get(&(stat.st_dev, stat.st_ino));
        *object.expect("everything below the directory was made before the tap")
    }

    fn named(&self, at: BorrowedFd<'_>, name: &OsStr) -> Object {
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let object = self.objects.get(&(stat.st_dev, stat.st_ino));
        *object.expect("everything below the directory was made before the tap")
    }

    fn new_object(&mut self, at: BorrowedFd<'_>, name: &OsStr, folder: bool) -> Object {
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let object = self.folders.len();
        self.folders.push(folder);
        self.objects.insert((stat.st_dev, stat.st_ino), object);
        object
    }
}

impl Tap for Recorder {
    fn call(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome) -> Outcome {
        // Held during the call: the order of the trace is the order of the effects.
        let mut recording = self.0.lock().unwrap();
        let at = call.at;
        let was_there = match call.op {
            Op::OpenOrCreate(name) => {
                rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
            }
            _ => false,
        };
        let n = make(usize::MAX)?;
        let here = recording.known(at.as_fd());
        let (change, name) = match call.op {
            Op::OpenOrCreate(_) if was_there => return Ok(n),
            Op::OpenOrCreate(name) | Op::Create(name) => {
                let object = recording.new_object(at, name, false);
                (Change::Names(here, vec![(name.into(), Some(object))]), name)
            }
            Op::MakeFolder(name) => {
                let object = recording.new_object(at, name, true);
                (Change::Names(here, vec![(name.into(), Some(object))]), name)
            }
            Op::Rename(from, to) => {
                let object = recording.named(at, to);
                let names = vec![(from.into(), None), (to.into(), Some(object))];
                (Change::Names(here, names), to)
            }
            Op::Remove(name) | Op::RemoveFolder(name) => {
                (Change::Names(here, vec![(name.into(), None)]), name)
            }
            Op::SyncFolder => (Change::SyncFolder(here), OsStr::new("")),
            Op::SyncFile => (Change::SyncFile(here), OsStr::new("")),
            Op::SetLength(length) => (Change::Length(here, length as usize), OsStr::new("")),
            Op::Write { offset, bytes } => {
                let bytes = bytes[..n].to_vec();
                (Change::Write(here, offset as usize, bytes), OsStr::new(""))
            }
        };
        let op = format!("{:?}", call.op);
        let op = op.split(['(', ' ', '{']).next().unwrap_or_default();
        let path = call.path.join(name);
        let what = format!("{op} {}", path.display());
        recording.events.push(Event { change, what });
        Ok(n)
    }
}

#[derive(Debug, Clone, Default)]
struct FileState {
    synced: Vec<u8>,
    /// As a reader sees it while the power lasts.
    written: Vec<u8>,
    /// What was written since the last sync, as ranges.
    pending: Vec<(usize, usize)>,
}

#[derive(Debug, Clone, Default)]
struct FolderState {
    synced: BTreeMap<OsString, Object>,
    /// Calls since the last sync.
    pending: Vec<Vec<(OsString, Option<Object>)>>,
}

/// Which of the names that are not durable are there.
#[derive(Debug, Clone, PartialEq)]
pub enum Names {
    None,
    All,
    /// All but one call's, counted over all directories.
    Without(usize),
    Only(usize),
    Random(u64),
}

/// How much of the bytes that are not durable are there.
#[derive(Debug, Clone, PartialEq)]
pub enum Bytes {
    None,
    All,
    /// The files are as long as they were, and hold zeros.
    Zeros,
    /// Some sectors, and perhaps not the end.
    Torn(u64),
}

pub type Choice = (Names, Bytes);

/// What a directory or file is on an image.
#[derive(Debug, Clone)]
pub enum Node {
    Folder(BTreeMap<OsString, Node>),
    File(Vec<u8>),
}

/// The state after some events.
#[derive(Debug, Clone)]
pub struct Disk {
    files: BTreeMap<Object, FileState>,
    folders: BTreeMap<Object, FolderState>,
    kinds: Vec<bool>,
}

impl Disk {
    pub fn new(trace: &Trace) -> Self {
        Self {
            files: BTreeMap::new(),
            folders: BTreeMap::from([(0, FolderState::default())]),
            kinds: trace.folders.clone(),
        }
    }

    /// After the whole trace.
    pub fn after(trace: &Trace) -> Self {
        let mut disk = Self::new(trace);
        trace.events.iter().for_each(|e| disk.apply(&e.change));
        disk
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Names(folder, names) => {
                let folder = self.folders.entry(*folder).or_default();
                folder.pending.push(names.clone());
            }
            Change::SyncFolder(folder) => {
                let folder = self.folders.entry(*folder).or_default();
                for call in std::mem::take(&mut folder.pending) {
                    set(&mut folder.synced, &call);
                }
            }
            Change::Write(file, offset, bytes) => {
                let file = self.files.entry(*file).or_default();
                let end = offset + bytes.len();
                if file.written.len() < end {
                    file.written.resize(end, 0);
                }
                file.written[*offset..end].copy_from_slice(bytes);
                file.pending.push((*offset, end));
            }
            Change::Length(file, length) => {
                let file = self.files.entry(*file).or_default();
                file.written.resize(*length, 0);
                file.pending.push((*length, *length));
            }
            Change::SyncFile(file) => {
                let file = self.files.entry(*file).or_default();
                file.synced = file.written.clone();
                file.pending.clear();
            }
            Change::Acknowledged(_) => {}
        }
    }

    /// How many calls gave or took names that are not durable yet.
    pub fn pending_names(&self) -> usize {
        self.folders.values().map(|f| f.pending.len()).sum()
    }

    pub fn pending_bytes(&self) -> bool {
        self.files.values().any(|f| !f.pending.is_empty())
    }

    /// What may be there: names in each of the ways, and bytes in each of theirs.
    pub fn choices(&self, random: &mut Random, rounds: usize) -> Vec<Choice> {
        let mut names = vec![Names::None];
        let calls = self.pending_names();
        if calls > 0 {
            names.push(Names::All);
        }
        if calls > 1 {
            names.extend((0..calls).map(Names::Without));
            names.extend((0..calls).map(Names::Only));
            names.extend((0..rounds).map(|_| Names::Random(random.next())));
        }
        let mut bytes = vec![Bytes::None];
        if self.pending_bytes() {
            bytes.extend([Bytes::All, Bytes::Zeros]);
            bytes.extend((0..rounds).map(|_| Bytes::Torn(random.next())));
        }
        names
            .iter()
            .flat_map(|n| bytes.iter().map(move |b| (n.clone(), b.clone())))
            .collect()
    }

    /// One of the disks that a power loss may leave now.
    pub fn image(&self, (names, bytes): &Choice) -> Node {
        let mut random = match names {
            Names::Random(seed) => Random(*seed),
            _ => Random(0),
        };
        let mut call = 0;
        let mut folders: BTreeMap<Object, BTreeMap<OsString, Object>> = BTreeMap::new();
        for (object, folder) in &self.folders {
            let mut entries = folder.synced.clone();
            for change in &folder.pending {
                let there = match names {
                    Names::None => false,
                    Names::All => true,
                    Names::Without(n) => call != *n,
                    Names::Only(n) => call == *n,
                    Names::Random(_) => random.coin(),
                };
                if there {
                    set(&mut entries, change);
                }
                call += 1;
            }
            folders.insert(*object, entries);
        }
        let mut random = match bytes {
            Bytes::Torn(seed) => Random(*seed),
            _ => Random(0),
        };
        self.node(0, &folders, bytes, &mut random)
    }

    fn node(
        &self,
        object: Object,
        folders: &BTreeMap<Object, BTreeMap<OsString, Object>>,
        bytes: &Bytes,
        random: &mut Random,
    ) -> Node {
        if self.kinds[object] {
            let entries = folders.get(&object).into_iter().flatten();
            return Node::Folder(
                entries
                    .map(|(name, to)| (name.clone(), self.node(*to, folders, bytes, random)))
                    .collect(),
            );
        }
        let Some(file) = self.files.get(&object) else {
            return Node::File(Vec::new());
        };
        if file.pending.is_empty() {
            return Node::File(file.synced.clone());
        }
        Node::File(match bytes {
            Bytes::None => file.synced.clone(),
            Bytes::All => file.written.clone(),
            Bytes::Zeros => {
                let mut content = file.written.clone();
                for (from, to) in &file.pending {
                    let to = (*to).min(content.len());
                    content[(*from).min(to)..to].fill(0);
                }
                content
            }
            Bytes::Torn(_) => torn(file, random),
        })
    }
}

/// Each sector as it was synced, as it was written, or zeros; and cut at a sector, or not.
fn torn(file: &FileState, random: &mut Random) -> Vec<u8> {
    let mut content = file.written.clone();
    if random.coin() {
        let sectors = content.len().div_ceil(SECTOR);
        let least = file.synced.len().min(content.len());
        let cut = random.below(sectors + 1) * SECTOR;
        content.truncate(cut.max(least));
    }
    for (i, sector) in content.chunks_mut(SECTOR).enumerate() {
        let (from, to) = (i * SECTOR, i * SECTOR + sector.len());
        let touched = file.pending.iter().any(|(a, b)| *a < to && from < *b);
        if !touched || random.coin() {
            continue;
        }
        sector.fill(0);
        if random.coin()
            && let Some(old) = file.synced.get(from..)
        {
            let n = old.len().min(sector.len());
            sector[..n].copy_from_slice(&old[..n]);
        }
    }
    content
}

fn set(entries: &mut BTreeMap<OsString, Object>, call: &[(OsString, Option<Object>)]) {
    for (name, object) in call {
        match object {
            Some(object) => entries.insert(name.clone(), *object),
            None => entries.remove(name),
        };
    }
}

impl Node {
    /// Tells images apart.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        match self {
            Node::File(bytes) => {
                hasher.update(b"file");
                hasher.update(bytes);
            }
            Node::Folder(entries) => {
                hasher.update(b"folder");
                for (name, node) in entries {
                    let name = name.as_encoded_bytes();
                    hasher.update(&(name.len() as u64).to_le_bytes());
                    hasher.update(name);
                    hasher.update(&node.hash());
                }
            }
        }
        *hasher.finalize().as_bytes()
    }

    pub fn read(path: &Path) -> Self {
        if !path.is_dir() {
            return Node::File(std::fs::read(path).unwrap());
        }
        let entries = std::fs::read_dir(path).unwrap().map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name(), Self::read(&entry.path()))
        });
        Node::Folder(entries.collect())
    }

    pub fn write(&self, path: &Path) {
        match self {
            Node::File(bytes) => std::fs::write(path, bytes).unwrap(),
            Node::Folder(entries) => {
                if !path.exists() {
                    std::fs::create_dir(path).unwrap();
                }
                for (name, node) in entries {
                    node.write(&path.join(name));
                }
            }
        }
    }
}
