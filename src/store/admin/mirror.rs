//! Copies device changes by operators from the database to the spool. A gateway with a spool looks up only there
//! whether a device may connect, even while the database is available.

use std::collections::HashSet;
use std::path::PathBuf;

use super::device::{
    CHANGES_PACE, Changes, DeviceState, Position, StoredKey, changes_since, find, next_revision,
    put, select,
};
use super::{Access, Connection, Pace, Poll, QueryError, Reconnecting, Source};
use crate::config::store_url::StoreUrl;

/// Copies changes from a database to a spool.
pub struct Mirror {
    database: Reconnecting,
    spool: Source,
    /// Position in the database up to which the spool has all changes.
    copied: Option<Position>,
}

impl Mirror {
    pub fn new(database: &StoreUrl, spool: PathBuf) -> Mirror {
        Mirror {
            database: Reconnecting::new(database),
            spool: Source::Spool(spool),
            copied: None,
        }
    }
}

impl Poll for Mirror {
    const TASK: &'static str = "mirror";
    const PACE: Pace = CHANGES_PACE;

    /// Copies new changes; all changes on the first call.
    async fn poll(&mut self) -> Result<(), QueryError> {
        let changes = changes_since(&mut self.database, self.copied.as_ref()).await?;
        if let Some(changes) = changes {
            let mut spool = Connection::open(self.spool.clone(), Access::Write).await?;
            spool.begin().await?;
            let adopted = adopt(&mut spool, &changes).await;
            spool.end(adopted).await?;
            self.copied = Some(changes.position);
        }
        Ok(())
    }
}

/// Updates the spool's devices to their state in the database and assigns the spool's own revision. A restored
/// database reuses revisions, but sessions and logins are checked against revisions that only increase.
async fn adopt(spool: &mut Connection, changes: &Changes) -> Result<(), QueryError> {
    let revision = next_revision(spool).await?;
    for device in &changes.devices {
        // A spool does not know the device's id, and its rows under that name may belong to the name's next
        // device.
        if device.former_name().is_some() {
            continue;
        }
        let DeviceState {
            name,
            key,
            is_enabled,
            ..
        } = device;
        let before = find(spool, name).await?;
        put(spool, name, before.as_ref(), *is_enabled, key, revision).await?;
    }
    if changes.is_all {
        let changed = changes.devices.iter().map(|device| device.name.as_str());
        undo_others(spool, &changed.collect(), revision).await?;
    }
    Ok(())
}

/// Resets all other devices to their state before any change.
async fn undo_others(
    spool: &mut Connection,
    changed: &HashSet<&str>,
    revision: i64,
) -> Result<(), QueryError> {
    for device in select(spool, "WHERE revision > 0", &[]).await? {
        if !changed.contains(device.name.as_str()) {
            let first = StoredKey::default();
            put(spool, &device.name, Some(&device), true, &first, revision).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::store::Store;
    use crate::store::admin::device::DeviceEdit;
    use crate::store::sqlite::{SqliteSettings, SqliteStore};

    /// A database and a spool. The database is SQLite, because the statements are the same as for Postgres.
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

        async fn database(&self) -> Connection {
            let store = StoreUrl::Sqlite(self.path("database.db"));
            Connection::open(&store, Access::Write).await.unwrap()
        }

        fn spool(&self) -> Source {
            Source::Spool(self.path("spool.db"))
        }

        fn mirror(&self) -> Mirror {
            Mirror::new(
                &StoreUrl::Sqlite(self.path("database.db")),
                self.path("spool.db"),
            )
        }

        /// Changes a device, like a command.
        async fn set(&self, name: &str, is_enabled: bool, version: u32) {
            let mut database = self.database().await;
            let mut edit = DeviceEdit::begin(&mut database, 0).await.unwrap();
            let before = edit.find([name].into_iter()).await.unwrap();
            let key = StoredKey {
                version,
                sealed: None,
            };
            let set = edit.set(name, before.get(name), is_enabled, &key);
            assert!(set.await.unwrap());
            database.commit().await.unwrap();
        }

        /// Puts the database into the state before the second change, like a restored backup.
        async fn restore(&self) {
            let mut database = self.database().await;
            let first =
                "UPDATE devices SET enabled = 1, key_version = 0, revision = 0, key_revision = 0
                WHERE revision > 1";
            database.execute(first, &[]).await.unwrap();
            let latest = "UPDATE device_revision SET latest = 1";
            database.execute(latest, &[]).await.unwrap();
        }

        async fn spooled(&self, name: &str) -> DeviceState {
            let spool = Connection::open(self.spool(), Access::Poll).await;
            find(&mut spool.unwrap(), name).await.unwrap().unwrap()
        }
    }

    /// Reads changes from the spool, like a gateway.
    struct Watch {
        spool: Reconnecting,
        seen: Option<Position>,
    }

    impl Watch {
        fn of(site: &Site) -> Watch {
            Watch {
                spool: Reconnecting::new(site.spool()),
                seen: None,
            }
        }

        async fn changes(&mut self) -> Option<Changes> {
            let changes = changes_since(&mut self.spool, self.seen.as_ref()).await;
            let changes = changes.unwrap()?;
            self.seen = Some(changes.position.clone());
            Some(changes)
        }
    }

    fn names(changes: &Changes) -> Vec<&str> {
        let names = changes.devices.iter().map(|device| device.name.as_str());
        names.collect()
    }

    #[tokio::test]
    async fn changes_lost_by_the_database_are_undone() {
        let site = Site::new().await;
        site.set("valve", false, 0).await;
        site.set("pump", false, 0).await;
        site.set("fan", true, 1).await;
        let (mut mirror, mut watch) = (site.mirror(), Watch::of(&site));
        mirror.poll().await.unwrap();
        let changes = watch.changes().await.unwrap();
        assert_eq!(changes.devices.len(), 3);
        let before = site.spooled("pump").await;

        site.restore().await;
        mirror.poll().await.unwrap();
        for (name, is_enabled) in [("valve", false), ("pump", true), ("fan", true)] {
            let spooled = site.spooled(name).await;
            assert_eq!(spooled.is_enabled, is_enabled, "{name}");
            assert_eq!(spooled.key, StoredKey::default(), "{name}");
        }
        // To the gateway it is an ordinary change, which ends the sessions with a lost key.
        let changes = watch.changes().await.unwrap();
        assert!(!changes.is_all);
        let mut changed = names(&changes);
        changed.sort_unstable();
        assert_eq!(changed, ["fan", "pump"]);
        assert!(changes.devices[0].revision > before.revision);
        let fan = site.spooled("fan").await;
        assert_eq!(fan.key_revision, fan.revision);
        assert_eq!(site.spooled("pump").await.key_revision, 0);
        assert!(watch.changes().await.is_none());

        // So are later changes, whatever their number in the database.
        site.set("pump", false, 0).await;
        mirror.poll().await.unwrap();
        let changes = watch.changes().await.unwrap();
        assert!(!changes.is_all && !changes.devices[0].is_enabled);
        assert_eq!(names(&changes), ["pump"]);
        assert!(changes.devices[0].revision > fan.revision);
        assert!(watch.changes().await.is_none());
    }

    #[tokio::test]
    async fn a_restart_changes_nothing() {
        let site = Site::new().await;
        site.set("pump", false, 0).await;
        site.set("fan", true, 1).await;
        site.mirror().poll().await.unwrap();
        let mut watch = Watch::of(&site);
        watch.changes().await;
        let before = site.spooled("fan").await;
        site.mirror().poll().await.unwrap();
        assert_eq!(site.spooled("fan").await, before);
        let changes = watch.changes().await.unwrap();
        assert!(!changes.is_all && changes.devices.is_empty());
    }

    #[tokio::test]
    async fn changes_are_copied_again_after_a_failure() {
        let site = Site::new().await;
        let mut mirror = site.mirror();
        site.set("fan", false, 0).await;
        mirror.poll().await.unwrap();
        site.set("pump", false, 0).await;
        std::fs::rename(site.path("spool.db"), site.path("away.db")).unwrap();
        mirror.poll().await.unwrap_err();
        std::fs::rename(site.path("away.db"), site.path("spool.db")).unwrap();
        mirror.poll().await.unwrap();
        assert!(!site.spooled("pump").await.is_enabled);
    }
}
