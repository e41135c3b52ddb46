//! The store, changed by an operator: one connection that writes, beside whatever gateways run.
//!
//! A gateway is a writer like any other here. In SQLite one of the two waits until the other has
//! committed, so a transaction must be short: for as long as it is open no frame is acknowledged.
//! Statements are one text for both stores, as those of [`Reader`].

use std::ops::{Deref, DerefMut};
use std::path::Path;

use sqlx::{AssertSqlSafe, Executor};

use super::reader::{Argument, OpenError, ReadError, Reader, postgres_arguments, sqlite_arguments};
use super::url::StoreUrl;
use super::{postgres, sqlite};

/// A connection that writes; it reads as a [`Reader`] does.
pub struct Editor(Reader);

impl Deref for Editor {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        &self.0
    }
}

impl DerefMut for Editor {
    fn deref_mut(&mut self) -> &mut Reader {
        &mut self.0
    }
}

impl Editor {
    /// Opens the store for writing, also beside a running gateway.
    ///
    /// # Errors
    /// As [`Reader::open`]: there is none, or it is not one of this program's present schema.
    pub async fn open(store: &StoreUrl) -> Result<Editor, OpenError> {
        Ok(Editor(match store {
            StoreUrl::Sqlite(path) => Reader::Sqlite(sqlite::open_editor(path).await?),
            StoreUrl::Postgres(url) => Reader::Postgres(postgres::open_editor(url).await?),
        }))
    }

    /// Opens the spool in the file `path`, beside the gateway that uses it.
    ///
    /// # Errors
    /// There is none, or it is not one of this program's present schema.
    pub async fn open_spool(path: &Path) -> Result<Editor, OpenError> {
        let conn = sqlite::spool::open_editor(path).await?;
        Ok(Editor(Reader::Sqlite(conn)))
    }

    /// Begins a transaction; in SQLite, waits for its turn to write.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn begin(&mut self) -> Result<(), ReadError> {
        let begin = match &self.0 {
            Reader::Sqlite(_) => "BEGIN IMMEDIATE",
            // Each statement must see what was committed while it waited for a lock.
            Reader::Postgres(_) => "BEGIN ISOLATION LEVEL READ COMMITTED",
        };
        self.run_alone(begin).await
    }

    /// Ends the transaction: all that was done in it is synced.
    ///
    /// # Errors
    /// Nothing of it was done, or, if the connection was lost, nobody knows.
    pub async fn commit(&mut self) -> Result<(), ReadError> {
        self.run_alone("COMMIT").await
    }

    /// Ends the transaction and undoes it.
    ///
    /// # Errors
    /// The store does not answer; the transaction is undone all the same.
    pub async fn rollback(&mut self) -> Result<(), ReadError> {
        self.run_alone("ROLLBACK").await
    }

    /// Runs a statement that writes; gives the number of rows that it changed.
    ///
    /// # Errors
    /// The store refuses it or does not answer.
    pub async fn execute(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<u64, ReadError> {
        let sql = AssertSqlSafe(sql.to_owned());
        Ok(match &mut self.0 {
            Reader::Sqlite(conn) => sqlx::query_with(sql, sqlite_arguments(arguments)?)
                .execute(conn)
                .await?
                .rows_affected(),
            Reader::Postgres(conn) => sqlx::query_with(sql, postgres_arguments(arguments)?)
                .execute(conn)
                .await?
                .rows_affected(),
        })
    }

    async fn run_alone(&mut self, sql: &'static str) -> Result<(), ReadError> {
        let sql = sqlx::raw_sql(sql);
        match &mut self.0 {
            Reader::Sqlite(conn) => conn.execute(sql).await.map(drop)?,
            Reader::Postgres(conn) => conn.execute(sql).await.map(drop)?,
        }
        Ok(())
    }
}
