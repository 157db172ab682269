//! Everything that touches the disk: parts that are written once and synced, a swap by rename,
//! maps whose length was checked, advisory locks.
//!
//! A [`Directory`] is held by its descriptor, so it stays the same directory when it is renamed, and
//! nothing below it is reached through a symlink. No other module writes, syncs, renames or removes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::tap::{Call, MaybeTap, Op, Tap};
use crate::watch::Progress;

/// The only folder inside a store.
pub const INDEX_FOLDER: &str = "bm25";

const FILE_MODE: Mode = Mode::from_raw_mode(0o666);
const FOLDER_MODE: Mode = Mode::from_raw_mode(0o777);
const READ_CHUNK: usize = 1 << 20;

/// What was written: the length and BLAKE3 that a manifest records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    pub length: u64,
    pub blake3: [u8; 32],
}

/// Whether a lock was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    Held,
    Busy,
    /// The file system has no locks.
    Unsupported,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    Shared,
    Exclusive,
}

/// A name that a manifest may use: a plain file, or a plain file in `bm25/`.
pub fn is_part_name(name: &str) -> bool {
    let file = match name.split_once('/') {
        Some((INDEX_FOLDER, file)) => file,
        Some(_) => return false,
        None => name,
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !file.is_empty() && file.len() <= 200 && !file.starts_with('.') && file.bytes().all(plain)
}

/// An open directory.
#[derive(Debug, Clone)]
pub struct Directory {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    tap: MaybeTap,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Directory {
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io(path, e))?;
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            tap: MaybeTap::default(),
        })
    }

    /// The same directory; what alters it, its folders and their files passes `tap` from here on.
    pub fn with_tap(self, tap: Arc<dyn Tap>) -> Self {
        let tap = MaybeTap(Some(tap));
        Self { tap, ..self }
    }

    fn call<T>(
        &self,
        op: Op<'_>,
        make: impl FnOnce(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (at, path) = (self.fd.as_fd(), self.path.as_path());
        self.tap.call(Call { op, at, path }, || make(at))
    }

    /// Where it was when it was opened (for messages), or where [`Directory::moved_to`] says it went.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn path_of(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path.join(name.as_ref())
    }

    /// The same directory after a rename.
    pub fn moved_to(&self, path: impl AsRef<Path>) -> Self {
        Self {
            fd: Arc::clone(&self.fd),
            path: path.as_ref().to_owned(),
            tap: self.tap.clone(),
        }
    }

    /// A folder in this one; a symlink is refused.
    pub fn folder(&self, name: impl AsRef<OsStr>) -> Result<Self> {
        let (name, path) = (name.as_ref(), self.path_of(&name));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(self.fd.as_fd(), name, flags, Mode::empty()).map_err(
                |e| match e {
                    Errno::NOTDIR | Errno::LOOP => {
                        Error::corrupt(&path, "folder", "a folder", "a file, or a symlink")
                    }
                    e => Error::io(&path, e),
                },
            )?;
        Ok(Self {
            fd: Arc::new(fd),
            path,
            tap: self.tap.clone(),
        })
    }

    fn mkdir(&self, name: &OsStr) -> Result<(), Errno> {
        self.call(Op::MakeFolder(name), |fd| {
            rustix::fs::mkdirat(fd, name, FOLDER_MODE)
        })
    }

    /// A folder in this one, made if it is missing.
    pub fn make_folder(&self, name: &str) -> Result<Self> {
        match self.mkdir(name.as_ref()) {
            Ok(()) | Err(Errno::EXIST) => self.folder(name),
            Err(e) => Err(Error::io(self.path_of(name), e)),
        }
    }

    /// A new folder; one that exists already is an error.
    pub fn create_folder(&self, name: &OsStr) -> Result<Self> {
        self.mkdir(name)
            .map_err(|e| Error::io(self.path_of(name), e))?;
        self.folder(name)
    }

    /// Removes a folder of this directory with its files and those of its index; another folder in it is
    /// an error.
    pub fn remove_folder(&self, name: &OsStr) -> Result<()> {
        let folder = self.folder(name)?;
        let mut files = folder.list()?;
        if let Some(at) = files.iter().position(|n| n == INDEX_FOLDER) {
            files.remove(at);
            let index = folder.folder(INDEX_FOLDER)?;
            index.list()?.iter().try_for_each(|n| index.remove(n))?;
            folder.rmdir(INDEX_FOLDER.as_ref())?;
        }
        files.iter().try_for_each(|n| folder.remove(n))?;
        self.rmdir(name)
    }

    fn rmdir(&self, name: &OsStr) -> Result<()> {
        self.call(Op::RemoveFolder(name), |fd| {
            rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR)
        })
        .map_err(|e| Error::io(self.path_of(name), e))
    }

    /// The folder that holds `name`, and the name within it.
    fn place<'n>(&self, name: &'n str) -> Result<(Self, &'n str)> {
        match name.split_once('/') {
            Some((folder, file)) => Ok((self.folder(folder)?, file)),
            None => Ok((self.clone(), name)),
        }
    }

    /// A regular file for reading. Symlinks, FIFOs and devices are refused without waiting on them.
    pub fn open_file(&self, name: &str) -> Result<File> {
        let (folder, file) = self.place(name)?;
        let path = self.path_of(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(folder.fd.as_fd(), file, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::LOOP) => {
                return Err(Error::corrupt(path, "file", "a regular file", "a symlink"));
            }
            Err(Errno::NXIO) => {
                let found = "a socket, or a device without a driver";
                return Err(Error::corrupt(path, "file", "a regular file", found));
            }
            Err(e) => return Err(Error::io(path, e)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io(&path, e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::RegularFile {
            let found = format!("{kind:?}");
            return Err(Error::corrupt(path, "file", "a regular file", found));
        }
        Ok(File::from(fd))
    }

    /// As [`Directory::open_file`], when the manifest promises the file: absence or another length is corruption.
    pub fn open_part(&self, name: &str, length: u64) -> Result<File> {
        let path = self.path_of(name);
        let file = match self.open_file(name) {
            Err(e) if e.io_kind() == Some(std::io::ErrorKind::NotFound) => {
                return Err(Error::corrupt(
                    path,
                    "part",
                    format!("{length} bytes"),
                    "no such file",
                ));
            }
            other => other?,
        };
        let found = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        if found != length {
            return Err(Error::corrupt(
                path,
                "length",
                format!("{length} bytes"),
                format!("{found} bytes"),
            ));
        }
        Ok(file)
    }

    /// Maps a part after comparing its real length: a map that is longer than its file kills the process.
    pub fn map(&self, name: &str, length: u64) -> Result<Mapped> {
        let file = self.open_part(name, length)?;
        Mapped::new(&file, length, self.path_of(name))
    }

    /// A whole small file; `limit` bounds what is allocated.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        read_limited(&self.open_file(name)?, limit, &self.path_of(name))
    }

    /// Reads a whole file and hashes it, without mapping it.
    pub fn digest(&self, name: &str) -> Result<Digest> {
        self.digest_watched(name, &Progress::unseen())
    }

    pub(crate) fn digest_watched(&self, name: &str, progress: &Progress) -> Result<Digest> {
        let path = self.path_of(name);
        let mut file = self.open_file(name)?;
        let mut hasher = blake3::Hasher::new();
        let mut length = 0u64;
        pour(&mut file, &path, progress, &mut |bytes| {
            hasher.update(bytes);
            length += bytes.len() as u64;
            Ok(())
        })?;
        Ok(Digest {
            length,
            blake3: *hasher.finalize().as_bytes(),
        })
    }

    /// A file to read and write that may exist already; for the lock, whose content is only a message.
    pub fn open_or_create(&self, name: &str) -> Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        self.call(Op::OpenOrCreate(name.as_ref()), |fd| {
            rustix::fs::openat(fd, name, flags, FILE_MODE)
        })
        .map(File::from)
        .map_err(|e| Error::io(self.path_of(name), e))
    }

    /// Puts other content into a file that is open; neither at once nor durably.
    pub fn overwrite(&self, file: &File, name: &str, bytes: &[u8]) -> Result<()> {
        let (at, path) = (file.as_fd(), self.path_of(name));
        let op = Op::SetLength(0);
        let call = Call {
            op,
            at,
            path: &path,
        };
        self.tap
            .call(call, || rustix::fs::ftruncate(at, 0))
            .map_err(|e| Error::io(&path, e))?;
        write_all(&self.tap, at, &path, 0, bytes)
    }

    /// A new part, hashed as it is written; one that exists already is an error.
    pub fn create_part(&self, name: &str) -> Result<PartWriter> {
        let (folder, file) = self.place(name)?;
        let path = self.path_of(name);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = folder
            .call(Op::Create(file.as_ref()), |fd| {
                rustix::fs::openat(fd, file, flags, FILE_MODE)
            })
            .map_err(|e| Error::io(&path, e))?;
        Ok(PartWriter {
            file: File::from(fd),
            path,
            hasher: blake3::Hasher::new(),
            length: 0,
            tap: self.tap.clone(),
        })
    }

    /// A new part in one piece, synced.
    pub fn write_part(&self, name: &str, bytes: &[u8]) -> Result<Digest> {
        let mut part = self.create_part(name)?;
        part.write(bytes)?;
        part.finish()
    }

    /// Swaps a small file by rename. When it returns, either content survives a power loss whole;
    /// the new one surely does after [`Directory::sync`].
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let beside = format!("{name}.new");
        self.remove(&beside)?;
        self.write_part(&beside, bytes)?;
        let (folder, new) = self.place(&beside)?;
        let (_, old) = self.place(name)?;
        folder
            .call(Op::Rename(new.as_ref(), old.as_ref()), |fd| {
                rustix::fs::renameat(fd, new, fd, old)
            })
            .map_err(|e| Error::io(self.path_of(name), e))
    }

    /// Removes a file; a missing one is fine.
    pub fn remove(&self, name: &str) -> Result<()> {
        let (folder, file) = self.place(name)?;
        let removed = folder.call(Op::Remove(file.as_ref()), |fd| {
            rustix::fs::unlinkat(fd, file, AtFlags::empty())
        });
        match removed {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io(self.path_of(name), e)),
        }
    }

    /// Makes the entries of the directory durable.
    pub fn sync(&self) -> Result<()> {
        rustix::io::retry_on_intr(|| self.call(Op::SyncFolder, |fd| rustix::fs::fsync(fd)))
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Names of all entries that are UTF-8 (none of ours is anything else).
    pub fn list(&self) -> Result<Vec<String>> {
        let entries =
            rustix::fs::Dir::read_from(self.fd.as_fd()).map_err(|e| Error::io(&self.path, e))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::io(&self.path, e))?;
            match entry.file_name().to_str() {
                Ok(".") | Ok("..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Whether `name` is still the file that `file` has open.
    pub fn still_names(&self, name: impl AsRef<OsStr>, file: impl AsFd) -> Result<bool> {
        let name = name.as_ref();
        let held = rustix::fs::fstat(file).map_err(|e| Error::io(self.path_of(name), e))?;
        match rustix::fs::statat(self.fd.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) => Ok(named.st_ino == held.st_ino && named.st_dev == held.st_dev),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(Error::io(self.path_of(name), e)),
        }
    }

    /// Whether it was removed since it was opened, whatever has its name now.
    pub fn is_removed(&self) -> bool {
        rustix::fs::fstat(self.fd.as_fd()).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// A lock on the directory itself.
    pub fn lock(&self, mode: LockMode) -> Result<Lock> {
        lock(&self.fd, mode, &self.path)
    }

    /// Whether anything has this name.
    pub fn has(&self, name: &OsStr) -> Result<bool> {
        match rustix::fs::statat(self.fd.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(Error::io(self.path_of(name), e)),
        }
    }

    /// Renames the folder `from` to `to`, both in this directory, unless `to` exists.
    pub fn rename_new(&self, from: &OsStr, to: &OsStr) -> Result<()> {
        let fail = |e: Errno| Error::io(self.path_of(to), e);
        let refusing = self.call(Op::Rename(from, to), |fd| {
            rustix::fs::renameat_with(fd, from, fd, to, RenameFlags::NOREPLACE)
        });
        match refusing {
            Ok(()) => Ok(()),
            // Not every file system can refuse by itself. A plain rename of a folder replaces at most
            // an empty folder, so nobody's data is lost between the look and the rename.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match self.has(to)? {
                true => Err(fail(Errno::EXIST)),
                false => self
                    .call(Op::Rename(from, to), |fd| {
                        rustix::fs::renameat(fd, from, fd, to)
                    })
                    .map_err(fail),
            },
            Err(e) => Err(fail(e)),
        }
    }

    /// Whether the directory lies on a file system that other machines may share.
    pub fn is_shared_between_machines(&self) -> bool {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            // statfs(2): nfs, smb, cifs, smb2, ncp, afs, coda, ceph, lustre, gpfs, 9p, fuse
            const NETWORK: [u32; 12] = [
                0x6969,
                0x517b,
                0xff53_4d42,
                0xfe53_4d42,
                0x564c,
                0x5346_414f,
                0x7375_7245,
                0x00c3_6400,
                0x0bd0_0bd0,
                0x4750_4653,
                0x0102_1997,
                0x6573_5546,
            ];
            match rustix::fs::fstatfs(self.fd.as_fd()) {
                Ok(stat) => NETWORK.contains(&(stat.f_type as u32)),
                Err(_) => true,
            }
        }
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        {
            false
        }
    }
}

/// Hands on everything that `source` (at `path`, for messages) has, a chunk at a time; counts bytes.
pub(crate) fn pour(
    source: &mut dyn Read,
    path: &Path,
    progress: &Progress,
    to: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; READ_CHUNK];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to(buffer.get(..n).unwrap_or_default())?;
                progress.add(n as u64)?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => progress.tell(0)?,
            Err(e) => return Err(Error::io(path, e)),
        }
    }
}

/// Reads all of `file`, which may be `limit` bytes long at most.
pub fn read_limited(file: &File, limit: u64, path: &Path) -> Result<Vec<u8>> {
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let too_long = |n: u64| {
        Error::corrupt(
            path,
            "length",
            format!("at most {limit} bytes"),
            format!("{n} bytes"),
        )
    };
    if length > limit {
        return Err(too_long(length));
    }
    // One byte more, so that the end is found without growing.
    let mut bytes = Vec::with_capacity(length as usize + 1);
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(too_long(bytes.len() as u64));
    }
    Ok(bytes)
}

/// A lock that lasts as long as `file` (and its copies) stay open; never waits.
pub fn lock(file: impl AsFd, mode: LockMode, path: &Path) -> Result<Lock> {
    let operation = match mode {
        LockMode::Shared => FlockOperation::NonBlockingLockShared,
        LockMode::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        return match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Lock::Held),
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) => Ok(Lock::Busy),
            Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                Ok(Lock::Unsupported)
            }
            Err(e) => Err(Error::io(path, e)),
        };
    }
}

/// Gives a lock back, also where a forked child has the file open.
pub fn unlock(file: impl AsFd) {
    // A lock that cannot be given back goes with the process.
    let _ = rustix::fs::flock(file, FlockOperation::Unlock);
}

/// Writes everything, however little the system takes at once.
fn write_all(
    tap: &MaybeTap,
    at: BorrowedFd<'_>,
    path: &Path,
    mut offset: u64,
    mut bytes: &[u8],
) -> Result<()> {
    while !bytes.is_empty() {
        match tap.write(at, path, offset, bytes) {
            Ok(0) => return Err(Error::io(path, std::io::ErrorKind::WriteZero)),
            Ok(n) => {
                offset += n as u64;
                bytes = bytes.get(n..).unwrap_or_default();
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::io(path, e)),
        }
    }
    Ok(())
}

impl AsFd for PartWriter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A part in the making.
#[derive(Debug)]
pub struct PartWriter {
    file: File,
    path: PathBuf,
    hasher: blake3::Hasher,
    length: u64,
    tap: MaybeTap,
}

impl PartWriter {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let at = self.file.as_fd();
        write_all(&self.tap, at, &self.path, self.length, bytes)?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// A lock on the file.
    pub fn lock(&self, mode: LockMode) -> Result<Lock> {
        lock(&self.file, mode, &self.path)
    }

    /// The file once more, which keeps its lock after the writer is done.
    pub fn duplicate(&self) -> Result<File> {
        let file = self.file.try_clone();
        file.map_err(|e| Error::io(&self.path, e))
    }

    /// Syncs it; from here on the file never changes.
    pub fn finish(self) -> Result<Digest> {
        let (op, at, path) = (Op::SyncFile, self.file.as_fd(), self.path.as_path());
        // The standard library knows what makes a file durable on each system.
        let sync = || {
            let failed = |e| Errno::from_io_error(&e).unwrap_or(Errno::IO);
            self.file.sync_all().map_err(failed)
        };
        rustix::io::retry_on_intr(|| self.tap.call(Call { op, at, path }, sync))
            .map_err(|e| Error::io(path, e))?;
        Ok(Digest {
            length: self.length,
            blake3: *self.hasher.finalize().as_bytes(),
        })
    }
}

/// A mapped part. Copies share the map, and each keeps it alive.
#[derive(Debug, Clone)]
pub struct Mapped {
    bytes: Bytes,
    path: Arc<Path>,
}

#[derive(Debug, Clone)]
enum Bytes {
    Map(Arc<memmap2::Mmap>),
    /// An empty file, which cannot be mapped, or what a fuzz target gives.
    Memory(Arc<[u8]>),
}

impl Mapped {
    /// `length` must be the real length of `file`: callers compare it first.
    fn new(file: &File, length: u64, path: PathBuf) -> Result<Self> {
        let size = usize::try_from(length)
            .map_err(|_| Error::corrupt(&path, "length", "a size that can be mapped", length))?;
        let bytes = match size {
            0 => Bytes::Memory(Arc::new([])),
            _ => Bytes::Map(Arc::new(
                map_file(file, size).map_err(|e| Error::io(&path, e))?,
            )),
        };
        Ok(Self {
            bytes,
            path: path.into(),
        })
    }

    /// Bytes in memory, as if a file had them.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            bytes: Bytes::Memory(bytes.into()),
            path: Path::new("bytes in memory").into(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[allow(unsafe_code)]
fn map_file(file: &File, size: usize) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the map is read-only and `size` is the length that this descriptor reported. Parts are
    // immutable by contract: created once under a fresh name, synced, never written again and only
    // unlinked, which leaves maps valid. What another process writes into a part by force is outside
    // the contract, as is truncating it; every reader checks the bytes it takes, so altered bytes give
    // a wrong value or an error and never an access outside the map.
    unsafe { memmap2::MmapOptions::new().len(size).map(file) }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Map(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}
