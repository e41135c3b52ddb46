//! The store in a Postgres database, which several gateways may share.
//!
//! A gateway has a few connections that write, each with its own transactions; a device always has
//! the same one. `open` gets connections, `write` turns a batch into a transaction (`admit` has the
//! statements of logins and declares, `copy` and `timestamp` the binary format of COPY), `partitions`
//! keeps a table for each day, `feed` is for a spool that feeds the database. Here they are put together, and errors become [`StoreError`]s.
//!
//! Invariants
//! - The rows of a batch's streams are locked, in the order of their ids, before anything of it is
//!   written: two gateways that have frames of one stream take turns, and the second sees what the
//!   first has stored.
//! - After an error, and after a COMMIT of which nothing is known, the connection is given up. The
//!   batch comes again on a new one, and the ledger passes over what is stored already.

use std::borrow::Cow;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

use self::copy::Progress;
use self::identity::Identity;
pub(super) use self::identity::REASON_LOST_BY_STORE;
pub use self::open::{OpenError, migrate, open_editor, open_reader};
use self::partitions::Partitions;
pub use self::timestamp::Timestamp;
use self::write::{CommitError, Writer};
pub(super) use self::write::{insert_hours, insert_readings};
use super::bounds::DeviceBounds;
use super::{Batch, Committed, Store, StoreError};
use crate::store::url::PostgresUrl;

mod admit;
mod copy;
pub(super) mod feed;
mod identity;
mod open;
mod partitions;
#[cfg(test)]
pub(super) mod tests;
mod timestamp;
mod write;

/// A server that has not gone on for so long is given up, and connected to anew: the network may have
/// lost the connection without a word.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);

/// How the store is reached and used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresSettings {
    /// The database.
    pub url: PostgresUrl,
    /// Connections that write.
    pub writers: usize,
    /// Whether a server that may lose what it says is committed will do.
    pub allows_data_loss: bool,
    /// What each device may have.
    pub bounds: DeviceBounds,
    /// The spool that this gateway writes for, if it has one.
    pub spool: Option<SpoolClaim>,
}

/// By which a spool is known to the database that it feeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpoolClaim {
    /// Made with the spool, and the same in a copy of it.
    pub id: String,
    /// Drawn by each gateway that begins with the spool: of copies, only the one that the database knows may
    /// feed it.
    pub instance: String,
    /// How many commits of the spool's content it has forgotten since.
    pub drained: i64,
    /// How many the database counts; less where it was put back to an earlier state.
    pub found_drained: i64,
}

/// One of the connections that write; see the module.
pub struct PostgresStore {
    settings: Arc<PostgresSettings>,
    partitions: Arc<Partitions>,
    /// `None` after an error, until the next commit.
    writer: Option<Writer>,
    identity: Identity,
}

impl PostgresStore {
    /// Connects, brings the tables up to date, and gives back as many writers as `settings` say.
    ///
    /// # Errors
    /// [`OpenError`] says in one line what is wrong and what to do.
    pub async fn open(settings: PostgresSettings) -> Result<Vec<Self>, OpenError> {
        let settings = Arc::new(settings);
        let mut first = open::connect(&settings.url, settings.allows_data_loss).await?;
        open::bring_up_to_date(&mut first, &settings.url).await?;
        let pruned = identity::prune(&mut first).await;
        pruned.map_err(|error| open::open_error(&settings.url, error))?;
        let partitions = Partitions::new(first, settings.url.clone());
        let partitions = Arc::new(partitions.await?);
        let mut stores = Vec::with_capacity(settings.writers);
        for _ in 0..settings.writers {
            let conn = connect(&settings).await?;
            stores.push(Self {
                settings: Arc::clone(&settings),
                partitions: Arc::clone(&partitions),
                writer: Some(Writer::new(conn, settings.bounds)),
                identity: Identity::new(&settings),
            });
        }
        Ok(stores)
    }

    /// The spool has forgotten what it had committed here.
    pub(super) fn advance_drained(&mut self) {
        self.identity.advance_drained();
    }

    /// Begins again with a database of which nothing is known, and marks it for those who read from it.
    async fn forget(&mut self) {
        self.identity.forget();
        // What others know of operators' changes is compared with the database by their numbers, too.
        let marking = async {
            let mut writer = self.writer().await.ok()?;
            identity::mark_replaced(&mut writer.conn).await.ok()?;
            Some(writer)
        };
        self.writer = timeout(COMMIT_TIMEOUT, marking).await.ok().flatten();
    }

    async fn writer(&mut self) -> Result<Writer, StoreError> {
        if let Some(writer) = self.writer.take() {
            return Ok(writer);
        }
        // Whatever is wrong with the server now was not when the gateway began: it may be mended.
        let connected = connect(&self.settings).await;
        let conn = connected.map_err(|error| StoreError::Transient(error.to_string()))?;
        Ok(Writer::new(conn, self.settings.bounds))
    }
}

/// A connection that may write.
async fn connect(settings: &PostgresSettings) -> Result<PgConnection, OpenError> {
    let mut conn = open::connect(&settings.url, settings.allows_data_loss).await?;
    feed::enter(&mut conn, &settings.url, settings.spool.as_ref()).await?;
    Ok(conn)
}

impl Store for PostgresStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        let mut writer = self.writer().await?;
        let progress = Arc::clone(&writer.progress);
        let identity = &mut self.identity;
        let attempt = async {
            let now = Instant::now();
            self.partitions.make_for(&batch.entries, now).await;
            writer.commit(batch, identity).await
        };
        let committed = while_answering(attempt, &progress).await?;
        let committed = committed.map_err(|error| classify(&error));
        if let Err(StoreError::Replaced(_)) = committed {
            self.forget().await;
        }
        let committed = committed?;
        self.identity.remember(batch, &committed);
        self.writer = Some(writer);
        Ok(committed)
    }

    async fn close(self) -> Result<(), StoreError> {
        let Some(mut writer) = self.writer else {
            return Ok(());
        };
        // Everything is durable already; this is only to be polite.
        let leaving = async {
            let _ = self.identity.leave(&mut writer.conn).await;
            let _ = writer.conn.close().await;
        };
        let _ = timeout(COMMIT_TIMEOUT, leaving).await;
        Ok(())
    }
}

/// Awaits something that the server does, for as long as it goes on with it.
async fn while_answering<T>(
    attempt: impl Future<Output = T>,
    progress: &Progress,
) -> Result<T, StoreError> {
    let mut attempt = pin!(attempt);
    let mut made = progress.made();
    loop {
        match tokio::time::timeout(COMMIT_TIMEOUT, &mut attempt).await {
            Ok(done) => return Ok(done),
            Err(_) if progress.made() > made => made = progress.made(),
            Err(_) => return Err(no_answer()),
        }
    }
}

fn no_answer() -> StoreError {
    let seconds = COMMIT_TIMEOUT.as_secs();
    StoreError::Transient(format!("no answer within {seconds} s"))
}

fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Whether an SQLSTATE tells of a state that may pass: lost connections (08), conflicts of
/// transactions (40), a lack of room (53), shutdown and cancellation (57), I/O errors of the server
/// (58; those that endanger what is committed, it does not survive). Other classes tell mostly of
/// faults that last. Of them may pass: a server that has become a standby (25006); a transaction that
/// the server has ended because this process was suspended in it (25P03, and 25P04 from release 17 on);
/// what somebody else uses or has locked (55006, 55P03).
fn is_passing(code: &str) -> bool {
    const CLASSES: [&str; 5] = ["08", "40", "53", "57", "58"];
    const CODES: [&str; 5] = ["25006", "25P03", "25P04", "55006", "55P03"];
    CLASSES.iter().any(|class| code.starts_with(class)) || CODES.contains(&code)
}

/// Whether a reading was on its way to the default partition when somebody made the one of its day. A
/// constraint of an operator's own has a name.
fn is_overtaken(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else {
        return false;
    };
    let is_violation = error.code().as_deref() == Some("23514");
    is_violation && error.table() == Some("readings_default") && error.constraint().is_none()
}

fn classify(error: &CommitError) -> StoreError {
    /// `foreign_key_violation`: what a session knows of is not there any more.
    const FOREIGN_KEY: &str = "23503";
    let text = error.to_string();
    let CommitError::Sql(error) = error else {
        return StoreError::Replaced(text);
    };
    match (error, code(error)) {
        (error, Some(code)) if is_passing(&code) || is_overtaken(error) => {
            StoreError::Transient(text)
        }
        (_, Some(code)) if code == FOREIGN_KEY => StoreError::Replaced(text),
        (_, Some(_)) => StoreError::Fatal(text),
        // A connection that breaks in the middle of a message may show as a breach of protocol.
        (sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_), None) => {
            StoreError::Transient(text)
        }
        _ => StoreError::Fatal(text),
    }
}

/// As [`run`]; gives the number of rows that were written.
async fn run_counted(conn: &mut PgConnection, sql: String) -> Result<u64, sqlx::Error> {
    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(conn)
        .await?;
    Ok(done.rows_affected())
}

/// A text that is SQL without parameters, by the simple protocol.
async fn run(conn: &mut PgConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.into()))
        .execute(conn)
        .await
        .map(drop)
}
