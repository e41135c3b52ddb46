//! The baseline on Postgres: binary COPY on as many connections as the gateway writes with, each for
//! different devices. Also the databases for all measurements.

use std::sync::Arc;
use std::time::Duration;

use fieldgate::config::store_url::PostgresUrl;
use fieldgate::internals::migrate_postgres;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use tokio::task::JoinSet;

use super::BenchError;
use super::baseline::{Job, Meter};
use super::workload::{self, Frame, Frames};

/// Maximum time to connect to the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Number of bytes sent at a time; the next rows are generated meanwhile.
const SEND_BYTES: usize = 32 * 1024;
/// The gateway takes frame ids from a sequence of blocks of this size.
const BLOCK_IDS: i64 = 1024;

/// A database for this process alone.
pub(super) struct Database {
    server: PostgresUrl,
    own: PostgresUrl,
    name: String,
}

impl Database {
    /// Plans a database on `server`, which names an existing database. Creates nothing yet.
    pub(super) fn on(server: &PostgresUrl, what_for: &str) -> Database {
        let name = format!("fieldgate_bench_{}_{what_for}", std::process::id());
        Database {
            server: server.clone(),
            own: server.with_database(&name),
            name,
        }
    }

    pub(super) fn url(&self) -> &PostgresUrl {
        &self.own
    }

    /// Creates an empty database, replacing an existing one.
    pub(super) async fn recreate(&self) -> Result<(), BenchError> {
        self.remove().await?;
        let name = &self.name;
        self.execute(format!(
            "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'"
        ))
        .await
    }

    /// Removes the database and closes all connections to it.
    pub(super) async fn remove(&self) -> Result<(), BenchError> {
        let name = &self.name;
        self.execute(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            .await
    }

    /// Returns the size of its tables, with all partitions and indexes.
    pub(super) async fn disk_bytes(&self) -> Result<u64, BenchError> {
        let mut conn = connect(&self.own).await?;
        let bytes: i64 = sqlx::query_scalar(
            "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
                 WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
        )
        .fetch_one(&mut conn)
        .await?;
        conn.close().await?;
        Ok(bytes.unsigned_abs())
    }

    async fn execute(&self, sql: String) -> Result<(), BenchError> {
        let refused = |error: sqlx::Error| BenchError::Server {
            server: self.server.clone(),
            reason: match error.as_database_error() {
                Some(error) => error.message().to_owned(),
                None => error.to_string(),
            },
        };
        let mut conn = connect(&self.server).await.map_err(refused)?;
        execute(&mut conn, sql).await.map_err(refused)?;
        conn.close().await.map_err(refused)
    }
}

async fn connect(url: &PostgresUrl) -> Result<PgConnection, sqlx::Error> {
    let options = url.options().disable_statement_logging();
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, options.connect()).await;
    let timed_out = || {
        let seconds = CONNECT_TIMEOUT.as_secs();
        std::io::Error::other(format!("timed out after {seconds} s")).into()
    };
    connected.unwrap_or_else(|_| Err(timed_out()))
}

async fn execute(conn: &mut PgConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    let sql = sqlx::raw_sql(AssertSqlSafe(sql.into()));
    sql.execute(conn).await.map(drop)
}

/// Copies what a fleet would have stored, and nothing else; returns readings per second.
pub(super) async fn baseline(
    url: &PostgresUrl,
    connections: usize,
    job: &Job,
) -> Result<f64, BenchError> {
    let migrated = migrate_postgres(url).await;
    migrated.map_err(|error| BenchError::Migrate(error.to_string()))?;
    let mut conn = connect(url).await?;
    make_partitions(&mut conn, job).await?;
    if let Some(sql) = &job.registry {
        execute(&mut conn, sql).await?;
        // Frame ids that a gateway assigns follow the existing ones.
        let block = ids_start(connections) / BLOCK_IDS;
        execute(
            &mut conn,
            format!("SELECT setval('frame_id_blocks', {block})"),
        )
        .await?;
    }
    conn.close().await?;
    let mut copiers = Vec::new();
    for number in 0..connections {
        copiers.push(Copier {
            conn: connect(url).await?,
            job: job.clone(),
            frames: Frames::new(job.workload, number, connections, ids_start(number)),
            bytes: Vec::with_capacity(2 * SEND_BYTES),
        });
    }
    let meter = Arc::new(Meter::start(job.until));
    let mut tasks = JoinSet::new();
    for copier in copiers {
        tasks.spawn(copier.copy(Arc::clone(&meter)));
    }
    while let Some(copied) = tasks.join_next().await {
        copied.map_err(std::io::Error::other)??;
    }
    Ok(meter.rate())
}

/// Returns the first frame id of a connection; the ids of each connection are consecutive, as in the gateway.
fn ids_start(connection: usize) -> i64 {
    (connection as i64 + 1) << 40
}

/// Creates partitions for the months of the readings, with the gateway's names, so that no row goes to the default
/// partition.
async fn make_partitions(conn: &mut PgConnection, job: &Job) -> Result<(), sqlx::Error> {
    let date = |us| {
        let time = jiff::Timestamp::from_microsecond(us).unwrap_or_default();
        time.to_zoned(jiff::tz::TimeZone::UTC).date()
    };
    let last = date(job.start_us + job.span_us());
    let mut from = date(job.start_us).first_of_month();
    while from <= last {
        let to = from.saturating_add(jiff::Span::new().months(1));
        let name = from.strftime("readings_%Y%m");
        let table = format!("CREATE TABLE {name} PARTITION OF readings");
        let range = format!("FROM ('{from} 00:00+00') TO ('{to} 00:00+00')");
        execute(conn, format!("{table} FOR VALUES {range}")).await?;
        from = to;
    }
    Ok(())
}

/// A connection and its progress.
struct Copier {
    conn: PgConnection,
    job: Job,
    frames: Frames,
    bytes: Vec<u8>,
}

impl Copier {
    /// Copies until all connections together have stored enough.
    async fn copy(mut self, meter: Arc<Meter>) -> Result<(), sqlx::Error> {
        while !meter.is_over() {
            let frames = self.frames.transaction();
            execute(&mut self.conn, "BEGIN").await?;
            self.copy_frames(&frames).await?;
            self.copy_readings(&frames).await?;
            execute(&mut self.conn, "COMMIT").await?;
            meter.add(frames.len() * self.job.workload.frame_readings());
        }
        Ok(())
    }

    async fn copy_frames(&mut self, frames: &[Frame]) -> Result<(), sqlx::Error> {
        let received_at = since_2000(self.job.start_us).to_be_bytes();
        let readings = self.job.workload.frame_readings() as i32;
        self.copy_all("frames", frames.iter(), |bytes, frame| {
            bytes.extend_from_slice(&11_i16.to_be_bytes());
            field(bytes, frame.id.to_be_bytes());
            field(bytes, frame.device.to_be_bytes());
            field(bytes, frame.seq.to_be_bytes());
            field(bytes, 17_i16.to_be_bytes());
            field(bytes, received_at);
            field(bytes, readings.to_be_bytes());
            field(bytes, 0_i16.to_be_bytes());
            field(bytes, 0_i64.to_be_bytes());
            field(bytes, received_at);
            field(bytes, received_at);
            // Placeholder for the checksum of a frame.
            field(bytes, 0x89AB_CDEF_i64.to_be_bytes());
        })
        .await
    }

    async fn copy_readings(&mut self, frames: &[Frame]) -> Result<(), sqlx::Error> {
        let start = since_2000(self.job.start_us);
        let rows = workload::rows(self.job.workload, frames);
        self.copy_all("readings", rows, |bytes, row| {
            bytes.extend_from_slice(&4_i16.to_be_bytes());
            field(bytes, row.series.to_be_bytes());
            field(bytes, (start + row.second * 1_000_000).to_be_bytes());
            field(bytes, row.frame_id.to_be_bytes());
            field(bytes, row.value.to_be_bytes());
        })
        .await
    }

    async fn copy_all<R>(
        &mut self,
        table: &str,
        rows: impl Iterator<Item = R>,
        write: impl Fn(&mut Vec<u8>, R),
    ) -> Result<(), sqlx::Error> {
        let sql = format!("COPY {table} FROM STDIN (FORMAT binary)");
        let mut copy = self.conn.copy_in_raw(&sql).await?;
        self.bytes.clear();
        self.bytes
            .extend_from_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
        for row in rows {
            write(&mut self.bytes, row);
            if self.bytes.len() >= SEND_BYTES {
                copy.send(self.bytes.as_slice()).await?;
                self.bytes.clear();
            }
        }
        self.bytes.extend_from_slice(&(-1_i16).to_be_bytes());
        copy.send(self.bytes.as_slice()).await?;
        copy.finish().await.map(drop)
    }
}

fn field<const N: usize>(bytes: &mut Vec<u8>, value: [u8; N]) {
    bytes.extend_from_slice(&(N as i32).to_be_bytes());
    bytes.extend_from_slice(&value);
}

/// Converts to microseconds since 2000, which is Postgres' epoch.
fn since_2000(time_us: i64) -> i64 {
    time_us - 946_684_800_000_000
}
