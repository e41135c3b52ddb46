//! One statement over many rows, in a few fixed sizes, so that each is prepared once and then found
//! in the statement cache whatever the number of rows.
//!
//! Those that write many rows do so OR FAIL: any other way of failing makes SQLite keep a copy of each
//! page that a statement changes, to undo half of it, and here a batch is undone as a whole.
//!
//! Invariant: parameters are anonymous (`?`). Numbered ones would be looked up by name at each bind,
//! in time quadratic in the number of rows.

use std::sync::Arc;

use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, AssertSqlSafe, Encode, Sqlite, SqliteConnection, Type};

/// Numbers of rows besides one. Each statement is a journey to SQLite's thread and back, so few should be
/// needed whatever the number of rows: as many as it has ones in binary. More than a thousand rows at once
/// gain nothing.
const SIZES: &[usize] = &[1024, 512, 256, 128, 64, 32, 16, 8, 4, 2];

/// Ends the error of rows that were not written.
const LEFT_OUT: &str = ": a trigger leaves rows out; drop that";

/// Whether it is the error of rows that were not written.
pub(super) fn is_left_out(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason.ends_with(LEFT_OUT))
}

/// A statement that has `VALUES (?, …), (?, …), …` in its middle.
pub(super) struct Bulk {
    columns: usize,
    /// Whether each row has to be written.
    is_whole: bool,
    /// Rows and text, most rows first, one row last.
    sizes: Vec<(usize, Arc<str>)>,
}

/// The parameters of a statement in the making.
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

    /// Adds the next parameter.
    pub(super) fn bind<'q, T: Encode<'q, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        if let Err(error) = self.arguments.add(value) {
            self.failure.get_or_insert(sqlx::Error::Encode(error));
        }
        self
    }
}

impl Bulk {
    /// `head` comes before the rows of so many `columns`, `tail` after them.
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

    /// Has it fail when a row is not written: a trigger of the operator's may leave rows out without an error.
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
                "{written} of {rows} rows were stored{LEFT_OUT}"
            ))),
            false => Ok(()),
        }
    }

    /// Runs the statement over all rows.
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
            // SQLite works in a thread of its own: bind the next rows meanwhile.
            let (done, bound) = tokio::join!(run, async { self.take(&mut rows, &bind) });
            self.check(size, done?.rows_affected())?;
            next = bound?;
        }
        Ok(())
    }

    /// Runs the statement over all rows and collects what it returns.
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

    /// The next statement with its number of rows and its parameters; `None` when no row is left.
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
    async fn every_row_is_bound_once_whatever_the_count() {
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
