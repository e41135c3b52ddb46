//! Connects to a database, or says in one line why not and what to do.
//!
//! Invariants
//! - A database that is not a store of this program is never written to.
//! - Nobody gets a connection that writes to a server that does not sync each commit, unless the
//!   operator has said that this may be.

use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::{ConnectOptions, Connection, PgConnection};

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
const TABLES: [&str; 15] = [
    "devices",
    "device_revision",
    "streams",
    "schemas",
    "series",
    "frames",
    "readings",
    "reading_hours",
    "gaps",
    "quarantine",
    "device_events",
    "clocks",
    "spool",
    "store_identity",
    "store_writers",
];
/// `server_version_num` of the oldest release that is tested.
const VERSION_MIN: i32 = 140_000;
/// Without these, a server that crashes may have lost what it said was committed.
const DURABILITY_SETTINGS: [&str; 3] = ["fsync", "full_page_writes", "synchronous_commit"];

/// The locks of a gateway that froze, or whose network is gone, are what other gateways wait for: the
/// server shall find out.
const WRITER_SETTINGS: &str = "SET default_transaction_read_only = off;
    SET idle_in_transaction_session_timeout = '30s'; SET tcp_keepalives_idle = 30;
    SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3";
/// A reader shows values as text: what the role or the database sets must not change how they are written.
const READER_SETTINGS: &str = "SET default_transaction_read_only = on; SET bytea_output = 'hex';
    SET IntervalStyle = 'postgres'";

/// How long the server may take to let a connection in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

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

/// Opens a connection that may write, to a server that keeps what it commits.
///
/// # Errors
/// [`OpenError`] says in one line what is wrong and what to do.
pub(super) async fn connect(
    url: &PostgresUrl,
    allows_data_loss: bool,
) -> Result<PgConnection, OpenError> {
    let mut conn = connect_as(url, WRITER_SETTINGS).await?;
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
    let mut conn = connect_as(url, WRITER_SETTINGS).await?;
    refuse_unfit(&mut conn, url).await?;
    let before = bring_up_to_date(&mut conn, url).await?;
    conn.close().await.map_err(|error| open_error(url, error))?;
    Ok((before, latest_known()))
}

/// Brings the schema up to date; gives back its version before.
pub(super) async fn bring_up_to_date(
    conn: &mut PgConnection,
    url: &PostgresUrl,
) -> Result<i64, OpenError> {
    let before = refuse_foreign(conn, url).await?;
    if before < latest_known() {
        // `run` is the same behind a trait that keeps a task from awaiting it.
        MIGRATIONS
            .run_direct(None, &mut *conn, false)
            .await
            .map_err(|error| migration_error(url, error))?;
    }
    Ok(before)
}

/// Opens a connection whose transactions cannot write.
///
/// # Errors
/// The server does not let us in, or what is there is no store of this program's present schema.
pub async fn open_reader(url: &PostgresUrl) -> Result<PgConnection, OpenError> {
    open_present(url, READER_SETTINGS).await
}

/// Opens a connection that writes beside running gateways. It must not add frames nor move streams: for
/// that it would have to be the one that may (see `feed`).
///
/// # Errors
/// As [`open_reader`].
pub async fn open_editor(url: &PostgresUrl) -> Result<PgConnection, OpenError> {
    let mut conn = open_present(url, WRITER_SETTINGS).await?;
    refuse_unfit(&mut conn, url).await?;
    Ok(conn)
}

/// Connects to what is there already, and of the present schema.
async fn open_present(url: &PostgresUrl, settings: &str) -> Result<PgConnection, OpenError> {
    let mut conn = connect_as(url, settings).await?;
    match refuse_foreign(&mut conn, url).await? {
        0 => Err(OpenError::Missing { url: url.clone() }),
        found if found < latest_known() => Err(OpenError::Older { url: url.clone() }),
        _ => Ok(conn),
    }
}

async fn connect_as(url: &PostgresUrl, settings: &str) -> Result<PgConnection, OpenError> {
    let options = url.options().disable_statement_logging();
    let connecting = async {
        let mut conn = options.connect().await?;
        run(&mut conn, settings).await?;
        Ok(conn)
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| open_error(url, error)),
        Err(_) => Err(OpenError::Unreachable {
            url: url.clone(),
            reason: format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        }),
    }
}

async fn refuse_unfit(conn: &mut PgConnection, url: &PostgresUrl) -> Result<(), OpenError> {
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

async fn unsafe_settings(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT name FROM pg_settings WHERE name = ANY($1) AND setting = 'off' ORDER BY name",
    )
    .bind(&DURABILITY_SETTINGS[..])
    .fetch_all(conn)
    .await
}

/// Gives back the version of the schema, 0 where there is none.
async fn refuse_foreign(conn: &mut PgConnection, url: &PostgresUrl) -> Result<i64, OpenError> {
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

async fn refuse_newer(conn: &mut PgConnection, url: &PostgresUrl) -> Result<i64, OpenError> {
    let applied = conn.list_applied_migrations(MIGRATIONS_TABLE).await;
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
        error => error.to_string(),
    }
}

pub(super) fn open_error(url: &PostgresUrl, error: sqlx::Error) -> OpenError {
    let (url, reason) = (url.clone(), reason(&error));
    match &error {
        sqlx::Error::Io(_) => OpenError::Unreachable { url, reason },
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
