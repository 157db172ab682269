//! The only files that Tantivy sees: those that one generation lists, and those it writes itself.
//!
//! - A listed file is opened without following symlinks, must be a regular file, and its real
//!   length is compared with the listed one before it is mapped ([`files::Directory::map`]).
//! - What Tantivy reads is compared with its checksum first ([`super::checked`]).
//! - `meta.json` lives in memory while Tantivy works and is `meta-<generation>.json` on disk,
//!   written once by a commit. `.managed.json` lives in memory only.
//! - A file of an earlier generation is never removed or overwritten; the store's collector does
//!   that. What this session wrote and merged away again is removed at once.
//! - Tantivy's own locks do nothing: the store has one writer, by its own lock.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tantivy::Directory;
use tantivy::directory::error::{DeleteError, LockError, OpenReadError, OpenWriteError};
use tantivy::directory::{
    AntiCallToken, DirectoryLock, FileHandle, Lock, TerminatingWrite, WatchCallback, WatchHandle,
    WritePtr,
};

use super::IndexFile;
use super::checked::{CheckedFile, Failure, TrailerWriter};
use crate::error::{Error, Result};
use crate::files::{self, INDEX_FOLDER, PartWriter};
use crate::watch::Progress;

const META: &str = "meta.json";
const MANAGED: &str = ".managed.json";
/// A meta file names at most some thousand segments.
const MAX_META_BYTES: u64 = 16 << 20;

/// What is known of one file in the folder.
#[derive(Clone, Debug)]
struct Entry {
    length: u64,
    blake3: [u8; 32],
    /// Listed by a generation, and so not ours to remove.
    published: bool,
    /// From its first use on, so that what was found whole stays so.
    open: Arc<OnceLock<Arc<CheckedFile>>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Entry>,
    meta: Option<Vec<u8>>,
}

/// A clone is another handle to the same state.
#[derive(Clone)]
pub(super) struct StoreDirectory {
    store: files::Directory,
    // Who reads an index only reads this: a child that was forked while another thread read it is not in the way
    // of itself, as it would be with a mutex.
    state: Arc<RwLock<State>>,
    failure: Failure,
    traffic: Arc<Traffic>,
}

/// What goes to the disk, from all threads.
#[derive(Default)]
struct Traffic {
    written: AtomicU64,
    /// Nothing more may.
    stopped: AtomicBool,
}

impl fmt::Debug for StoreDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StoreDirectory")
            .field(&self.folder())
            .finish()
    }
}

fn meta_name(generation: u64) -> String {
    format!("{INDEX_FOLDER}/meta-{generation}.json")
}

fn full_name(name: &str) -> String {
    format!("{INDEX_FOLDER}/{name}")
}

impl StoreDirectory {
    /// The files of one generation; none for a new index.
    pub(super) fn new(
        store: &files::Directory,
        generation: Option<u64>,
        listed: &[IndexFile],
    ) -> Result<Self> {
        let meta_file = generation.map(meta_name);
        let mut state = State::default();
        for file in listed {
            let Some(name) = own_name(&file.name) else {
                let reason = format!("the manifest lists {:?} as a file of the index", file.name);
                return Err(Error::corrupt_index(store.path_of(INDEX_FOLDER), reason));
            };
            if meta_file.as_deref() == Some(&file.name) {
                state.meta = Some(read_meta(store, file)?);
                continue;
            }
            let entry = Entry {
                length: file.length,
                blake3: file.blake3,
                published: true,
                open: Arc::default(),
            };
            state.files.insert(name.to_owned(), entry);
        }
        if let (Some(name), None) = (&meta_file, &state.meta) {
            let reason = "the manifest does not list it";
            return Err(Error::corrupt_index(store.path_of(name), reason));
        }
        Ok(Self {
            store: store.clone(),
            state: Arc::new(RwLock::new(state)),
            failure: Failure::default(),
            traffic: Arc::default(),
        })
    }

    /// For a writer. Tantivy names the deletions of a segment by a stamp that it counts on from the one in its
    /// meta file; after going back to an earlier generation it would come by the names of a later one's files
    /// again. So the count goes on above every name in the folder.
    pub(super) fn raise_stamp(&self) -> Result<()> {
        let mut state = self.change();
        let Some(meta) = &mut state.meta else {
            return Ok(());
        };
        let malformed = |reason: &str| Error::corrupt_index(self.path_of(Path::new(META)), reason);
        let mut json: serde_json::Value =
            serde_json::from_slice(meta).map_err(|e| malformed(&e.to_string()))?;
        let stamp = json
            .get_mut("opstamp")
            .ok_or_else(|| malformed("it has no opstamp"))?;
        let names = self.store.folder(INDEX_FOLDER)?.list()?;
        let newest = names.iter().filter_map(|name| stamp_in(name)).max();
        if stamp.as_u64() < newest {
            *stamp = newest.into();
            *meta = serde_json::to_vec(&json).map_err(|e| malformed(&e.to_string()))?;
        }
        Ok(())
    }

    pub(super) fn folder(&self) -> PathBuf {
        self.store.path_of(INDEX_FOLDER)
    }

    fn path_of(&self, path: &Path) -> PathBuf {
        self.folder().join(path)
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What failed below Tantivy first, if anything: the cause of a vaguer error from above.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.take()
    }

    /// Lets every write fail from here on, and with it the threads that write.
    pub(super) fn stop(&self) {
        self.traffic.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether every write fails.
    pub(super) fn is_stopped(&self) -> bool {
        self.traffic.stopped.load(Ordering::Relaxed)
    }

    /// Bytes that were written so far.
    pub(super) fn written(&self) -> u64 {
        self.traffic.written.load(Ordering::Relaxed)
    }

    /// Of all files.
    pub(super) fn bytes(&self) -> u64 {
        let state = self.state();
        let lengths = state.files.values().map(|entry| entry.length);
        lengths.fold(0, u64::saturating_add)
    }

    /// Remembers a failure, and puts it into words that Tantivy can carry.
    fn fail(&self, error: Error) -> io::Error {
        self.failure.report(as_index_error(error))
    }

    /// A file that is known here, open; once for all its uses.
    fn open_file(&self, name: &str, entry: &Entry) -> Result<Arc<CheckedFile>> {
        if let Some(open) = entry.open.get() {
            return Ok(Arc::clone(open));
        }
        let map = self.store.map(&full_name(name), entry.length);
        let map = map.map_err(as_index_error)?;
        let file = Arc::new(CheckedFile::open(map, self.failure.clone())?);
        // Of two that open it at once, both go on with the same.
        Ok(Arc::clone(entry.open.get_or_init(|| file)))
    }

    /// Compares every block of every file with its checksum.
    pub(super) fn verify(&self, progress: &Progress) -> Result<()> {
        let files = self.state().files.clone();
        files
            .iter()
            .try_for_each(|(name, entry)| self.open_file(name, entry)?.verify(progress))
    }

    /// Of a file that is there.
    pub(super) fn length_of(&self, file: &Path) -> Option<u64> {
        let state = self.state();
        Some(state.files.get(file.to_str()?)?.length)
    }

    /// Makes `living` the files of `generation`: writes its meta file, syncs the folder, and returns
    /// the list for the manifest.
    pub(super) fn publish(
        &self,
        generation: u64,
        living: &HashSet<PathBuf>,
    ) -> Result<Vec<IndexFile>> {
        let folder = self.store.make_folder(INDEX_FOLDER)?;
        let meta = self.state().meta.clone().unwrap_or_default();
        let name = meta_name(generation);
        self.store.remove(&name)?; // of a commit that never happened
        let digest = self.store.write_part(&name, &meta)?;
        folder.sync()?;

        let mut listed = vec![IndexFile {
            name,
            length: digest.length,
            blake3: digest.blake3,
        }];
        let mut state = self.change();
        for (name, entry) in &mut state.files {
            if living.contains(Path::new(name)) {
                entry.published = true;
                listed.push(IndexFile {
                    name: full_name(name),
                    length: entry.length,
                    blake3: entry.blake3,
                });
            }
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// Removes what no generation lists. Best effort: what stays is found by the store's collector.
    pub(super) fn remove_unpublished(&self) {
        let mut state = self.change();
        state.files.retain(|name, entry| {
            if !entry.published {
                let _ = self.store.remove(&full_name(name));
            }
            entry.published
        });
    }
}

/// The stamp in the name of a segment's deletions: `segment.stamp.del`.
fn stamp_in(name: &str) -> Option<u64> {
    name.strip_suffix(".del")?.rsplit_once('.')?.1.parse().ok()
}

/// The part after `bm25/`, if the name is a plain one inside that folder.
fn own_name(name: &str) -> Option<&str> {
    let (folder, own) = name.split_once('/')?;
    (folder == INDEX_FOLDER && files::is_part_name(name)).then_some(own)
}

/// The meta file decides what all the others mean, and is small: its hash is checked at every open.
fn read_meta(store: &files::Directory, file: &IndexFile) -> Result<Vec<u8>> {
    if file.length > MAX_META_BYTES {
        let reason = format!(
            "{} bytes; a meta file has {MAX_META_BYTES} at most",
            file.length
        );
        return Err(Error::corrupt_index(store.path_of(&file.name), reason));
    }
    let map = store.map(&file.name, file.length).map_err(as_index_error)?;
    if *blake3::hash(&map).as_bytes() != file.blake3 {
        let reason = "its BLAKE3 is not the one that the manifest gives";
        return Err(Error::corrupt_index(store.path_of(&file.name), reason));
    }
    Ok(map.to_vec())
}

/// What is a corrupt part of a store in general is a corrupt index here: routes do not need it.
pub(crate) fn as_index_error(error: Error) -> Error {
    match error {
        Error::CorruptStore {
            file,
            what,
            expected,
            found,
        } => Error::CorruptIndex {
            file,
            reason: format!("{what}: expected {expected}, found {found}"),
        },
        other => other,
    }
}

impl Directory for StoreDirectory {
    fn get_file_handle(&self, path: &Path) -> Result<Arc<dyn FileHandle>, OpenReadError> {
        let name = path.to_str().unwrap_or_default();
        let entry = self.state().files.get(name).cloned();
        let Some(entry) = entry else {
            return Err(OpenReadError::FileDoesNotExist(self.path_of(path)));
        };
        let file = self
            .open_file(name, &entry)
            .map_err(|error| OpenReadError::wrap_io_error(self.fail(error), self.path_of(path)))?;
        Ok(file)
    }

    fn delete(&self, path: &Path) -> Result<(), DeleteError> {
        let mut state = self.change();
        let name = path.to_str().unwrap_or_default();
        match state.files.get(name) {
            None => return Err(DeleteError::FileDoesNotExist(self.path_of(path))),
            Some(entry) if entry.published => return Ok(()),
            Some(_) => {}
        }
        state.files.remove(name);
        // One that cannot be removed is listed nowhere, and so the collector's.
        let _ = self.store.remove(&full_name(name));
        Ok(())
    }

    fn exists(&self, path: &Path) -> Result<bool, OpenReadError> {
        let state = self.state();
        Ok(match path.to_str() {
            Some(META) => state.meta.is_some(),
            Some(name) => state.files.contains_key(name),
            None => false,
        })
    }

    fn open_write(&self, path: &Path) -> Result<WritePtr, OpenWriteError> {
        let name = path.to_str().unwrap_or_default().to_owned();
        if self.state().files.contains_key(&name) {
            return Err(OpenWriteError::FileAlreadyExists(self.path_of(path)));
        }
        // What lies there unlisted is the rest of a commit that never happened.
        let full = full_name(&name);
        let part = self
            .store
            .make_folder(INDEX_FOLDER)
            .and_then(|_| self.store.remove(&full))
            .and_then(|()| self.store.create_part(&full))
            .map_err(|error| OpenWriteError::wrap_io_error(self.fail(error), self.path_of(path)))?;
        // Known from its first byte on, so that discarding finds it.
        let entry = Entry {
            length: 0,
            blake3: [0; 32],
            published: false,
            open: Arc::default(),
        };
        self.change().files.insert(name.clone(), entry);
        let writer = FileWriter {
            directory: self.clone(),
            name,
            part: Some((part, TrailerWriter::default())),
        };
        Ok(BufWriter::new(Box::new(writer)))
    }

    fn atomic_read(&self, path: &Path) -> Result<Vec<u8>, OpenReadError> {
        let state = self.state();
        let missing = || OpenReadError::FileDoesNotExist(self.path_of(path));
        match path.to_str() {
            Some(META) => state.meta.clone().ok_or_else(missing),
            Some(MANAGED) => serde_json::to_vec(&state.files.keys().collect::<Vec<_>>())
                .map_err(|error| OpenReadError::wrap_io_error(error.into(), path.to_owned())),
            _ => Err(missing()),
        }
    }

    fn atomic_write(&self, path: &Path, data: &[u8]) -> io::Result<()> {
        match path.to_str() {
            Some(META) => self.change().meta = Some(data.to_vec()),
            Some(MANAGED) => {}
            _ => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        }
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        Ok(()) // `publish` does, once
    }

    fn acquire_lock(&self, _: &Lock) -> Result<DirectoryLock, LockError> {
        Ok(DirectoryLock::from(Box::new(())))
    }

    fn watch(&self, _: WatchCallback) -> tantivy::Result<WatchHandle> {
        Ok(WatchHandle::empty())
    }
}

/// Writes a file once, from front to back, with our trailer; its length and hash, both with the trailer,
/// go into the directory's state.
struct FileWriter {
    directory: StoreDirectory,
    name: String,
    part: Option<(PartWriter, TrailerWriter)>,
}

impl Write for FileWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.directory.is_stopped() {
            return Err(self.directory.fail(Error::Interrupted));
        }
        let length = data.len() as u64;
        self.directory
            .traffic
            .written
            .fetch_add(length, Ordering::Relaxed);
        match &mut self.part {
            Some((part, trailer)) => {
                part.write(data)
                    .map_err(|error| self.directory.fail(error))?;
                trailer.write(data);
            }
            None => return Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TerminatingWrite for FileWriter {
    fn terminate_ref(&mut self, _: AntiCallToken) -> io::Result<()> {
        if let Some((mut part, trailer)) = self.part.take() {
            let digest = part
                .write(&trailer.finish())
                .and_then(|()| part.finish())
                .map_err(|error| self.directory.fail(error))?;
            if let Some(entry) = self.directory.change().files.get_mut(&self.name) {
                entry.length = digest.length;
                entry.blake3 = digest.blake3;
            }
        }
        Ok(())
    }
}
