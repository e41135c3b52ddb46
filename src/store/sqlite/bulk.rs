//! One statement over many rows, in a few fixed sizes, so that each size is prepared once and then found in the
//! statement cache for any number of rows.
//!
//! Statements that write many rows use OR FAIL. Any other conflict resolution makes SQLite copy each page that
//! a statement changes, so that it can undo part of the statement; here a batch is rolled back as a whole.
//!
//! Invariant: parameters are anonymous (`?`). Numbered ones would be looked up by name at each bind, in time
//! quadratic in the number of rows.

use std::sync::Arc;

use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, AssertSqlSafe, Encode, Sqlite, SqliteConnection, Type};

/// Numbers of rows, in addition to one. Each statement is a round trip to SQLite's thread, so powers of two
/// keep their number low: as many as the number of rows has ones in binary. Larger statements than about a
/// thousand rows are no faster.
const SIZES: &[usize] = &[1024, 512, 256, 128, 64, 32, 16, 8, 4, 2];

/// End of the error about rows that were not written.
const LEFT_OUT: &str = ": a trigger drops rows; remove it";

/// Returns whether it is the error about rows that were not written.
pub(super) fn is_left_out(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason.ends_with(LEFT_OUT))
}

/// A statement with `VALUES (?, …), (?, …), …` in its middle.
pub(super) struct Bulk {
    columns: usize,
    /// Whether every row must be written.
    is_whole: bool,
    /// Number of rows and text, in descending order down to one row.
    sizes: Vec<(usize, Arc<str>)>,
}

/// Parameters of a statement under construction.
pub(super) struct Params {
    arguments: SqliteArguments,
    failure: Option<sqlx::Error>,
}

impl Params {
    fn with_capacity(params: usize) -> Self {
        let mut arguments = SqliteArguments::default();
        arguments.reserve(params, 0);
        Self {
            arguments,
            failure: None,
        }
    }

    pub(super) fn bind<'q, T: Encode<'q, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        if let Err(error) = self.arguments.add(value) {
            self.failure.get_or_insert(sqlx::Error::Encode(error));
        }
        self
    }
}

impl Bulk {
    /// Creates a statement: `head` precedes the rows of `columns` columns, `tail` follows them.
    pub(super) fn new(head: &str, columns: usize, tail: &str) -> Self {
        let row = format!("({})", vec!["?"; columns].join(","));
        let sizes = SIZES.iter().chain(&[1]).map(|&rows| {
            let sql = format!(
                "{head} VALUES {} {tail}",
                vec![row.as_str(); rows].join(",")
            );
            (rows, Arc::from(sql))
        });
        Self {
            columns,
            is_whole: false,
            sizes: sizes.collect(),
        }
    }

    /// Makes the statement fail when a row is not written: an operator's trigger may drop rows without an
    /// error.
    #[must_use]
    pub(super) fn whole(self) -> Self {
        Self {
            is_whole: true,
            ..self
        }
    }

    fn check(&self, rows: usize, written: u64) -> Result<(), sqlx::Error> {
        match self.is_whole && written != rows as u64 {
            true => Err(sqlx::Error::Protocol(format!(
                "only {written} of {rows} rows were stored{LEFT_OUT}"
            ))),
            false => Ok(()),
        }
    }

    pub(super) async fn execute<R: Send>(
        &self,
        conn: &mut SqliteConnection,
        rows: impl ExactSizeIterator<Item = R> + Send,
        bind: impl Fn(&mut Params, R) + Send + Sync,
    ) -> Result<(), sqlx::Error> {
        let mut rows = rows;
        let mut next = self.take(&mut rows, &bind)?;
        while let Some((size, sql, arguments)) = next.take() {
            let run = sqlx::query_with(AssertSqlSafe(sql), arguments).execute(&mut *conn);
            // SQLite works in its own thread, so bind the next rows meanwhile.
            let (done, bound) = tokio::join!(run, async { self.take(&mut rows, &bind) });
            self.check(size, done?.rows_affected())?;
            next = bound?;
        }
        Ok(())
    }

    /// Runs the statement over all rows and collects the results.
    pub(super) async fn fetch<R: Send>(
        &self,
        conn: &mut SqliteConnection,
        rows: impl ExactSizeIterator<Item = R> + Send,
        bind: impl Fn(&mut Params, R) + Send + Sync,
    ) -> Result<Vec<SqliteRow>, sqlx::Error> {
        let mut rows = rows;
        let mut returned = Vec::with_capacity(rows.len());
        while let Some((_, sql, arguments)) = self.take(&mut rows, &bind)? {
            returned.extend(
                sqlx::query_with(AssertSqlSafe(sql), arguments)
                    .fetch_all(&mut *conn)
                    .await?,
            );
        }
        Ok(returned)
    }

    /// Returns the next statement with its number of rows and its parameters; `None` when no row is left.
    fn take<R>(
        &self,
        rows: &mut impl ExactSizeIterator<Item = R>,
        bind: &impl Fn(&mut Params, R),
    ) -> Result<Option<(usize, Arc<str>, SqliteArguments)>, sqlx::Error> {
        let left = rows.len();
        let Some((size, sql)) = self.sizes.iter().find(|(size, _)| *size <= left) else {
            return Ok(None);
        };
        let mut params = Params::with_capacity(size * self.columns);
        for row in rows.take(*size) {
            bind(&mut params, row);
        }
        match params.failure {
            Some(error) => Err(error),
            None => Ok(Some((*size, Arc::clone(sql), params.arguments))),
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, Row};

    use super::*;

    #[tokio::test]
    async fn every_row_is_bound_once_for_any_count() {
        let mut conn = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        let echo = Bulk::new("WITH t(a, b) AS (", 2, ") SELECT a, b FROM t");
        for count in [0, 1, 2, 3, 7, 8, 100, 1023, 1024, 1025, 3071] {
            let rows = (0..count)
                .map(|n: i64| (n, -n))
                .collect::<Vec<_>>()
                .into_iter();
            let bind = |params: &mut Params, (a, b): (i64, i64)| {
                params.bind(a).bind(b);
            };
            let returned = echo.fetch(&mut conn, rows, bind).await.unwrap();
            let pairs: Vec<(i64, i64)> = returned
                .iter()
                .map(|row| (row.get(0), row.get(1)))
                .collect();
            assert_eq!(pairs, (0..count).map(|n| (n, -n)).collect::<Vec<_>>());
        }
    }
}
