//! Shipping: one generation as a new directory (`snapshot`), as one file (`pack`) and back (`unpack`). Every
//! byte is hashed on its way and compared with the manifest, and a copy has the digest of its source.
//!
//! A packed store is a tar archive of plain files without owner and time, so that one generation always gives the
//! same bytes: `CURRENT` first, then its manifest, then the parts in the manifest's order.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, INDEX_FOLDER, Lock, LockMode, PartWriter, pour};
use crate::generation::Generation;
use crate::lock::{WriterLock, take_lock};
use crate::manifest::{CURRENT, CURRENT_LIMIT, Current, Hash, MANIFEST_LIMIT, Manifest, Part};
use crate::new_folder::{NewFolder, at_work, fresh_ending, remove_abandoned};
use crate::watch::{Progress, Unit, Watch};

/// How the name of an archive begins while it is written.
const PACKING: &str = ".polyprag-pack-";
/// Between two looks into a pipe that is empty.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Copies the generation to a new store, `name` in `parent`.
pub fn snapshot(
    generation: &Generation,
    parent: Directory,
    name: &OsStr,
    watch: &Arc<dyn Watch>,
) -> Result<()> {
    let progress = Progress::begin(watch, Unit::Bytes, generation.manifest().bytes())?;
    let mut copy = NewCopy::begin(parent, name)?;
    for part in &generation.manifest().parts {
        copy_part(&generation.dir, part, copy.folder.dir(), &progress)?;
    }
    copy.finish(
        generation.current(),
        &manifest_bytes(generation)?,
        &progress,
    )
}

/// The manifest of a generation as its file has it, which may have been altered since the generation was opened.
fn manifest_bytes(generation: &Generation) -> Result<Vec<u8>> {
    let (dir, current) = (&generation.dir, generation.current());
    let json = dir.read(&current.manifest, MANIFEST_LIMIT)?;
    current.check(&json, &dir.path_of(&current.manifest))?;
    Ok(json)
}

/// Copies a part under its name, and compares it with what its manifest says.
pub fn copy_part(from: &Directory, part: &Part, to: &Directory, progress: &Progress) -> Result<()> {
    let file = from.open_part(&part.file, part.length)?;
    let path = from.path_of(&part.file);
    receive(to, part, &mut (&file), &path, progress)
}

/// Writes a part from what `source` gives, which must be all of it.
fn receive(
    to: &Directory,
    part: &Part,
    source: &mut dyn Read,
    path: &Path,
    progress: &Progress,
) -> Result<()> {
    if part.file.starts_with(INDEX_FOLDER) {
        to.make_folder(INDEX_FOLDER)?;
    }
    let mut written = to.create_part(&part.file)?;
    pour(source, path, progress, &mut |bytes| written.write(bytes))?;
    let digest = written.finish()?;
    compare(part, digest, path)
}

fn compare(part: &Part, digest: Digest, path: &Path) -> Result<()> {
    let (expected, found) = (
        format!("{} bytes with BLAKE3 {}", part.length, part.blake3),
        format!("{} with {}", digest.length, Hash(digest.blake3)),
    );
    match digest.length == part.length && digest.blake3 == part.blake3.0 {
        true => Ok(()),
        false => Err(Error::corrupt(path, "content", expected, found)),
    }
}

/// A new store that is filled with parts which exist already.
pub struct NewCopy {
    pub folder: NewFolder,
    _lock: WriterLock,
}

impl NewCopy {
    pub fn begin(parent: Directory, name: &OsStr) -> Result<Self> {
        let folder = NewFolder::beside(parent, name)?;
        let lock = take_lock(folder.dir())?;
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// The parts are all there and synced: gives the store its manifest and its name.
    pub fn finish(
        &mut self,
        current: &Current,
        manifest: &[u8],
        progress: &Progress,
    ) -> Result<()> {
        let dir = self.folder.dir();
        dir.write_part(&current.manifest, manifest)?;
        if dir.has(OsStr::new(INDEX_FOLDER))? {
            dir.folder(INDEX_FOLDER)?.sync()?;
        }
        dir.put_in_force(current)?;
        progress.end()?;
        self.folder.publish()
    }
}

/// Writes the generation into one new file, `name` in `parent`.
pub fn pack(
    generation: &Generation,
    parent: &Directory,
    name: &OsStr,
    watch: &Arc<dyn Watch>,
) -> Result<()> {
    if parent.has(name)? {
        let source = std::io::Error::from(Errno::EXIST);
        return Err(Error::io(parent.path_of(name), source));
    }
    let progress = Progress::begin(watch, Unit::Bytes, generation.manifest().bytes())?;
    remove_abandoned(parent, PACKING);
    let (beside, part) = part_beside(parent)?;
    // Others see by the lock that somebody is at work on it.
    let _lock = part.duplicate()?;
    let packed = pack_into(generation, part, &progress);
    let written = progress.blame(packed).and_then(|part| {
        part.finish()?;
        progress.end()?;
        parent.rename_new(OsStr::new(&beside), name)?;
        parent.sync()
    });
    if written.is_err() {
        // The failure itself is what the caller must hear of.
        let _ = parent.remove(&beside);
    }
    written
}

/// The file that becomes an archive, locked, and its name.
fn part_beside(parent: &Directory) -> Result<(String, PartWriter)> {
    at_work(|| {
        let name = format!("{PACKING}{}", fresh_ending());
        let part = parent.create_part(&name)?;
        let held = part.lock(LockMode::Exclusive)? != Lock::Busy;
        Ok((held && parent.still_names(&name, &part)?).then_some((name, part)))
    })
}

fn pack_into(generation: &Generation, part: PartWriter, progress: &Progress) -> Result<PartWriter> {
    let mut archive = Archive {
        tar: tar::Builder::new(Sink {
            part,
            failure: None,
        }),
    };
    let current = generation.current();
    archive.add_bytes(CURRENT, current.to_text().as_bytes())?;
    archive.add_bytes(&current.manifest, &manifest_bytes(generation)?)?;
    for part in &generation.manifest().parts {
        let path = generation.dir.path_of(&part.file);
        let file = generation.dir.open_part(&part.file, part.length)?;
        let mut source = Hashing {
            file,
            hasher: blake3::Hasher::new(),
            length: 0,
            progress,
        };
        archive.add(&part.file, part.length, &mut source, &path)?;
        let digest = Digest {
            length: source.length,
            blake3: *source.hasher.finalize().as_bytes(),
        };
        compare(part, digest, &path)?;
    }
    archive.finish()
}

struct Archive {
    tar: tar::Builder<Sink>,
}

impl Archive {
    fn add_bytes(&mut self, name: &str, mut bytes: &[u8]) -> Result<()> {
        self.add(name, bytes.len() as u64, &mut bytes, Path::new(name))
    }

    fn add(&mut self, name: &str, length: u64, source: &mut dyn Read, path: &Path) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(length);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        let added = self.tar.append_data(&mut header, name, source);
        added.map_err(|e| self.cause(path, e))
    }

    /// What failed below, if it is that, says more than what comes of it above.
    fn cause(&mut self, path: &Path, above: std::io::Error) -> Error {
        let below = self.tar.get_mut().failure.take();
        below.unwrap_or_else(|| Error::io(path, above))
    }

    fn finish(mut self) -> Result<PartWriter> {
        let path = Path::new("archive");
        if let Err(e) = self.tar.finish() {
            return Err(self.cause(path, e));
        }
        let sink = self.tar.into_inner().map_err(|e| Error::io(path, e))?;
        Ok(sink.part)
    }
}

/// A part as the archive writes it.
struct Sink {
    part: PartWriter,
    failure: Option<Error>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.part.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(e) => {
                let kind = e.io_kind().unwrap_or(ErrorKind::Other);
                self.failure = Some(e);
                Err(kind.into())
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A file that is hashed as it is read.
struct Hashing<'h> {
    file: File,
    hasher: blake3::Hasher,
    length: u64,
    progress: &'h Progress,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        self.length += n as u64;
        self.progress.add(n as u64).map_err(std::io::Error::other)?;
        Ok(n)
    }
}

/// Makes a store, `name` in `parent`, of a file that [`pack`] wrote.
pub fn unpack(file: &Path, parent: Directory, name: &OsStr, watch: &Arc<dyn Watch>) -> Result<()> {
    let progress = Progress::begin(watch, Unit::Bytes, 0)?;
    let source = Waiting::open(file, &progress)?;
    let begin = |manifest: &Manifest| {
        progress.set_total(manifest.bytes())?;
        NewCopy::begin(parent, name)
    };
    let read = read_packed(source, file, begin, |copy, part, entry| {
        receive(copy.folder.dir(), part, entry, file, &progress)
    });
    let (mut copy, current, manifest) = progress.blame(read)?;
    copy.finish(&current, &manifest, &progress)
}

/// A file that may be a pipe: while its next bytes are waited for, the watch is told.
struct Waiting<'w> {
    file: File,
    /// A pipe into which nobody has written yet: that it is empty is not its end.
    is_new_pipe: bool,
    progress: &'w Progress,
}

impl<'w> Waiting<'w> {
    fn open(path: &Path, progress: &'w Progress) -> Result<Self> {
        // To open a pipe would wait for its other end. And a read that blocks would end for a signal that comes in
        // it, and not for one that came just before.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io(path, e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io(path, e))?;
        Ok(Self {
            file: fd.into(),
            is_new_pipe: FileType::from_raw_mode(stat.st_mode) == FileType::Fifo,
            progress,
        })
    }
}

impl Read for Waiting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut pause = Duration::from_micros(100);
        loop {
            match self.file.read(buffer) {
                Ok(n) if n > 0 || !self.is_new_pipe => {
                    self.is_new_pipe = false;
                    return Ok(n);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                _ => {
                    self.progress.tell(0).map_err(std::io::Error::other)?;
                    std::thread::sleep(pause);
                    pause = LONGEST_PAUSE.min(2 * pause);
                }
            }
        }
    }
}

/// Reads a packed store from front to back. `begin` is called when its manifest is known to be one, and `take`
/// for each part, all of whose bytes it has to read and to compare. Returns what `begin` gave, and the manifest.
pub fn read_packed<C>(
    source: impl Read,
    file: &Path,
    begin: impl FnOnce(&Manifest) -> Result<C>,
    mut take: impl FnMut(&mut C, &Part, &mut dyn Read) -> Result<()>,
) -> Result<(C, Current, Vec<u8>)> {
    let mut archive = tar::Archive::new(source);
    let broken = |e: std::io::Error| match e.raw_os_error() {
        Some(_) => Error::io(file, e),
        None => malformed(file, "a tar archive", e),
    };
    let mut entries = archive.entries().map_err(broken)?;
    let mut next = |expected: &str| match entries.next() {
        Some(entry) => entry.map_err(broken),
        None => Err(malformed(file, expected, "the end of the archive")),
    };

    let mut entry = next("a file CURRENT")?;
    let current = small(&mut entry, CURRENT, CURRENT_LIMIT, file)?;
    let current = Current::parse(&current, file)?;
    let mut entry = next("a manifest")?;
    let json = small(&mut entry, &current.manifest, MANIFEST_LIMIT, file)?;
    current.check(&json, file)?;
    let manifest = Manifest::parse(&json, &file.with_file_name(&current.manifest))?;
    let mut begun = begin(&manifest)?;
    for part in &manifest.parts {
        let mut entry = next(&part.file)?;
        is_named(&entry, &part.file, file)?;
        if entry.size() != part.length {
            let expected = format!("{} bytes of {}", part.length, part.file);
            return Err(malformed(file, expected, entry.size()));
        }
        take(&mut begun, part, &mut entry)?;
    }
    if entries.next().is_some() {
        return Err(malformed(file, "the end of the archive", "another file"));
    }
    Ok((begun, current, json))
}

fn malformed(
    file: &Path,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> Error {
    Error::corrupt(file, "packed store", expected, found)
}

fn is_named(entry: &tar::Entry<'_, impl Read>, name: &str, file: &Path) -> Result<()> {
    let found = entry.path_bytes();
    if found.as_ref() != name.as_bytes() || !entry.header().entry_type().is_file() {
        let found = String::from_utf8_lossy(&found).into_owned();
        return Err(malformed(
            file,
            format!("a plain file {name}"),
            format!("{found:?}"),
        ));
    }
    Ok(())
}

/// A whole small entry; `limit` bounds what is allocated.
fn small(
    entry: &mut tar::Entry<'_, impl Read>,
    name: &str,
    limit: u64,
    file: &Path,
) -> Result<Vec<u8>> {
    is_named(entry, name, file)?;
    if entry.size() > limit {
        let expected = format!("{name} of at most {limit} bytes");
        return Err(malformed(file, expected, entry.size()));
    }
    let mut bytes = Vec::new();
    pour(entry, file, &Progress::unseen(), &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}
