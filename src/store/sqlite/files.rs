//! Detects that the files a gateway holds open no longer have their names. A file that was deleted, replaced or
//! moved still accepts writes, which are lost when it is closed.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Interval between checks while nothing is committed.
const LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// File names and the files they referred to.
#[derive(Debug)]
pub struct HeldFiles {
    held: Vec<Held>,
    /// Write-ahead log of a database.
    log: Option<PathBuf>,
}

#[derive(Debug)]
struct Held {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl HeldFiles {
    /// Remembers the files that have these names now; missing ones are left out.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> HeldFiles {
        let held = |path: PathBuf| {
            let id = id(&path).ok()?;
            Some(Held { path, id })
        };
        HeldFiles {
            held: paths.into_iter().filter_map(held).collect(),
            log: None,
        }
    }

    /// Remembers a database in use, under the given name and under its name without links, with its write-ahead
    /// log, the log's index and its directory.
    pub fn of_database(path: &Path) -> HeldFiles {
        let given = path.to_owned();
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (log, index) = (sibling(&path, "-wal"), sibling(&path, "-shm"));
        let directory = path.parent().map(Path::to_owned);
        let mut held = HeldFiles::new(
            [given, path, log.clone(), index]
                .into_iter()
                .chain(directory),
        );
        held.log = Some(log);
        held
    }

    /// Checks that every name still refers to the same file.
    ///
    /// # Errors
    /// The reason in one line.
    pub fn check(&self) -> Result<(), String> {
        for Held { path, id: known } in &self.held {
            let found = id(path);
            let path = path.display();
            match found {
                Ok(found) if found == *known => {}
                Ok(_) => {
                    return Err(format!(
                        "{path} was replaced {IN_USE}; restore the original file"
                    ));
                }
                Err(error) if is_gone(&error) => {
                    return Err(format!(
                        "{path} was deleted or moved {IN_USE}; move it back"
                    ));
                }
                // The state of this file is unknown.
                Err(_) => {}
            }
        }
        match &self.log {
            Some(log) if is_emptied(log) => Err(format!(
                "{} was emptied {IN_USE}; only SQLite may change it",
                log.display()
            )),
            _ => Ok(()),
        }
    }

    /// Logs a warning once if a file is no longer in place; only the next start needs these files.
    pub async fn watch_only<T>(&self) -> T {
        let reason = self.watch().await;
        tracing::warn!(%reason, "database file missing or replaced; the next start needs it");
        std::future::pending().await
    }

    /// Waits until a file is no longer in place; returns the reason.
    pub async fn watch(&self) -> String {
        loop {
            if let Err(reason) = self.check() {
                return reason;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// Last known content of the database file's header. Only checkpoints write the file, and its change counter
/// never decreases. If it does, the file was overwritten by `cp` or a shell, which keep device and inode. A checkpoint
/// shortens the file to the pages that the header counts, after rows were deleted; the change counter may stay the same.
#[derive(Debug, Default)]
pub(super) struct Header {
    changes: u32,
    len_bytes: u64,
    /// Size of the database according to the header.
    counted_bytes: u64,
}

impl Header {
    /// Checks that only SQLite has written to the file at `path` since the last call. `file` stays open as long
    /// as SQLite has it open.
    ///
    /// # Errors
    /// The reason in one line.
    pub(super) fn check(&mut self, file: &File, path: &Path) -> Result<(), String> {
        let Ok(found) = Header::read(file) else {
            return Ok(());
        };
        let went_back = |now: &Header| {
            now.changes < self.changes
                || now.changes == self.changes
                    && now.len_bytes < self.len_bytes
                    && now.len_bytes < now.counted_bytes
        };
        // Read twice, because a page may be half written.
        if went_back(&found) && Header::read(file).is_ok_and(|again| went_back(&again)) {
            let path = path.display();
            return Err(format!(
                "{path} was overwritten {IN_USE}; delete {path}-wal and {path}-shm and restore a complete database"
            ));
        }
        *self = found;
        Ok(())
    }

    fn read(file: &File) -> io::Result<Header> {
        let mut start = [0; HEADER_BYTES];
        let mut len = 0;
        while len < HEADER_BYTES {
            match file.read_at(&mut start[len..], len as u64)? {
                0 => break,
                count => len += count,
            }
        }
        let number = |at: usize| {
            let bytes = [start[at], start[at + 1], start[at + 2], start[at + 3]];
            u32::from_be_bytes(bytes)
        };
        // 1 stands for 65,536, which does not fit.
        let page_bytes = match u16::from_be_bytes([start[16], start[17]]) {
            1 => 1 << 16,
            bytes => u64::from(bytes),
        };
        Ok(Header {
            changes: number(24),
            len_bytes: file.metadata()?.len(),
            counted_bytes: page_bytes * u64::from(number(28)),
        })
    }
}

/// Returns whether a write-ahead log was overwritten: it has content that does not start with SQLite's header.
fn is_emptied(log: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(log).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && !LOG_MAGIC.contains(&u32::from_be_bytes(magic))
}

/// Length of the database header up to the number of pages, in bytes.
const HEADER_BYTES: usize = 32;
/// A write-ahead log starts with one of these.
const LOG_MAGIC: [u32; 2] = [0x377f_0682, 0x377f_0683];
/// Common part of the messages.
const IN_USE: &str = "while the gateway was using it";

fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Returns whether no process can be writing to a database: its medium is read-only, or its directory is
/// read-only for this user and no gateway uses it.
pub(super) fn is_read_only(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mounted = rustix::fs::statvfs(&path).map(|found| found.f_flag);
    if mounted.is_ok_and(|flags| flags.contains(rustix::fs::StatVfsMountFlags::RDONLY)) {
        return true;
    }
    let is_writable = rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok();
    // Both files exist while a gateway runs.
    !is_writable && !sibling(&path, "-shm").exists() && !sibling(&path, "-wal").exists()
}

/// Returns whether a database has a write-ahead log that is not empty.
pub(super) fn has_log(path: &Path) -> bool {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    fs::metadata(sibling(&path, "-wal")).is_ok_and(|log| log.len() > 0)
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(suffix);
    path.into()
}

/// Locks the database file, under any name. SQLite's locks are of another kind and do not conflict with this
/// one, but all of them are released when any descriptor of the file is closed. So open this file before SQLite
/// does, and close it after SQLite has closed it.
///
/// Returns `None` on a network file system, where the two kinds of locks conflict.
pub(super) fn lock(path: &Path) -> Result<Option<File>, TryLockError> {
    let file = File::open(path).map_err(TryLockError::Error)?;
    if is_remote(&file) {
        return Ok(None);
    }
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        // The file system does not support such locks.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns whether a gateway holds the lock of a database.
pub fn is_in_use(path: &Path) -> bool {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let Ok(lock) = File::open(sibling(&path, ".lock")) else {
        return false;
    };
    matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Returns what is wrong with the file system of a directory for a database, and what to do; `None` if nothing is known.
#[cfg(target_os = "linux")]
pub fn file_system_fault(dir: &Path) -> Option<&'static str> {
    const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let dir = File::open(dir).ok()?;
    if is_remote(&dir) {
        return Some("a network file system, which may ignore locks and syncs; use a local disk");
    }
    let kind = rustix::fs::fstatfs(&dir).ok()?.f_type as u64 & 0xffff_ffff;
    IN_MEMORY
        .contains(&kind)
        .then_some("a file system in memory: all frames are lost at a restart; use a disk")
}

#[cfg(not(target_os = "linux"))]
pub fn file_system_fault(_: &Path) -> Option<&'static str> {
    None
}

/// Returns whether a file is on NFS or SMB.
#[cfg(target_os = "linux")]
fn is_remote(file: &File) -> bool {
    const KINDS: [u64; 4] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42];
    let kind = rustix::fs::fstatfs(file).map(|found| found.f_type as u64 & 0xffff_ffff);
    kind.is_ok_and(|kind| KINDS.contains(&kind))
}

#[cfg(not(target_os = "linux"))]
fn is_remote(_: &File) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file of `len` pages whose header has a change counter and counts `pages`.
    fn write(path: &Path, changes: u32, pages: u32, len: usize) {
        let mut bytes = vec![0; len * 4096];
        bytes[16..18].copy_from_slice(&4096u16.to_be_bytes());
        bytes[24..28].copy_from_slice(&changes.to_be_bytes());
        bytes[28..32].copy_from_slice(&pages.to_be_bytes());
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_file_may_become_shorter_but_not_older_or_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        write(&path, 7, 10, 10);
        let file = File::open(&path).unwrap();
        let mut header = Header::default();
        header.check(&file, &path).unwrap();
        // A checkpoint writes the header first, and shortens the file at its end.
        write(&path, 7, 6, 10);
        header.check(&file, &path).unwrap();
        write(&path, 7, 6, 6);
        header.check(&file, &path).unwrap();
        write(&path, 7, 6, 5);
        assert!(header.check(&file, &path).is_err());
        write(&path, 6, 6, 6);
        assert!(header.check(&file, &path).is_err());
    }
}
