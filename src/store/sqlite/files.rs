//! Whether the files that a gateway holds open are still the ones that have their names: a file that was
//! deleted, replaced or moved takes writes all the same, and they are gone when it is closed.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// From one look to the next while nothing is committed.
const LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// Files by their names, and which ones they were.
#[derive(Debug)]
pub struct HeldFiles {
    held: Vec<Held>,
    /// The write-ahead log of a database.
    log: Option<PathBuf>,
}

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
        HeldFiles {
            held: paths.into_iter().filter_map(held).collect(),
            log: None,
        }
    }

    /// Remembers a database in use, by the name that was given and without links, with its write-ahead log, the
    /// log's index and its directory.
    pub fn of_database(path: &Path) -> HeldFiles {
        let given = path.to_owned();
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (log, index) = (beside(&path, "-wal"), beside(&path, "-shm"));
        let directory = path.parent().map(Path::to_owned);
        let mut held = HeldFiles::new(
            [given, path, log.clone(), index]
                .into_iter()
                .chain(directory),
        );
        held.log = Some(log);
        held
    }

    /// Makes sure that all of them are where they were.
    ///
    /// # Errors
    /// The reason in one line.
    pub fn check(&self) -> Result<(), String> {
        for Held { path, id: known } in &self.held {
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
        match &self.log {
            Some(log) if is_emptied(log) => Err(format!(
                "{} was emptied while the gateway was using it; leave it to SQLite",
                log.display()
            )),
            _ => Ok(()),
        }
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

/// What was read last of a database's own first bytes. Only checkpoints write the file, and their counter in it
/// does not go back: where it does, the file was written over, by `cp` or a shell, and keeps device and inode.
#[derive(Debug, Default)]
pub(super) struct Header {
    changes: u32,
    len_bytes: u64,
}

impl Header {
    /// Makes sure that nothing but SQLite has written to the file at `path` since the last call. `file` is open as
    /// long as SQLite has it open.
    ///
    /// # Errors
    /// The reason in one line.
    pub(super) fn check(&mut self, file: &File, path: &Path) -> Result<(), String> {
        let Ok(found) = Header::read(file) else {
            return Ok(());
        };
        let went_back = |now: &Header| {
            now.changes < self.changes
                || now.changes == self.changes && now.len_bytes < self.len_bytes
        };
        // Read twice: a page may be half written.
        if went_back(&found) && Header::read(file).is_ok_and(|again| went_back(&again)) {
            let path = path.display();
            return Err(format!(
                "{path} was written over while the gateway was using it; delete {path}-wal and {path}-shm, and \
                 put a whole database there"
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
        let [.., a, b, c, d] = start;
        Ok(Header {
            changes: u32::from_be_bytes([a, b, c, d]),
            len_bytes: file.metadata()?.len(),
        })
    }
}

/// Whether a write-ahead log has content, and not the beginning that SQLite gives it.
fn is_emptied(log: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(log).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && !LOG_MAGIC.contains(&u32::from_be_bytes(magic))
}

/// A database's first bytes, as far as the count of changes.
const HEADER_BYTES: usize = 28;
/// A write-ahead log begins with one of these.
const LOG_MAGIC: [u32; 2] = [0x377f_0682, 0x377f_0683];
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
