//! The store in a Postgres database, which several gateways may share.
//!
//! A gateway has a few connections that write, each with its own transactions; a device always has
//! the same one. `link` is a connection on which every await has a deadline, `backends` ends at the server
//! what was given up here, `open` gets connections, `write` turns a batch into a transaction (`admit` has the
//! statements of logins and declares, `copy` and `timestamp` the binary format of COPY), `partitions`
//! makes a table for each month, and for each year long ago, `newest` keeps the newest reading of each series, `feed`
//! is for a spool that feeds the database. Here they are put together, and errors become [`StoreError`]s.
//!
//! Invariants
//! - The rows of a batch's streams are locked, in the order of their ids, before anything of it is
//!   written: two gateways that have frames of one stream take turns, and the second sees what the
//!   first has stored.
//! - After an error, and after a COMMIT of which nothing is known, the connection is given up. The
//!   batch comes again on a new one, and the ledger passes over what is stored already.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::backends::Backends;
pub use self::backends::end_left;
use self::identity::Identity;
pub(super) use self::identity::REASON_LOST_BY_STORE;
pub use self::link::Link;
use self::newest::Newest;
pub(super) use self::newest::insert_newest;
pub use self::open::{OpenError, check, migrate, open_editor, open_reader, open_watcher};
use self::partitions::Partitions;
pub use self::timestamp::Timestamp;
use self::write::{CommitError, Writer};
pub(super) use self::write::{insert_hours, insert_readings};
use super::bounds::DeviceBounds;
use super::cut::{Cut, Sum};
use super::{Batch, Committed, Store, StoreError};
use crate::store::url::PostgresUrl;
use crate::time::{SystemClock, warn_at_start};

mod admit;
mod backends;
mod copy;
pub(super) mod feed;
mod identity;
mod link;
mod newest;
mod open;
mod partitions;
#[cfg(test)]
pub(super) mod tests;
mod timestamp;
mod write;

/// A server that has not gone on for this long is given up, and connected to again: the network may have
/// lost the connection without a word.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long newest readings may take to be written at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

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
    /// Which gateway this is to the database, among others.
    pub gateway: String,
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

/// The latest time of receipt that is stored.
const LATEST_TIME: &str = "SELECT max(at) FROM (
    SELECT max(last_seen_at) AS at FROM devices
    UNION ALL SELECT max(measured_at) FROM clocks
    UNION ALL SELECT (SELECT received_at FROM frames ORDER BY id DESC LIMIT 1)) AS latest";

/// One of the connections that write; see the module.
pub struct PostgresStore {
    settings: Arc<PostgresSettings>,
    partitions: Arc<Partitions>,
    /// `None` after an error, until the next commit.
    writer: Option<Writer>,
    identity: Identity,
    cut: Cut,
    newest: Newest,
}

impl PostgresStore {
    /// Connects, brings the tables up to date, and gives back as many writers as `settings` say.
    ///
    /// # Errors
    /// [`OpenError`] says in one line what is wrong and what to do.
    pub async fn open(settings: PostgresSettings) -> Result<Vec<Self>, OpenError> {
        let settings = Arc::new(settings);
        Backends::of(&settings.url).allow_writers(settings.writers);
        let mut first = open::connect(&settings.url, settings.allows_data_loss).await?;
        open::bring_up_to_date(&mut first, &settings.url).await?;
        let pruned = identity::prune(&mut first).await;
        pruned.map_err(|error| open::open_error(&settings.url, error))?;
        if settings.spool.is_none() {
            let now_us = SystemClock::start().now().utc_us;
            let stored = sqlx::query_scalar::<_, Option<Timestamp>>(LATEST_TIME);
            let stored = stored.fetch_one(&mut first).await;
            let stored = stored.map_err(|error| open::open_error(&settings.url, error))?;
            warn_at_start(now_us, stored.map(|stored| stored.0));
            let closed = write::close_sessions(&mut first, &settings.gateway, now_us).await;
            closed.map_err(|error| open::open_error(&settings.url, error))?;
        }
        let partitions = Partitions::new(first, settings.url.clone());
        let partitions = Arc::new(partitions.await?);
        let mut stores = Vec::with_capacity(settings.writers);
        for number in 0..settings.writers {
            let conn = connect(&settings).await?;
            stores.push(Self {
                settings: Arc::clone(&settings),
                partitions: Arc::clone(&partitions),
                writer: Some(Writer::new(conn, &settings, partitions.are_own())),
                identity: Identity::new(&settings),
                cut: Cut::default(),
                newest: Newest::new(number == 0, settings.spool.is_some()),
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
        self.newest = Newest::new(true, self.settings.spool.is_some());
        // What others know of operators' changes is compared with the database by their numbers, too.
        let Ok(mut writer) = self.writer().await else {
            return;
        };
        if identity::mark_replaced(&mut writer.conn).await.is_ok() {
            self.writer = Some(writer);
        }
    }

    async fn writer(&mut self) -> Result<Writer, StoreError> {
        if let Some(writer) = self.writer.take() {
            return Ok(writer);
        }
        // Whatever is wrong with the server now was not when the gateway began: it may pass.
        let connected = connect(&self.settings).await;
        let conn = connected.map_err(|error| StoreError::Transient(error.to_string()))?;
        let counts_readings = self.partitions.are_own();
        Ok(Writer::new(conn, &self.settings, counts_readings))
    }

    /// Commits what goes into one transaction.
    async fn commit_part(&mut self, part: &Batch) -> Result<Committed, (StoreError, Size)> {
        let mut writer = self
            .writer()
            .await
            .map_err(|error| (error, Size::IsNoMatter))?;
        self.partitions
            .make_for(&part.entries, Instant::now())
            .await;
        let committed = writer
            .commit(part, &mut self.identity, &mut self.newest)
            .await;
        let committed = committed.map_err(|error| (classify(&error), Size::of(&error)));
        if let Err((StoreError::Replaced(_), _)) = committed {
            self.forget().await;
        }
        let committed = committed?;
        self.identity.remember(part, &committed);
        self.writer = Some(writer);
        Ok(committed)
    }
}

/// A connection that may write.
async fn connect(settings: &PostgresSettings) -> Result<Link, OpenError> {
    let mut conn = open::connect(&settings.url, settings.allows_data_loss).await?;
    feed::enter(&mut conn, &settings.url, settings.spool.as_ref()).await?;
    Ok(conn)
}

impl Store for PostgresStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        'cut: loop {
            let (mut sum, mut taken) = (Sum::default(), 0);
            while let Some(part) = self.cut.next_part(batch, &mut taken) {
                match self.commit_part(&part).await {
                    Ok(committed) => {
                        self.cut.pass(&part);
                        sum.add(committed);
                    }
                    Err((error, size)) => {
                        let reason = error.to_string();
                        let floor = size.floor();
                        let is_cut =
                            floor.is_some_and(|floor| self.cut.halve(&part, floor, &reason));
                        if is_cut && size == Size::IsTooMuch {
                            continue 'cut;
                        }
                        return Err(error);
                    }
                }
            }
            return Ok(sum.committed());
        }
    }

    fn tidy_after(&self) -> Option<Duration> {
        self.newest.tidy_after()
    }

    async fn close(mut self) -> Result<(), StoreError> {
        if self.writer.is_some() && self.newest.has_pending() {
            // The next start would find what is left, too.
            let nothing = Batch::default();
            let last = self.commit(&nothing);
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, last).await;
        }
        let Some(mut writer) = self.writer else {
            return Ok(());
        };
        // Everything is durable already; this is only to be polite.
        // So is this; and a failure of it shows in nothing.
        let _ = self.identity.leave(&mut writer.conn).await;
        writer.conn.close().await;
        Ok(())
    }
}

fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Whether an SQLSTATE says that the server lets nobody in for the moment: a start tries again.
fn is_passing(code: &str) -> bool {
    const CLASSES: [&str; 5] = ["08", "40", "53", "57", "58"];
    const CODES: [&str; 5] = ["25006", "25P03", "25P04", "55006", "55P03"];
    CLASSES.iter().any(|class| code.starts_with(class)) || CODES.contains(&code)
}

/// Keys of this program's own. A row that breaks one shows that the gateway knows ids or watermarks by
/// heart that the database does not have.
const OWN_KEYS: [&str; 19] = [
    "devices_pkey",
    "devices_name_key",
    "streams_pkey",
    "streams_device_id_stream_key",
    "streams_device_id_fkey",
    "schemas_pkey",
    "schemas_device_id_fkey",
    "series_pkey",
    "series_device_id_channel_unit_kind_key",
    "series_device_id_fkey",
    "frames_pkey",
    "frames_stream_id_seq_key",
    "gaps_pkey",
    "gaps_stream_id_fkey",
    "quarantine_stream_id_seq_key",
    "quarantine_device_id_fkey",
    "quarantine_stream_id_fkey",
    "device_events_device_id_fkey",
    "clocks_device_id_fkey",
];

/// Tells what passes, or can be put right while the gateway waits, from what only a new start can.
///
/// | error | examples | answer |
/// |---|---|---|
/// | the connection, or no answer | 08, reset, silence, TLS | waits |
/// | the server's state | 25006 standby, 40 conflicts, 53 no room, 57 shutdown, 58 I/O, XX damage | waits |
/// | limits on a batch | [`Size`] | cuts the batch, then waits |
/// | a right, a table or a column that is missing | 42501, 42P01, 42703, 3F000 | waits: an operator gives it back |
/// | a trigger or a constraint of the operator's own | P0001, 22, 23 with another name | waits: it is the operator's to change |
/// | the database is another one | `identity`, 23503 of [`OWN_KEYS`] | forgets what it knew; devices log in again |
/// | a row is there that must not be | 23505 of [`OWN_KEYS`] | ends: what is known by heart is wrong |
/// | an answer that cannot be read | a column of another type | ends: a fault of this program |
///
/// While it waits nothing is acknowledged, devices hear NACK 11, and the log has the server's words. To
/// end would have the service manager start it again and again, and would say no more.
fn classify(error: &CommitError) -> StoreError {
    let text = error.to_string();
    let error = match error {
        CommitError::Sql(error) => error,
        CommitError::Unsafe(_) => return StoreError::Transient(text),
        CommitError::Replaced(_) => return StoreError::Replaced(text),
    };
    match error {
        sqlx::Error::Database(database) => {
            let key = database.constraint().unwrap_or_default();
            match database.code().as_deref() {
                Some("23503") if OWN_KEYS.contains(&key) => StoreError::Replaced(text),
                Some("23505") if OWN_KEYS.contains(&key) => StoreError::Fatal(text),
                _ => StoreError::Transient(text),
            }
        }
        // A connection that breaks in the middle of a message may show as a breach of protocol; a trigger
        // that leaves a row out, as a row that is missing.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::RowNotFound => StoreError::Transient(text),
        _ => StoreError::Fatal(text),
    }
}

/// Whether a reading was on its way to the default partition when a gateway made the one of its time: the same
/// transaction passes when it is tried again. A constraint of an operator's own has a name.
pub(super) fn is_overtaken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| {
        error.code().as_deref() == Some("23514")
            && error.table() == Some("readings_default")
            && error.constraint().is_none()
    })
}

/// As [`run`]; gives the number of rows that were written.
async fn run_counted(conn: &mut Link, sql: String) -> Result<u64, sqlx::Error> {
    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(conn)
        .await?;
    Ok(done.rows_affected())
}

/// What the size of a transaction has to do with its failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    IsNoMatter,
    /// A smaller one may pass where this one waited too long.
    MayMatter,
    /// A smaller one is tried at once.
    IsTooMuch,
}

impl Size {
    /// Rows below which nothing is cut. What few rows wait for is not their number.
    fn floor(self) -> Option<usize> {
        match self {
            Size::IsNoMatter => None,
            Size::MayMatter => Some(1000),
            Size::IsTooMuch => Some(0),
        }
    }

    fn of(error: &CommitError) -> Size {
        let CommitError::Sql(error) = error else {
            return Size::IsNoMatter;
        };
        if let sqlx::Error::Io(error) = error {
            return match error.kind() {
                std::io::ErrorKind::TimedOut => Size::MayMatter,
                _ => Size::IsNoMatter,
            };
        }
        match code(error).as_deref() {
            // Time for a statement or a transaction, memory (locks are in shared memory), limits.
            Some("57014" | "25P04" | "53200" | "53400") => Size::IsTooMuch,
            Some(code) if code.starts_with("54") => Size::IsTooMuch,
            Some("55P03") => Size::MayMatter,
            _ => Size::IsNoMatter,
        }
    }
}

/// A text that is SQL without parameters, by the simple protocol.
async fn run(conn: &mut Link, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.into()))
        .execute(conn)
        .await
        .map(drop)
}
