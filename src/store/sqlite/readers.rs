//! Asks readers to end, so that the gateway can keep storing.
//!
//! A gateway cannot shorten its write-ahead log past a statement that still reads. When the log approaches the
//! length at which commits are rejected, the gateway locks the file `<database>.readers`; queries of this
//! program check whether it is locked. A process that ends, for any reason, releases the lock: the system
//! unlocks its files.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::store_url::StoreUrl;

/// Growth of the write-ahead log during a query, in bytes, at which the query is aborted. A running query keeps the
/// gateway from checkpointing the log, and the gateway stores nothing when the log is full (1 GiB by default).
const LOG_GROWTH_MAX: u64 = 256 << 20;
/// Size of the log, in bytes, at which a query is aborted if the log has grown at all.
const LOG_BYTES_MAX: u64 = 512 << 20;
/// Interval between polls of the log.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// A query is aborted after this many consecutive polls in which the gateway asks it to stop.
const ASKED_MAX: u32 = 4;

fn path_of(database: &Path) -> PathBuf {
    let mut path = OsString::from(database);
    path.push(".readers");
    path.into()
}

/// The gateway's side. Without file locks on this file system, it asks no readers.
pub(super) struct Readers {
    file: Option<File>,
    are_asked: bool,
}

impl Readers {
    pub(super) fn of_gateway(database: &Path) -> Self {
        Self {
            file: open(database).ok(),
            are_asked: false,
        }
    }

    /// Asks readers to end, or stops asking.
    pub(super) fn ask_to_end(&mut self, asks: bool) {
        let Some(file) = &self.file else {
            return;
        };
        if asks == self.are_asked {
            return;
        }
        let done = match asks {
            // A reader may be checking right now; the next commit tries again.
            true => file.try_lock().is_ok(),
            false => file.unlock().is_ok(),
        };
        self.are_asked = asks == done;
    }
}

fn open(database: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let options = options.create(true).truncate(false).write(true);
    options.open(path_of(database))
}

/// Waits until the gateway needs the write-ahead log that a query keeps it from checkpointing. Never returns for
/// Postgres.
pub async fn log_is_needed(store: &StoreUrl) {
    let StoreUrl::Sqlite(path) = store else {
        return std::future::pending().await;
    };
    let mut log = OsString::from(path);
    log.push("-wal");
    let bytes = || std::fs::metadata(Path::new(&log)).map_or(0, |file| file.len());
    let began = bytes();
    let limit = (began + LOG_GROWTH_MAX).min(LOG_BYTES_MAX).max(began + 1);
    let mut asked = 0;
    while bytes() < limit && asked < ASKED_MAX {
        tokio::time::sleep(LOOK_AGAIN).await;
        asked = if must_end(path) { asked + 1 } else { 0 };
    }
}

/// Returns whether a gateway asks the readers of this database to end.
fn must_end(database: &Path) -> bool {
    let Ok(path) = database.canonicalize() else {
        return false;
    };
    let locked = File::open(path_of(&path)).map(|file| file.try_lock_shared());
    matches!(locked, Ok(Err(TryLockError::WouldBlock)))
}
