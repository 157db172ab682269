//! Every way in which the store can fail, with what was expected, what was found and what to do about it.
//!
//! The names are those of `polyprag.errors` in Python. Failures of the operating system keep their
//! [`std::io::Error`], so that a caller can turn them into what its language calls them.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape, type or value.
    #[error("{0}")]
    InvalidInput(String),

    /// The path exists, but no committed store lives there.
    #[error("{}: not a polyprag store: {reason}", path.display())]
    NotAStore { path: PathBuf, reason: String },

    /// A file is not what the manifest says: truncated, altered or malformed.
    #[error(
        "{}: corrupt {what}: expected {expected}, found {found}; restore the store from a copy",
        file.display()
    )]
    CorruptStore {
        file: PathBuf,
        what: String,
        expected: String,
        found: String,
    },

    /// The BM25 index cannot be read; routes by id go on working without it.
    #[error(
        "{}: corrupt BM25 index: {reason}; routes by id still work, and `polyprag reindex STORE` rebuilds it from kept text",
        file.display()
    )]
    CorruptIndex { file: PathBuf, reason: String },

    /// Written by a newer polyprag, or needs a feature that this one lacks.
    #[error("{}: {what}; this version reads {known}: use a newer polyprag", file.display())]
    UnsupportedFormat {
        file: PathBuf,
        what: String,
        known: String,
    },

    /// The BM25 index was written by a Tantivy version that can no longer be read.
    #[error(
        "{}: the BM25 index is too old: {reason}; routes by id still work, and `polyprag reindex STORE` rebuilds it from kept text",
        file.display()
    )]
    IndexTooOld { file: PathBuf, reason: String },

    /// Another writer holds the store.
    #[error("{}: another writer holds this store: {holder}; wait for it, or end it", path.display())]
    StoreLocked { path: PathBuf, holder: String },

    /// The store or writer was closed before this call.
    #[error("{}: {reason}", path.display())]
    StoreClosed { path: PathBuf, reason: String },

    /// An id is already in the store, or appears twice in one call.
    #[error("id {id} {reason}")]
    DuplicateId { id: String, reason: String },

    /// No document of the store has this id.
    #[error("no document has the id {id}{hint}")]
    UnknownId { id: String, hint: String },

    /// The document is searchable but has no route.
    #[error("document {id} has no route: train one for it, or leave it out")]
    Unrouted { id: String },

    /// A [`Watch`](crate::Watch) stopped the work.
    #[error("stopped before its end, as was asked; nothing of it was committed")]
    Interrupted,

    /// The operating system refused; the kind and the number of the failure are in `source`.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: Arc<io::Error>,
    },
}

impl Error {
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::InvalidInput(message.into())
    }

    pub fn io(path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Error::Io {
            path: path.as_ref().to_owned(),
            source: Arc::new(source.into()),
        }
    }

    pub fn corrupt(
        file: impl AsRef<Path>,
        what: impl Display,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Error::CorruptStore {
            file: file.as_ref().to_owned(),
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    pub fn corrupt_index(file: impl AsRef<Path>, reason: impl Display) -> Self {
        Error::CorruptIndex {
            file: file.as_ref().to_owned(),
            reason: reason.to_string(),
        }
    }

    /// The kind of an operating system failure, if this is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}
