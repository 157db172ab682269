//! The index of a generation, opened by its first search.

use std::sync::{Mutex, OnceLock, PoisonError};

use super::directory::as_index_error;
use super::{IndexFile, IndexReader, IndexSpec};
use crate::error::{Error, Result};
use crate::files::Directory;

/// Opening reads the dictionaries and the lengths of all documents, so it is left to the first search.
/// What is wrong with the index takes only searching with it.
#[derive(Debug)]
pub struct LazyIndex {
    store: Directory,
    generation: u64,
    files: Vec<IndexFile>,
    spec: IndexSpec,
    open: OnceLock<IndexReader>,
    /// Why it never can be opened.
    broken: OnceLock<Error>,
    /// Held while it is being opened, in the process that made this.
    opening: Mutex<()>,
    process: u32,
}

impl LazyIndex {
    /// Compares the lengths of the files and reads nothing.
    pub fn new(store: &Directory, generation: u64, files: Vec<IndexFile>, spec: IndexSpec) -> Self {
        let mut files_of = files.iter();
        let compared = files_of.try_for_each(|file| {
            let part = store.open_part(&file.name, file.length);
            part.map(drop).map_err(as_index_error)
        });
        Self {
            store: store.clone(),
            generation,
            spec,
            open: OnceLock::new(),
            broken: compared.err().map(OnceLock::from).unwrap_or_default(),
            opening: Mutex::default(),
            process: std::process::id(),
            files,
        }
    }

    pub fn get(&self) -> Result<&IndexReader> {
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        // One thread opens it and the others wait; not in a forked child, where the one may be missing.
        let _alone = (std::process::id() == self.process)
            .then(|| self.opening.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(error) = self.broken.get() {
            return Err(error.clone());
        }
        // Another thread may have opened it while this one waited.
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        match IndexReader::open(&self.store, self.generation, &self.files, &self.spec) {
            Ok(reader) => Ok(self.open.get_or_init(|| reader)),
            Err(error) => {
                // What the operating system refuses now, such as one more open file, it may grant later.
                if error.io_kind().is_none() {
                    let _ = self.broken.set(error.clone());
                }
                Err(error)
            }
        }
    }
}
