//! Detects that the file no longer holds what this gateway wrote. SQLite replaces the content of a file in use
//! with an ordinary transaction (`.restore`, the backup API); ids that the gateway has cached then refer to
//! other rows.
//!
//! A row counts transactions: each one that assigns ids, and others at intervals, because every page write
//! wears flash storage. The count is compared when another connection has written to the file, a check that
//! costs nothing.

use std::time::{Duration, Instant};

use sqlx::SqliteConnection;

use crate::store::ledger::UnknownStream;

/// Interval at which transactions that assign no ids are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
const RESTORED: &str = "the database was restored to an earlier state or used by another gateway while this one was \
    running; start the gateway again";

const GONE: &str = "; its device may have been removed";

/// Known content of the file.
#[derive(Debug, Default)]
pub(super) struct Identity {
    /// Generated for this connection; another gateway on the same file generates its own.
    owner: String,
    count: i64,
    counted_at: Option<Instant>,
    /// Changes when another connection has written.
    data_version: i64,
    /// A stream that the latest transaction moved, and its number. A file without it was restored, however
    /// recent the backup.
    newest: Option<(i64, i64)>,
}

/// New count if the transaction succeeds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    count: i64,
    counted_at: Option<Instant>,
    data_version: i64,
    /// Whether another connection has written since the latest transaction.
    pub(super) others_wrote: bool,
}

impl Identity {
    /// Loads the count from the file, when nothing is cached or after a transaction with unknown outcome.
    pub(super) async fn settle(&mut self, conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        if self.owner.is_empty() {
            let owner: String = sqlx::query_scalar("SELECT lower(hex(randomblob(16)))")
                .fetch_one(&mut *conn)
                .await?;
            // Run to completion: RETURNING would return a row before the write to a possibly full disk has
            // succeeded.
            sqlx::query("UPDATE store_identity SET owner = ?")
                .bind(&owner)
                .execute(&mut *conn)
                .await?;
            self.owner = owner;
        }
        let found: i64 = self.find(conn).await?;
        // The count increases by one at a time.
        if self.count != 0 && found != self.count && found != self.count + 1 {
            return Err(restored());
        }
        self.count = found;
        Ok(())
    }

    async fn find(&self, conn: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
        let row: (String, i64) = sqlx::query_as("SELECT owner, transactions FROM store_identity")
            .fetch_one(conn)
            .await?;
        match row {
            (owner, count) if owner == self.owner => Ok(count),
            _ => Err(restored()),
        }
    }

    /// Returns whether the file lacks the latest transaction. If the stream is missing, either its device was removed,
    /// or a lower count of logins shows that the file is older.
    async fn lacks_newest(&self, conn: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
        let Some((stream, seq)) = self.newest else {
            return Ok(false);
        };
        let found: Option<i64> = sqlx::query_scalar("SELECT durable_seq FROM streams WHERE id = ?")
            .bind(stream)
            .fetch_optional(conn)
            .await?;
        Ok(found.is_some_and(|found| found < seq))
    }

    /// Checks, at the start of a transaction, that the file holds all earlier ones, and counts it if that is
    /// due.
    pub(super) async fn check(
        &mut self,
        conn: &mut SqliteConnection,
        gives_out_ids: bool,
    ) -> Result<Counted, sqlx::Error> {
        let data_version: i64 = sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&mut *conn)
            .await?;
        let others_wrote = data_version != self.data_version;
        if others_wrote && (self.find(conn).await? != self.count || self.lacks_newest(conn).await?)
        {
            return Err(restored());
        }
        let mut counted = Counted {
            count: self.count,
            counted_at: self.counted_at,
            data_version,
            others_wrote,
        };
        let is_due = { self.counted_at }.is_none_or(|at| at.elapsed() >= COUNT_INTERVAL);
        if gives_out_ids || is_due {
            counted.count += 1;
            counted.counted_at = Some(Instant::now());
            sqlx::query("UPDATE store_identity SET transactions = ?")
                .bind(counted.count)
                .execute(conn)
                .await?;
        }
        Ok(counted)
    }

    /// Records that the transaction succeeded; `moved` is a stream and its new durable number, if it moved one.
    pub(super) fn advance(&mut self, counted: Counted, moved: Option<(i64, i64)>) {
        self.newest = moved.or(self.newest);
        self.count = counted.count;
        self.counted_at = counted.counted_at;
        self.data_version = counted.data_version;
    }
}

fn restored() -> sqlx::Error {
    sqlx::Error::Protocol(RESTORED.to_owned())
}

/// Returns the error for a missing stream, for example of a device that was removed while its frames waited.
pub(super) fn unknown_stream(unknown: &UnknownStream) -> sqlx::Error {
    sqlx::Error::Protocol(format!("{unknown}{GONE}"))
}

/// Returns whether it is the error for a missing stream.
pub(super) fn is_unknown_stream(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason.ends_with(GONE))
}

/// Returns whether it is the error for a file that lacks what was written to it.
pub(super) fn is_restored(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason == RESTORED)
}
