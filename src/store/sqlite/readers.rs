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

/// Returns whether a gateway asks the readers of this database to end.
pub fn must_end(database: &Path) -> bool {
    let Ok(path) = database.canonicalize() else {
        return false;
    };
    let locked = File::open(path_of(&path)).map(|file| file.try_lock_shared());
    matches!(locked, Ok(Err(TryLockError::WouldBlock)))
}
