//! Limits session events and boot clocks to the newest of each device.
//!
//! A device that sleeps and connects every few minutes writes more of these rows than readings. Pruning runs
//! concurrently with the commits, on a separate connection, and deletes a few rows at a time. Events that
//! devices reported (`event`) and changes by operators stay.

use std::path::PathBuf;
use std::time::Duration;

use super::{Access, Argument, Connection, Pace, Poll, QueryError, Source};
use crate::config::EventRetention;
use crate::config::store_url::StoreUrl;
use crate::time::{DAY_US, SystemClock};

const DEVICES_AT_ONCE: i64 = 64;
/// Rows deleted by one statement; each statement is a transaction.
const ROWS_AT_ONCE: i64 = 500;
/// Pause between two statements, in which gateways commit.
const PAUSE: Duration = Duration::from_millis(50);
/// Number of newest events and clocks of a device that stay at any age, so that pruning deletes little when
/// a clock jumps ahead.
const NEWEST: i64 = 100;
/// Number of boot clocks that stay; a login uses the latest 8.
const CLOCKS: i64 = 64;

/// A table to prune. The parameters of its statements: the device's id; the number of rows newer than the
/// oldest that stays; the time before which rows are deleted; the number of rows that stay at any age; and a
/// limit.
struct Table {
    /// Query that returns whether a device has rows to delete.
    excess: &'static str,
    delete: &'static str,
    newest: i64,
}

/// The condition matches that of an index.
const EVENTS: Table = Table {
    excess: "EXISTS (
            SELECT 1 FROM device_events AS e
            WHERE e.device_id = d.id AND e.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
            ORDER BY e.id DESC LIMIT 1 OFFSET $2 + 1
        ) OR (
            EXISTS (
                SELECT 1 FROM device_events AS e
                WHERE e.device_id = d.id AND e.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
                ORDER BY e.id DESC LIMIT 1 OFFSET $4 + 1
            ) AND (
                SELECT e.at FROM device_events AS e
                WHERE e.device_id = d.id AND e.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
                ORDER BY e.id LIMIT 1
            ) < $3
        )",
    delete: "DELETE FROM device_events WHERE id IN (
            SELECT x.id FROM device_events AS x
            WHERE x.device_id = $1 AND x.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin') AND (
                x.id < (
                    SELECT e.id FROM device_events AS e
                    WHERE e.device_id = $1 AND e.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
                    ORDER BY e.id DESC LIMIT 1 OFFSET $2
                ) OR x.at < $3 AND x.id < (
                    SELECT e.id FROM device_events AS e
                    WHERE e.device_id = $1 AND e.kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
                    ORDER BY e.id DESC LIMIT 1 OFFSET $4
                )
            )
            ORDER BY x.id LIMIT $5
        )",
    newest: NEWEST,
};

const BOOTS: Table = Table {
    excess: "EXISTS (
            SELECT 1 FROM clocks AS c WHERE c.device_id = d.id
            ORDER BY c.measured_at DESC LIMIT 1 OFFSET $2 + 1
        ) OR EXISTS (
            SELECT 1 FROM (
                SELECT c.measured_at FROM clocks AS c WHERE c.device_id = d.id
                ORDER BY c.measured_at DESC LIMIT 1 OFFSET $4 + 1
            ) AS c WHERE c.measured_at < $3
        )",
    delete: "DELETE FROM clocks WHERE device_id = $1 AND boot IN (
            SELECT x.boot FROM clocks AS x WHERE x.device_id = $1 AND (
                x.measured_at < (
                    SELECT c.measured_at FROM clocks AS c WHERE c.device_id = $1
                    ORDER BY c.measured_at DESC LIMIT 1 OFFSET $2
                ) OR x.measured_at < $3 AND x.measured_at < (
                    SELECT c.measured_at FROM clocks AS c WHERE c.device_id = $1
                    ORDER BY c.measured_at DESC LIMIT 1 OFFSET $4
                )
            )
            ORDER BY x.measured_at LIMIT $5
        )",
    // Those that a login uses.
    newest: 8,
};

/// Prunes a store, and the spool in front of it.
pub struct Pruner {
    sources: Vec<Source>,
    retention: EventRetention,
    is_failure_logged: bool,
}

impl Pruner {
    pub fn new(store: &StoreUrl, spool: Option<PathBuf>, retention: EventRetention) -> Pruner {
        let spool = spool.map(Source::Spool);
        Pruner {
            sources: spool.into_iter().chain([store.into()]).collect(),
            retention,
            is_failure_logged: false,
        }
    }

    /// Checks each device once; returns the number of deleted rows.
    ///
    /// # Errors
    /// A store is unavailable or rejects the deletion. The next round continues.
    ///
    /// # Cancel safety
    /// The next round continues.
    pub async fn round(&self, now_us: i64) -> Result<u64, QueryError> {
        let before_us =
            now_us.saturating_sub(i64::from(self.retention.device_events_days) * DAY_US);
        let mut rows = 0;
        for source in &self.sources {
            let mut connection = Connection::open(source.clone(), Access::Write).await?;
            rows += self.prune(&mut connection, before_us).await?;
        }
        Ok(rows)
    }

    async fn prune(&self, connection: &mut Connection, before_us: i64) -> Result<u64, QueryError> {
        let events_max = i64::from(self.retention.device_events_max);
        let events = prune(connection, &EVENTS, events_max, before_us).await?;
        Ok(events + prune(connection, &BOOTS, CLOCKS, before_us).await?)
    }
}

impl Poll for Pruner {
    const TASK: &'static str = "pruner";
    /// One round; the next one continues one that was abandoned.
    const PACE: Pace = Pace {
        interval: Duration::from_secs(600),
        timeout: Duration::from_secs(300),
        share: 1,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        match self.round(SystemClock::start().now().utc_us).await {
            Ok(0) => Ok(()),
            Ok(rows) => {
                tracing::debug!(rows, "pruned the audit trail and clocks");
                Ok(())
            }
            Err(error) if !std::mem::replace(&mut self.is_failure_logged, true) => {
                tracing::warn!(%error, "could not prune the audit trail and clocks, retrying");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

async fn prune(
    connection: &mut Connection,
    table: &Table,
    max: i64,
    before_us: i64,
) -> Result<u64, QueryError> {
    let max = max - 1;
    let newest = (table.newest - 1).min(max);
    let mut rows = 0;
    let mut after = 0;
    loop {
        let sql = format!(
            "SELECT d.id, CASE WHEN {} THEN 1 ELSE 0 END FROM devices AS d
             WHERE d.id > $1 ORDER BY d.id LIMIT $5",
            table.excess
        );
        let arguments = |first: i64, limit: i64| {
            let before = Argument::Time(before_us);
            [
                first.into(),
                max.into(),
                before,
                newest.into(),
                limit.into(),
            ]
        };
        let devices = connection
            .rows(&sql, &arguments(after, DEVICES_AT_ONCE))
            .await?;
        let Some(last) = devices.last() else {
            return Ok(rows);
        };
        after = last.integer(0)?;
        for device in &devices {
            if device.integer(1)? == 0 {
                continue;
            }
            let arguments = arguments(device.integer(0)?, ROWS_AT_ONCE);
            loop {
                let deleted = connection.step(table.delete, &arguments).await?;
                rows += deleted;
                tokio::time::sleep(PAUSE).await;
                if deleted < ROWS_AT_ONCE as u64 {
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::sqlite::{SqliteSettings, SqliteStore};

    const NOW_US: i64 = 1_700_000_000_000_000;
    const RETENTION: EventRetention = EventRetention {
        device_events_max: 300,
        device_events_days: 90,
    };

    async fn run(store: &StoreUrl, sql: &str, arguments: &[Argument<'_>]) {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        connection.execute(sql, arguments).await.unwrap();
    }

    /// Creates a device with events, the oldest first, each of the given age in days.
    async fn device(store: &StoreUrl, id: i64, kind: &str, days_ago: impl Iterator<Item = i64>) {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        let sql = "INSERT INTO devices (name) VALUES ($1) ON CONFLICT DO NOTHING";
        let name = format!("device-{id}");
        connection
            .execute(sql, &[name.as_str().into()])
            .await
            .unwrap();
        connection.begin().await.unwrap();
        for days in days_ago {
            let sql = "INSERT INTO device_events (device_id, at, kind, code, detail)
                VALUES ($1, $2, $3, 0, '')";
            let at = Argument::Time(NOW_US - days * DAY_US);
            connection
                .execute(sql, &[id.into(), at, kind.into()])
                .await
                .unwrap();
        }
        connection.commit().await.unwrap();
    }

    async fn clocks(store: &StoreUrl, device: i64, days_ago: impl Iterator<Item = i64>) {
        for (boot, days) in (1..).zip(days_ago) {
            let sql = "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at)
                VALUES ($1, $2, 0, 0, $3)";
            let at = Argument::Time(NOW_US - days * DAY_US);
            run(store, sql, &[device.into(), boot.into(), at]).await;
        }
    }

    /// Returns the number of rows and the time of the oldest.
    async fn left(store: &StoreUrl, sql: &str) -> (i64, i64) {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        let rows = connection.rows(sql, &[]).await.unwrap();
        let days_ago = (NOW_US - rows[0].integer(1).unwrap()) / DAY_US;
        (rows[0].integer(0).unwrap(), days_ago)
    }

    async fn the_newest_stay(store: StoreUrl) {
        for id in 1..=4 {
            device(&store, id, "connected", std::iter::empty()).await;
        }
        // Reported events and changes by operators, older than any session event.
        device(&store, 1, "event", (0..400).map(|_| 1000)).await;
        device(&store, 1, "disabled", (0..400).map(|_| 1000)).await;
        // Too many; too old, except for the newest; few and old; exactly the maximum.
        device(&store, 1, "connected", (0..1600).rev().map(|n| n / 100)).await;
        device(&store, 2, "refused", (0..200).rev().map(|n| 80 + n / 10)).await;
        device(&store, 3, "disconnected", (0..50).map(|_| 1000)).await;
        device(&store, 4, "connected", (0..300).map(|_| 1)).await;
        clocks(&store, 1, (0..70).rev()).await;
        clocks(&store, 2, (0..20).rev().map(|n| 85 + n)).await;
        clocks(&store, 3, (0..8).map(|_| 1000)).await;

        let pruner = Pruner::new(&store, None, RETENTION);
        let rows = pruner.round(NOW_US).await.unwrap();
        let events = async |device: i64, kind| {
            let sql = format!(
                "SELECT count(*), min(at) FROM device_events WHERE device_id = {device} AND kind = '{kind}'"
            );
            left(&store, &sql).await
        };
        assert_eq!(events(1, "connected").await, (300, 2));
        assert_eq!(events(2, "refused").await, (110, 90));
        assert_eq!(events(3, "disconnected").await, (50, 1000));
        assert_eq!(events(4, "connected").await, (300, 1));
        assert_eq!(events(1, "event").await, (400, 1000));
        assert_eq!(events(1, "disabled").await, (400, 1000));
        let boots = async |device: i64| {
            let sql =
                format!("SELECT count(*), min(measured_at) FROM clocks WHERE device_id = {device}");
            left(&store, &sql).await
        };
        assert_eq!(boots(1).await, (64, 63));
        assert_eq!(boots(2).await, (8, 92));
        assert_eq!(boots(3).await, (8, 1000));
        assert_eq!(rows, 1300 + 90 + 6 + 12);
        assert_eq!(pruner.round(NOW_US).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_newest_events_and_clocks_of_a_device_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
        the_newest_stay(StoreUrl::Sqlite(path)).await;
        store.unwrap().close().await.unwrap();
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn the_newest_events_and_clocks_of_a_device_stay_in_postgres() {
        let database = crate::store::postgres::tests::Database::create().await;
        let store = crate::store::postgres::PostgresStore::open(database.settings()).await;
        the_newest_stay(StoreUrl::Postgres(database.settings().url)).await;
        drop(store.unwrap());
    }

    /// A clock that waits to be drained must not be drained after it was pruned.
    #[tokio::test]
    async fn a_spool_does_not_drain_pruned_clocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spool.db");
        let spool = SqliteStore::open_spool(&path, &SqliteSettings::default()).await;
        let mut connection = Connection::open(Source::Spool(path), Access::Write)
            .await
            .unwrap();
        for sql in [
            "INSERT INTO devices (name) VALUES ('pump')",
            "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at)
             SELECT 1, n.value, 0, 0, n.value FROM json_each('[1,2,3,4,5,6,7,8,9,10]') AS n",
        ] {
            connection.execute(sql, &[]).await.unwrap();
        }
        assert_eq!(
            prune(&mut connection, &BOOTS, CLOCKS, NOW_US)
                .await
                .unwrap(),
            2
        );
        let sql = "SELECT count(*) FROM changes WHERE what = 'clock'";
        let rows = connection.rows(sql, &[]).await.unwrap();
        assert_eq!(rows[0].integer(0).unwrap(), 8);
        spool.unwrap().close().await.unwrap();
    }
}
