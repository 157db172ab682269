//! The lock of the one writer: advisory, and with a message that names its holder.

use std::fs::File;
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::{self, Directory, Lock, LockMode};

/// The file that is locked.
pub const LOCK: &str = "LOCK";

/// The writer's lock, held until this is dropped.
#[derive(Debug)]
pub struct WriterLock {
    file: File,
    process: u32,
}

impl Drop for WriterLock {
    fn drop(&mut self) {
        // A child that was forked meanwhile has the same lock, and would keep it by having the file open. And what
        // the child drops is still its parent's.
        if self.process == process::id() {
            files::unlock(&self.file);
        }
    }
}

/// Takes the writer's lock, or names its holder. The lock goes with the process, however that ends.
pub fn take_lock(dir: &Directory) -> Result<WriterLock> {
    let path = dir.path_of(LOCK);
    let file = dir.open_or_create(LOCK)?;
    match files::lock(&file, LockMode::Exclusive, &path)? {
        Lock::Held => {}
        Lock::Busy => {
            let text = files::read_limited(&file, 4096, &path).unwrap_or_default();
            return Err(Error::StoreLocked {
                path: dir.path().to_owned(),
                holder: holder(&String::from_utf8_lossy(&text)),
            });
        }
        Lock::Unsupported => {
            let why = "this file system has no locks, so a second writer could not be kept out";
            let source = std::io::Error::new(std::io::ErrorKind::Unsupported, why);
            return Err(Error::io(path, source));
        }
    }
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let process = process::id();
    let line = format!("{process} {host} {}\n", now());
    // Only for the message to others: a full disk must not keep the holder from working.
    let _ = dir.overwrite(&file, LOCK, line.as_bytes());
    Ok(WriterLock { file, process })
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// The holder of a lock, from what it wrote: process, host, start.
fn holder(line: &str) -> String {
    let mut words = line.split_whitespace();
    match (
        words.next(),
        words.next(),
        words.next().and_then(|s| s.parse::<u64>().ok()),
    ) {
        (Some(process), Some(host), Some(start)) => {
            let seconds = now().saturating_sub(start);
            format!("process {process} on {host}, for {seconds} s")
        }
        _ => "an unnamed process".into(),
    }
}
