//! Disk space reserved for deletions. Deleting drained frames of a spool, or what is older than the retention of a
//! store, needs space itself, in the write-ahead log and, after a checkpoint, in the database.
//!
//! The reserve is a file next to the database. It is deleted when rows cannot be deleted for lack of space, and
//! allocated again when the disk has space. Meanwhile new frames use only free pages of a spool's file, and a store
//! receives none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::sys::disk::Space;

/// Size of the reserve of a spool, in bytes: twice what the checkpoint of a log of [`LOG_BYTES`] and a batch needs. If
/// there is not enough space for it, half this size is reserved.
pub(super) const RESERVE_BYTES: u64 = 32 << 20;
/// Maximum size of a spool's log, in bytes, before it is checkpointed between two commits.
pub(super) const LOG_BYTES: u64 = 8 << 20;
/// Minimum and maximum size of the reserve of a store, in bytes. Between them, it is this part of the disk.
const STORE_RESERVE_BYTES: RangeInclusive<u64> = 4 << 20..=16 << 20;
const STORE_RESERVE_SHARE: u64 = 64;
/// Interval between attempts to allocate the reserve again.
const RETRY: Duration = Duration::from_secs(10);
/// Size of each write, in bytes, if the file system cannot allocate space.
const BLOCK_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub(in crate::store) struct Reserve {
    path: PathBuf,
    bytes: u64,
    is_held: bool,
    /// Earliest time to allocate it again.
    retry_at: Instant,
}

impl Reserve {
    /// Reserves space for deletions from the store at `path`, or keeps the reserve of an earlier gateway.
    pub(in crate::store) fn of_store(path: &Path) -> Reserve {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (min, max) = STORE_RESERVE_BYTES.into_inner();
        let disk = path.parent().and_then(|dir| Space::of(dir).ok());
        let share = disk.map_or(max, |disk| disk.total_bytes / STORE_RESERVE_SHARE);
        Reserve::open(&path, share.clamp(min, max))
    }

    /// Reserves space for the database at `path`, or keeps the reserve of an earlier gateway.
    pub(super) fn open(path: &Path, bytes: u64) -> Reserve {
        let mut path = path.to_owned().into_os_string();
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

    pub(super) fn bytes_min(&self) -> u64 {
        self.bytes / 2
    }

    /// Deletes the reserve; returns whether there was one.
    pub(in crate::store) fn release(&mut self) -> bool {
        self.retry_at = Instant::now() + RETRY;
        let was_held = std::mem::take(&mut self.is_held);
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Allocates the reserve again if it was deleted, the disk has enough space, and the next attempt is due.
    /// Returns whether it is held.
    pub(in crate::store) fn restore(&mut self) -> bool {
        if !self.is_held && Instant::now() >= self.retry_at {
            self.retry_at = Instant::now() + RETRY;
            let wanted = [self.bytes, self.bytes_min()];
            self.is_held = { wanted.iter() }.any(|bytes| allocate(&self.path, *bytes).is_ok());
            if !self.is_held {
                // A partial file would only waste space.
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
    fn the_reserve_is_held_until_released_and_restored_later() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join("spool.db");
        let file = dir.path().join("spool.db.reserve");
        let mut reserve = Reserve::open(&spool, 1 << 20);
        let held = fs::metadata(&file).unwrap();
        assert_eq!(held.len(), 1 << 20);
        // Not a sparse file.
        assert!(std::os::unix::fs::MetadataExt::blocks(&held) * 512 >= 1 << 20);
        // The next start keeps it.
        assert!(Reserve::open(&spool, 1 << 20).is_held);
        assert!(reserve.release() && !file.exists());
        assert!(!reserve.release());
        assert!(!reserve.restore(), "not before the retry is due");
        reserve.retry_at = Instant::now();
        assert!(reserve.restore() && file.exists());
    }
}
