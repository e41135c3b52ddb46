//! The verifier's own connection to a store, which only reads. It uses none of the gateway's code for stores, so that
//! a fault of that code cannot hide itself.
//!
//! A query is one text for SQLite and Postgres: parameters are `$1`, `$2`, …, and a sum is CAST to BIGINT, because
//! Postgres would return a numeric.

use std::future::poll_fn;

use fieldgate::config::store_url::StoreUrl;
use sqlx::postgres::PgRow;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Executor, PgConnection, Row as _, SqliteConnection, TypeInfo,
    ValueRef,
};

/// From 1970 to 2000, where Postgres begins to count.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

#[derive(Debug, thiserror::Error)]
#[error("could not open {store}: {}; is it the store of a gateway?", words(.error))]
pub struct OpenError {
    store: StoreUrl,
    error: sqlx::Error,
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{}", words(.0))]
    Sql(#[from] sqlx::Error),
    /// The verifier knows no such value in this place.
    #[error("column {column} of a row holds {found:?}")]
    Unexpected { column: usize, found: Value },
}

fn words(error: &sqlx::Error) -> String {
    match error.as_database_error() {
        Some(error) => error.message().to_owned(),
        None => error.to_string(),
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    /// Integer, or a time in microseconds UTC.
    Integer(i64),
    Real(f64),
    Text(String),
    Bytes(Vec<u8>),
}

/// Values of a row, in column order.
pub(super) struct Row(pub(super) Vec<Value>);

impl Row {
    pub(super) fn integer(&self, column: usize) -> Result<i64, ReadError> {
        self.integer_or_null(column)?
            .ok_or_else(|| self.unexpected(column))
    }

    pub(super) fn integer_or_null(&self, column: usize) -> Result<Option<i64>, ReadError> {
        match self.0[column] {
            Value::Null => Ok(None),
            Value::Integer(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    pub(super) fn text_or_null(&self, column: usize) -> Result<Option<&str>, ReadError> {
        match &self.0[column] {
            Value::Null => Ok(None),
            Value::Text(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    pub(super) fn bytes(&self, column: usize) -> Result<&[u8], ReadError> {
        match &self.0[column] {
            Value::Bytes(value) => Ok(value),
            _ => Err(self.unexpected(column)),
        }
    }

    fn unexpected(&self, column: usize) -> ReadError {
        let found = self.0[column].clone();
        ReadError::Unexpected { column, found }
    }

    fn of_sqlite(row: &SqliteRow) -> Result<Row, sqlx::Error> {
        let value = |index| {
            let raw = row.try_get_raw(index)?;
            // The type of the value: SQLite does not enforce that of the column.
            Ok(match raw.type_info().name() {
                _ if raw.is_null() => Value::Null,
                "INTEGER" => Value::Integer(row.try_get(index)?),
                "REAL" => Value::Real(row.try_get(index)?),
                "BLOB" => Value::Bytes(row.try_get(index)?),
                _ => {
                    let text: Vec<u8> = row.try_get_unchecked(index)?;
                    Value::Text(String::from_utf8_lossy(&text).into_owned())
                }
            })
        };
        (0..row.len()).map(value).collect::<Result<_, _>>().map(Row)
    }

    fn of_postgres(row: &PgRow) -> Result<Row, sqlx::Error> {
        let value = |index| {
            let raw = row.try_get_raw(index)?;
            let type_info = raw.type_info().into_owned();
            Ok(match type_info.name() {
                _ if raw.is_null() => Value::Null,
                "INT2" | "INT4" | "INT8" => Value::Integer(row.try_get_unchecked(index)?),
                "TIMESTAMPTZ" => {
                    let us: i64 = row.try_get_unchecked(index)?;
                    Value::Integer(us.saturating_add(POSTGRES_EPOCH_US))
                }
                "FLOAT8" => Value::Real(row.try_get(index)?),
                "BYTEA" => Value::Bytes(row.try_get(index)?),
                _ => Value::Text(row.try_get_unchecked(index)?),
            })
        };
        (0..row.len()).map(value).collect::<Result<_, _>>().map(Row)
    }
}

/// A connection that cannot write.
pub(super) enum Store {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

/// Passes each row to `$on_row`. A macro, because the streams and rows of the stores have different types.
macro_rules! each_row {
    ($sql:expr, $ids:expr, $conn:expr, $convert:path, $on_row:expr) => {{
        let query = sqlx::query(AssertSqlSafe($sql));
        let query = $ids.iter().fold(query, |query, id| query.bind(*id));
        let mut rows = query.fetch($conn);
        while let Some(row) = poll_fn(|context| rows.as_mut().poll_next(context)).await {
            $on_row($convert(&row?)?)?;
        }
    }};
}

impl Store {
    /// Opens a store, also of a running gateway.
    pub(super) async fn open(store: &StoreUrl) -> Result<Store, OpenError> {
        let opened = match store {
            StoreUrl::Sqlite(path) => {
                Store::open_sqlite(SqliteConnectOptions::new().filename(path)).await
            }
            StoreUrl::Postgres(url) => Store::open_postgres(url.options()).await,
        };
        opened.map_err(|error| OpenError {
            store: store.clone(),
            error,
        })
    }

    async fn open_sqlite(options: SqliteConnectOptions) -> Result<Store, sqlx::Error> {
        let mut conn = options
            .read_only(true)
            .pragma("query_only", "ON")
            .connect()
            .await?;
        conn.execute("SELECT 1 FROM streams WHERE false").await?;
        Ok(Store::Sqlite(conn))
    }

    async fn open_postgres(
        options: sqlx::postgres::PgConnectOptions,
    ) -> Result<Store, sqlx::Error> {
        let mut conn = options
            .application_name("fieldgate-sim verify")
            .connect()
            .await?;
        conn.execute("SET default_transaction_read_only = on; SET jit = off")
            .await?;
        conn.execute("SELECT 1 FROM streams WHERE false").await?;
        Ok(Store::Postgres(conn))
    }

    /// Passes the rows of a query one at a time to `on_row`, until that fails. `ids` are the parameters.
    pub(super) async fn each(
        &mut self,
        sql: &str,
        ids: &[i64],
        mut on_row: impl FnMut(Row) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        match self {
            Store::Sqlite(conn) => each_row!(sql.to_owned(), ids, conn, Row::of_sqlite, on_row),
            Store::Postgres(conn) => each_row!(sql.to_owned(), ids, conn, Row::of_postgres, on_row),
        }
        Ok(())
    }

    pub(super) async fn rows(&mut self, sql: &str, ids: &[i64]) -> Result<Vec<Row>, ReadError> {
        let mut rows = Vec::new();
        let on_row = |row| {
            rows.push(row);
            Ok(())
        };
        self.each(sql, ids, on_row).await?;
        Ok(rows)
    }

    /// Returns the only row of an aggregate.
    pub(super) async fn row(&mut self, sql: &str, ids: &[i64]) -> Result<Row, ReadError> {
        let mut rows = self.rows(sql, ids).await?;
        Ok(rows.pop().expect("an aggregate gives a row"))
    }
}
