//! Clean-up of files that no generation in use needs. It never fails a commit: what cannot be removed
//! now is removed by a later writer.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::files::{self, Directory, INDEX_FOLDER, Lock, LockMode, is_part_name};
use crate::lock::LOCK;
use crate::manifest::{CURRENT, Current, Manifest, read_other};

/// Removes what neither the generation in force, nor the one before, nor a reader needs. Only for the
/// holder of the writer's lock, and not while an index writer is open.
pub fn collect(dir: &Directory) -> Result<()> {
    // Locks between machines are not to be trusted.
    if dir.is_shared_between_machines() {
        return Ok(());
    }
    let current = Current::read(dir)?.manifest;
    let mut keep: HashSet<String> = HashSet::from([current.clone()]);
    if let Some(previous) = read_other(dir, &current)?.previous {
        keep.insert(Manifest::name(previous));
    }
    let mut needed: HashSet<String> = HashSet::from([CURRENT.into(), LOCK.into()]);
    let entries = dir.list()?;
    for name in entries
        .iter()
        .filter(|n| Manifest::generation_of(n).is_some())
    {
        if !keep.contains(name) && remove_unless_read(dir, name)? {
            continue;
        }
        // An error here ends the clean-up: a manifest that cannot be read may name any file.
        needed.extend(read_other(dir, name)?.parts.into_iter().map(|p| p.file));
        needed.insert(name.clone());
    }
    let in_folder = match dir.folder(INDEX_FOLDER) {
        Ok(folder) => folder.list()?,
        Err(_) => Vec::new(),
    };
    let all = entries
        .into_iter()
        .filter(|name| name != INDEX_FOLDER)
        .chain(
            in_folder
                .into_iter()
                .map(|name| format!("{INDEX_FOLDER}/{name}")),
        );
    for name in all.filter(|name| !needed.contains(name) && is_ours(name)) {
        dir.remove(&name)?;
    }
    Ok(())
}

/// Only what a writer would have written: a stranger's file in the directory stays.
fn is_ours(name: &str) -> bool {
    const ENDS: [&str; 5] = [".json", ".seg", ".safetensors", ".bin", ".new"];
    is_part_name(name)
        && (name.starts_with(INDEX_FOLDER)
            || (generation_in(name).is_some() && ENDS.iter().any(|e| name.ends_with(e))))
        || name == "CURRENT.new"
}

/// False if a reader holds the manifest, or if there are no locks to tell.
fn remove_unless_read(dir: &Directory, name: &str) -> Result<bool> {
    let file = dir.open_file(name)?;
    match files::lock(&file, LockMode::Exclusive, &dir.path_of(name))? {
        // Removed while the lock is held: a reader that has it open by now sees that it is gone.
        Lock::Held => dir.remove(name).map(|()| true),
        Lock::Busy | Lock::Unsupported => Ok(false),
    }
}

/// The generation that wrote a file, from its name: `role-00000001.end`, `bm25/meta-1.json`.
pub fn generation_in(name: &str) -> Option<u64> {
    let (_, rest) = name.rsplit_once('-')?;
    let digits = rest.split('.').next()?;
    match !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        true => digits.parse().ok(),
        false => None,
    }
}

/// A number above every generation of which there is a trace, committed or not.
pub fn next_generation(dir: &Directory) -> Result<u64> {
    let mut names = dir.list()?;
    if let Ok(folder) = dir.folder(INDEX_FOLDER) {
        names.extend(folder.list()?);
    }
    let newest = names.iter().filter_map(|n| generation_in(n)).max();
    newest.unwrap_or(0).checked_add(1).ok_or_else(|| {
        let path = dir.path().display();
        Error::invalid(format!("{path}: the store has no generation left"))
    })
}
