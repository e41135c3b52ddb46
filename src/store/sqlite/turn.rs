//! Coordinates writes between the gateway and the commands that write while it runs.
//!
//! SQLite has no queue for its write lock: a waiting connection polls, while a gateway under load begins its
//! next transaction immediately. So a command locks the file `<database>.turn` before it takes the write lock,
//! and keeps it until its transaction ends. The gateway begins no transaction while that file is locked.
//!
//! Invariants
//! - The gateway waits at most [`GIVE_WAY_MAX`] before it competes for the write lock again.
//! - A process that ends, for any reason, releases its turn: the system unlocks its files.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Maximum time that the gateway gives way, so that consecutive commands cannot block it.
const GIVE_WAY_MAX: Duration = Duration::from_millis(100);
/// Interval at which the gateway checks whether a command has finished.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

fn path_of(database: &Path) -> PathBuf {
    let mut path = OsString::from(database);
    path.push(".turn");
    path.into()
}

fn open(database: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let options = options.create(true).truncate(false).write(true);
    options.open(path_of(database))
}

/// The gateway's side of the turns; `None` if the file system has no locks.
pub(super) struct Turns(Option<File>);

impl Turns {
    pub(super) fn of_gateway(database: &Path) -> Self {
        Self(open(database).ok())
    }

    /// Waits while a command holds or awaits the write turn.
    pub(super) async fn give_way(&self) {
        let Some(file) = &self.0 else {
            return;
        };
        let end = Instant::now() + GIVE_WAY_MAX;
        while let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let _ = file.unlock();
    }
}

/// A command's turn; it ends when this is dropped.
pub(in crate::store) struct Turn(#[expect(dead_code, reason = "held for its lock")] File);

impl Turn {
    /// Waits behind other commands for the turn to write to the database at `path`; `None` if the file system
    /// has no locks, or this user may not write there.
    pub(in crate::store) async fn take(path: &Path) -> Option<Turn> {
        let file = open(path).ok()?;
        let locked = tokio::task::spawn_blocking(move || file.lock().map(|()| Turn(file)));
        locked.await.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::config::store_url::StoreUrl;
    use crate::store::admin::{Access, Connection};
    use crate::store::sqlite::{SqliteSettings, SqliteStore};
    use crate::store::{Batch, Store};

    const MOMENT: Duration = Duration::from_millis(20);

    async fn takes_turn(turns: &Turns) -> bool {
        timeout(MOMENT, turns.give_way()).await.is_ok()
    }

    #[tokio::test]
    async fn the_gateway_gives_way_to_a_command_until_it_has_committed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.db");
        let settings = SqliteSettings::default();
        let mut store = SqliteStore::open(&path, &settings).await.unwrap();
        let turns = Turns::of_gateway(&path);
        // Every other name refers to the same database.
        let link = directory.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for path in [&path, &link] {
            let url = StoreUrl::Sqlite(path.clone());
            let mut connection = Connection::open(&url, Access::Write).await.unwrap();
            assert!(takes_turn(&turns).await);
            connection.begin().await.unwrap();
            assert!(!takes_turn(&turns).await);
            connection.commit().await.unwrap();
            assert!(takes_turn(&turns).await);
            connection.begin().await.unwrap();
            assert!(!takes_turn(&turns).await);
            connection.rollback().await.unwrap();
            store.commit(&Batch::default()).await.unwrap();
            // A command that ends abnormally releases its turn.
            connection.begin().await.unwrap();
            drop(connection);
            turns.give_way().await;
            assert!(takes_turn(&turns).await);
        }
    }

    #[tokio::test]
    async fn consecutive_commands_do_not_block_the_gateway() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.db");
        let turns = Turns::of_gateway(&path);
        let _turn = Turn::take(&path).await.unwrap();
        let waited = timeout(20 * GIVE_WAY_MAX, turns.give_way()).await;
        assert!(waited.is_ok());
    }
}
