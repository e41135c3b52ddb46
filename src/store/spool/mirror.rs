//! What operators change about devices, brought from the database to the spool: a gateway with a spool asks
//! the spool who may connect, with the database or without it.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::store_url::StoreUrl;
use crate::store::device_admin::{ChangeReader, adopt};
use crate::store::editor::Editor;
use crate::store::reader::{OpenError, ReadError};
use crate::store::steady::{SteadyError, SteadyReader};

/// From one look for changes to the next. The gateway looks as often again, and within a second a
/// change shall have got through.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A look that takes longer is given up.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Brings changes from a database to a spool.
pub struct Mirror {
    changes: ChangeReader,
    spool: PathBuf,
}

/// Why nothing was brought.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The database does not answer.
    #[error(transparent)]
    Database(#[from] SteadyError),
    /// The spool cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The spool does not take it.
    #[error(transparent)]
    Spool(#[from] ReadError),
}

impl Mirror {
    /// From `database` to the spool in the file `spool`.
    pub fn new(database: StoreUrl, spool: PathBuf) -> Mirror {
        Mirror {
            changes: ChangeReader::new(SteadyReader::new(database)),
            spool,
        }
    }

    /// Brings what has changed.
    ///
    /// # Errors
    /// One of the two does not answer; the next call brings all.
    pub async fn copy(&mut self) -> Result<(), MirrorError> {
        let Some(changes) = self.changes.changes().await? else {
            return Ok(());
        };
        // Until it is there, it is not seen.
        let seen = self.changes.forget();
        let mut editor = Editor::open_spool(&self.spool).await?;
        adopt(&mut editor, &changes).await?;
        self.changes.remember(seen);
        Ok(())
    }

    /// Brings what changes again and again, for as long as it is polled.
    pub async fn watch<T>(mut self) -> T {
        loop {
            match tokio::time::timeout(LOOK_TIMEOUT, self.copy()).await {
                Ok(Ok(())) => {}
                // That the database is away is told by the drain.
                Ok(Err(error)) => {
                    tracing::debug!(%error, "changes of devices do not reach the spool")
                }
                Err(_) => tracing::debug!("changes of devices do not reach the spool in time"),
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::store::Store;
    use crate::store::device_admin::{Changes, DeviceEdit, DeviceState, StoredKey, find};
    use crate::store::sqlite::{SqliteSettings, SqliteStore};

    /// A database and a spool. What is mirrored is written alike for all databases, so SQLite will do.
    struct Site {
        directory: TempDir,
    }

    impl Site {
        async fn new() -> Site {
            let site = Site {
                directory: tempfile::tempdir().unwrap(),
            };
            let settings = SqliteSettings::default();
            let database = SqliteStore::open(site.path("database.db"), &settings).await;
            database.unwrap().close().await.unwrap();
            let spool = SqliteStore::open_spool(&site.path("spool.db"), &settings).await;
            spool.unwrap().close().await.unwrap();
            site
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn database(&self) -> StoreUrl {
            StoreUrl::Sqlite(self.path("database.db"))
        }

        fn mirror(&self) -> Mirror {
            Mirror::new(self.database(), self.path("spool.db"))
        }

        /// As a command does.
        async fn set(&self, name: &str, is_enabled: bool, version: u32) {
            let mut editor = Editor::open(&self.database()).await.unwrap();
            let mut edit = DeviceEdit::begin(&mut editor, 0).await.unwrap();
            let before = edit.find([name].into_iter()).await.unwrap();
            let key = StoredKey {
                version,
                sealed: None,
            };
            let set = edit.set(name, before.get(name), is_enabled, &key);
            assert!(set.await.unwrap());
            edit.commit().await.unwrap();
        }

        /// As a backup from before the second change has it.
        async fn restored(&self) {
            let mut editor = Editor::open(&self.database()).await.unwrap();
            let first =
                "UPDATE devices SET enabled = 1, key_version = 0, revision = 0, key_revision = 0
                WHERE revision > 1";
            editor.execute(first, &[]).await.unwrap();
            let latest = "UPDATE device_revision SET latest = 1";
            editor.execute(latest, &[]).await.unwrap();
        }

        /// What a gateway asks the spool.
        fn reader(&self) -> ChangeReader {
            ChangeReader::new(SteadyReader::of_spool(self.path("spool.db")))
        }

        async fn spooled(&self, name: &str) -> DeviceState {
            let mut editor = Editor::open_spool(&self.path("spool.db")).await.unwrap();
            find(&mut editor, name).await.unwrap().unwrap()
        }
    }

    fn names(changes: &Changes) -> Vec<&str> {
        let names = changes.devices.iter().map(|device| device.name.as_str());
        names.collect()
    }

    #[tokio::test]
    async fn what_the_database_has_lost_is_undone() {
        let site = Site::new().await;
        site.set("valve", false, 0).await;
        site.set("pump", false, 0).await;
        site.set("fan", true, 1).await;
        let (mut mirror, mut reader) = (site.mirror(), site.reader());
        mirror.copy().await.unwrap();
        let changes = reader.changes().await.unwrap().unwrap();
        assert_eq!(changes.devices.len(), 3);
        let before = site.spooled("pump").await;

        site.restored().await;
        mirror.copy().await.unwrap();
        for (name, is_enabled) in [("valve", false), ("pump", true), ("fan", true)] {
            let spooled = site.spooled(name).await;
            assert_eq!(spooled.is_enabled, is_enabled, "{name}");
            assert_eq!(spooled.key, StoredKey::default(), "{name}");
        }
        // To a gateway it is a change like any other: it ends sessions of the key that was lost.
        let changes = reader.changes().await.unwrap().unwrap();
        assert!(!changes.is_all);
        let mut changed = names(&changes);
        changed.sort_unstable();
        assert_eq!(changed, ["fan", "pump"]);
        assert!(changes.devices[0].revision > before.revision);
        let fan = site.spooled("fan").await;
        assert_eq!(fan.key_revision, fan.revision);
        assert_eq!(site.spooled("pump").await.key_revision, 0);
        assert!(reader.changes().await.unwrap().is_none());

        // So is what operators do next, whatever its number is in the database.
        site.set("pump", false, 0).await;
        mirror.copy().await.unwrap();
        let changes = reader.changes().await.unwrap().unwrap();
        assert!(!changes.is_all && !changes.devices[0].is_enabled);
        assert_eq!(names(&changes), ["pump"]);
        assert!(changes.devices[0].revision > fan.revision);
        assert!(reader.changes().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_start_changes_nothing_that_is_so_already() {
        let site = Site::new().await;
        site.set("pump", false, 0).await;
        site.set("fan", true, 1).await;
        site.mirror().copy().await.unwrap();
        let mut reader = site.reader();
        reader.changes().await.unwrap();
        let before = site.spooled("fan").await;
        site.mirror().copy().await.unwrap();
        assert_eq!(site.spooled("fan").await, before);
        let changes = reader.changes().await.unwrap().unwrap();
        assert!(!changes.is_all && changes.devices.is_empty());
    }

    /// A gateway would take each of its looks for the first one.
    #[tokio::test]
    async fn a_spool_that_counted_as_the_database_is_mended() {
        let site = Site::new().await;
        site.set("valve", false, 0).await;
        site.set("pump", true, 0).await;
        site.mirror().copy().await.unwrap();
        let mut editor = Editor::open_spool(&site.path("spool.db")).await.unwrap();
        for sql in [
            "UPDATE devices SET revision = 7 WHERE name = 'pump'",
            "UPDATE device_revision SET latest = 5",
        ] {
            editor.execute(sql, &[]).await.unwrap();
        }
        site.mirror().copy().await.unwrap();
        let mut reader = site.reader();
        reader.changes().await.unwrap().unwrap();
        assert!(reader.changes().await.unwrap().is_none());
    }
}
