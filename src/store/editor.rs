//! The store, changed by an operator: one connection that writes, beside whatever gateways run.
//!
//! A gateway is a writer like any other here. In SQLite one of the two waits until the other has
//! committed, so a transaction must be short: for as long as it is open no frame is acknowledged.
//! Statements are one text for both stores, as those of [`Reader`].

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Executor};

use super::reader::{Argument, OpenError, ReadError, Reader, postgres_arguments, sqlite_arguments};
use super::sqlite::turn::Turn;
use super::{postgres, sqlite};
use crate::config::store_url::StoreUrl;

/// A connection that writes; it reads as a [`Reader`] does.
pub struct Editor {
    reader: Reader,
    /// The file of the database, if it is one.
    path: Option<PathBuf>,
    /// The transaction that is open, if there is one.
    open: Option<Open>,
    /// How long the last transaction took.
    took: Duration,
}

struct Open {
    began: Instant,
    /// Ends with the transaction.
    _turn: Option<Turn>,
}

impl Deref for Editor {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        &self.reader
    }
}

impl DerefMut for Editor {
    fn deref_mut(&mut self) -> &mut Reader {
        &mut self.reader
    }
}

impl Editor {
    /// Opens the store for writing, also beside a running gateway.
    ///
    /// # Errors
    /// As [`Reader::open`]: there is none, or it is not one of this program's present schema.
    pub async fn open(store: &StoreUrl) -> Result<Editor, OpenError> {
        Ok(match store {
            StoreUrl::Sqlite(path) => {
                let conn = sqlite::open_editor(path).await?;
                Editor::of(Reader::Sqlite(conn), Some(path))
            }
            StoreUrl::Postgres(url) => {
                let conn = postgres::open_editor(url).await?;
                Editor::of(Reader::Postgres(conn), None)
            }
        })
    }

    /// Opens the spool in the file `path`, beside the gateway that uses it.
    ///
    /// # Errors
    /// There is none, or it is not one of this program's present schema.
    pub async fn open_spool(path: &Path) -> Result<Editor, OpenError> {
        let conn = sqlite::spool::open_editor(path).await?;
        Ok(Editor::of(Reader::Sqlite(conn), Some(path)))
    }

    fn of(reader: Reader, path: Option<&Path>) -> Editor {
        Editor {
            reader,
            path: path.map(Path::to_owned),
            open: None,
            took: Duration::ZERO,
        }
    }

    /// Begins a transaction; in SQLite, waits for its turn to write. Leaves the store to others for as long as the
    /// last transaction took, so that many in a row take at most half of the time.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn begin(&mut self) -> Result<(), ReadError> {
        let turn = match &self.path {
            Some(path) => {
                tokio::time::sleep(self.took).await;
                // Through a link it is the same database, and the same turn.
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                Turn::take(&path).await
            }
            None => None,
        };
        self.open = Some(Open {
            began: Instant::now(),
            _turn: turn,
        });
        let begin = match &self.reader {
            Reader::Sqlite(_) => "BEGIN IMMEDIATE",
            // Each statement must see what was committed while it waited for a lock.
            Reader::Postgres(_) => "BEGIN ISOLATION LEVEL READ COMMITTED",
        };
        let begun = self.run_alone(begin).await;
        if begun.is_err() {
            self.end();
        }
        begun
    }

    /// Ends the transaction: all that was done in it is synced.
    ///
    /// # Errors
    /// Nothing of it was done, or, if the connection was lost, nobody knows.
    pub async fn commit(&mut self) -> Result<(), ReadError> {
        let committed = self.run_alone("COMMIT").await;
        self.end();
        committed
    }

    /// Ends the transaction and undoes it.
    ///
    /// # Errors
    /// The store does not answer; the transaction is undone all the same.
    pub async fn rollback(&mut self) -> Result<(), ReadError> {
        let undone = self.run_alone("ROLLBACK").await;
        self.end();
        undone
    }

    fn end(&mut self) {
        if let Some(open) = self.open.take() {
            self.took = open.began.elapsed();
        }
    }

    /// Runs a statement that writes as a transaction of its own; gives the number of rows that it changed.
    ///
    /// # Errors
    /// As [`Editor::execute`]; nothing was done, or, if the connection was lost, nobody knows.
    pub async fn step(&mut self, sql: &str, arguments: &[Argument<'_>]) -> Result<u64, ReadError> {
        self.begin().await?;
        match self.execute(sql, arguments).await {
            Ok(rows) => {
                self.commit().await?;
                Ok(rows)
            }
            Err(error) => {
                let _ = self.rollback().await;
                Err(error)
            }
        }
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
        Ok(match &mut self.reader {
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
        match &mut self.reader {
            Reader::Sqlite(conn) => conn.execute(sql).await.map(drop)?,
            Reader::Postgres(conn) => conn.execute(sql).await.map(drop)?,
        }
        Ok(())
    }
}
