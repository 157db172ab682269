//! A new store is built beside its path and gets its name when it is whole.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::{Directory, Lock, LockMode, lock};

/// The folder in which a new store is built, beside its path; removed unless it was moved there.
#[derive(Debug)]
pub(crate) struct NewFolder {
    parent: Directory,
    name: OsString,
    target: OsString,
    dir: Directory,
    /// The same folder, locked: others see by it that somebody is at work here.
    lock: Directory,
    moved: bool,
}

impl NewFolder {
    pub fn beside(parent: Directory, target: &OsStr) -> Result<Self> {
        if parent.has(target)? {
            let source = std::io::Error::from(rustix::io::Errno::EXIST);
            return Err(Error::io(parent.path_of(target), source));
        }
        let mut prefix = OsString::from(".");
        prefix.push(target);
        prefix.push(".tmp-");
        if let Some(prefix) = prefix.to_str() {
            remove_abandoned(&parent, prefix);
        }
        at_work(|| {
            let mut name = prefix.clone();
            name.push(fresh_ending());
            let new = Self {
                dir: parent.create_folder(&name)?,
                lock: parent.folder(&name)?,
                parent: parent.clone(),
                name,
                target: target.to_owned(),
                moved: false,
            };
            let held = new.lock.lock(LockMode::Exclusive)? != Lock::Busy;
            Ok((held && new.parent.still_names(&new.name, &new.lock)?).then_some(new))
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

/// What `make` has made and locked. Another process may take it for abandoned before it is locked, and remove it: then
/// `make` gives None, and makes the next.
pub fn at_work<T>(mut make: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    for _ in 0..4 {
        if let Some(made) = make()? {
            return Ok(made);
        }
    }
    let source = std::io::Error::from(rustix::io::Errno::AGAIN);
    Err(Error::io("a name for what is being written", source))
}

/// The end of a name that no other process, and no other moment, takes.
pub fn fresh_ending() -> String {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    format!("{}-{nanos:x}", std::process::id())
}

/// Whether [`fresh_ending`] gives such ends.
fn is_fresh_ending(end: &str) -> bool {
    let plain =
        |word: &str, digit: fn(&u8) -> bool| !word.is_empty() && word.bytes().all(|b| digit(&b));
    end.split_once('-').is_some_and(|(process, nanos)| {
        plain(process, u8::is_ascii_digit) && plain(nanos, u8::is_ascii_hexdigit)
    })
}

/// The directory that holds `path`, and the name in it.
pub fn parent_of(path: &Path) -> Result<(Directory, OsString)> {
    let name = path.file_name().ok_or_else(|| {
        let reason = "not a path that can be created";
        Error::invalid(format!("{}: {reason}", path.display()))
    })?;
    let parent = match path.parent() {
        // The path stays as it was given, for messages.
        Some(parent) if parent != Path::new("") => Directory::open(parent)?,
        _ => Directory::open(".")?.moved_to(""),
    };
    Ok((parent, name.to_owned()))
}

/// Removes folders and files of creators that were killed: nobody holds the lock on them.
pub fn remove_abandoned(parent: &Directory, prefix: &str) {
    if parent.is_shared_between_machines() {
        return;
    }
    let Ok(names) = parent.list() else {
        return;
    };
    let held = |lock: Result<Lock>| lock.is_ok_and(|l| l == Lock::Held);
    let ours = |name: &&String| name.strip_prefix(prefix).is_some_and(is_fresh_ending);
    for name in names.iter().filter(ours) {
        if let Ok(folder) = parent.folder(name) {
            if held(folder.lock(LockMode::Exclusive)) {
                let _ = parent.remove_folder(OsStr::new(name));
            }
        } else if let Ok(file) = parent.open_file(name)
            && held(lock(&file, LockMode::Exclusive, parent.path()))
        {
            let _ = parent.remove(name);
        }
    }
}
