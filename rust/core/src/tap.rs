//! A place between the store and the system. Each call that alters the disk passes the [`Tap`] of its
//! [`Directory`](crate::files::Directory), if it has one: so tests record what was done, let a call fail,
//! cut a write short, or end the process at an exact place.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

/// What is about to be done, and to what.
#[derive(Debug, Clone, Copy)]
pub struct Call<'c> {
    pub op: Op<'c>,
    /// The directory in which names are made or removed, or the file or directory itself.
    pub at: BorrowedFd<'c>,
    /// For messages: where it was when it was opened.
    pub path: &'c Path,
}

#[derive(Debug, Clone, Copy)]
pub enum Op<'c> {
    /// Of a file that may be there already: the lock.
    OpenOrCreate(&'c OsStr),
    Create(&'c OsStr),
    MakeFolder(&'c OsStr),
    Rename(&'c OsStr, &'c OsStr),
    Remove(&'c OsStr),
    RemoveFolder(&'c OsStr),
    SyncFolder,
    Write {
        offset: u64,
        bytes: &'c [u8],
    },
    SetLength(u64),
    SyncFile,
}

/// What a call gave: for a write how many bytes were written, for others nothing of meaning.
pub type Outcome = Result<usize, Errno>;

/// Stands between the store and the system. Threads of the index call it too.
pub trait Tap: Debug + Send + Sync {
    /// Does a call in its own way. `make` makes it for real; of a write, at most as many bytes as it is told.
    fn call(&self, call: &Call<'_>, make: &mut dyn FnMut(usize) -> Outcome) -> Outcome;
}

/// A tap, or none.
#[derive(Debug, Clone, Default)]
pub(crate) struct MaybeTap(pub Option<Arc<dyn Tap>>);

impl MaybeTap {
    pub fn call<T>(
        &self,
        call: Call<'_>,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let Some(tap) = &self.0 else {
            return make();
        };
        let (mut make, mut made) = (Some(make), None);
        tap.call(&call, &mut |_| {
            let make = make.take().ok_or(Errno::ALREADY)?;
            made = Some(make()?);
            Ok(0)
        })?;
        made.ok_or(Errno::CANCELED)
    }

    pub fn write(
        &self,
        at: BorrowedFd<'_>,
        path: &Path,
        offset: u64,
        bytes: &[u8],
    ) -> Result<usize, Errno> {
        let mut make = |most: usize| {
            let bytes = bytes.get(..most).unwrap_or(bytes);
            rustix::io::pwrite(at, bytes, offset)
        };
        match &self.0 {
            None => make(bytes.len()),
            Some(tap) => {
                let op = Op::Write { offset, bytes };
                tap.call(&Call { op, at, path }, &mut make)
            }
        }
    }
}
