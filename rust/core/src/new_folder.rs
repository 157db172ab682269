//! A new store is built beside its path and gets its name when it is whole.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::{self, Directory, Lock, LockMode};
use crate::lock::LOCK;

/// The folder in which a new store is built, beside its path; removed unless it was moved there.
#[derive(Debug)]
pub(crate) struct NewFolder {
    parent: Directory,
    name: OsString,
    target: OsString,
    dir: Directory,
    moved: bool,
}

impl NewFolder {
    pub fn beside(path: &Path) -> Result<Self> {
        let target = path
            .file_name()
            .ok_or_else(|| {
                Error::invalid(format!(
                    "{}: not a path that can be created",
                    path.display()
                ))
            })?
            .to_owned();
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let parent = Directory::open(parent)?;
        if std::fs::symlink_metadata(path).is_ok() {
            let source = std::io::Error::from(rustix::io::Errno::EXIST);
            return Err(Error::io(path, source));
        }
        let mut prefix = OsString::from(".");
        prefix.push(&target);
        prefix.push(".tmp-");
        remove_abandoned(&parent, &prefix);
        let nanos = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos());
        let mut name = prefix;
        name.push(format!("{}-{nanos:x}", std::process::id()));
        let dir = parent.create_folder(&name)?;
        Ok(Self {
            parent,
            name,
            target,
            dir,
            moved: false,
        })
    }

    pub fn dir(&self) -> &Directory {
        &self.dir
    }

    /// Makes the folder visible under its real name, durably.
    pub fn publish(&mut self) -> Result<()> {
        self.parent.rename_new(&self.name, &self.target)?;
        self.moved = true;
        self.parent.sync()
    }

    /// Whether it has its real name.
    pub fn is_published(&self) -> bool {
        self.moved
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.moved {
            // A writer that is dropped has nobody to tell; the next creation tries again.
            let _ = self.parent.remove_folder(&self.name);
        }
    }
}

/// Folders of creators that were killed: nobody holds their lock.
fn remove_abandoned(parent: &Directory, prefix: &OsStr) {
    if parent.is_shared_between_machines() {
        return;
    }
    let (Ok(names), Some(prefix)) = (parent.list(), prefix.to_str()) else {
        return;
    };
    for name in names.iter().filter(|n| n.starts_with(prefix)) {
        let Ok(folder) = parent.folder(name) else {
            continue;
        };
        let Ok(lock) = folder.open_file(LOCK) else {
            continue;
        };
        if files::lock(&lock, LockMode::Exclusive, folder.path()).is_ok_and(|l| l == Lock::Held) {
            let _ = parent.remove_folder(OsStr::new(name));
        }
    }
}
