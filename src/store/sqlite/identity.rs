//! Whether the file still holds what this gateway has put into it. SQLite replaces the content of a file
//! that is in use as one more transaction (`.restore`, the backup API), and ids that the gateway knows by
//! heart then mean other rows.
//!
//! A row counts transactions: each that gives out ids, and others now and then, for each page that is written
//! wears flash storage. It is looked at when another connection has written to the file, which costs nothing
//! to ask.

use std::time::{Duration, Instant};

use sqlx::SqliteConnection;

use crate::store::ledger::UnknownStream;

/// How often transactions count that give out no ids.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
const PUT_BACK: &str = "the database was put back to an earlier state, or is in use by another gateway, while \
    this gateway was using it; start the gateway again";

const GONE: &str = " any more";

/// What the file is known to hold.
#[derive(Debug, Default)]
pub(super) struct Identity {
    /// Drawn for this connection; another gateway on the same file draws its own.
    owner: String,
    count: i64,
    counted_at: Option<Instant>,
    /// Changes when another connection has written.
    data_version: i64,
    /// A stream that the latest transaction has moved, and how far: a file without it was put back, however
    /// little time lies between.
    newest: Option<(i64, i64)>,
}

/// What becomes of the count if the transaction succeeds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    count: i64,
    counted_at: Option<Instant>,
    data_version: i64,
}

impl Identity {
    /// Begins with what the file says, when nothing of it is known by heart, or after a transaction of which is
    /// not known whether it succeeded.
    pub(super) async fn settle(&mut self, conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        if self.owner.is_empty() {
            let owner: String = sqlx::query_scalar("SELECT lower(hex(randomblob(16)))")
                .fetch_one(&mut *conn)
                .await?;
            // To its end: RETURNING would give a row before it is known whether a full disk took it.
            sqlx::query("UPDATE store_identity SET owner = ?")
                .bind(&owner)
                .execute(&mut *conn)
                .await?;
            self.owner = owner;
        }
        let found: i64 = self.find(conn).await?;
        // The count moves by one at a time.
        if self.count != 0 && found != self.count && found != self.count + 1 {
            return Err(put_back());
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
            _ => Err(put_back()),
        }
    }

    /// Whether the file lacks the latest transaction. A stream that is missing was taken out with its device, or is
    /// missed by the count of logins.
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

    /// Begins a transaction: makes sure that the file holds all former ones, and counts it if that is due.
    pub(super) async fn check(
        &mut self,
        conn: &mut SqliteConnection,
        gives_out_ids: bool,
    ) -> Result<Counted, sqlx::Error> {
        let data_version: i64 = sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&mut *conn)
            .await?;
        if data_version != self.data_version
            && (self.find(conn).await? != self.count || self.lacks_newest(conn).await?)
        {
            return Err(put_back());
        }
        let mut counted = Counted {
            count: self.count,
            counted_at: self.counted_at,
            data_version,
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

    /// The transaction has succeeded; `moved` is a stream and its durable number by it, if it moved one.
    pub(super) fn advance(&mut self, counted: Counted, moved: Option<(i64, i64)>) {
        self.newest = moved.or(self.newest);
        self.count = counted.count;
        self.counted_at = counted.counted_at;
        self.data_version = counted.data_version;
    }
}

fn put_back() -> sqlx::Error {
    sqlx::Error::Protocol(PUT_BACK.to_owned())
}

/// The error of a stream that is gone, as one of a device that was removed while its frames waited.
pub(super) fn unknown_stream(unknown: &UnknownStream) -> sqlx::Error {
    sqlx::Error::Protocol(format!("{unknown}{GONE}"))
}

/// Whether it is the error of a stream that is gone.
pub(super) fn is_unknown_stream(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason.ends_with(GONE))
}

/// Whether it is the error of a file that does not hold what was put into it.
pub(super) fn is_put_back(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Protocol(reason) if reason == PUT_BACK)
}
