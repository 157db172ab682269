//! Clean-up of files that no generation in use needs. It never fails a commit: what cannot be removed
//! now is removed by a later writer.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::files::{self, Directory, INDEX_FOLDER, Lock, LockMode, is_part_name};
use crate::lock::LOCK;
use crate::manifest::{CURRENT, Current, Manifest, read_other, role};

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
        // One that cannot be removed keeps no other.
        let _ = dir.remove(&name);
    }
    Ok(())
}

/// Only what a writer would have written: a stranger's file in the directory stays. The index's folder is ours.
fn is_ours(name: &str) -> bool {
    let in_folder = name.split_once('/').is_some_and(|(f, _)| f == INDEX_FOLDER);
    in_folder && is_part_name(name) || written_by(name).is_some() || name == "CURRENT.new"
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

/// The generation that wrote a file, if its name is one that a writer gives: `role-00000001.end`,
/// `role-00000001.2.end`.
fn written_by(name: &str) -> Option<u64> {
    const ENDS: [&str; 3] = ["seg", "safetensors", "bin"];
    if let Some(generation) = Manifest::generation_of(name) {
        return Some(generation);
    }
    let (role, rest) = name.split_once('-')?;
    let (digits, rest) = rest.split_once('.')?;
    let end = match rest.split_once('.') {
        Some((n, end)) => number(n).map(|_| end)?,
        None => rest,
    };
    let ours = role::OF_FILES.contains(&role) && digits.len() >= 8 && ENDS.contains(&end);
    ours.then(|| number(digits)).flatten()
}

fn number(digits: &str) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// A number above every generation of which there is a trace, committed or not.
pub fn next_generation(dir: &Directory) -> Result<u64> {
    let in_folder = match dir.folder(INDEX_FOLDER) {
        Ok(folder) => folder.list()?,
        Err(_) => Vec::new(),
    };
    let of_index = |name: &String| number(name.strip_prefix("meta-")?.strip_suffix(".json")?);
    let names = dir.list()?;
    let written = names.iter().filter_map(|name| written_by(name));
    let newest = written.chain(in_folder.iter().filter_map(of_index)).max();
    newest.unwrap_or(0).checked_add(1).ok_or_else(|| {
        let path = dir.path().display();
        Error::invalid(format!("{path}: the store has no generation left"))
    })
}
