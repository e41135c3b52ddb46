//! Connects to a database, or says in one line why not and what to do.
//!
//! Invariants
//! - A database that is not a store of this program is never written to.
//! - No gateway gets a connection that writes to a server that does not sync each commit, unless the
//!   operator has said that this may be. Migrations and commands that write do not check this.

use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use sqlx::Row;
use sqlx::migrate::{Migrate, MigrateError, Migrator};

use super::backends::Backends;
use super::link::{Link, Patience};
use super::{code, run};
use crate::store::url::PostgresUrl;

/// Name of the table of the migrations that were applied; the database may hold other things, which
/// may use sqlx, too.
const MIGRATIONS_TABLE: &str = "fieldgate_migrations";
/// Every version of the tables and views.
static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrator = sqlx::migrate!("migrations/postgres");
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator
});
/// Tables that another program may have, under the same names.
const TABLES: [&str; 21] = [
    "devices",
    "removed_devices",
    "refusals",
    "device_revision",
    "fleet_key",
    "streams",
    "schemas",
    "series",
    "frames",
    "readings",
    "reading_hours",
    "newest",
    "gaps",
    "quarantine",
    "device_events",
    "clocks",
    "clock_steps",
    "sessions",
    "spool",
    "store_identity",
    "store_writers",
];
/// `server_version_num` of the oldest release that is tested.
const VERSION_MIN: i32 = 140_000;
/// Without these, a server that crashes may have lost what it said was committed. What a session can set
/// itself, `synchronous_commit`, is not among them.
const DURABILITY_SETTINGS: [&str; 2] = ["fsync", "full_page_writes"];

/// What every session sets, whatever the role or the database have as defaults. A statement waits for a
/// lock for a while, and then says that it did. A gateway that froze, or whose network is gone, is found
/// out by the server, because others wait for its locks. A backslash in a text is one, and nothing else.
const SETTINGS: &str = "SET application_name = 'fieldgate'; SET idle_session_timeout = 0;
    SET standard_conforming_strings = on;
    SET lock_timeout = '20s'; SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10;
    SET tcp_keepalives_count = 3;";
/// As the server shows it.
const LOCK_TIMEOUT: &str = "20s";
/// A writer's statement is given up by its [`Link`] when it makes no progress; these limits are for what
/// the link cannot end, and far above what a batch takes.
const WRITER_SETTINGS: &str = "SET default_transaction_read_only = off;
    SET idle_in_transaction_session_timeout = '30s'; SET statement_timeout = '5min';";
/// What a gateway reads again and again it gives up after 5 s.
const WATCHER_SETTINGS: &str =
    "SET default_transaction_read_only = on; SET statement_timeout = '10s';";
/// How long a statement may run is for the database's administrator to say. A reader shows values as text:
/// what the role or the database sets must not change how they are written.
const READER_SETTINGS: &str = "SET default_transaction_read_only = on; SET bytea_output = 'hex';
    SET IntervalStyle = 'postgres'; SET jit = off;";
/// From release 17 on, a limit on whole transactions may be the role's default.
const TRANSACTION_TIMEOUT: &str = "SET transaction_timeout = '10min';";
const TRANSACTION_TIMEOUT_SINCE: u32 = 170_000;
/// Keeps what the operator has configured, through every reload, and raises it where commits would not
/// wait for the disk.
const KEEP_SYNCHRONOUS: &str = "SELECT set_config('synchronous_commit',
        CASE setting WHEN 'off' THEN 'on' ELSE setting END, false)
    FROM (SELECT current_setting('synchronous_commit') AS setting) AS configured;";
/// A statement that runs or waits for a lock learns that its client is gone. Servers on some systems
/// cannot do that, and refuse it.
const CHECK_CLIENT: &str = "SET client_connection_check_interval = '5s'";

/// How long the server may take to let a connection in, and for each step of setting it up.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// To write; `keeps` is whether each commit has to wait for the disk.
    Writer { keeps: bool },
    /// To look again and again while the gateway runs.
    Watcher,
    /// To read for an operator.
    Reader,
}

impl Role {
    fn settings(self) -> String {
        match self {
            Role::Writer { keeps: true } => format!("{WRITER_SETTINGS}{KEEP_SYNCHRONOUS}"),
            Role::Writer { keeps: false } => WRITER_SETTINGS.to_owned(),
            Role::Watcher => WATCHER_SETTINGS.to_owned(),
            Role::Reader => READER_SETTINGS.to_owned(),
        }
    }

    fn patience(self) -> Patience {
        match self {
            Role::Reader => Patience::WhileWorking,
            _ => Patience::Limited,
        }
    }
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody answers.
    #[error("no Postgres answers at {url}: {reason}; is it running, and are host and port right?")]
    Unreachable {
        /// The database.
        url: PostgresUrl,
        /// What the system says.
        reason: String,
    },
    /// It is there, and takes nobody for the moment: it starts, stops, or has no connection left.
    #[error("{url} is not ready: {reason}; try again in a moment")]
    NotReady {
        /// The database.
        url: PostgresUrl,
        /// What the server says.
        reason: String,
    },
    /// The connection cannot be encrypted as the address demands, or the certificate is not trusted.
    #[error("no TLS connection to {url}: {reason}; check sslmode and sslrootcert in the address")]
    Tls {
        /// The database.
        url: PostgresUrl,
        /// What went wrong.
        reason: String,
    },
    /// The server does not let this user in.
    #[error(
        "Postgres does not let us into {url}: {reason}; check the user, the password (in the address, PGPASSWORD or ~/.pgpass) and pg_hba.conf"
    )]
    Refused {
        /// The database.
        url: PostgresUrl,
        /// What the server says.
        reason: String,
    },
    /// The server has no such database.
    #[error("there is no such database, {url}: make it with `createdb`, or give another --store")]
    NoDatabase {
        /// The database.
        url: PostgresUrl,
    },
    /// The user may not do what has to be done.
    #[error(
        "the user of {url} lacks rights: {reason}; make it the owner of the database, or of a schema in its search_path"
    )]
    Rights {
        /// The database.
        url: PostgresUrl,
        /// What the server says.
        reason: String,
    },
    /// A pooler or the role keeps the session from having settings of its own.
    #[error(
        "the session with {url} cannot be set up: {reason}; connect to Postgres itself, or through a pooler in session mode, as a role that may SET"
    )]
    Settings {
        /// The database.
        url: PostgresUrl,
        /// What the server says.
        reason: String,
    },
    /// A release that nobody has tried.
    #[error("{url} is Postgres {found}: 14 or later is needed")]
    TooOld {
        /// The database.
        url: PostgresUrl,
        /// Its version.
        found: String,
    },
    /// Names of devices may have any characters.
    #[error(
        "{url} is encoded in {found}: a store needs UTF8 (createdb --encoding UTF8 --template template0)"
    )]
    Encoding {
        /// The database.
        url: PostgresUrl,
        /// Its encoding.
        found: String,
    },
    /// A standby takes no writes.
    #[error("{url} is a standby: give the address of the primary")]
    Standby {
        /// The database.
        url: PostgresUrl,
    },
    /// The server does not sync what it commits.
    #[error(
        "{url} has {settings} off, and so may lose what was acknowledged when it crashes: turn it on, or accept that with --allow-postgres-data-loss"
    )]
    Unsafe {
        /// The database.
        url: PostgresUrl,
        /// Which settings.
        settings: String,
    },
    /// A gateway acknowledges from its spool, and nobody else knows what.
    #[error(
        "{url} is fed by the spool of a gateway on {host}, and no other gateway may write to it: let that one drain it and start without --spool (if its disk is lost, DELETE FROM spool gives the database free)"
    )]
    Spooled {
        /// The database.
        url: PostgresUrl,
        /// Where that gateway runs.
        host: String,
    },
    /// Somebody gave the database free although this gateway's spool feeds it.
    #[error(
        "{url} does not know this gateway's spool any more: other gateways may have written to it; start without --spool once nothing is left in the spool, or restore the row in its table spool"
    )]
    SpoolForgotten {
        /// The database.
        url: PostgresUrl,
    },
    /// A copy of this gateway's spool feeds the database.
    #[error(
        "could not feed {url}: a gateway with a copy of this spool does; stop this one, and copy no data directory that is in use (frames that only this spool holds stay in it)"
    )]
    SpoolCopied {
        /// The database.
        url: PostgresUrl,
    },
    /// The spool's file is an earlier state of itself.
    #[error(
        "could not feed {url}: it has frames of a later state of this spool, which was put back to an earlier one; start the gateway again to go on from where the database stands"
    )]
    SpoolPutBack {
        /// The database.
        url: PostgresUrl,
    },
    /// A spool cannot begin while others write.
    #[error(
        "another gateway writes to {url}: stop it first, for a database is fed by one gateway with --spool, or by any number without"
    )]
    InUse {
        /// The database.
        url: PostgresUrl,
    },
    /// A reader found no tables.
    #[error("no store in {url}: start `fieldgate serve` first or give another --store")]
    Missing {
        /// The database.
        url: PostgresUrl,
    },
    /// Tables of other programs are in the way.
    #[error(
        "{url} has a table {table} of another program: give another database, or a schema of its own by ?options=-csearch_path%3DNAME"
    )]
    Foreign {
        /// The database.
        url: PostgresUrl,
        /// One of the tables.
        table: String,
    },
    /// A later release of this program wrote it.
    #[error(
        "{url} was written by a newer fieldgate (its schema is version {found}, this program knows {known}): use that release"
    )]
    Newer {
        /// The database.
        url: PostgresUrl,
        /// Version of its schema.
        found: i64,
        /// The latest version this program knows.
        known: i64,
    },
    /// A reader found a database that has still to be brought up to date.
    #[error(
        "{url} has the schema of an older fieldgate: run `fieldgate migrate` to bring it up to date"
    )]
    Older {
        /// The database.
        url: PostgresUrl,
    },
    /// A migration was changed after it was applied, or broke off.
    #[error("the schema of {url} cannot be brought up to date: {reason}")]
    Migration {
        /// The database.
        url: PostgresUrl,
        /// What is wrong with it.
        reason: String,
    },
    /// Anything else the server says.
    #[error("cannot open {url}: {reason}")]
    Other {
        /// The database.
        url: PostgresUrl,
        /// What it says.
        reason: String,
    },
}

impl OpenError {
    /// Returns whether the server may be there in a moment, without anybody's doing.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            OpenError::Unreachable { .. } | OpenError::NotReady { .. }
        )
    }
}

/// Opens a connection that may write, to a server that keeps what it commits.
///
/// # Errors
/// [`OpenError`] says in one line what is wrong and what to do.
pub(super) async fn connect(url: &PostgresUrl, allows_data_loss: bool) -> Result<Link, OpenError> {
    let keeps = !allows_data_loss;
    let mut conn = session(url, Role::Writer { keeps }).await?;
    refuse_unfit(&mut conn, url).await?;
    let lacking = unsafe_settings(&mut conn).await;
    let lacking = lacking.map_err(|error| open_error(url, error))?;
    if !lacking.is_empty() && !allows_data_loss {
        return Err(OpenError::Unsafe {
            url: url.clone(),
            settings: lacking.join(", "),
        });
    }
    Ok(conn)
}

/// Creates the tables or brings them up to date; gives back the version of the schema before (0 where
/// there was none) and after. Two at a time wait for each other.
///
/// # Errors
/// As for [`super::PostgresStore::open`].
pub async fn migrate(url: &PostgresUrl) -> Result<(i64, i64), OpenError> {
    let mut conn = session(url, Role::Writer { keeps: true }).await?;
    refuse_unfit(&mut conn, url).await?;
    let before = bring_up_to_date(&mut conn, url).await?;
    conn.close().await;
    Ok((before, latest_known()))
}

/// Looks whether a gateway could store into the database, and changes nothing.
///
/// # Errors
/// As for [`super::PostgresStore::open`].
pub async fn check(url: &PostgresUrl, allows_data_loss: bool) -> Result<(), OpenError> {
    let mut conn = connect(url, allows_data_loss).await?;
    let sql = |error| open_error(url, error);
    if refuse_foreign(&mut conn, url).await? == 0 {
        let may_create: Option<bool> =
            sqlx::query_scalar("SELECT has_schema_privilege(current_schema(), 'CREATE')")
                .fetch_one(&mut conn)
                .await
                .map_err(sql)?;
        if may_create != Some(true) {
            return Err(OpenError::Rights {
                url: url.clone(),
                reason: "it may not create tables".to_owned(),
            });
        }
    }
    conn.close().await;
    Ok(())
}

/// Brings the schema up to date; gives back its version before.
pub(super) async fn bring_up_to_date(conn: &mut Link, url: &PostgresUrl) -> Result<i64, OpenError> {
    let before = refuse_foreign(conn, url).await?;
    if before < latest_known() {
        // A change of the schema may take long; the next connection has the usual limits.
        let sql = |error| open_error(url, error);
        run(conn, "SET statement_timeout = 0").await.map_err(sql)?;
        if conn.release() >= Some(TRANSACTION_TIMEOUT_SINCE) {
            run(conn, "SET transaction_timeout = 0")
                .await
                .map_err(sql)?;
        }
        conn.set_patience(Patience::WhileWorking);
        let (inner, watch) = conn.parts();
        // `run` is the same behind a trait that keeps a task from awaiting it.
        let migrating = async { Ok(MIGRATIONS.run_direct(None, inner, false).await) };
        let migrated = watch.answer(migrating).await.map_err(sql)?;
        migrated.map_err(|error| migration_error(url, error))?;
        conn.set_patience(Patience::Limited);
        let role = Role::Writer { keeps: false };
        set(conn, url, role).await?;
        let after = latest_known();
        tracing::info!(database = %url, before, after, "schema brought up to date");
    }
    Ok(before)
}

/// Opens a connection whose transactions cannot write.
///
/// # Errors
/// The server does not let us in, or what is there is no store of this program's present schema.
pub async fn open_reader(url: &PostgresUrl) -> Result<Link, OpenError> {
    open_present(url, Role::Reader).await
}

/// Opens a connection as [`open_reader`], for a gateway that looks again and again.
///
/// # Errors
/// As [`open_reader`].
pub async fn open_watcher(url: &PostgresUrl) -> Result<Link, OpenError> {
    open_present(url, Role::Watcher).await
}

/// Opens a connection that writes beside running gateways. It must not add frames nor move streams: for
/// that it would have to be the one that may (see `feed`).
///
/// # Errors
/// As [`open_reader`].
pub async fn open_editor(url: &PostgresUrl) -> Result<Link, OpenError> {
    let mut conn = open_present(url, Role::Writer { keeps: true }).await?;
    refuse_unfit(&mut conn, url).await?;
    Ok(conn)
}

/// Connects to what is there already, and of the present schema.
async fn open_present(url: &PostgresUrl, role: Role) -> Result<Link, OpenError> {
    let mut conn = session(url, role).await?;
    match refuse_foreign(&mut conn, url).await? {
        0 => Err(OpenError::Missing { url: url.clone() }),
        found if found < latest_known() => Err(OpenError::Older { url: url.clone() }),
        _ => Ok(conn),
    }
}

/// Connects, and gives the session its own settings.
async fn session(url: &PostgresUrl, role: Role) -> Result<Link, OpenError> {
    let connected = Link::connect(url).await;
    let mut conn = connected.map_err(|error| open_error(url, error))?;
    conn.set_patience(Patience::Within(Backends::of(url).connect_timeout()));
    if let Some(release) = conn
        .release()
        .filter(|release| *release < VERSION_MIN as u32)
    {
        return Err(OpenError::TooOld {
            url: url.clone(),
            found: format!("{}.{}", release / 10_000, release % 10_000),
        });
    }
    set(&mut conn, url, role).await?;
    match run(&mut conn, CHECK_CLIENT).await {
        Ok(()) | Err(sqlx::Error::Database(_)) => {}
        Err(error) => return Err(open_error(url, error)),
    }
    conn.set_patience(role.patience());
    Ok(conn)
}

/// Gives a session its settings, and makes sure that the next statement has them.
async fn set(conn: &mut Link, url: &PostgresUrl, role: Role) -> Result<(), OpenError> {
    let refused = |error: sqlx::Error| match open_error(url, error) {
        OpenError::Other { url, reason } | OpenError::Rights { url, reason } => {
            OpenError::Settings { url, reason }
        }
        other => other,
    };
    let mut settings = format!("{SETTINGS}{}", role.settings());
    if conn.release() >= Some(TRANSACTION_TIMEOUT_SINCE) {
        settings.push_str(TRANSACTION_TIMEOUT);
    }
    settings.push_str("SELECT pg_backend_pid() AS pid");
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(settings));
    let rows = rows.fetch_all(&mut *conn).await.map_err(refused)?;
    let set_on: Option<i32> = rows.last().and_then(|row| row.try_get("pid").ok());
    let (pid, started_us, lock_timeout): (i32, Option<i64>, String) = sqlx::query_as(
        "SELECT pg_backend_pid(), (SELECT (extract(epoch FROM backend_start) * 1000000)::bigint
             FROM pg_stat_activity WHERE pid = pg_backend_pid()), current_setting('lock_timeout')",
    )
    .persistent(false)
    .fetch_one(&mut *conn)
    .await
    .map_err(refused)?;
    if set_on != Some(pid) || lock_timeout != LOCK_TIMEOUT {
        let reason = "its settings are gone at the next statement".to_owned();
        return Err(OpenError::Settings {
            url: url.clone(),
            reason,
        });
    }
    conn.identify(pid, started_us.unwrap_or_default());
    Ok(())
}

async fn refuse_unfit(conn: &mut Link, url: &PostgresUrl) -> Result<(), OpenError> {
    let found: Result<(i32, String, String, bool), sqlx::Error> = sqlx::query_as(
        "SELECT current_setting('server_version_num')::int4, current_setting('server_version'),
             current_setting('server_encoding'), pg_is_in_recovery()",
    )
    .fetch_one(conn)
    .await;
    let (version, version_text, encoding, is_standby) =
        found.map_err(|error| open_error(url, error))?;
    let url = url.clone();
    if version < VERSION_MIN {
        let found = version_text;
        return Err(OpenError::TooOld { url, found });
    }
    if encoding != "UTF8" {
        let found = encoding;
        return Err(OpenError::Encoding { url, found });
    }
    if is_standby {
        return Err(OpenError::Standby { url });
    }
    Ok(())
}

async fn unsafe_settings(conn: &mut Link) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT name FROM pg_settings WHERE name = ANY($1) AND setting = 'off' ORDER BY name",
    )
    .bind(&DURABILITY_SETTINGS[..])
    .fetch_all(conn)
    .await
}

/// Gives back the version of the schema, 0 where there is none.
async fn refuse_foreign(conn: &mut Link, url: &PostgresUrl) -> Result<i64, OpenError> {
    let has_migrations: Result<bool, sqlx::Error> =
        sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(MIGRATIONS_TABLE)
            .fetch_one(&mut *conn)
            .await;
    if has_migrations.map_err(|error| open_error(url, error))? {
        return refuse_newer(conn, url).await;
    }
    let table: Result<Option<String>, sqlx::Error> = sqlx::query_scalar(
        "SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NOT NULL LIMIT 1",
    )
    .bind(&TABLES[..])
    .fetch_optional(conn)
    .await;
    let url = url.clone();
    match table {
        Ok(None) => Ok(0),
        Ok(Some(table)) => Err(OpenError::Foreign { url, table }),
        Err(error) => Err(open_error(&url, error)),
    }
}

async fn refuse_newer(conn: &mut Link, url: &PostgresUrl) -> Result<i64, OpenError> {
    let (inner, watch) = conn.parts();
    let listing = async { Ok(inner.list_applied_migrations(MIGRATIONS_TABLE).await) };
    let applied = watch
        .answer(listing)
        .await
        .map_err(|error| open_error(url, error))?;
    let applied = applied.map_err(|error| migration_error(url, error))?;
    let found = applied.iter().map(|migration| migration.version).max();
    let (found, known) = (found.unwrap_or(0), latest_known());
    if found > known {
        let url = url.clone();
        return Err(OpenError::Newer { url, found, known });
    }
    Ok(found)
}

fn latest_known() -> i64 {
    let versions = MIGRATIONS.iter().map(|migration| migration.version);
    versions.max().unwrap_or(0)
}

/// The server's words without the library's.
pub(super) fn reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => error.message().to_owned(),
        sqlx::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the server closed the connection".to_owned()
        }
        sqlx::Error::Io(error) => error.to_string(),
        // The driver reads a 0 where nothing comes.
        sqlx::Error::Protocol(text) if text.contains("SSLRequest: 0x00") => {
            "the server closed the connection".to_owned()
        }
        error => error.to_string(),
    }
}

pub(super) fn open_error(url: &PostgresUrl, error: sqlx::Error) -> OpenError {
    let (url, reason) = (url.clone(), reason(&error));
    match &error {
        // A proxy in front of a server that is not up accepts, and closes without a word of Postgres'.
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) => OpenError::Unreachable { url, reason },
        sqlx::Error::Tls(_) => OpenError::Tls { url, reason },
        _ => match code(&error).as_deref() {
            Some("28P01" | "28000") => OpenError::Refused { url, reason },
            Some("3D000") => OpenError::NoDatabase { url },
            Some("42501" | "3F000") => OpenError::Rights { url, reason },
            Some(code) if super::is_passing(code) => OpenError::NotReady { url, reason },
            _ => OpenError::Other { url, reason },
        },
    }
}

fn migration_error(url: &PostgresUrl, error: MigrateError) -> OpenError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            open_error(url, error)
        }
        other => OpenError::Migration {
            url: url.clone(),
            reason: other.to_string(),
        },
    }
}
