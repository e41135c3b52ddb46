//! Readable texts of server errors, and the reasons why a database could not be opened or a batch not committed.

use std::io;

use sqlx::migrate::MigrateError;

use super::code;
use crate::config::store_url::PostgresUrl;
use crate::store::ledger::UnknownStream;

/// Returns the server's message without the library's prefix.
pub(super) fn reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => error.message().to_owned(),
        sqlx::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the server closed the connection".to_owned()
        }
        sqlx::Error::Io(error) => error.to_string(),
        // The driver reads a 0 byte when the connection closes.
        sqlx::Error::Protocol(text) if text.contains("SSLRequest: 0x00") => {
            "the server closed the connection".to_owned()
        }
        error => error.to_string(),
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    #[error("{}", reason(.0))]
    Sql(#[from] sqlx::Error),
    /// The server does not sync its commits.
    #[error(
        "Postgres runs with {0} and may lose commits; not acknowledging until fsync and full_page_writes are on"
    )]
    Unsafe(String),
    /// The ids in the batch come from another database.
    #[error("{0}")]
    Replaced(String),
}

impl From<UnknownStream> for CommitError {
    fn from(_: UnknownStream) -> Self {
        Self::Replaced("a stream is no longer in the database".to_owned())
    }
}

/// The message states in one line what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "could not reach Postgres at {url}: {reason}; check that it is running and that host and port are right"
    )]
    Unreachable { url: PostgresUrl, reason: String },
    /// The server runs but accepts no connections now: it is starting, stopping, or out of connections.
    #[error("{url} is not ready: {reason}; retry later")]
    NotReady { url: PostgresUrl, reason: String },
    /// The connection cannot be encrypted as the URL demands, or the certificate is not trusted.
    #[error(
        "could not establish TLS with {url}: {reason}; check sslmode and sslrootcert in the URL"
    )]
    Tls { url: PostgresUrl, reason: String },
    #[error(
        "Postgres denied access to {url}: {reason}; check user, password (URL, PGPASSWORD or ~/.pgpass) and pg_hba.conf"
    )]
    Refused { url: PostgresUrl, reason: String },
    #[error("database {url} does not exist; create it with `createdb`, or set another --store")]
    NoDatabase { url: PostgresUrl },
    #[error(
        "user of {url} lacks privileges: {reason}; make it the owner of the database, or of a schema in its search_path"
    )]
    Rights { url: PostgresUrl, reason: String },
    /// A pooler or the role prevents session settings.
    #[error(
        "could not set up a session on {url}: {reason}; connect directly or through a session-mode pooler, as a role that may use SET"
    )]
    Settings { url: PostgresUrl, reason: String },
    /// An untested, older Postgres release.
    #[error("{url} is Postgres {found}; 14 or later is required")]
    TooOld { url: PostgresUrl, found: String },
    /// The encoding is not UTF8, but device names may contain any character.
    #[error(
        "{url} uses encoding {found}; create the database with UTF8 (createdb --encoding UTF8 --template template0)"
    )]
    Encoding { url: PostgresUrl, found: String },
    #[error("{url} is a standby; use the URL of the primary")]
    Standby { url: PostgresUrl },
    #[error(
        "{url} has {settings} off and could lose acknowledged readings in a crash; turn it on, or override with --allow-postgres-data-loss"
    )]
    Unsafe { url: PostgresUrl, settings: String },
    /// Another gateway acknowledges from its spool, and only it knows which frames.
    #[error(
        "{url} is used by the spool of the gateway on {host}; drain it and start that gateway without --spool (if its disk is lost, run DELETE FROM spool)"
    )]
    Spooled { url: PostgresUrl, host: String },
    #[error(
        "{url} no longer knows this gateway's spool, and other gateways may have written to it; start without --spool once the spool is empty, or restore the row in table spool"
    )]
    SpoolForgotten { url: PostgresUrl },
    #[error(
        "could not drain into {url}: a gateway with a copy of this spool does; stop this gateway, and never copy a data directory in use (undrained frames stay in this spool)"
    )]
    SpoolCopied { url: PostgresUrl },
    #[error(
        "could not drain into {url}: this spool was restored to an earlier state; start the gateway again to continue from the state of the database"
    )]
    SpoolRestored { url: PostgresUrl },
    #[error(
        "another gateway writes to {url}; stop it first: a database accepts one gateway with --spool, or any number without"
    )]
    InUse { url: PostgresUrl },
    #[error("no store in {url}; start `fieldgate serve` first, or set another --store")]
    Missing { url: PostgresUrl },
    #[error(
        "{url} contains a table {table} of another program; use another database, or a separate schema with ?options=-csearch_path%3DNAME"
    )]
    Foreign { url: PostgresUrl, table: String },
    #[error(
        "{url} was written by a newer Fieldgate (schema version {found}, supported {known}); use that release"
    )]
    Newer {
        url: PostgresUrl,
        found: i64,
        known: i64,
    },
    #[error("{url} has the schema of an older Fieldgate; run `fieldgate migrate` to update it")]
    Older { url: PostgresUrl },
    /// A migration was changed after it was applied, or was interrupted.
    #[error("could not update the schema of {url}: {reason}")]
    Migration { url: PostgresUrl, reason: String },
    #[error("could not open {url}: {reason}")]
    Other { url: PostgresUrl, reason: String },
}

impl OpenError {
    /// Returns whether the error can resolve itself, so that a retry is worthwhile.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            OpenError::Unreachable { .. } | OpenError::NotReady { .. }
        )
    }
}

pub(super) fn open_error(url: &PostgresUrl, error: sqlx::Error) -> OpenError {
    let (url, reason) = (url.clone(), reason(&error));
    match &error {
        // A proxy accepts and closes the connection without a Postgres message if its server is down.
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

pub(super) fn migration_error(url: &PostgresUrl, error: MigrateError) -> OpenError {
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
