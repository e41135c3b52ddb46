//! The store, read: one connection that cannot write, whatever the store is.
//!
//! A query of this program's own is one text for both stores: parameters are `$1`, `$2`, …; a sum is
//! CAST to BIGINT (Postgres would make it numeric); text is ordered by `COLLATE "C"`, which is by
//! bytes in both. Times come as microseconds UTC.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use sqlx::postgres::{PgArguments, PgDatabaseError};
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, AssertSqlSafe, Column, Executor, SqlSafeStr, SqliteConnection, Statement};

pub use super::value::Value;
use super::{postgres, sqlite, value};
use crate::config::store_url::StoreUrl;

/// How long a query of this program's own may read from a file. The gateway cannot shorten its write-ahead log
/// past a reader, and stops storing when the log is full.
const OWN_QUERY_MAX: Duration = Duration::from_secs(10);
/// Steps of SQLite between two looks at the clock.
const STEPS_BETWEEN_LOOKS: i32 = 10_000;

/// A connection that reads.
pub enum Reader {
    /// To a file.
    Sqlite(SqliteConnection),
    /// To a server.
    Postgres(postgres::Link),
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file.
    #[error(transparent)]
    Sqlite(#[from] sqlite::OpenError),
    /// The database of a server.
    #[error(transparent)]
    Postgres(#[from] postgres::OpenError),
}

/// Why nothing more was read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// What the store says.
    #[error("{}", words(.0))]
    Sql(#[from] sqlx::Error),
    /// It took too long to go on holding the gateway's write-ahead log.
    #[error(
        "could not read all of it within {} s, and gave up so that the gateway can shorten its write-ahead log; try again when the machine has less to do",
        OWN_QUERY_MAX.as_secs()
    )]
    TooSlow,
    /// A row is not what this program writes.
    #[error("column {column} of a row holds {found:?}, which does not belong there")]
    Unexpected {
        /// Which one, from 0 on.
        column: usize,
        /// What is there.
        found: Value,
    },
}

impl ReadError {
    /// Whether the statement would have written.
    pub fn is_write(&self) -> bool {
        const SQLITE_READONLY: i32 = 8;
        const READ_ONLY_SQL_TRANSACTION: &str = "25006";
        let ReadError::Sql(sqlx::Error::Database(error)) = self else {
            return false;
        };
        match error.try_downcast_ref::<PgDatabaseError>() {
            Some(error) => error.code() == READ_ONLY_SQL_TRANSACTION,
            None => {
                let code: Option<i32> = error.code().and_then(|code| code.parse().ok());
                // The low byte is the kind, the rest says more of it.
                code.is_some_and(|code| code & 0xFF == SQLITE_READONLY)
            }
        }
    }

    /// What the server thinks was meant instead.
    pub fn hint(&self) -> Option<&str> {
        match self {
            ReadError::Sql(sqlx::Error::Database(error)) => {
                error.try_downcast_ref::<PgDatabaseError>()?.hint()
            }
            _ => None,
        }
    }
}

fn is_interrupted(error: &sqlx::Error) -> bool {
    const SQLITE_INTERRUPT: &str = "9";
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some(SQLITE_INTERRUPT)
}

/// The store's own words, where they are.
fn words(error: &sqlx::Error) -> String {
    match error.as_database_error() {
        Some(error) => error.message().replace('\n', " "),
        None => error.to_string(),
    }
}

/// A parameter of a query.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// A whole number.
    Integer(i64),
    /// Text.
    Text(&'a str),
    /// A time, microseconds UTC.
    Time(i64),
    /// Bytes, or NULL.
    Bytes(Option<&'a [u8]>),
}

impl From<i64> for Argument<'_> {
    fn from(value: i64) -> Self {
        Argument::Integer(value)
    }
}

impl<'a> From<&'a str> for Argument<'a> {
    fn from(value: &'a str) -> Self {
        Argument::Text(value)
    }
}

/// A row: its values, in the order of the columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Row(pub Vec<Value>);

impl Row {
    /// The number in a column.
    pub fn integer(&self, column: usize) -> Result<i64, ReadError> {
        match self.0[column] {
            Value::Integer(value) => Ok(value),
            _ => Err(self.unexpected(column)),
        }
    }

    /// The number in a column that may be NULL.
    pub fn integer_or_null(&self, column: usize) -> Result<Option<i64>, ReadError> {
        match self.0[column] {
            Value::Null => Ok(None),
            _ => self.integer(column).map(Some),
        }
    }

    /// The double in a column that may be NULL.
    pub fn real_or_null(&self, column: usize) -> Result<Option<f64>, ReadError> {
        match self.0[column] {
            Value::Null => Ok(None),
            Value::Real(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    /// The text in a column that may be NULL.
    pub fn text_or_null(&self, column: usize) -> Result<Option<&str>, ReadError> {
        match &self.0[column] {
            Value::Null => Ok(None),
            Value::Text(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    /// The bytes in a column.
    pub fn bytes(&self, column: usize) -> Result<&[u8], ReadError> {
        match &self.0[column] {
            Value::Blob(value) => Ok(value),
            _ => Err(self.unexpected(column)),
        }
    }

    fn unexpected(&self, column: usize) -> ReadError {
        ReadError::Unexpected {
            column,
            found: self.0[column].clone(),
        }
    }
}

/// Takes rows until there are no more, or `$on_row` breaks off. A macro, because the streams of the two
/// stores have types of their own.
macro_rules! take_rows {
    ($rows:expr, $values:path, $on_row:expr) => {{
        let mut rows = $rows;
        while let Some(row) = poll_fn(|context| rows.as_mut().poll_next(context)).await {
            if let ControlFlow::Break(end) = $on_row(Row($values(&row?)?)) {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }};
}

impl Reader {
    /// Opens the store for reading, also beside a running gateway.
    ///
    /// # Errors
    /// There is none, or it is not one of this program's present schema.
    pub async fn open(store: &StoreUrl) -> Result<Reader, OpenError> {
        match store {
            StoreUrl::Sqlite(path) => Ok(Reader::Sqlite(sqlite::open_reader(path).await?)),
            StoreUrl::Postgres(url) => Ok(Reader::Postgres(postgres::open_reader(url).await?)),
        }
    }

    /// Opens the store as [`Reader::open`], for a gateway that looks again and again: what is slow is
    /// given up.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub async fn open_watcher(store: &StoreUrl) -> Result<Reader, OpenError> {
        match store {
            StoreUrl::Sqlite(_) => Reader::open(store).await,
            StoreUrl::Postgres(url) => Ok(Reader::Postgres(postgres::open_watcher(url).await?)),
        }
    }

    /// Returns the rows of a query of this program's own.
    ///
    /// # Errors
    /// The store does not answer, or a file has not given all rows within [`OWN_QUERY_MAX`].
    pub async fn rows(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, ReadError> {
        self.rows_within(OWN_QUERY_MAX, sql, arguments).await
    }

    async fn rows_within(
        &mut self,
        limit: Duration,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, ReadError> {
        let mut rows = Vec::new();
        let on_row = |row| {
            rows.push(row);
            Ok(())
        };
        self.limit(Some(limit)).await?;
        let read = self.each(sql, arguments, on_row).await;
        self.limit(None).await?;
        match read {
            Err(ReadError::Sql(error)) if is_interrupted(&error) => Err(ReadError::TooSlow),
            read => read.map(|()| rows),
        }
    }

    /// Has SQLite end a statement that runs longer than `limit`, from now on.
    async fn limit(&mut self, limit: Option<Duration>) -> Result<(), sqlx::Error> {
        let Reader::Sqlite(conn) = self else {
            return Ok(());
        };
        let mut handle = conn.lock_handle().await?;
        match limit.and_then(|limit| Instant::now().checked_add(limit)) {
            Some(end) => {
                handle.set_progress_handler(STEPS_BETWEEN_LOOKS, move || Instant::now() < end);
            }
            None => handle.remove_progress_handler(),
        }
        Ok(())
    }

    /// Gives the rows of a query of this program's own to `on_row`, one at a time, until that fails.
    pub async fn each(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
        mut on_row: impl FnMut(Row) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let on_row = |row| match on_row(row) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        };
        let failed = self.fetch(sql, Some(arguments), on_row).await?;
        failed.map_or(Ok(()), Err)
    }

    /// The names of the columns of a user's statement, so that an empty result has headers, too.
    /// Postgres refuses two statements in one text here, if nobody has before.
    pub async fn columns(&mut self, sql: &str) -> Result<Vec<String>, ReadError> {
        let sql = AssertSqlSafe(sql.to_owned()).into_sql_str();
        fn names<C: Column>(columns: &[C]) -> Vec<String> {
            let names = columns.iter().map(|column| column.name().to_owned());
            names.collect()
        }
        match self {
            Reader::Sqlite(conn) => Ok(names(conn.prepare(sql).await?.columns())),
            Reader::Postgres(conn) => Ok(names(conn.prepare(sql).await?.columns())),
        }
    }

    /// Gives the rows of a user's statement to `on_row` as they come, until that breaks off; gives
    /// back what it broke off with.
    pub async fn run<B>(
        &mut self,
        sql: &str,
        on_row: impl FnMut(Row) -> ControlFlow<B>,
    ) -> Result<Option<B>, ReadError> {
        self.fetch(sql, None, on_row).await
    }

    /// `arguments` are `None` for a user's statement, which is run once and may give any type.
    async fn fetch<B>(
        &mut self,
        sql: &str,
        arguments: Option<&[Argument<'_>]>,
        mut on_row: impl FnMut(Row) -> ControlFlow<B>,
    ) -> Result<Option<B>, ReadError> {
        let is_own = arguments.is_some();
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            Reader::Sqlite(conn) => {
                let arguments = sqlite_arguments(arguments.unwrap_or_default())?;
                let query = sqlx::query_with(sql, arguments).persistent(is_own);
                take_rows!(query.fetch(conn), value::of_sqlite, on_row)
            }
            Reader::Postgres(conn) => {
                let rows = match arguments {
                    Some(arguments) => {
                        sqlx::query_with(sql, postgres_arguments(arguments)?).fetch(conn)
                    }
                    // By the simple protocol: every value comes as text.
                    None => sqlx::raw_sql(sql).fetch(conn),
                };
                take_rows!(rows, value::of_postgres, on_row)
            }
        }
    }
}

pub(super) fn sqlite_arguments(values: &[Argument<'_>]) -> Result<SqliteArguments, sqlx::Error> {
    let mut arguments = SqliteArguments::default();
    for value in values {
        match value {
            Argument::Integer(value) | Argument::Time(value) => arguments.add(*value),
            Argument::Text(value) => arguments.add((*value).to_owned()),
            Argument::Bytes(value) => arguments.add(value.map(<[u8]>::to_vec)),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

pub(super) fn postgres_arguments(values: &[Argument<'_>]) -> Result<PgArguments, sqlx::Error> {
    let mut arguments = PgArguments::default();
    for value in values {
        match value {
            Argument::Integer(value) => arguments.add(*value),
            Argument::Text(value) => arguments.add(*value),
            Argument::Time(value) => arguments.add(postgres::Timestamp(*value)),
            Argument::Bytes(value) => arguments.add(*value),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::postgres::tests::Database;

    async fn row_of(reader: &mut Reader, sql: &str) -> Vec<Value> {
        let broken_off = reader.run(sql, |row| ControlFlow::Break(row.0)).await;
        broken_off.unwrap().unwrap()
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn every_type_of_postgres_can_be_read() {
        let database = Database::create().await;
        let url = database.settings().url;
        let store = StoreUrl::Postgres(url.clone());
        let missing = Reader::open(&store).await.err().unwrap();
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
        let mut reader = Reader::open(&store).await.unwrap();
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
        assert_eq!(row_of(&mut reader, numbers).await, expected);
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
        assert_eq!(row_of(&mut reader, others).await, expected);
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn postgres_is_only_read() {
        let database = Database::create().await;
        let url = database.settings().url;
        postgres::migrate(&url).await.unwrap();
        let mut reader = Reader::open(&StoreUrl::Postgres(url.clone()))
            .await
            .unwrap();
        let empty = "SELECT name, enabled AS is_enabled FROM devices WHERE false";
        assert_eq!(reader.columns(empty).await.unwrap(), ["name", "is_enabled"]);
        for sql in [
            "WITH new AS (INSERT INTO devices (name) VALUES ('a') RETURNING 1) SELECT * FROM new",
            "EXPLAIN ANALYZE DELETE FROM devices",
            "SELECT nextval('frame_id_blocks')",
        ] {
            let result = reader.run(sql, |_| ControlFlow::<()>::Continue(())).await;
            assert!(result.unwrap_err().is_write(), "{sql}");
        }
        let misspelt = reader
            .columns("SELECT nmae FROM devices")
            .await
            .unwrap_err();
        assert!(misspelt.hint().unwrap().contains("devices.name"));
        let several = reader.columns("SELECT 1; SELECT 2").await.unwrap_err();
        assert!(
            several.to_string().contains("multiple commands"),
            "{several}"
        );
        // A time of the store is microseconds, whatever the store is.
        let at = "SELECT CAST(CAST($1 AS TEXT) AS TIMESTAMPTZ), CAST(sum(n) AS BIGINT)
                  FROM (VALUES (1), ($2)) AS numbers (n)";
        let rows = reader
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
        let mut reader = Reader::open(&StoreUrl::Sqlite(path)).await.unwrap();
        let sql = "SELECT column1, CAST(sum(column2) AS BIGINT)
                   FROM (VALUES ($1, $2), ('B', 1), ($1, 2)) GROUP BY column1
                   ORDER BY column1 COLLATE \"C\"";
        let rows = reader.rows(sql, &["a".into(), 40.into()]).await.unwrap();
        assert_eq!(rows[0], Row(vec!["B".into(), 1.into()]));
        assert_eq!(rows[1], Row(vec!["a".into(), 42.into()]));
        assert!(rows[0].integer(0).is_err() && rows[0].real_or_null(1).is_err());
        assert_eq!(rows[0].text_or_null(0).unwrap(), Some("B"));
        // A query of this program's own does not hold the log for long.
        let endless =
            "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n";
        let given_up = { &mut reader }
            .rows_within(Duration::from_millis(1), endless, &[])
            .await;
        assert!(matches!(given_up, Err(ReadError::TooSlow)), "{given_up:?}");
        assert_eq!(
            reader
                .rows(sql, &["a".into(), 1.into()])
                .await
                .unwrap()
                .len(),
            2
        );
        let write = "INSERT INTO devices (name) VALUES ('a')";
        let result = reader.run(write, |_| ControlFlow::<()>::Continue(())).await;
        assert!(result.unwrap_err().is_write());
    }
}
