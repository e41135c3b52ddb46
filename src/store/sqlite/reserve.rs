//! Room on the disk that is set aside for a spool: to forget what was drained takes room itself, in the
//! write-ahead log and, when that is moved, in the database.
//!
//! The room is a file beside the spool. It is given up when nothing can be forgotten for want of room, and taken
//! back when the disk has room again; meanwhile frames go only into pages that are free in the file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Twice what a log of [`LOG_BYTES`] and a batch need when they are moved into the database; where there is no room
/// for that, half of it.
pub(super) const RESERVE_BYTES: u64 = 32 << 20;
/// How long a spool's log may become before it is moved between two commits.
pub(super) const LOG_BYTES: u64 = 8 << 20;
/// From one try to take the room back to the next.
const RETRY: Duration = Duration::from_secs(10);
/// Written at once where the file system cannot set room aside.
const BLOCK_BYTES: usize = 64 << 10;

/// The room; see the module.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    is_held: bool,
    /// When it may be taken back.
    retry_at: Instant,
}

impl Reserve {
    /// Sets room aside for the spool at `spool`, or keeps what a former gateway has set aside.
    pub(super) fn open(spool: &Path, bytes: u64) -> Reserve {
        let mut path = spool.to_owned().into_os_string();
        path.push(".reserve");
        let mut reserve = Reserve {
            path: path.into(),
            bytes,
            is_held: false,
            retry_at: Instant::now(),
        };
        let found = fs::metadata(&reserve.path);
        reserve.is_held = found.is_ok_and(|found| found.len() >= bytes / 2) || reserve.restore();
        reserve
    }

    /// The least that is enough.
    pub(super) fn bytes_min(&self) -> u64 {
        self.bytes / 2
    }

    /// Gives the room up; tells whether there was any.
    pub(super) fn release(&mut self) -> bool {
        self.retry_at = Instant::now() + RETRY;
        let was_held = std::mem::take(&mut self.is_held);
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Takes the room back if it was given up, there is enough, and it is time to try; tells whether it is held.
    pub(super) fn restore(&mut self) -> bool {
        if !self.is_held && Instant::now() >= self.retry_at {
            self.retry_at = Instant::now() + RETRY;
            let wanted = [self.bytes, self.bytes_min()];
            self.is_held = { wanted.iter() }.any(|bytes| allocate(&self.path, *bytes).is_ok());
            if !self.is_held {
                // A part of it would only be in the way.
                let _ = fs::remove_file(&self.path);
            }
        }
        self.is_held
    }
}

fn allocate(path: &Path, bytes: u64) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut file = options.open(path)?;
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Ok(()) => return file.sync_all(),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    fill(&mut file, bytes)
}

fn fill(file: &mut File, bytes: u64) -> io::Result<()> {
    let block = [0; BLOCK_BYTES];
    for _ in 0..bytes / BLOCK_BYTES as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_is_there_until_it_is_given_up_and_comes_back_later() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join("spool.db");
        let file = dir.path().join("spool.db.reserve");
        let mut reserve = Reserve::open(&spool, 1 << 20);
        let held = fs::metadata(&file).unwrap();
        assert_eq!(held.len(), 1 << 20);
        // Not a hole that takes no room.
        assert!(std::os::unix::fs::MetadataExt::blocks(&held) * 512 >= 1 << 20);
        // The next start keeps it.
        assert!(Reserve::open(&spool, 1 << 20).is_held);
        assert!(reserve.release() && !file.exists());
        assert!(!reserve.release());
        assert!(!reserve.restore(), "at once it would be taken for nothing");
        reserve.retry_at = Instant::now();
        assert!(reserve.restore() && file.exists());
    }
}
