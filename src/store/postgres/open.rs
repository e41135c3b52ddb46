//! Connects to a database, or reports in one line why that failed and what to do.
//!
//! Invariants
//! - A database that is not a store of this program is never written to.
//! - A gateway writes only on connections to a server that syncs each commit, unless the operator allows data loss.
//!   Migrations and commands do not check this.

use std::sync::LazyLock;

use sqlx::Row;
use sqlx::migrate::{Migrate, Migrator};

use super::backends::Backends;
use super::errors::{OpenError, migration_error, open_error};
use super::link::{Link, Patience};
use super::run;
use crate::config::store_url::PostgresUrl;
use crate::store::admin::Access;

/// Table of applied migrations. It has its own name because other programs in the same database may also use
/// sqlx.
const MIGRATIONS_TABLE: &str = "fieldgate_migrations";
/// All versions of the tables and views.
static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrator = sqlx::migrate!("migrations/postgres");
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator
});
/// Tables of the store, whose names another program may also use.
const TABLES: [&str; 24] = [
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
    "quarantine_usage",
    "device_events",
    "presence",
    "clocks",
    "clock_steps",
    "sessions",
    "gateways",
    "spool",
    "store_identity",
    "store_writers",
];
/// `server_version_num` of the oldest tested release.
const VERSION_MIN: i32 = 140_000;
/// Settings without which a crash of the server may lose committed transactions. `synchronous_commit` is not
/// among them, because a session can set it.
const DURABILITY_SETTINGS: [&str; 2] = ["fsync", "full_page_writes"];

/// Settings of every session, regardless of the defaults of role and database. A statement waits for a lock for
/// a limited time and then fails. The server detects a gateway that froze or lost its network, because others
/// wait for its locks. A backslash in a string literal is literal.
const SETTINGS: &str = "SET application_name = 'fieldgate'; SET idle_session_timeout = 0;
    SET standard_conforming_strings = on;
    SET lock_timeout = '20s'; SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10;
    SET tcp_keepalives_count = 3;";
/// As the server displays it.
const LOCK_TIMEOUT: &str = "20s";
/// Settings of a writer. Its [`Link`] abandons a statement that makes no progress; these limits cover what the
/// link cannot end, and are far longer than a batch needs.
const WRITER_SETTINGS: &str = "SET default_transaction_read_only = off;
    SET idle_in_transaction_session_timeout = '30s';";
/// Settings of a gateway that polls; it abandons a poll after 5 s.
const POLLER_SETTINGS: &str = "SET default_transaction_read_only = on; SET jit = off;";
/// Settings of a reader. The database's administrator decides how long its statements may run. It displays
/// values as text, so settings of role or database must not change their format.
const READER_SETTINGS: &str = "SET default_transaction_read_only = on; SET bytea_output = 'hex';
    SET IntervalStyle = 'postgres'; SET jit = off;";
/// Since release 17, a role may have a default limit on whole transactions.
const TRANSACTION_TIMEOUT: &str = "SET transaction_timeout = '10min';";
const TRANSACTION_TIMEOUT_SINCE: u32 = 170_000;
/// Keeps the operator's setting across reloads, and raises it if commits would not wait for the disk.
const KEEP_SYNCHRONOUS: &str = "SELECT set_config('synchronous_commit',
        CASE setting WHEN 'off' THEN 'on' ELSE setting END, false)
    FROM (SELECT current_setting('synchronous_commit') AS setting) AS configured;";
/// Makes the server detect, while a statement runs or waits for a lock, that its client is gone. Servers on some
/// systems do not support this and reject it.
const CHECK_CLIENT: &str = "SET client_connection_check_interval = '5s'";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Writes; `keeps` is whether each commit must wait for the disk.
    Writer { keeps: bool },
    /// Polls while the gateway runs.
    Poller,
    /// Reads for an operator.
    Reader,
}

impl Role {
    fn settings(self) -> String {
        match self {
            Role::Writer { keeps: true } => format!("{WRITER_SETTINGS}{KEEP_SYNCHRONOUS}"),
            Role::Writer { keeps: false } => WRITER_SETTINGS.to_owned(),
            Role::Poller => POLLER_SETTINGS.to_owned(),
            Role::Reader => READER_SETTINGS.to_owned(),
        }
    }

    /// How long a statement may run; `None`: as the administrator of the database decides.
    fn statement_timeout(self) -> Option<&'static str> {
        match self {
            Role::Writer { .. } => Some("SET statement_timeout = '5min'"),
            Role::Poller => Some("SET statement_timeout = '10s'"),
            Role::Reader => None,
        }
    }

    fn patience(self) -> Patience {
        match self {
            Role::Reader => Patience::WhileWorking,
            _ => Patience::Limited,
        }
    }
}

/// Opens a connection that may write, to a server that syncs its commits.
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

/// Creates the tables or updates their schema. Returns the schema version before (0 if there was none) and
/// after. Concurrent calls wait for each other.
pub async fn migrate(url: &PostgresUrl) -> Result<(i64, i64), OpenError> {
    let mut conn = session(url, Role::Writer { keeps: true }).await?;
    refuse_unfit(&mut conn, url).await?;
    let before = bring_up_to_date(&mut conn, url).await?;
    conn.close().await;
    Ok((before, latest_known()))
}

/// Checks whether a gateway could store into the database, without changing anything.
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
                reason: "it cannot create tables".to_owned(),
            });
        }
    }
    conn.close().await;
    Ok(())
}

/// Returns the settings with which the server can lose acknowledged frames.
///
/// # Errors
/// The server rejects the connection.
pub async fn settings_that_lose_data(url: &PostgresUrl) -> Result<Vec<String>, OpenError> {
    let mut conn = session(url, Role::Reader).await?;
    let found = unsafe_settings(&mut conn).await;
    conn.close().await;
    found.map_err(|error| open_error(url, error))
}

/// Updates the schema; returns its previous version.
pub(super) async fn bring_up_to_date(conn: &mut Link, url: &PostgresUrl) -> Result<i64, OpenError> {
    let before = refuse_foreign(conn, url).await?;
    if before < latest_known() {
        // A schema change may take long; the next connection has the usual limits.
        let sql = |error| open_error(url, error);
        run(conn, "SET statement_timeout = 0").await.map_err(sql)?;
        if conn.release() >= Some(TRANSACTION_TIMEOUT_SINCE) {
            run(conn, "SET transaction_timeout = 0")
                .await
                .map_err(sql)?;
        }
        conn.set_patience(Patience::WhileWorking);
        let (inner, watch) = conn.parts();
        // `run` does the same behind a trait whose future cannot be awaited in a task.
        let migrating = async { Ok(MIGRATIONS.run_direct(None, inner, false).await) };
        let migrated = watch.answer(migrating).await.map_err(sql)?;
        migrated.map_err(|error| migration_error(url, error))?;
        conn.set_patience(Patience::Limited);
        let role = Role::Writer { keeps: false };
        set(conn, url, role).await?;
        let after = latest_known();
        tracing::info!(database = %url, before, after, "schema updated");
    }
    Ok(before)
}

/// Connects to an existing store with the current schema, while gateways run. A connection that writes must not
/// add frames or move streams: only the registered writer may (see `feed`).
pub(in crate::store) async fn open_existing(
    url: &PostgresUrl,
    access: Access,
) -> Result<Link, OpenError> {
    let role = match access {
        Access::Read => Role::Reader,
        Access::Poll => Role::Poller,
        Access::Write => Role::Writer { keeps: true },
    };
    let mut conn = session(url, role).await?;
    match refuse_foreign(&mut conn, url).await? {
        0 => return Err(OpenError::Missing { url: url.clone() }),
        found if found < latest_known() => return Err(OpenError::Older { url: url.clone() }),
        _ => {}
    }
    if access == Access::Write {
        refuse_unfit(&mut conn, url).await?;
    }
    Ok(conn)
}

/// Connects and applies the session settings.
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

/// Applies the session settings, and verifies that they persist for the next statement.
async fn set(conn: &mut Link, url: &PostgresUrl, role: Role) -> Result<(), OpenError> {
    let refused = |error: sqlx::Error| match open_error(url, error) {
        OpenError::Other { url, reason } | OpenError::Rights { url, reason } => {
            OpenError::Settings { url, reason }
        }
        other => other,
    };
    let mut settings = format!("{SETTINGS}{}", role.settings());
    // A new limit does not apply to the message that sets it, so it comes first and alone. The other message sets it
    // again, because a pooler may send the two to different servers.
    if let Some(statement_timeout) = role.statement_timeout() {
        run(conn, statement_timeout).await.map_err(refused)?;
        settings.push_str(statement_timeout);
        settings.push(';');
    }
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
        let reason = "its settings do not persist between statements".to_owned();
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

/// Returns the schema version, 0 if there is no schema; fails if the tables belong to another program.
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
