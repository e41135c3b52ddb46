//! A private Postgres database for a test, and sessions that query it.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, FromRow, PgConnection};
use tokio::runtime::{Builder, Runtime};

use crate::support::{PATIENCE, eventually};

/// Variable with the URL of the server that tests share; `tests/run` sets it.
const SERVER_VARIABLE: &str = "FIELDGATE_TEST_POSTGRES_URL";
/// Maximum time to connect: a frozen server accepts no connections.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A connection to Postgres.
pub struct Session {
    runtime: Runtime,
    connection: PgConnection,
}

impl Session {
    pub fn open(url: &str) -> Session {
        Session::connect(url).expect(url)
    }

    /// Connects, or returns `None` if the server is not available.
    pub fn try_open(url: &str) -> Option<Session> {
        Session::connect(url).ok()
    }

    fn connect(url: &str) -> Result<Session, sqlx::Error> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let options: PgConnectOptions = url.parse().expect(url);
        let options = options.application_name("test").disable_statement_logging();
        let connect = async { tokio::time::timeout(CONNECT_WITHIN, options.connect()).await };
        let connection = runtime
            .block_on(connect)
            .unwrap_or_else(|_| Err(std::io::Error::from(ErrorKind::TimedOut).into()))?;
        Ok(Session {
            runtime,
            connection,
        })
    }

    pub fn execute(&mut self, sql: &str) {
        let statements = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.connection);
        self.runtime.block_on(statements).expect(sql);
    }

    pub fn rows<T>(&mut self, sql: &str) -> Vec<T>
    where
        T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        self.try_rows(sql).expect(sql)
    }

    fn try_rows<T>(&mut self, sql: &str) -> Result<Vec<T>, sqlx::Error>
    where
        T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        let query = sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_all(&mut self.connection);
        let query = async { tokio::time::timeout(PATIENCE, query).await };
        self.runtime.block_on(query).expect("an answer")
    }

    /// Returns the one number that a query returns.
    pub fn count(&mut self, sql: &str) -> i64 {
        self.rows::<(i64,)>(sql)[0].0
    }

    pub fn explain(&mut self, sql: &str) -> serde_json::Value {
        let explain = format!("EXPLAIN (FORMAT JSON) {sql}");
        let row = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_one(&mut self.connection);
        let row = self.runtime.block_on(row).expect(sql);
        let plan: String = sqlx::Row::try_get_unchecked(&row, 0).expect("text");
        serde_json::from_str(&plan).expect("JSON")
    }

    /// Runs a query and returns its plan with the actual numbers.
    pub fn explain_run(&mut self, sql: &str) -> serde_json::Value {
        let explain = format!("EXPLAIN (ANALYZE, FORMAT JSON) {sql}");
        let row = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_one(&mut self.connection);
        let row = self.runtime.block_on(row).expect(sql);
        let plan: String = sqlx::Row::try_get_unchecked(&row, 0).expect("text");
        serde_json::from_str(&plan).expect("JSON")
    }

    /// Waits until a query returns true.
    pub fn wait_for(&mut self, sql: &str) {
        eventually(sql, PATIENCE, || self.rows::<(bool,)>(sql)[0].0);
    }
}

/// A database that is dropped with this value.
pub struct PgDatabase {
    server: String,
    name: String,
    session: Option<Session>,
}

impl PgDatabase {
    /// Creates a database on the server that tests share.
    pub fn create() -> PgDatabase {
        let server = std::env::var(SERVER_VARIABLE);
        PgDatabase::create_on(&server.expect("FIELDGATE_TEST_POSTGRES_URL names a server"))
    }

    pub fn create_on(server: &str) -> PgDatabase {
        PgDatabase::create_as(server, "TEMPLATE template0 ENCODING 'UTF8'")
    }

    /// Creates a database with further options of CREATE DATABASE.
    pub fn create_as(server: &str, kind: &str) -> PgDatabase {
        let name = format!("fieldgate_test_{:016x}", rand::random::<u64>());
        Session::open(server).execute(&format!("CREATE DATABASE {name} {kind}"));
        PgDatabase {
            server: server.to_owned(),
            name,
            session: None,
        }
    }

    /// Creates a copy of this database, to which no session may be connected.
    pub fn copy(&self) -> PgDatabase {
        PgDatabase::create_as(&self.server, &format!("TEMPLATE {}", self.name))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the URL of the server's maintenance database.
    pub fn server(&self) -> &str {
        &self.server
    }

    pub fn close_session(&mut self) {
        self.session = None;
    }

    pub fn url(&self) -> String {
        self.url_as("")
    }

    /// Returns the URL for another user, optionally with a password: `user:password`.
    pub fn url_as(&self, user: &str) -> String {
        let (address, query) = match self.server.split_once('?') {
            Some((address, query)) => (address, format!("?{query}")),
            None => (self.server.as_str(), String::new()),
        };
        let (scheme, rest) = address.split_once("://").expect("an address");
        let host = rest.split('/').next().unwrap_or_default();
        let host = match user {
            "" => host.to_owned(),
            user => format!("{user}@{}", host.rsplit('@').next().unwrap_or_default()),
        };
        format!("{scheme}://{host}/{}{query}", self.name)
    }

    /// Returns a session that stays open.
    pub fn session(&mut self) -> &mut Session {
        let url = self.url();
        self.session.get_or_insert_with(|| Session::open(&url))
    }

    /// Returns the one number that a query returns; `None` while the server is down.
    pub fn poll(&mut self, sql: &str) -> Option<i64> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => Session::try_open(&self.url())?,
        };
        let rows: Vec<(i64,)> = match session.try_rows(sql) {
            Ok(rows) => rows,
            Err(sqlx::Error::Database(error)) if !error.code().is_some_and(is_going_away) => {
                panic!("{sql}: {error}")
            }
            Err(_) => return None,
        };
        self.session = Some(session);
        Some(rows[0].0)
    }

    /// Returns the stored frames of a device's stream, in order, with their types.
    pub fn frames(&mut self, device: &str) -> Vec<(i64, i16)> {
        self.session().rows(&format!(
            "SELECT f.seq, f.type FROM frames f JOIN streams s ON s.id = f.stream_id \
             JOIN devices d ON d.id = s.device_id WHERE d.name = '{device}' ORDER BY f.seq, f.id"
        ))
    }

    /// Returns a device's readings as (time, value), in time order.
    pub fn readings(&mut self, device: &str) -> Vec<(i64, Option<f64>)> {
        self.session().rows(&format!(
            "SELECT (extract(epoch FROM r.ts) * 1000000)::bigint, r.value \
             FROM readings r JOIN series s ON s.id = r.series_id \
             JOIN devices d ON d.id = s.device_id WHERE d.name = '{device}' \
             ORDER BY r.ts, s.channel, r.frame_id"
        ))
    }

    /// Returns a device's quarantined frames, as (number, code, bytes).
    pub fn quarantine(&mut self, device: &str) -> Vec<(i64, i16, Vec<u8>)> {
        self.session().rows(&format!(
            "SELECT q.seq, q.code, q.bytes FROM quarantine q JOIN devices d ON d.id = q.device_id \
             WHERE d.name = '{device}' ORDER BY q.seq"
        ))
    }
}

fn is_going_away(code: Cow<'_, str>) -> bool {
    code.starts_with("57")
}

impl Drop for PgDatabase {
    fn drop(&mut self) {
        self.session = None;
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        // A test that fails may leave a server that accepts no connections.
        match Session::try_open(&self.server) {
            Some(mut server) => {
                // It may have been left waiting for a removed standby.
                server.execute("SET synchronous_commit = local");
                server.execute(&drop);
            }
            None => assert!(std::thread::panicking(), "could not {drop}"),
        }
    }
}
