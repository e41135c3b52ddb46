//! The conformance suite over Postgres, and Postgres-specific behaviour.
//!
//! Each test creates its own database on the server of `FIELDGATE_TEST_POSTGRES_URL`.

use sqlx::{ConnectOptions, Executor, PgConnection, Postgres, Row};

use super::*;
use crate::config::PostgresOptions;
use crate::config::store_url::StoreUrl;
use crate::store::conformance::{Dump, Harness, change, conformance, peer};

mod answers;
mod declares;
mod identity;
mod newest;
mod partitions;
mod silence;
mod trouble;
mod views;

conformance!(
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    OnServer
);

async fn run<'c>(
    conn: impl Executor<'c, Database = Postgres>,
    sql: impl Into<String>,
) -> Result<(), sqlx::Error> {
    let sql = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.into()));
    sql.execute(conn).await.map(drop)
}

/// A database that is dropped when the test ends.
pub(in crate::store) struct Database {
    server: PostgresUrl,
    name: String,
}

impl Database {
    pub(in crate::store) async fn create() -> Self {
        let server = std::env::var("FIELDGATE_TEST_POSTGRES_URL")
            .expect("FIELDGATE_TEST_POSTGRES_URL names a server for tests");
        let StoreUrl::Postgres(server) = server.parse().unwrap() else {
            panic!("FIELDGATE_TEST_POSTGRES_URL is not a Postgres URL");
        };
        let name = format!("fieldgate_test_{:016x}", rand::random::<u64>());
        let mut admin = server.options().connect().await.unwrap();
        let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'");
        run(&mut admin, create).await.unwrap();
        Self { server, name }
    }

    pub(in crate::store) fn url(&self) -> PostgresUrl {
        self.server.with_database(&self.name)
    }

    pub(in crate::store) async fn connect(&self) -> PgConnection {
        self.url().options().connect().await.unwrap()
    }

    pub(in crate::store) fn settings(&self) -> PostgresSettings {
        PostgresSettings {
            url: self.url(),
            options: PostgresOptions {
                postgres_writers: 1,
                allow_postgres_data_loss: true,
                ..PostgresOptions::default()
            },
            bounds: DeviceBounds::default(),
            gateway: "one".to_owned(),
            spool: None,
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        // The runtime of the test may have ended already.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async {
                let mut admin = server.options().connect().await.unwrap();
                let drop = format!("DROP DATABASE {name} WITH (FORCE)");
                run(&mut admin, drop).await.unwrap();
            });
        });
        if dropped.join().is_err() && !std::thread::panicking() {
            panic!("the test's database could not be dropped");
        }
    }
}

struct OnServer {
    store: PostgresStore,
    database: Database,
}

impl OnServer {
    async fn in_database(database: Database) -> Self {
        let store = PostgresStore::open(database.settings()).await.unwrap();
        Self {
            store: { store }.remove(0),
            database,
        }
    }

    async fn run(&self, sql: &str) {
        run(&mut self.database.connect().await, sql).await.unwrap();
    }
}

impl Harness for OnServer {
    type Store = PostgresStore;

    async fn create() -> Self {
        Self::in_database(Database::create().await).await
    }

    fn store(&mut self) -> &mut PostgresStore {
        &mut self.store
    }

    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        Self::in_database(self.database).await
    }

    async fn change(&mut self, device: &str, is_enabled: bool, replaces_key: bool) -> i64 {
        let store = StoreUrl::Postgres(self.database.settings().url);
        change(&store, device, is_enabled, replaces_key).await
    }

    async fn fill_disk(&mut self) {
        // The error of a full disk, after the ledger and half of the rest have been written.
        self.run(
            "CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;
             CREATE TRIGGER is_full BEFORE INSERT ON gaps EXECUTE FUNCTION is_full()",
        )
        .await;
    }

    async fn free_disk(&mut self) {
        self.run("DROP TRIGGER is_full ON gaps").await;
    }

    async fn dump(&mut self) -> Dump {
        dump(&mut self.database.connect().await).await
    }
}

pub(in crate::store) async fn dump(conn: &mut PgConnection) -> Dump {
    let mut dump = Dump::default();
    let mut rows = async |sql: &'static str| sqlx::query(sql).fetch_all(&mut *conn).await.unwrap();
    let frames = "SELECT d.name, f.stream_id, f.seq, f.type, f.quality, f.clock_offset_us
        FROM frames f JOIN streams s ON s.id = f.stream_id JOIN devices d ON d.id = s.device_id
        ORDER BY f.stream_id, f.seq";
    for r in rows(frames).await {
        let quality = r.get::<Option<i16>, _>(4).map(|quality| quality as u8);
        dump.frames.push((
            r.get(0),
            r.get(1),
            number(&r, 2),
            small(&r, 3),
            quality,
            r.get(5),
        ));
    }
    let readings = "SELECT d.name, s.channel, s.unit, r.ts, f.seq, r.value
        FROM readings r JOIN series s ON s.id = r.series_id JOIN devices d ON d.id = s.device_id
        JOIN frames f ON f.id = r.frame_id";
    for r in rows(readings).await {
        let bits = r.get::<Option<f64>, _>(5).map(f64::to_bits);
        dump.readings.push((
            r.get(0),
            r.get(1),
            r.get(2),
            time_us(&r, 3),
            number(&r, 4),
            bits,
        ));
    }
    for r in rows("SELECT stream_id, from_seq, to_seq, reason FROM gaps ORDER BY 1, 2").await {
        dump.gaps
            .push((r.get(0), number(&r, 1), number(&r, 2), small(&r, 3)));
    }
    let quarantine = "SELECT stream_id, seq, code, detail, bytes FROM quarantine ORDER BY 1, 2";
    for r in rows(quarantine).await {
        dump.quarantine
            .push((r.get(0), number(&r, 1), small(&r, 2), r.get(3), r.get(4)));
    }
    let usage =
        "SELECT d.name, u.bytes FROM quarantine_usage u JOIN devices d ON d.id = u.device_id";
    for r in rows(usage).await {
        dump.quarantine_usage.insert(r.get(0), number(&r, 1));
    }
    let events = "SELECT d.name, e.at, e.kind, e.code, e.detail
        FROM device_events e JOIN devices d ON d.id = e.device_id";
    for r in rows(events).await {
        let code = r.get::<i32, _>(3) as u16;
        dump.events
            .push((r.get(0), time_us(&r, 1), r.get(2), code, r.get(4)));
    }
    let open = "SELECT peer FROM sessions ORDER BY id";
    for r in rows(open).await {
        dump.open_sessions.push(r.get(0));
    }
    let clocks = "SELECT d.name, c.boot, c.offset_us, c.delay_us
        FROM clocks c JOIN devices d ON d.id = c.device_id ORDER BY d.id, c.boot";
    for r in rows(clocks).await {
        dump.clocks
            .push((r.get(0), number(&r, 1) as u32, r.get(2), number(&r, 3)));
    }
    let refusals = "SELECT peer, device, code, count, first_at, last_at FROM refusals
        ORDER BY peer COLLATE \"C\", device COLLATE \"C\", code";
    for r in rows(refusals).await {
        dump.refusals.push((
            r.get(0),
            r.get(1),
            small(&r, 2),
            number(&r, 3),
            time_us(&r, 4),
            time_us(&r, 5),
        ));
    }
    dump.readings.sort();
    dump.events.sort();
    dump
}

fn number(row: &sqlx::postgres::PgRow, column: usize) -> u64 {
    row.get::<i64, _>(column).cast_unsigned()
}

fn small(row: &sqlx::postgres::PgRow, column: usize) -> u8 {
    row.get::<i16, _>(column) as u8
}

fn time_us(row: &sqlx::postgres::PgRow, column: usize) -> i64 {
    row.get::<Timestamp, _>(column).0
}

#[test]
fn transient_errors_are_distinguished_from_fatal_ones() {
    let passing = [
        "08006", "25006", "25P03", "25P04", "40001", "40P01", "53100", "53300", "55006", "55P03",
        "57014", "57P01", "57P03", "57P05", "58030",
    ];
    let lasting = [
        "0A000", "22003", "23503", "23505", "25P01", "25P02", "42501", "42P01", "42703", "54000",
        "55000", "XX000", "XX001",
    ];
    for code in passing {
        assert!(is_passing(code), "{code}");
    }
    for code in lasting {
        assert!(!is_passing(code), "{code}");
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_gateway_suspended_in_a_transaction_continues() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    // The connection sends nothing for longer than the server waits.
    let suspended = &mut h.store.writer.as_mut().unwrap().conn;
    let transaction = "SET idle_in_transaction_session_timeout = '1ms'; BEGIN; LOCK TABLE gaps";
    run(suspended, transaction).await.unwrap();
    // Gets the lock once the server has terminated that session.
    h.run("BEGIN; LOCK TABLE gaps; COMMIT").await;
    let batch = Batch {
        entries: vec![peer.readings(1, &[(1, 1.0)])],
        ..Batch::default()
    };
    let failed = h.store().commit(&batch).await;
    assert!(
        matches!(failed, Err(StoreError::Transient(_))),
        "{failed:?}"
    );
    let committed = h.store().commit(&batch).await.unwrap();
    assert_eq!(committed.receipts[0].durable_seq(), 1);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_number_reused_with_different_content_is_recorded() {
    crate::store::conformance::a_number_reused_with_different_content_is_recorded::<OnServer>()
        .await;
}
