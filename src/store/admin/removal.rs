//! Removes a device and everything stored for it while gateways run. The removal works in small steps that do
//! not block commits, and it can resume after an interruption.
//!
//! The first transaction renames the device's row and makes a change that ends its sessions
//! ([`super::device::DeviceEdit::remove`]). From then on the name is free, and the device's rows are
//! found by its id. Later transactions delete rows, a limited number at a time. The device's own row goes last,
//! in a transaction that checks that nothing else is left. Ids are never reused, and `removed_devices` keeps
//! them.

use std::time::Duration;

use super::{Argument, Connection, QueryError};

/// Rows deleted by one statement; each statement is a transaction.
const ROWS_AT_ONCE: i64 = 5000;
/// Pause between two statements, in which gateways commit.
const PAUSE: Duration = Duration::from_millis(20);
/// Time in which every gateway polls for changes several times and stores the remaining frames of the sessions
/// that it ended.
const QUIET: Duration = Duration::from_secs(3);
/// Interval between two checks whether a gateway has compacted the device's level-0 readings.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Rows stored for a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Belongings {
    /// Labels and row counts, for display.
    pub counts: Vec<(&'static str, u64)>,
}

impl Belongings {
    pub fn add(&mut self, other: Belongings) {
        if self.counts.is_empty() {
            *self = other;
            return;
        }
        for (sum, (_, count)) in self.counts.iter_mut().zip(other.counts) {
            sum.1 += count;
        }
    }
}

/// Counts the rows stored for a device. Readings and frames come from the totals of its streams.
pub async fn belongings(
    connection: &mut Connection,
    device: i64,
) -> Result<Belongings, QueryError> {
    let of_device =
        |table: &str| format!("SELECT CAST(count(*) AS BIGINT) FROM {table} WHERE device_id = $1");
    let of_streams = |what: &str| {
        format!("SELECT CAST(coalesce(sum({what}), 0) AS BIGINT) FROM streams WHERE device_id = $1")
    };
    let gaps =
        "SELECT CAST(count(*) AS BIGINT) FROM gaps AS g JOIN streams AS s ON s.id = g.stream_id
        WHERE s.device_id = $1";
    let mut counts = Vec::new();
    for (what, sql) in [
        ("readings", of_streams("readings")),
        ("frames", of_streams("frames")),
        ("streams", of_device("streams")),
        ("series", of_device("series")),
        ("schemas", of_device("schemas")),
        ("gaps", gaps.to_owned()),
        ("quarantined frames", of_device("quarantine")),
        ("audit events", of_device("device_events")),
        ("boot clocks", of_device("clocks")),
    ] {
        let count = connection.integer(&sql, &[device.into()]).await?;
        counts.push((what, count.unsigned_abs()));
    }
    Ok(Belongings { counts })
}

/// Deletes rows by device id, up to a limit. Rows that refer to other rows are deleted first.
const BY_DEVICE: [&str; 5] = [
    "DELETE FROM gaps WHERE (stream_id, from_seq) IN (
         SELECT g.stream_id, g.from_seq FROM gaps AS g JOIN streams AS s ON s.id = g.stream_id
         WHERE s.device_id = $1 LIMIT $2
     )",
    "DELETE FROM quarantine WHERE id IN (
         SELECT q.id FROM quarantine AS q WHERE q.device_id = $1 LIMIT $2
     )",
    "DELETE FROM device_events WHERE id IN (
         SELECT e.id FROM device_events AS e WHERE e.device_id = $1 LIMIT $2
     )",
    "DELETE FROM clocks WHERE device_id = $1 AND boot IN (
         SELECT c.boot FROM clocks AS c WHERE c.device_id = $1 LIMIT $2
     )",
    "DELETE FROM frames WHERE id IN (
         SELECT f.id FROM frames AS f JOIN streams AS s ON s.id = f.stream_id
         WHERE s.device_id = $1 LIMIT $2
     )",
];

/// Removes a device that was renamed, possibly by an earlier, interrupted run.
///
/// `is_alone` returns whether no gateway uses the store and none can start; it is called again while the
/// removal waits for a gateway, which may be killed.
///
/// # Errors
/// The store is unavailable. The next call resumes the removal.
///
/// # Cancel safety
/// The next call resumes the removal.
pub async fn take_out(
    connection: &mut Connection,
    device: i64,
    is_alone: &mut impl FnMut() -> bool,
) -> Result<(), QueryError> {
    if !is_alone() {
        tokio::time::sleep(QUIET).await;
    }
    loop {
        await_compaction(connection, device, is_alone).await?;
        delete_readings(connection, device).await?;
        for sql in BY_DEVICE {
            let arguments = [device.into(), ROWS_AT_ONCE.into()];
            while connection.step(sql, &arguments).await? == ROWS_AT_ONCE as u64 {
                tokio::time::sleep(PAUSE).await;
            }
        }
        connection.begin().await?;
        let finished = finish(connection, device).await;
        if connection.end(finished).await? {
            return Ok(());
        }
        // A gateway may still have been storing the device's last frames.
        tokio::time::sleep(QUIET).await;
    }
}

/// Returns the table that holds readings permanently. In SQLite, `readings_recent` is the level 0 in front of it.
fn readings_table(connection: &Connection) -> &'static str {
    match connection.is_sqlite() {
        true => "readings_sorted",
        false => "readings",
    }
}

/// Waits until a gateway has compacted the device's level-0 readings, which it caches; deletes them if no gateway runs.
async fn await_compaction(
    connection: &mut Connection,
    device: i64,
    is_alone: &mut impl FnMut() -> bool,
) -> Result<(), QueryError> {
    const OF_DEVICE: &str = "series_id IN (SELECT id FROM series WHERE device_id = $1)";
    if !connection.is_sqlite() {
        return Ok(());
    }
    let sql = format!("SELECT EXISTS (SELECT 1 FROM readings_recent WHERE {OF_DEVICE})");
    while connection.integer(&sql, &[device.into()]).await? != 0 {
        if is_alone() {
            let sql = format!("DELETE FROM readings_recent WHERE {OF_DEVICE}");
            return connection.step(&sql, &[device.into()]).await.map(drop);
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
    Ok(())
}

async fn delete_readings(connection: &mut Connection, device: i64) -> Result<(), QueryError> {
    let table = readings_table(connection);
    let series = "SELECT id FROM series WHERE device_id = $1 ORDER BY id";
    let find = format!(
        "SELECT ts FROM {table} WHERE series_id = $1 ORDER BY ts LIMIT 1 OFFSET {ROWS_AT_ONCE}"
    );
    let some = format!("DELETE FROM {table} WHERE series_id = $1 AND ts <= $2");
    let rest = format!("DELETE FROM {table} WHERE series_id = $1");
    for row in connection.rows(series, &[device.into()]).await? {
        let series = row.integer(0)?;
        while let Some(row) = connection.rows(&find, &[series.into()]).await?.first() {
            let through = Argument::Time(row.integer(0)?);
            connection.step(&some, &[series.into(), through]).await?;
            tokio::time::sleep(PAUSE).await;
        }
        connection.step(&rest, &[series.into()]).await?;
    }
    Ok(())
}

/// Deletes the device itself, unless new rows have arrived for it; returns whether it did.
async fn finish(connection: &mut Connection, device: i64) -> Result<bool, QueryError> {
    if !is_bare(connection, device).await? {
        return Ok(false);
    }
    let newest =
        "DELETE FROM newest WHERE series_id IN (SELECT id FROM series WHERE device_id = $1)";
    let newest = (!connection.is_sqlite()).then_some(newest);
    for sql in newest.into_iter().chain([
        "DELETE FROM sessions WHERE device_id = $1",
        "DELETE FROM device_events WHERE device_id = $1",
        "DELETE FROM clocks WHERE device_id = $1",
        "DELETE FROM streams WHERE device_id = $1",
        "DELETE FROM series WHERE device_id = $1",
        "DELETE FROM schemas WHERE device_id = $1",
        "DELETE FROM devices WHERE id = $1",
    ]) {
        connection.execute(sql, &[device.into()]).await?;
    }
    Ok(true)
}

/// Returns whether no rows remain in the tables that grow with a device's data. In Postgres this also locks the
/// device's streams until the transaction ends.
async fn is_bare(connection: &mut Connection, device: i64) -> Result<bool, QueryError> {
    let table = readings_table(connection);
    let mut recent = "";
    if connection.is_sqlite() {
        recent = "+ (SELECT count(*) FROM readings_recent WHERE series_id IN
            (SELECT id FROM series WHERE device_id = $1))";
    } else {
        let lock = "SELECT id FROM streams WHERE device_id = $1 ORDER BY id FOR UPDATE";
        connection.rows(lock, &[device.into()]).await?;
    }
    let sql = format!(
        "SELECT CAST(
             (SELECT count(*) FROM streams AS s WHERE s.device_id = $1
                 AND EXISTS (SELECT 1 FROM frames AS f WHERE f.stream_id = s.id))
             + (SELECT count(*) FROM series AS s WHERE s.device_id = $1
                 AND EXISTS (SELECT 1 FROM {table} AS r WHERE r.series_id = s.id))
             + (SELECT count(*) FROM quarantine AS q WHERE q.device_id = $1)
             {recent} AS BIGINT)"
    );
    Ok(connection.integer(&sql, &[device.into()]).await? == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::store_url::StoreUrl;
    use crate::store::admin::Access;
    use crate::store::admin::device::{DeviceEdit, find};
    use crate::store::conformance::{Peer, admitted, login, peer};
    use crate::store::sqlite::{SqliteSettings, SqliteStore};
    use crate::store::{Batch, Content, DeviceEvent, DeviceEventKind, Entry, SessionId, Store};

    fn content(peer: &Peer, seq: u64, content: Content) -> Entry {
        Entry {
            content,
            ..peer.gap(seq, seq)
        }
    }

    /// Stores one row of every kind for a device.
    async fn fill(store: &mut impl Store, name: &str) -> Peer {
        let peer = peer(store, name).await;
        let quarantined = Content::Quarantined {
            code: 30,
            detail: String::new(),
            bytes: vec![1],
            peer: String::new(),
        };
        // More readings than one step deletes, in Postgres and in SQLite.
        let rows: Vec<(i64, f64)> = (0..ROWS_AT_ONCE + 10).map(|ts| (ts, 1.0)).collect();
        let mut entries = vec![
            peer.readings(1, &[(-5, 1.0)]),
            peer.gap(2, 4),
            content(&peer, 5, quarantined),
        ];
        for (seq, rows) in (6..).zip(rows.chunks(500)) {
            entries.push(peer.readings(seq, rows));
        }
        let connected = DeviceEvent {
            device: peer.device,
            session: Some(SessionId(peer.device.0)),
            at_us: 1,
            kind: DeviceEventKind::Connected,
            code: 0,
            detail: String::new(),
        };
        let batch = Batch {
            entries,
            events: vec![connected],
            ..Batch::default()
        };
        store.commit(&batch).await.unwrap();
        peer
    }

    /// Returns the row counts of all tables that refer to a device, stream or series, except `removed_devices`.
    async fn left(store: &StoreUrl, peer: &Peer) -> Vec<(String, i64)> {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        let columns = match store {
            StoreUrl::Sqlite(_) => {
                "SELECT m.name, c.name FROM sqlite_master AS m CROSS JOIN pragma_table_info(m.name) AS c
                 WHERE m.type = 'table'"
            }
            StoreUrl::Postgres(_) => {
                "SELECT CAST(t.table_name AS text), CAST(c.column_name AS text)
                 FROM information_schema.tables AS t
                 JOIN information_schema.columns AS c USING (table_schema, table_name)
                 WHERE t.table_schema = 'public' AND t.table_type = 'BASE TABLE'"
            }
        };
        let mut left = Vec::new();
        for row in connection.rows(columns, &[]).await.unwrap() {
            let text = |n| row.text_or_null(n).unwrap().unwrap().to_owned();
            let (table, column) = (text(0), text(1));
            let id = match (table.as_str(), column.as_str()) {
                ("removed_devices" | "readings_sorting", _) => continue,
                ("devices", "id") | (_, "device_id") => peer.device.0,
                ("streams", "id") | (_, "stream_id") => peer.stream.0,
                ("series", "id") | (_, "series_id") => peer.series.0,
                _ => continue,
            };
            let sql = format!("SELECT CAST(count(*) AS BIGINT) FROM {table} WHERE {column} = $1");
            let rows = connection.rows(&sql, &[id.into()]).await.unwrap();
            left.push((format!("{table}.{column}"), rows[0].integer(0).unwrap()));
        }
        left.sort();
        left
    }

    async fn give_up_name(store: &StoreUrl, name: &str) -> i64 {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        let mut edit = DeviceEdit::begin(&mut connection, 5).await.unwrap();
        let found = edit.find([name].into_iter()).await.unwrap();
        edit.remove(&found[name]).await.unwrap();
        connection.commit().await.unwrap();
        found[name].device.0
    }

    async fn is_full(store: &StoreUrl, peer: &Peer) {
        let left = left(store, peer).await;
        assert!(left.len() > 10, "{left:?}");
        // Readings are in one of the two tables, and `fill` opens no session.
        let has_rows = |(table, rows): &(String, i64)| {
            *rows > 0 || table.starts_with("readings_") || table == "sessions.device_id"
        };
        assert!(left.iter().all(has_rows), "{left:?}");
    }

    /// Adds a row of presence for each new device.
    async fn watch(store: &StoreUrl) {
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        let sql = "INSERT INTO presence (device_id) SELECT id FROM devices WHERE id > 0
            ON CONFLICT DO NOTHING";
        connection.step(sql, &[]).await.unwrap();
    }

    async fn nothing_is_left<S: Store>(store: &StoreUrl, mut writer: S) -> S {
        let gone = fill(&mut writer, "gone").await;
        let stays = fill(&mut writer, "stays").await;
        watch(store).await;
        is_full(store, &gone).await;
        let before = left(store, &stays).await;
        let id = give_up_name(store, "gone").await;
        // The name is free immediately, and ids are not reused.
        let again = fill(&mut writer, "gone").await;
        assert!(again.device != gone.device && again.series != gone.series);
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        assert_eq!(
            find(&mut connection, "gone").await.unwrap().unwrap().device,
            again.device
        );
        let counts = belongings(&mut connection, id).await.unwrap().counts;
        assert_eq!(counts[0], ("readings", ROWS_AT_ONCE as u64 + 11));
        // An interrupted run, and a frame that a session stores after it ended.
        let mut is_alone = || true;
        let broken_off = take_out(&mut connection, id, &mut is_alone);
        drop(tokio::time::timeout(Duration::from_millis(30), broken_off).await);
        // The removal may have been interrupted while it held the write turn.
        drop(connection);
        let mut connection = Connection::open(store, Access::Write).await.unwrap();
        take_out(&mut connection, id, &mut is_alone).await.unwrap();
        let left_of = left(store, &gone).await;
        assert!(left_of.iter().all(|(_, rows)| *rows == 0), "{left_of:?}");
        assert_eq!(left(store, &stays).await, before);
        watch(store).await;
        is_full(store, &again).await;
        let late = Batch {
            events: vec![DeviceEvent {
                device: gone.device,
                session: Some(SessionId(gone.device.0)),
                at_us: 2,
                kind: DeviceEventKind::Disconnected,
                code: 52,
                detail: String::new(),
            }],
            ..Batch::default()
        };
        writer.commit(&late).await.unwrap();
        let newest = admitted(&mut writer, login("newest", 1, 1)).await;
        assert!(newest.device > again.device);
        writer
    }

    #[tokio::test]
    async fn nothing_of_a_removed_device_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
        let store = nothing_is_left(&StoreUrl::Sqlite(path), store.unwrap()).await;
        store.close().await.unwrap();
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn nothing_of_a_removed_device_is_left_in_postgres() {
        let database = crate::store::postgres::tests::Database::create().await;
        let store = crate::store::postgres::PostgresStore::open(database.settings()).await;
        let url = StoreUrl::Postgres(database.settings().url);
        nothing_is_left(&url, store.unwrap().swap_remove(0)).await;
    }
}
