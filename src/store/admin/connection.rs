//! A connection to a store or a spool, for the queries and changes of operators.
//!
//! SQL is the same text for SQLite and Postgres: parameters are `$1`, `$2`, …; a sum is CAST to BIGINT, because
//! Postgres would make it numeric; text is ordered by `COLLATE "C"`, by bytes. Times are microseconds UTC.
//!
//! A gateway writes at the same time. In SQLite one of the two waits until the other has committed, so keep
//! transactions short: while one is open, the gateway acknowledges nothing.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Column, Executor, SqlSafeStr, SqliteConnection, Statement};
use tokio::sync::mpsc::Sender;

use super::error::{OpenError, QueryError, is_interrupted};
use super::row::{postgres_arguments, sqlite_arguments, sqlite_values};
use super::{Argument, Row, Value, real, value};
use crate::config::store_url::StoreUrl;
use crate::store::sqlite::Purpose;
use crate::store::sqlite::turn::Turn;
use crate::store::{postgres, sqlite};

/// Maximum duration of a query in SQLite, except for a user's statement. The gateway cannot shorten its
/// write-ahead log past a reader, and stops storing when the log is full.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of SQLite's virtual machine steps between two checks of the time.
const STEPS_PER_CHECK: i32 = 10_000;

#[derive(Clone, Debug)]
pub enum Source {
    Store(StoreUrl),
    Spool(PathBuf),
}

impl From<&StoreUrl> for Source {
    fn from(store: &StoreUrl) -> Source {
        Source::Store(store.clone())
    }
}

/// Use of a connection to an existing store while gateways write to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads for an operator, who may run statements of any duration.
    Read,
    /// Reads for a gateway that polls.
    Poll,
    Write,
}

/// Returns a value as a literal of Postgres, of the type that its place needs. `standard_conforming_strings` is on.
fn literal(value: &Value) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Bool(value) => quoted(&value.to_string()),
        Value::Integer(value) => quoted(&value.to_string()),
        Value::Real(value) => quoted(&real(*value)),
        Value::Decimal(text) | Value::Text(text) => quoted(text),
        Value::Blob(bytes) => format!("'\\x{}'", hex::encode(bytes)),
    }
}

/// A connection that only reads, or also writes.
pub struct Connection {
    pub(super) driver: Driver,
    /// File of a SQLite database.
    file: Option<PathBuf>,
    transaction: Option<Transaction>,
    /// Duration of the last transaction.
    took: Duration,
}

pub(super) enum Driver {
    Sqlite(SqliteConnection),
    Postgres(postgres::Link),
}

struct Transaction {
    began: Instant,
    _turn: Option<Turn>,
}

/// Passes rows to `$taken` until there are no more or it breaks. A macro, because the row streams of the two
/// stores have different types.
macro_rules! take_rows {
    ($rows:expr, $values:path, |$row:ident| $taken:expr) => {{
        let mut rows = $rows;
        while let Some(row) = poll_fn(|context| rows.as_mut().poll_next(context)).await {
            let $row = Row($values(&row?)?);
            if let ControlFlow::Break(end) = $taken {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }};
}

/// Stops the statements of a connection in SQLite when it is dropped.
pub struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Connection {
    /// Opens a connection to an existing store or spool.
    pub async fn open(source: impl Into<Source>, access: Access) -> Result<Connection, OpenError> {
        let (file, purpose) = match source.into() {
            Source::Store(StoreUrl::Postgres(url)) => {
                let link = postgres::open_existing(&url, access).await?;
                return Ok(Connection::new(Driver::Postgres(link), None));
            }
            Source::Store(StoreUrl::Sqlite(path)) => (path, Purpose::Store),
            Source::Spool(path) => (path, Purpose::Spool),
        };
        let conn = sqlite::open_existing(&file, purpose, access).await?;
        Ok(Connection::new(Driver::Sqlite(conn), Some(file)))
    }

    fn new(driver: Driver, file: Option<PathBuf>) -> Connection {
        Connection {
            driver,
            file,
            transaction: None,
            took: Duration::ZERO,
        }
    }

    pub fn is_sqlite(&self) -> bool {
        matches!(self.driver, Driver::Sqlite(_))
    }

    /// # Errors
    /// The store is unavailable, or SQLite does not return all rows within [`QUERY_TIMEOUT`].
    pub async fn rows(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, QueryError> {
        self.rows_within(QUERY_TIMEOUT, sql, arguments).await
    }

    async fn rows_within(
        &mut self,
        limit: Duration,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, QueryError> {
        let mut rows = Vec::new();
        let on_row = |row| {
            rows.push(row);
            ControlFlow::<()>::Continue(())
        };
        self.limit(Some(limit)).await?;
        let read = self.fetch(sql, Some(arguments), on_row).await;
        self.limit(None).await?;
        match read {
            Err(QueryError::Sql(error)) if is_interrupted(&error) => Err(QueryError::TooSlow),
            read => read.map(|_| rows),
        }
    }

    /// Returns the integer in the first row, or 0 if there is no row.
    pub async fn integer(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<i64, QueryError> {
        let rows = self.rows(sql, arguments).await?;
        rows.first().map_or(Ok(0), |row| row.integer(0))
    }

    /// Makes SQLite stop statements that run longer than `limit` from now on.
    async fn limit(&mut self, limit: Option<Duration>) -> Result<(), sqlx::Error> {
        let Driver::Sqlite(conn) = &mut self.driver else {
            return Ok(());
        };
        let mut handle = conn.lock_handle().await?;
        match limit.and_then(|limit| Instant::now().checked_add(limit)) {
            Some(end) => {
                handle.set_progress_handler(STEPS_PER_CHECK, move || Instant::now() < end);
            }
            None => handle.remove_progress_handler(),
        }
        Ok(())
    }

    /// Returns the column names of a user's statement, so that an empty result has headers, too.
    ///
    /// # Errors
    /// The statement is invalid, for example because Postgres found several in one text.
    pub async fn columns(&mut self, sql: &str) -> Result<Vec<String>, QueryError> {
        fn names<C: Column>(columns: &[C]) -> Vec<String> {
            let names = columns.iter().map(|column| column.name().to_owned());
            names.collect()
        }
        let sql = AssertSqlSafe(sql.to_owned()).into_sql_str();
        match &mut self.driver {
            Driver::Sqlite(conn) => Ok(names(conn.prepare(sql).await?.columns())),
            Driver::Postgres(conn) => Ok(names(conn.prepare(sql).await?.columns())),
        }
    }

    /// Passes the rows of a user's statement to `on_row` as they arrive, until `on_row` breaks; returns the value
    /// of the break.
    pub async fn run<B>(
        &mut self,
        sql: &str,
        on_row: impl FnMut(Row) -> ControlFlow<B>,
    ) -> Result<Option<B>, QueryError> {
        self.fetch(sql, None, on_row).await
    }

    /// Makes the store stop the statements of this connection after `limit`. In SQLite, they also stop when the
    /// result is dropped; in Postgres, when the connection is.
    pub async fn bound(&mut self, limit: Duration) -> Result<Stop, QueryError> {
        let stop = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stop);
        let end = Instant::now() + limit;
        match &mut self.driver {
            Driver::Sqlite(conn) => {
                let mut handle = conn.lock_handle().await?;
                handle.set_progress_handler(STEPS_PER_CHECK, move || {
                    !is_stopped.load(Ordering::Relaxed) && Instant::now() < end
                });
            }
            Driver::Postgres(conn) => {
                let set = format!("SET statement_timeout = {}", limit.as_millis());
                conn.execute(sqlx::raw_sql(AssertSqlSafe(set))).await?;
            }
        }
        Ok(Stop(stop))
    }

    /// Sends the rows of a user's statement with `parameters` to `rows`, until its receiver is gone.
    pub async fn send(
        &mut self,
        sql: &str,
        parameters: &[Value],
        rows: &Sender<Row>,
    ) -> Result<(), QueryError> {
        let sent = self.send_until_gone(sql, parameters, rows).await;
        sent.map(drop)
    }

    async fn send_until_gone(
        &mut self,
        sql: &str,
        parameters: &[Value],
        rows: &Sender<Row>,
    ) -> Result<Option<()>, QueryError> {
        macro_rules! send {
            ($found:expr, $values:path) => {
                take_rows!($found, $values, |row| match rows.send(row).await {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                })
            };
        }
        match &mut self.driver {
            Driver::Sqlite(conn) => {
                let values = sqlite_values(parameters)?;
                let query = sqlx::query_with(AssertSqlSafe(sql.to_owned()), values);
                send!(query.persistent(false).fetch(conn), value::of_sqlite)
            }
            Driver::Postgres(conn) if parameters.is_empty() => {
                let query = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
                send!(query.fetch(conn), value::of_postgres)
            }
            // The simple protocol has no parameters, but SQL has them.
            Driver::Postgres(conn) => {
                let prepare = format!("PREPARE fieldgate_query AS {sql}");
                conn.execute(sqlx::raw_sql(AssertSqlSafe(prepare))).await?;
                let literals: Vec<String> = parameters.iter().map(literal).collect();
                let execute = format!("EXECUTE fieldgate_query({})", literals.join(", "));
                let query = sqlx::raw_sql(AssertSqlSafe(execute));
                send!(query.fetch(conn), value::of_postgres)
            }
        }
    }

    /// `arguments` are `None` for a user's statement, which runs once and may return any type.
    async fn fetch<B>(
        &mut self,
        sql: &str,
        arguments: Option<&[Argument<'_>]>,
        mut on_row: impl FnMut(Row) -> ControlFlow<B>,
    ) -> Result<Option<B>, QueryError> {
        let is_own = arguments.is_some();
        let sql = AssertSqlSafe(sql.to_owned());
        match &mut self.driver {
            Driver::Sqlite(conn) => {
                let arguments = sqlite_arguments(arguments.unwrap_or_default())?;
                let query = sqlx::query_with(sql, arguments).persistent(is_own);
                take_rows!(query.fetch(conn), value::of_sqlite, |row| on_row(row))
            }
            Driver::Postgres(conn) => {
                let rows = match arguments {
                    Some(arguments) => {
                        sqlx::query_with(sql, postgres_arguments(arguments)?).fetch(conn)
                    }
                    // The simple protocol returns every value as text.
                    None => sqlx::raw_sql(sql).fetch(conn),
                };
                take_rows!(rows, value::of_postgres, |row| on_row(row))
            }
        }
    }

    /// Runs a statement that writes; returns the number of changed rows.
    pub async fn execute(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<u64, QueryError> {
        let sql = AssertSqlSafe(sql.to_owned());
        Ok(match &mut self.driver {
            Driver::Sqlite(conn) => sqlx::query_with(sql, sqlite_arguments(arguments)?)
                .execute(conn)
                .await?
                .rows_affected(),
            Driver::Postgres(conn) => sqlx::query_with(sql, postgres_arguments(arguments)?)
                .execute(conn)
                .await?
                .rows_affected(),
        })
    }

    /// Runs a statement that writes in its own transaction; returns the number of changed rows.
    pub async fn step(&mut self, sql: &str, arguments: &[Argument<'_>]) -> Result<u64, QueryError> {
        self.begin().await?;
        let done = self.execute(sql, arguments).await;
        self.end(done).await
    }

    /// Begins a transaction. In SQLite, first pauses for the duration of the last transaction, so that consecutive
    /// transactions take at most half of the time; then waits for the turn to write.
    pub async fn begin(&mut self) -> Result<(), QueryError> {
        let turn = match &self.file {
            Some(file) => {
                tokio::time::sleep(self.took).await;
                // All links to a database share its turn.
                let file = file.canonicalize().unwrap_or_else(|_| file.clone());
                Turn::take(&file).await
            }
            None => None,
        };
        self.transaction = Some(Transaction {
            began: Instant::now(),
            _turn: turn,
        });
        let begin = match &self.driver {
            Driver::Sqlite(_) => "BEGIN IMMEDIATE",
            // Each statement must see what was committed while it waited for a lock.
            Driver::Postgres(_) => "BEGIN ISOLATION LEVEL READ COMMITTED",
        };
        let begun = self.control(begin).await;
        if begun.is_err() {
            self.release_turn();
        }
        begun
    }

    /// Ends the transaction: commits it if `done` is a success, and rolls it back otherwise.
    ///
    /// # Errors
    /// The error of `done`, or of the commit. Nothing was changed or, if the connection was lost during the commit,
    /// the outcome is unknown.
    pub async fn end<T, E: From<QueryError>>(&mut self, done: Result<T, E>) -> Result<T, E> {
        match &done {
            Ok(_) => self.commit().await?,
            // Its error is more useful than one from the rollback.
            Err(_) => drop(self.rollback().await),
        }
        done
    }

    pub async fn commit(&mut self) -> Result<(), QueryError> {
        let committed = self.control("COMMIT").await;
        self.release_turn();
        committed
    }

    pub async fn rollback(&mut self) -> Result<(), QueryError> {
        let undone = self.control("ROLLBACK").await;
        self.release_turn();
        undone
    }

    fn release_turn(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.took = transaction.began.elapsed();
        }
    }

    async fn control(&mut self, sql: &'static str) -> Result<(), QueryError> {
        let sql = sqlx::raw_sql(sql);
        match &mut self.driver {
            Driver::Sqlite(conn) => conn.execute(sql).await.map(drop)?,
            Driver::Postgres(conn) => conn.execute(sql).await.map(drop)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::postgres::tests::Database;

    async fn row_of(connection: &mut Connection, sql: &str) -> Vec<Value> {
        let taken = connection.run(sql, |row| ControlFlow::Break(row.0)).await;
        taken.unwrap().unwrap()
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn every_type_of_postgres_can_be_read() {
        let database = Database::create().await;
        let url = database.settings().url;
        let store = StoreUrl::Postgres(url.clone());
        let missing = Connection::open(&store, Access::Read).await.err().unwrap();
        assert!(missing.to_string().contains("no store in"), "{missing}");
        postgres::migrate(&url).await.unwrap();
        // Settings of a role or a database do not change how values are written.
        let mut admin = database.connect().await;
        for setting in [
            "bytea_output = escape",
            "IntervalStyle = iso_8601",
            "DateStyle = German",
            "TimeZone = Japan",
            "extra_float_digits = 0",
        ] {
            let set = format!(
                "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {setting}', current_database()); END $$"
            );
            sqlx::raw_sql(AssertSqlSafe(set))
                .execute(&mut admin)
                .await
                .unwrap();
        }
        let mut connection = Connection::open(&store, Access::Read).await.unwrap();
        let numbers = "SELECT 7::int2, -7::int8, 0.1::float4, 0.1::float8 + 0.2, '-0'::float8,
                           1e20::float8, 'NaN'::numeric, 12.50, true, NULL";
        let expected = [
            Value::Integer(7),
            Value::Integer(-7),
            Value::Real(0.1),
            Value::Real(0.1 + 0.2),
            Value::Real(-0.0),
            Value::Real(1e20),
            "NaN".into(),
            Value::Decimal("12.50".into()),
            Value::Bool(true),
            Value::Null,
        ];
        assert_eq!(row_of(&mut connection, numbers).await, expected);
        let others =
            "SELECT '2026-01-02T03:04:05.6Z'::timestamptz, interval '1 day', ARRAY['a', NULL],
                          '{\"a\": 1}'::jsonb, '\\xdead'::bytea, 'x'::\"char\", '1.2.3.4'::inet";
        let expected = [
            "2026-01-02 03:04:05.6+00".into(),
            "1 day".into(),
            "{a,NULL}".into(),
            "{\"a\": 1}".into(),
            Value::Blob(vec![0xDE, 0xAD]),
            "x".into(),
            "1.2.3.4".into(),
        ];
        assert_eq!(row_of(&mut connection, others).await, expected);
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn postgres_is_only_read() {
        let database = Database::create().await;
        let url = database.settings().url;
        postgres::migrate(&url).await.unwrap();
        let mut connection = Connection::open(&StoreUrl::Postgres(url.clone()), Access::Read)
            .await
            .unwrap();
        let empty = "SELECT name, enabled AS is_enabled FROM devices WHERE false";
        assert_eq!(
            connection.columns(empty).await.unwrap(),
            ["name", "is_enabled"]
        );
        for sql in [
            "WITH new AS (INSERT INTO devices (name) VALUES ('a') RETURNING 1) SELECT * FROM new",
            "EXPLAIN ANALYZE DELETE FROM devices",
            "SELECT nextval('frame_id_blocks')",
        ] {
            let result = connection
                .run(sql, |_| ControlFlow::<()>::Continue(()))
                .await;
            assert!(result.unwrap_err().is_write(), "{sql}");
        }
        let misspelt = connection
            .columns("SELECT nmae FROM devices")
            .await
            .unwrap_err();
        assert!(misspelt.hint().unwrap().contains("devices.name"));
        let several = connection.columns("SELECT 1; SELECT 2").await.unwrap_err();
        assert!(
            several.to_string().contains("multiple commands"),
            "{several}"
        );
        // A time is microseconds in every store.
        let at = "SELECT CAST(CAST($1 AS TEXT) AS TIMESTAMPTZ), CAST(sum(n) AS BIGINT)
                  FROM (VALUES (1), ($2)) AS numbers (n)";
        let rows = connection
            .rows(at, &["1970-01-01T00:00:01Z".into(), 2.into()])
            .await
            .unwrap();
        assert_eq!(rows, [Row(vec![1_000_000.into(), 3.into()])]);
    }

    #[tokio::test]
    async fn sqlite_takes_the_same_parameters_and_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let settings = sqlite::SqliteSettings::default();
        sqlite::migrate(&path, &settings).await.unwrap();
        let mut connection = Connection::open(&StoreUrl::Sqlite(path), Access::Read)
            .await
            .unwrap();
        let sql = "SELECT column1, CAST(sum(column2) AS BIGINT)
                   FROM (VALUES ($1, $2), ('B', 1), ($1, 2)) GROUP BY column1
                   ORDER BY column1 COLLATE \"C\"";
        let rows = connection
            .rows(sql, &["a".into(), 40.into()])
            .await
            .unwrap();
        assert_eq!(rows[0], Row(vec!["B".into(), 1.into()]));
        assert_eq!(rows[1], Row(vec!["a".into(), 42.into()]));
        assert!(rows[0].integer(0).is_err() && rows[0].real_or_null(1).is_err());
        assert_eq!(rows[0].text_or_null(0).unwrap(), Some("B"));
        // A query does not hold the write-ahead log for long.
        let endless =
            "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n";
        let stopped = { &mut connection }
            .rows_within(Duration::from_millis(1), endless, &[])
            .await;
        assert!(matches!(stopped, Err(QueryError::TooSlow)), "{stopped:?}");
        assert_eq!(
            connection
                .rows(sql, &["a".into(), 1.into()])
                .await
                .unwrap()
                .len(),
            2
        );
        let write = "INSERT INTO devices (name) VALUES ('a')";
        let result = connection
            .run(write, |_| ControlFlow::<()>::Continue(()))
            .await;
        assert!(result.unwrap_err().is_write());
    }
}
