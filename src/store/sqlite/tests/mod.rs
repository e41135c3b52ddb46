//! The conformance suite over SQLite, and SQLite-specific behaviour: its log, its errors, its plans.

use std::path::PathBuf;

use sqlx::{AssertSqlSafe, Row, SqliteConnection};
use tempfile::TempDir;

use super::*;
use crate::config::DeviceBounds;
use crate::config::store_url::StoreUrl;
use crate::store::admin::Access;
use crate::store::conformance::{Dump, Harness, Peer, change, conformance, peer};
use crate::store::{Entry, Login};

mod declares;
mod level0;
mod open;
mod views;

conformance!(OnDisk);

async fn open_reader(path: &Path) -> Result<SqliteConnection, OpenError> {
    open_existing(path, Purpose::Store, Access::Read).await
}

struct OnDisk {
    directory: TempDir,
    store: SqliteStore,
}

impl OnDisk {
    async fn with(settings: &SqliteSettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(directory.path().join("test.db"), settings)
            .await
            .unwrap();
        Self { directory, store }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("test.db")
    }

    fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.store.writer.as_mut().unwrap().conn
    }

    fn log_bytes(&self) -> u64 {
        std::fs::metadata(self.directory.path().join("test.db-wal"))
            .unwrap()
            .len()
    }
}

async fn run(conn: &mut SqliteConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(conn)
        .await
        .unwrap();
}

impl Harness for OnDisk {
    type Store = SqliteStore;

    async fn create() -> Self {
        Self::with(&SqliteSettings::default()).await
    }

    fn store(&mut self) -> &mut SqliteStore {
        &mut self.store
    }

    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        let path = self.directory.path().join("test.db");
        let store = SqliteStore::open(path, &SqliteSettings::default())
            .await
            .unwrap();
        Self {
            directory: self.directory,
            store,
        }
    }

    async fn change(&mut self, device: &str, is_enabled: bool, replaces_key: bool) -> i64 {
        change(
            &StoreUrl::Sqlite(self.path()),
            device,
            is_enabled,
            replaces_key,
        )
        .await
    }

    async fn fill_disk(&mut self) {
        run(self.conn(), "PRAGMA max_page_count = 60").await;
    }

    async fn free_disk(&mut self) {
        run(self.conn(), "PRAGMA max_page_count = 4294967294").await;
    }

    async fn dump(&mut self) -> Dump {
        let path = self.path();
        dump(&mut open_reader(&path).await.unwrap()).await
    }
}

async fn dump(conn: &mut SqliteConnection) -> Dump {
    let mut dump = Dump::default();
    let frames = "SELECT d.name, f.stream_id, f.seq, f.type, f.quality, f.clock_offset_us
        FROM frames f JOIN streams s ON s.id = f.stream_id JOIN devices d ON d.id = s.device_id
        ORDER BY f.stream_id, f.seq";
    for r in sqlx::query(frames).fetch_all(&mut *conn).await.unwrap() {
        let quality = r.get(4);
        dump.frames
            .push((r.get(0), r.get(1), seq(&r, 2), r.get(3), quality, r.get(5)));
    }
    let readings = "SELECT d.name, s.channel, s.unit, r.ts, f.seq, r.value
        FROM readings r JOIN series s ON s.id = r.series_id JOIN devices d ON d.id = s.device_id
        JOIN frames f ON f.id = r.frame_id";
    for r in sqlx::query(readings).fetch_all(&mut *conn).await.unwrap() {
        let bits = r.get::<Option<f64>, _>(5).map(f64::to_bits);
        dump.readings
            .push((r.get(0), r.get(1), r.get(2), r.get(3), seq(&r, 4), bits));
    }
    let gaps = "SELECT stream_id, from_seq, to_seq, reason FROM gaps ORDER BY 1, 2";
    for r in sqlx::query(gaps).fetch_all(&mut *conn).await.unwrap() {
        dump.gaps.push((r.get(0), seq(&r, 1), seq(&r, 2), r.get(3)));
    }
    let quarantine = "SELECT stream_id, seq, code, detail, bytes FROM quarantine ORDER BY 1, 2";
    for r in sqlx::query(quarantine).fetch_all(&mut *conn).await.unwrap() {
        dump.quarantine
            .push((r.get(0), seq(&r, 1), r.get(2), r.get(3), r.get(4)));
    }
    let usage =
        "SELECT d.name, u.bytes FROM quarantine_usage u JOIN devices d ON d.id = u.device_id";
    for r in sqlx::query(usage).fetch_all(&mut *conn).await.unwrap() {
        dump.quarantine_usage.insert(r.get(0), seq(&r, 1));
    }
    let events = "SELECT d.name, e.at, e.kind, e.code, e.detail
        FROM device_events e JOIN devices d ON d.id = e.device_id";
    for r in sqlx::query(events).fetch_all(&mut *conn).await.unwrap() {
        dump.events
            .push((r.get(0), r.get(1), r.get(2), r.get(3), r.get(4)));
    }
    let open = "SELECT peer FROM sessions ORDER BY id";
    for r in sqlx::query(open).fetch_all(&mut *conn).await.unwrap() {
        dump.open_sessions.push(r.get(0));
    }
    let clocks = "SELECT d.name, c.boot, c.offset_us, c.delay_us
        FROM clocks c JOIN devices d ON d.id = c.device_id ORDER BY d.id, c.boot";
    for r in sqlx::query(clocks).fetch_all(&mut *conn).await.unwrap() {
        dump.clocks.push((r.get(0), r.get(1), r.get(2), seq(&r, 3)));
    }
    let refusals = "SELECT peer, device, code, count, first_at, last_at FROM refusals
        ORDER BY peer, device, code";
    for r in sqlx::query(refusals).fetch_all(&mut *conn).await.unwrap() {
        dump.refusals
            .push((r.get(0), r.get(1), r.get(2), seq(&r, 3), r.get(4), r.get(5)));
    }
    dump.readings.sort();
    dump.events.sort();
    dump
}

fn seq(row: &sqlx::sqlite::SqliteRow, column: usize) -> u64 {
    row.get::<i64, _>(column).cast_unsigned()
}

/// Returns consecutive frames of one peer, with `rows` rows each.
fn frames(peer: &Peer, seqs: std::ops::Range<u64>, rows: i64) -> Batch {
    let entry = |seq: u64| -> Entry {
        let start = seq.cast_signed() * rows;
        let rows: Vec<(i64, f64)> = (start..start + rows).map(|ts| (ts, ts as f64)).collect();
        peer.readings(seq, &rows)
    };
    Batch {
        entries: seqs.map(entry).collect(),
        ..Batch::default()
    }
}

fn small_log() -> SqliteSettings {
    SqliteSettings {
        cache_bytes: 1 << 20,
        page_bytes: 4096,
        wal_checkpoint_bytes: 128 << 10,
        wal_soft_bytes: 512 << 10,
        wal_hard_bytes: 2 << 20,
        bounds: DeviceBounds::default(),
    }
}

/// More than a batch of `frames` below adds to the log.
const BATCH_BYTES: u64 = 512 << 10;

#[tokio::test]
async fn the_log_stays_short_under_load() {
    let mut h = OnDisk::with(&small_log()).await;
    let peer = peer(&mut h.store, "a").await;
    for n in 0..120 {
        h.store
            .commit(&frames(&peer, n * 10 + 1..n * 10 + 11, 200))
            .await
            .unwrap();
        assert!(
            h.log_bytes() <= small_log().wal_soft_bytes + BATCH_BYTES,
            "{}",
            h.log_bytes()
        );
    }
}

#[tokio::test]
async fn a_reader_cannot_make_the_log_grow_without_bound() {
    let mut h = OnDisk::with(&small_log()).await;
    let peer = peer(&mut h.store, "a").await;
    let mut reader = open_reader(&h.path()).await.unwrap();
    run(&mut reader, "BEGIN; SELECT count(*) FROM readings").await;
    let mut refusals = 0;
    let mut seq = 1;
    for _ in 0..120 {
        match h.store.commit(&frames(&peer, seq..seq + 10, 200)).await {
            Ok(_) => seq += 10,
            Err(StoreError::Transient(reason)) => {
                assert!(reason.contains("a reader blocks"), "{reason}");
                refusals += 1;
                if refusals == 2 {
                    break;
                }
            }
            Err(fatal) => panic!("{fatal}"),
        }
        assert!(
            h.log_bytes() <= small_log().wal_hard_bytes + BATCH_BYTES,
            "{}",
            h.log_bytes()
        );
    }
    assert_eq!(refusals, 2, "the hard limit was never reached");
    run(&mut reader, "ROLLBACK").await;
    for _ in 0..20 {
        h.store
            .commit(&frames(&peer, seq..seq + 10, 200))
            .await
            .unwrap();
        seq += 10;
    }
    assert!(
        h.log_bytes() <= small_log().wal_soft_bytes + BATCH_BYTES,
        "{}",
        h.log_bytes()
    );
    let receipt = h
        .store
        .commit(&frames(&peer, seq..seq + 1, 1))
        .await
        .unwrap()
        .receipts[0];
    assert_eq!(receipt.durable_seq(), seq);
}

#[tokio::test]
async fn a_command_that_writes_much_keeps_the_log_short() {
    let h = OnDisk::create().await;
    let conn = open_existing(&h.path(), Purpose::Store, Access::Write).await;
    let mut conn = conn.unwrap();
    run(&mut conn, "CREATE TABLE filler (content BLOB)").await;
    for _ in 0..60 {
        run(&mut conn, "INSERT INTO filler VALUES (zeroblob(1 << 20))").await;
    }
    assert!(h.log_bytes() < 12 << 20, "{}", h.log_bytes());
}

/// As when retention deletes while a reader delays the checkpoints.
#[tokio::test]
async fn a_file_that_becomes_shorter_is_not_taken_for_overwritten() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let mut seq = 0;
    let mut next = || {
        seq += 20;
        frames(&peer, seq - 19..seq + 1, 200)
    };
    let moves = "PRAGMA wal_checkpoint(PASSIVE)";
    for _ in 0..5 {
        h.store.commit(&next()).await.unwrap();
    }
    run(h.conn(), moves).await;
    h.store.commit(&next()).await.unwrap();
    let mut reader = open_reader(&h.path()).await.unwrap();
    run(&mut reader, "BEGIN; SELECT count(*) FROM readings").await;
    run(h.conn(), "DELETE FROM readings_sorted").await;
    run(h.conn(), "PRAGMA incremental_vacuum").await;
    run(h.conn(), moves).await;
    // The part of the log before the deletion is moved, so the file is still long.
    h.store.commit(&next()).await.unwrap();
    let before = std::fs::metadata(h.path()).unwrap().len();
    run(&mut reader, "ROLLBACK").await;
    run(h.conn(), moves).await;
    let after = std::fs::metadata(h.path()).unwrap().len();
    assert!(after < before, "{before} to {after} bytes");
    h.store.commit(&next()).await.unwrap();
}

#[tokio::test]
async fn a_database_held_by_another_writer_is_transient() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    run(h.conn(), "PRAGMA busy_timeout = 1").await;
    let mut other = SqliteConnection::connect(h.path().to_str().unwrap())
        .await
        .unwrap();
    run(&mut other, "BEGIN IMMEDIATE").await;
    let busy = h.store.commit(&frames(&peer, 1..2, 1)).await;
    assert!(matches!(busy, Err(StoreError::Transient(_))), "{busy:?}");
    run(&mut other, "ROLLBACK").await;
    h.store.commit(&frames(&peer, 1..2, 1)).await.unwrap();
}

#[tokio::test]
async fn after_a_fatal_error_commits_fail() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    run(h.conn(), "PRAGMA query_only = ON").await;
    for _ in 0..2 {
        let failed = h.store.commit(&frames(&peer, 1..2, 1)).await;
        assert!(matches!(failed, Err(StoreError::Fatal(_))), "{failed:?}");
        assert!(
            h.store.writer.is_none(),
            "closing it would run a checkpoint"
        );
    }
}

#[tokio::test]
async fn a_commit_dropped_half_way_is_harmless() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let batch = frames(&peer, 1..400, 100);
    for polls in 1..60 {
        let mut commit = Box::pin(h.store.commit(&batch));
        let mut left = polls;
        std::future::poll_fn(|cx| {
            left -= 1;
            match commit.as_mut().poll(cx) {
                std::task::Poll::Pending if left > 0 => std::task::Poll::Pending,
                _ => std::task::Poll::Ready(()),
            }
        })
        .await;
    }
    assert_eq!(
        h.store.commit(&batch).await.unwrap().receipts[0].durable_seq(),
        399
    );
    assert_eq!(h.dump().await.readings.len(), 39_900);
}

#[tokio::test]
async fn totals_move_with_the_rows() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    for batch in [frames(&peer, 1..4, 7), frames(&peer, 2..6, 7)] {
        h.store.commit(&batch).await.unwrap();
    }
    let row = sqlx::query("SELECT durable_seq, frames, readings FROM streams");
    let row = row.fetch_one(h.conn()).await.unwrap();
    assert_eq!(
        (
            row.get::<i64, _>(0),
            row.get::<i64, _>(1),
            row.get::<i64, _>(2)
        ),
        (5, 5, 35)
    );
}

#[tokio::test]
async fn statements_find_rows_by_index() {
    let mut h = OnDisk::create().await;
    let mut logins: Vec<Login> = Vec::new();
    for n in 0..3000 {
        logins.push(crate::store::conformance::login(&format!("d{n}"), 1, 1));
    }
    h.store
        .commit(&Batch {
            logins,
            ..Batch::default()
        })
        .await
        .unwrap();
    let sql = "EXPLAIN QUERY PLAN
        WITH moved(id, durable_seq) AS ( VALUES (1,2),(3,4),(5,6) )
        UPDATE streams SET durable_seq = moved.durable_seq FROM moved WHERE streams.id = moved.id";
    for analyzed in [false, true] {
        if analyzed {
            run(h.conn(), "ANALYZE").await;
        }
        let plan = plan(h.conn(), sql).await;
        assert!(
            plan.contains("SEARCH streams USING INTEGER PRIMARY KEY"),
            "{plan}"
        );
        assert!(!plan.contains("SCAN streams"), "{plan}");
    }
}

async fn plan(conn: &mut SqliteConnection, sql: &str) -> String {
    let rows = sqlx::query(AssertSqlSafe(sql))
        .fetch_all(conn)
        .await
        .unwrap();
    rows.iter()
        .map(|row| row.get::<String, _>(3) + "\n")
        .collect()
}

#[tokio::test]
async fn a_number_reused_with_different_content_is_recorded() {
    crate::store::conformance::a_number_reused_with_different_content_is_recorded::<OnDisk>().await;
}

#[tokio::test]
async fn rows_dropped_silently_by_a_trigger_are_detected() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    for (seq, table, event) in [
        (1, "frames", "INSERT"),
        (2, "readings_recent", "INSERT"),
        (3, "streams", "UPDATE"),
    ] {
        let batch = Batch {
            entries: vec![peer.readings(seq, &[(5, 1.0)])],
            ..Batch::default()
        };
        let trigger = format!(
            "CREATE TRIGGER leave_out BEFORE {event} ON {table} BEGIN SELECT RAISE(IGNORE); END"
        );
        run(h.conn(), &trigger).await;
        let failed = h.store.commit(&batch).await.unwrap_err();
        assert!(matches!(failed, StoreError::Transient(_)), "{failed:?}");
        assert!(failed.to_string().contains("drops rows"), "{failed}");
        run(h.conn(), "DROP TRIGGER leave_out").await;
        let committed = h.store.commit(&batch).await.unwrap();
        assert_eq!(committed.receipts[0].durable_seq(), seq);
    }
}
