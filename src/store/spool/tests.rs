//! The conformance suite over a spool and its database, and spool-specific behaviour.

use sqlx::{AssertSqlSafe, PgConnection};
use tempfile::TempDir;

use super::destination::Destination;
use super::*;
use crate::config::store_url::StoreUrl;
use crate::store::admin::mirror::Mirror;
use crate::store::admin::{Access, Connection, Poll, Source};
use crate::store::conformance::{
    Dump, Harness, Peer, change, conformance, eventually, peer, revision_of,
};
use crate::store::postgres::tests::{Database, dump};
use crate::store::postgres::{PostgresStore, REASON_LOST_BY_STORE, SpoolClaim};
use crate::store::sqlite::spool::Cursor;

conformance!(
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    Spooled
);

struct Spooled {
    store: SpoolStore,
    directory: TempDir,
    database: Database,
}

const BYTES_MAX: u64 = 1 << 30;

impl Spooled {
    async fn open(directory: TempDir, database: Database) -> Self {
        let store = open(&directory, &database).await.unwrap();
        Self {
            store,
            directory,
            database,
        }
    }

    /// Waits until the spool is empty; returns a connection to the database.
    async fn drained(&mut self) -> PgConnection {
        let path = self.directory.path().join("spool.db");
        let mut reader = SpoolReader::open(&path).await.unwrap();
        let is_empty = async || {
            let chunk = reader.chunk(Cursor::default()).await;
            chunk.unwrap().is_empty()
        };
        eventually("the spool is empty", is_empty).await;
        self.database.connect().await
    }

    async fn readings(&mut self, peer: &Peer, seqs: std::ops::Range<u64>) {
        let entry = |seq: u64| peer.readings(seq, &[(seq.cast_signed(), seq as f64)]);
        let batch = Batch {
            entries: seqs.map(entry).collect(),
            ..Batch::default()
        };
        self.store.commit(&batch).await.unwrap();
    }
}

async fn open(directory: &TempDir, database: &Database) -> Result<SpoolStore, SpoolError> {
    let path = directory.path().join("spool.db");
    let settings = SqliteSettings::default();
    let close_within = Duration::from_secs(10);
    SpoolStore::open(
        &path,
        &settings,
        BYTES_MAX,
        close_within,
        database.settings(),
    )
    .await
}

/// Returns the claim of an open spool.
async fn claim(store: &SpoolStore) -> SpoolClaim {
    let identity = store.spool.lock().await.identity().await.unwrap();
    SpoolClaim {
        id: identity.id,
        instance: identity.instance,
        drained: identity.drained,
        found_drained: identity.drained,
    }
}

async fn run(conn: &mut PgConnection, sql: &str) {
    let sql = AssertSqlSafe(sql.to_owned());
    sqlx::raw_sql(sql).execute(conn).await.unwrap();
}

impl Harness for Spooled {
    type Store = SpoolStore;

    async fn create() -> Self {
        Self::open(tempfile::tempdir().unwrap(), Database::create().await).await
    }

    fn store(&mut self) -> &mut SpoolStore {
        &mut self.store
    }

    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        Self::open(self.directory, self.database).await
    }

    async fn change(&mut self, device: &str, is_enabled: bool, replaces_key: bool) -> i64 {
        // The drain creates devices in the database.
        self.drained().await;
        let database = StoreUrl::Postgres(self.database.settings().url);
        change(&database, device, is_enabled, replaces_key).await;
        let path = self.directory.path().join("spool.db");
        Mirror::new(&database, path.clone()).poll().await.unwrap();
        let spool = Connection::open(Source::Spool(path), Access::Read).await;
        revision_of(&mut spool.unwrap(), device).await
    }

    async fn fill_disk(&mut self) {
        self.store.bytes_max = 0;
    }

    async fn free_disk(&mut self) {
        self.store.bytes_max = BYTES_MAX;
    }

    async fn dump(&mut self) -> Dump {
        dump(&mut self.drained().await).await
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn frames_drained_but_not_deleted_are_stored_once() {
    let mut h = Spooled::create().await;
    let peer = peer(&mut h.store, "a").await;
    h.readings(&peer, 1..4).await;
    h.drained().await;
    // Like a crash between the commit in the database and the deletion in the spool: the next chunk begins with frames
    // that the database has.
    let mut spool = h.store.spool.lock().await;
    let spooled = Batch {
        entries: (1..6)
            .map(|seq: u64| peer.readings(seq, &[(seq.cast_signed(), seq as f64)]))
            .collect(),
        ..Batch::default()
    };
    spool.set_durable_seq(0).await;
    spool.commit(&spooled).await.unwrap();
    drop(spool);
    h.store.arrived.notify_one();
    let dump = h.dump().await;
    let seqs: Vec<u64> = dump.frames.iter().map(|frame| frame.2).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
    assert_eq!(dump.readings.len(), 5);
    assert!(dump.gaps.is_empty());
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn frames_lost_by_the_database_become_a_gap() {
    let mut h = Spooled::create().await;
    let peer = peer(&mut h.store, "a").await;
    h.readings(&peer, 1..8).await;
    // Like a restored backup.
    let restored = "DELETE FROM readings; DELETE FROM frames WHERE seq > 3;
        UPDATE streams SET durable_seq = 3, frames = 3, readings = 3";
    run(&mut h.drained().await, restored).await;
    h.readings(&peer, 8..10).await;
    let dump = h.dump().await;
    assert_eq!(dump.gaps, [(1, 4, 7, REASON_LOST_BY_STORE)]);
    let seqs: Vec<u64> = dump.frames.iter().map(|frame| frame.2).collect();
    assert_eq!(seqs, [1, 2, 3, 7, 8, 9]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn frames_that_the_database_rejects_are_not_deleted() {
    let mut h = Spooled::create().await;
    let peer = peer(&mut h.store, "a").await;
    h.drained().await;
    h.store.drain.shutdown().await;
    h.readings(&peer, 1..5).await;
    let path = h.directory.path().join("spool.db");
    let mut reader = SpoolReader::open(&path).await.unwrap();
    let mut chunk = reader.chunk(Cursor::default()).await.unwrap();
    // Only a bug could cause this.
    chunk.entries.remove(1);
    let settings = PostgresSettings {
        spool: Some(claim(&h.store).await),
        ..h.database.settings()
    };
    let mut connected = Destination::open(settings, false).await.unwrap();
    let mut batch = connected.translate(&mut chunk, &mut reader).await.unwrap();
    let refused = connected.commit(&mut batch).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Transient(why) if why.contains("continue")));
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_restored_database_gets_gaps_for_lost_frames() {
    let mut h = Spooled::create().await;
    let (a, b) = (peer(&mut h.store, "a").await, peer(&mut h.store, "b").await);
    h.readings(&a, 1..3).await;
    h.drained().await;
    h.database.back_up().await;
    h.readings(&a, 3..6).await;
    h.readings(&b, 1..4).await;
    let c = peer(&mut h.store, "c").await;
    h.readings(&c, 1..2).await;
    h.drained().await;
    h.database.restored().await;
    // Only b sends after that.
    h.readings(&b, 4..6).await;
    let dump = h.dump().await;
    let stream = |device: &str| {
        let of_device = dump.frames.iter().find(|row| row.0 == device);
        of_device.expect("has frames").1
    };
    let mut gaps = vec![
        (stream("a"), 3, 5, REASON_LOST_BY_STORE),
        (stream("b"), 1, 3, REASON_LOST_BY_STORE),
        (stream("c"), 1, 1, REASON_LOST_BY_STORE),
    ];
    gaps.sort_unstable();
    let mut found = dump.gaps.clone();
    found.sort_unstable();
    assert_eq!(found, gaps);
    let mut conn = h.drained().await;
    let schemas = "SELECT count(*) FROM schemas";
    let schemas: i64 = { sqlx::query_scalar(schemas) }
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!(schemas, 3);
    // Later frames continue from there.
    h.readings(&a, 6..7).await;
    assert_eq!(h.dump().await.gaps.len(), 3);
}

/// Copies the spool to a new directory.
fn copied(directory: &TempDir) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["spool.db", "spool.db-wal"] {
        let from = directory.path().join(name);
        if from.exists() {
            std::fs::copy(from, copy.path().join(name)).unwrap();
        }
    }
    copy
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn only_one_copy_of_a_spool_drains_into_the_database() {
    let mut h = Spooled::create().await;
    let a = peer(&mut h.store, "a").await;
    h.readings(&a, 1..3).await;
    h.drained().await;
    // The copy is refused while the original runs,
    let copy = copied(&h.directory);
    let refused = open(&copy, &h.database).await.err().unwrap().to_string();
    assert!(refused.contains("a copy of this spool"), "{refused}");
    h.readings(&a, 3..5).await;
    let mut h = h.reopen().await;
    h.drained().await;
    h.store.close().await.unwrap();
    // and after it ended, because it may have drained frames that the copy lacks.
    let refused = open(&copy, &h.database).await.err().unwrap().to_string();
    assert!(refused.contains("a copy of this spool"), "{refused}");

    // A copy made after its end may continue; then the original may not.
    let copy = copied(&h.directory);
    let mut moved = Spooled::open(copy, h.database).await;
    moved.readings(&a, 5..6).await;
    moved.drained().await;
    let refused = open(&h.directory, &moved.database).await;
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("a copy of this spool"), "{refused}");
    let dump = moved.dump().await;
    assert!(dump.gaps.is_empty());
    assert_eq!(dump.frames.len(), 5);
}

/// Frames that both have acknowledged must not be dropped as duplicates of each other.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_copy_that_started_without_the_database_keeps_its_frames() {
    let mut h = Spooled::create().await;
    let a = peer(&mut h.store, "a").await;
    h.readings(&a, 1..3).await;
    h.drained().await;
    let copy = copied(&h.directory);
    // Nothing listens there.
    let StoreUrl::Postgres(nowhere) = "postgres://127.0.0.1:1/none".parse().unwrap() else {
        panic!("an address")
    };
    let path = copy.path().join("spool.db");
    let absent = PostgresSettings {
        url: nowhere,
        ..h.database.settings()
    };
    let mut twin = SpoolStore::open(
        &path,
        &SqliteSettings::default(),
        BYTES_MAX,
        Duration::ZERO,
        absent,
    )
    .await
    .unwrap();
    let batch = Batch {
        entries: vec![a.gap(3, 4)],
        ..Batch::default()
    };
    twin.commit(&batch).await.unwrap();
    twin.close().await.unwrap();
    let refused = open(&copy, &h.database).await.err().unwrap().to_string();
    assert!(refused.contains("a copy of this spool"), "{refused}");
    h.readings(&a, 3..5).await;
    let dump = h.dump().await;
    assert_eq!((dump.readings.len(), dump.gaps.len()), (4, 0));
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_restored_spool_continues_from_the_positions_in_the_database() {
    let mut h = Spooled::create().await;
    let a = peer(&mut h.store, "a").await;
    h.readings(&a, 1..3).await;
    h.drained().await;
    let mut h = h.reopen().await;
    let backup = copied(&h.directory);
    for seq in 3..8 {
        h.readings(&a, seq..seq + 1).await;
        h.drained().await;
    }
    let Spooled {
        store,
        directory,
        database,
    } = h;
    store.close().await.unwrap();
    std::fs::copy(
        backup.path().join("spool.db"),
        directory.path().join("spool.db"),
    )
    .unwrap();
    for name in ["spool.db-wal", "spool.db-shm"] {
        let path = directory.path().join(name);
        let _ = std::fs::remove_file(&path);
    }
    let wal = backup.path().join("spool.db-wal");
    if wal.exists() {
        std::fs::copy(wal, directory.path().join("spool.db-wal")).unwrap();
    }
    let mut h = Spooled::open(directory, database).await;
    let login = crate::store::conformance::login("a", 1, 8);
    let admission = crate::store::conformance::admitted(&mut h.store, login).await;
    assert_eq!(admission.receipt.durable_seq(), 7);
    h.readings(&a, 8..9).await;
    assert_eq!(h.dump().await.frames.len(), 8);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_full_spool_accepts_frames_again_after_draining() {
    let mut h = Spooled::create().await;
    let peer = peer(&mut h.store, "a").await;
    let mut blocker = h.drained().await;
    run(
        &mut blocker,
        "BEGIN; LOCK TABLE streams IN ACCESS EXCLUSIVE MODE",
    )
    .await;
    h.store.bytes_max = 1 << 20;
    let batch = |first: u64| Batch {
        entries: (first..first + 1000)
            .map(|seq| peer.readings(seq, &[(seq.cast_signed(), 1.0)]))
            .collect(),
        ..Batch::default()
    };
    let mut next = 1;
    let refused = loop {
        match h.store.commit(&batch(next)).await {
            Ok(_) => next += 1000,
            Err(refused) => break refused,
        }
    };
    assert!(matches!(&refused, StoreError::Transient(why) if why.contains("full")));
    assert!(next > 1);
    run(&mut blocker, "COMMIT").await;
    h.drained().await;
    h.store.commit(&batch(next)).await.unwrap();
    assert_eq!(h.dump().await.frames.len() as u64, next + 999);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_new_spool_knows_the_positions_of_streams() {
    let database = Database::create().await;
    let mut direct = PostgresStore::open(database.settings()).await.unwrap();
    let first = peer(&mut direct[0], "a").await;
    let batch = Batch {
        entries: (1..4).map(|seq| first.readings(seq, &[(1, 1.0)])).collect(),
        ..Batch::default()
    };
    direct[0].commit(&batch).await.unwrap();
    for store in direct {
        store.close().await.unwrap();
    }
    let mut h = Spooled::open(tempfile::tempdir().unwrap(), database).await;
    let login = crate::store::conformance::login("a", 1, 4);
    let admission = crate::store::conformance::admitted(&mut h.store, login).await;
    assert_eq!(admission.receipt.durable_seq(), 3);
    let again = Peer {
        device: admission.device,
        stream: admission.receipt.stream(),
        series: first.series,
    };
    let batch = Batch {
        entries: vec![again.gap(2, 4), again.gap(5, 5)],
        ..Batch::default()
    };
    h.store.commit(&batch).await.unwrap();
    let seqs: Vec<u64> = h.dump().await.frames.iter().map(|frame| frame.2).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_database_is_written_by_one_spool_or_by_gateways_without_spools() {
    let database = Database::create().await;
    let direct = PostgresStore::open(database.settings()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let refused = open(&directory, &database).await.err().unwrap().to_string();
    assert!(refused.contains("another gateway writes to"), "{refused}");
    for store in direct {
        store.close().await.unwrap();
    }
    let mut h = Spooled::open(directory, database).await;
    let refused = PostgresStore::open(h.database.settings()).await;
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("is used by the spool of"), "{refused}");
    let other = tempfile::tempdir().unwrap();
    let refused = open(&other, &h.database).await.err().unwrap().to_string();
    assert!(refused.contains("is used by the spool of"), "{refused}");

    // A spool with frames cannot be left.
    let (path, settings) = (
        h.directory.path().join("spool.db"),
        SqliteSettings::default(),
    );
    let peer = peer(&mut h.store, "a").await;
    let mut blocker = h.drained().await;
    run(
        &mut blocker,
        "BEGIN; LOCK TABLE streams IN ACCESS EXCLUSIVE MODE",
    )
    .await;
    h.readings(&peer, 1..2).await;
    let Spooled {
        mut store,
        directory,
        database,
    } = h;
    store.drain.shutdown().await;
    drop(store);
    let refused = leave(&path, &settings, &database.settings()).await;
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("1 acknowledged frames wait"), "{refused}");
    run(&mut blocker, "COMMIT").await;
    let mut h = Spooled::open(directory, database).await;
    h.drained().await;
    h.store.close().await.unwrap();
    leave(&path, &settings, &h.database.settings())
        .await
        .unwrap();
    PostgresStore::open(h.database.settings()).await.unwrap();
}

#[tokio::test]
async fn space_inside_the_file_is_known_while_a_gateway_uses_it() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("spool.db");
    let spool = SqliteStore::open_spool(&path, &SqliteSettings::default()).await;
    let spool = spool.unwrap();
    let mut connection = Connection::open(Source::Spool(path.clone()), Access::Write)
        .await
        .unwrap();
    let fill = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)
        INSERT INTO refusals (peer, device, code, reason, count, first_at, last_at)
        SELECT 'peer', hex(zeroblob(50)) || i, 40, '', 1, 0, 0 FROM n";
    connection.execute(fill, &[]).await.unwrap();
    let before = reusable_bytes(&path).await.unwrap();
    connection
        .execute("DELETE FROM refusals", &[])
        .await
        .unwrap();
    let freed = reusable_bytes(&path).await.unwrap() - before;
    assert!(freed > 1_000_000, "{freed}");
    spool.close().await.unwrap();
}
