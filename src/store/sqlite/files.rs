//! Whether the files that a gateway holds open are still the ones that have their names: a file that was
//! deleted, replaced or moved takes writes all the same, and they are gone when it is closed.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// From one look to the next while nothing is committed.
const LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// Files by their names, and which ones they were.
#[derive(Debug)]
pub struct HeldFiles(Vec<Held>);

#[derive(Debug)]
struct Held {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl HeldFiles {
    /// Remembers which files have these names now; such as are not there are left out.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> HeldFiles {
        let held = |path: PathBuf| {
            let id = id(&path).ok()?;
            Some(Held { path, id })
        };
        HeldFiles(paths.into_iter().filter_map(held).collect())
    }

    /// Remembers a database in use, with its write-ahead log and its directory.
    pub fn of_database(path: &Path) -> HeldFiles {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let log = beside(&path, "-wal");
        let directory = path.parent().map(Path::to_owned);
        HeldFiles::new([path, log].into_iter().chain(directory))
    }

    /// Makes sure that all of them are where they were.
    ///
    /// # Errors
    /// The reason in one line.
    pub fn check(&self) -> Result<(), String> {
        for Held { path, id: known } in &self.0 {
            let found = id(path);
            let path = path.display();
            match found {
                Ok(found) if found == *known => {}
                Ok(_) => return Err(format!("{path} was replaced by another file {ADVICE}")),
                Err(error) if is_gone(&error) => {
                    return Err(format!("{path} was deleted or moved {ADVICE}"));
                }
                // Of this one nothing is known.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Warns once when one of them is not where it was; nothing but the next start needs them.
    pub async fn watch_only<T>(&self) -> T {
        let reason = self.watch().await;
        tracing::warn!(%reason, "a file is missing that the next start needs");
        std::future::pending().await
    }

    /// Waits until one of them is not where it was; gives the reason.
    pub async fn watch(&self) -> String {
        loop {
            if let Err(reason) = self.check() {
                return reason;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// What follows where something is amiss.
const ADVICE: &str = "while the gateway was using it; put it back";

fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Whether nothing can be writing to a database: its medium is read-only, or its directory is to this user and no
/// gateway has it.
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
    // A gateway that runs has both files beside it.
    !is_writable && !beside(&path, "-shm").exists() && !beside(&path, "-wal").exists()
}

/// Whether a database has a write-ahead log with something in it.
pub(super) fn has_log(path: &Path) -> bool {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    fs::metadata(beside(&path, "-wal")).is_ok_and(|log| log.len() > 0)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(suffix);
    path.into()
}

/// Locks a database's own file, whatever name it was opened by. SQLite's locks are of another kind, and do
/// not meet this one; but they all go when any descriptor of the file is closed, so this one is to be opened
/// before SQLite opens the file, and closed after SQLite has closed it.
///
/// `None` where the file is on a server: there the two kinds of locks are one.
pub(super) fn lock(path: &Path) -> Result<Option<File>, TryLockError> {
    let file = File::open(path).map_err(TryLockError::Error)?;
    if is_remote(&file) {
        return Ok(None);
    }
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        // A file system without such locks.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a file is on NFS or SMB.
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
