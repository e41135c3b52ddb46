//! Opens a database file, or reports in one line why that failed and what to do.
//!
//! Invariants
//! - A file that is not a store of this program is never written to.
//! - One gateway at a time: it holds a lock on `<database>.lock` for as long as the store is open.
//! - Every connection that writes syncs each commit.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};

use super::{SqliteSettings, checkpoint, files};
use crate::store::admin::Access;

/// All versions of the tables and views of a store.
static STORE_MIGRATIONS: LazyLock<Migrator> =
    LazyLock::new(|| with_common(sqlx::migrate!("migrations/store")));
/// All versions of the tables of a spool.
static SPOOL_MIGRATIONS: LazyLock<Migrator> =
    LazyLock::new(|| with_common(sqlx::migrate!("migrations/spool")));

/// Prepends the common migrations to those of a store or a spool.
fn with_common(own: Migrator) -> Migrator {
    let common = sqlx::migrate!("migrations/sqlite");
    Migrator::with_migrations(common.iter().chain(own.iter()).cloned().collect())
}

/// sqlx's table of applied migrations.
const MIGRATIONS_TABLE: &str = "_sqlx_migrations";
/// "FGat", set by the first migration.
const APPLICATION_ID: i64 = 1_179_083_124;
/// "FGsp", set by the first migration of a spool.
const SPOOL_APPLICATION_ID: i64 = 1_179_087_728;
/// First release without the race between a reset of the log and a commit.
const SQLITE_MIN: (u32, u32, u32) = (3, 51, 3);
/// Capacity of the writer's statement cache: every statement in each of its sizes.
const STATEMENTS_MAX: usize = 256;

/// How long to wait for the lock, which the system may still hold for a killed gateway.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How long a command waits for the write lock. Under load the gateway begins its next transaction immediately,
/// so a waiting command gets the lock between two transactions only by chance.
const WRITE_LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// Length of the log, in pages, above which a command that writes moves it: 8 MiB with pages of 8 KiB.
const LOG_PAGES_OF_COMMANDS: u32 = 1024;

/// The message states in one line what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("no database at {}; start `fieldgate serve` first, or set the right --data-dir or --store", .0.display())]
    Missing(PathBuf),
    #[error("directory {} for the database does not exist; create it", .0.display())]
    NoDirectory(PathBuf),
    #[error("could not write {}: {source}; give this user access to it and its directory", path.display())]
    Inaccessible { path: PathBuf, source: io::Error },
    #[error("could not lock {}: {source}; this file system does not support locks; use another one, preferably a local disk", path.display())]
    NoLocks { path: PathBuf, source: io::Error },
    #[error("could not read {}: it is read-only and its write-ahead log is not checkpointed; copy it with {}-wal to a writable directory", .0.display(), .0.display())]
    LogOnReadOnly(PathBuf),
    #[error("{} is in use by another gateway; stop that gateway, or set another --data-dir or --store", .0.display())]
    InUse(PathBuf),
    #[error("{} is not an SQLite database; set another --data-dir or --store", .0.display())]
    NotADatabase(PathBuf),
    #[error("{} is the database of another program; set another --data-dir or --store", .0.display())]
    Foreign(PathBuf),
    #[error("{} was written by a newer Fieldgate (schema version {found}, supported {known}); use that release", path.display())]
    Newer {
        path: PathBuf,
        found: i64,
        known: i64,
    },
    #[error("{} has the schema of an older Fieldgate; start `fieldgate serve` once to update it", .0.display())]
    Older(PathBuf),
    /// A migration was changed after it was applied, or was interrupted.
    #[error("could not update the schema of {}: {reason}", path.display())]
    Migration { path: PathBuf, reason: String },
    #[error("SQLite {0} can lose committed data; build with SQLite 3.51.3 or later")]
    SqliteTooOld(String),
    /// A setting that durability or limits depend on was rejected.
    #[error("SQLite rejected {pragma} = {wanted} for {} (got {found}); does this file system support SQLite?", path.display())]
    Setting {
        path: PathBuf,
        pragma: &'static str,
        wanted: String,
        found: String,
    },
    #[error("invalid store settings: {0}")]
    Settings(&'static str),
    /// The copy could not be written, usually for lack of space.
    #[error("could not copy {} to {}: {source}; check the space of its disk", path.display(), to.display())]
    Copy {
        path: PathBuf,
        to: PathBuf,
        source: sqlx::Error,
    },
    #[error("{} is damaged: {fault}", path.display())]
    Damaged { path: PathBuf, fault: String },
    /// Any other error of SQLite.
    #[error("could not open {}: {source}", path.display())]
    Sqlite { path: PathBuf, source: sqlx::Error },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Keeps received data permanently.
    Store,
    /// Keeps received data until it is in another store.
    Spool,
}

impl Purpose {
    pub(super) fn migrations(self) -> &'static Migrator {
        match self {
            Self::Store => &STORE_MIGRATIONS,
            Self::Spool => &SPOOL_MIGRATIONS,
        }
    }

    fn application_id(self) -> i64 {
        match self {
            Self::Store => APPLICATION_ID,
            Self::Spool => SPOOL_APPLICATION_ID,
        }
    }

    fn latest_known(self) -> i64 {
        let versions = self.migrations().iter().map(|migration| migration.version);
        versions.max().unwrap_or(0)
    }
}

pub(super) struct WriterSettings {
    pub(super) purpose: Purpose,
    pub(super) cache_bytes: u64,
    pub(super) page_bytes: u32,
    pub(super) log_kept_bytes: u64,
}

impl WriterSettings {
    pub(super) fn of(settings: &SqliteSettings, purpose: Purpose) -> Self {
        Self {
            purpose,
            cache_bytes: settings.cache_bytes,
            page_bytes: settings.page_bytes,
            log_kept_bytes: settings.wal_soft_bytes,
        }
    }
}

/// Locks that exclude other gateways from a database.
#[derive(Debug)]
pub(super) struct Locks {
    /// On `<database>.lock`, which is found without opening the database.
    _name: File,
    /// On the database file itself, which is the same file under every name.
    file: Option<File>,
}

impl Locks {
    /// Returns the database file if it is locked.
    pub(super) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }
}

/// Takes the locks and creates the file if it does not exist; returns its absolute path.
pub(super) fn claim(path: &Path) -> Result<(PathBuf, Locks), OpenError> {
    let inaccessible = |path: &Path, source| OpenError::Inaccessible {
        path: path.into(),
        source,
    };
    let created = private().create_new(true).write(true).open(path);
    match created {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = path
                .parent()
                .filter(|directory| !directory.as_os_str().is_empty());
            return Err(OpenError::NoDirectory(
                directory.unwrap_or(Path::new(".")).into(),
            ));
        }
        Err(error) => return Err(inaccessible(path, error)),
    }
    // Any other name or link must lead to the same lock.
    let path = path
        .canonicalize()
        .map_err(|error| inaccessible(path, error))?;
    if path.is_dir() {
        return Err(OpenError::NotADatabase(path));
    }
    let mut lock_path = path.clone().into_os_string();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let lock = private()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path);
    let lock = lock.map_err(|error| inaccessible(&lock_path, error))?;
    let patience_ends = Instant::now() + LOCK_PATIENCE;
    let refused = |error, at: &Path| match error {
        TryLockError::WouldBlock => OpenError::InUse(path.clone()),
        TryLockError::Error(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            inaccessible(at, error)
        }
        TryLockError::Error(source) => OpenError::NoLocks {
            path: at.into(),
            source,
        },
    };
    patiently(patience_ends, || lock.try_lock()).map_err(|error| refused(error, &lock_path))?;
    let file = patiently(patience_ends, || files::lock(&path));
    let file = file.map_err(|error| refused(error, &path))?;
    let locks = Locks { _name: lock, file };
    Ok((path, locks))
}

/// Takes a lock as soon as it is free, within a limited time.
fn patiently<T>(
    until: Instant,
    mut try_lock: impl FnMut() -> Result<T, TryLockError>,
) -> Result<T, TryLockError> {
    loop {
        match try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOCK_RETRY);
            }
            done => return done,
        }
    }
}

/// Creates files with mode 0600, because readings are private; SQLite gives the log the mode of the database.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Opens the connection that writes and updates the schema.
pub(super) async fn writer(
    path: &Path,
    settings: &WriterSettings,
) -> Result<SqliteConnection, OpenError> {
    let sqlite = |source| sqlite_error(path, source);
    let mut conn = options(path).connect().await.map_err(sqlite)?;
    refuse_old_sqlite(&mut conn).await.map_err(sqlite)??;
    let is_new = refuse_foreign(&mut conn, path, settings.purpose).await?;
    let mut before = 0;
    if is_new {
        let page_size = format!("PRAGMA page_size = {}", settings.page_bytes);
        sqlx::query(AssertSqlSafe(page_size))
            .execute(&mut conn)
            .await
            .map_err(sqlite)?;
        // So that a store shrinks without a full VACUUM. It has no effect after the first table was created.
        sqlx::query("PRAGMA auto_vacuum = INCREMENTAL")
            .execute(&mut conn)
            .await
            .map_err(sqlite)?;
    } else {
        // Checked before any setting: a newer schema must not be modified.
        before = refuse_newer(&mut conn, path, settings.purpose).await?;
    }
    set(&mut conn, path, "journal_mode", "wal", "wal").await?;
    set(&mut conn, path, "synchronous", "FULL", "2").await?;
    set(&mut conn, path, "fullfsync", "ON", "1").await?;
    set(&mut conn, path, "checkpoint_fullfsync", "ON", "1").await?;
    set(&mut conn, path, "foreign_keys", "ON", "1").await?;
    // Limits the index rows that ANALYZE reads; PRAGMA optimize may run it.
    set(&mut conn, path, "analysis_limit", "1000", "1000").await?;
    let cache_kib = format!("-{}", settings.cache_bytes / 1024);
    set(&mut conn, path, "cache_size", &cache_kib, &cache_kib).await?;
    checkpoint::configure(&mut conn, settings.log_kept_bytes)
        .await
        .map_err(sqlite)?;
    let migrations = settings.purpose.migrations();
    migrations
        .run(&mut conn)
        .await
        .map_err(|error| migration_error(path, error))?;
    let after = settings.purpose.latest_known();
    if before != after {
        let path = path.display();
        tracing::info!(%path, before, after, "schema updated");
    }
    Ok(conn)
}

pub(super) async fn checkpointer(path: &Path) -> Result<SqliteConnection, OpenError> {
    let options = options(path).busy_timeout(checkpoint::WAIT_MAX);
    let mut conn = options
        .connect()
        .await
        .map_err(|source| sqlite_error(path, source))?;
    set(&mut conn, path, "synchronous", "FULL", "2").await?;
    set(&mut conn, path, "checkpoint_fullfsync", "ON", "1").await?;
    let configured = checkpoint::configure(&mut conn, 0).await;
    configured.map_err(|source| sqlite_error(path, source))?;
    Ok(conn)
}

/// Creates the database at `path` or updates its schema. Returns the schema version before (0 if there was
/// none) and after.
pub async fn migrate(path: &Path, settings: &SqliteSettings) -> Result<(i64, i64), OpenError> {
    let (path, _locks) = claim(path)?;
    let sqlite = |source| sqlite_error(&path, source);
    let mut conn = options(&path).connect().await.map_err(sqlite)?;
    let before = match refuse_foreign(&mut conn, &path, Purpose::Store).await? {
        true => 0,
        false => refuse_newer(&mut conn, &path, Purpose::Store).await?,
    };
    conn.close().await.map_err(sqlite)?;
    let conn = writer(&path, &WriterSettings::of(settings, Purpose::Store)).await?;
    conn.close().await.map_err(sqlite)?;
    Ok((before, Purpose::Store.latest_known()))
}

/// Copies a snapshot of a store into the empty file `to`, even while a gateway writes. Does not sync the file.
/// The gateway's write-ahead log grows meanwhile.
///
/// # Errors
/// There is no store at `path`, or the copy cannot be written.
pub async fn copy(path: &Path, to: &Path) -> Result<(), OpenError> {
    let mut conn = open_to_read(path, Purpose::Store).await?;
    // It counts the copy as a change.
    set(&mut conn, path, "query_only", "OFF", "0").await?;
    let name = to.to_str().ok_or_else(|| OpenError::Inaccessible {
        path: to.into(),
        source: io::Error::other("its name is not UTF-8"),
    })?;
    let copied = sqlx::query("VACUUM INTO $1").bind(name).execute(&mut conn);
    let copied = copied.await.map(drop);
    copied.map_err(|source| OpenError::Copy {
        path: path.into(),
        to: to.into(),
        source,
    })
}

/// Reads all pages of a copied store and checks their structure.
///
/// # Errors
/// The copy cannot be opened, or is damaged.
pub async fn check(path: &Path) -> Result<(), OpenError> {
    let damaged = |fault| OpenError::Damaged {
        path: path.into(),
        fault,
    };
    let opened = open_to_read(path, Purpose::Store).await;
    let mut conn = opened.map_err(|error| match error {
        OpenError::Sqlite { source, .. } => damaged(source.to_string()),
        other => other,
    })?;
    let checked = sqlx::query_scalar("PRAGMA quick_check(1)").fetch_one(&mut conn);
    let result: String = checked.await.map_err(|error| damaged(error.to_string()))?;
    match result.as_str() {
        "ok" => Ok(()),
        _ => Err(damaged(result)),
    }
}

/// Opens a connection to an existing database, for use while a gateway runs.
///
/// Keep its transactions short: while one is open, the gateway's write-ahead log grows, and if it writes, the
/// gateway waits. It must not change what the gateway caches: the ledger's ids, watermarks, and level-0 readings.
pub async fn open_existing(
    path: &Path,
    purpose: Purpose,
    access: Access,
) -> Result<SqliteConnection, OpenError> {
    match access {
        Access::Read | Access::Poll => open_to_read(path, purpose).await,
        Access::Write => open_to_write(path, purpose).await,
    }
}

async fn open_to_read(path: &Path, purpose: Purpose) -> Result<SqliteConnection, OpenError> {
    let opened = open_present(path, purpose, |options| options.read_only(true)).await;
    let mut conn = match opened {
        // SQLite needs to create a file next to the database, which registers the readers of the log.
        Err(OpenError::Inaccessible { .. }) if files::is_read_only(path) => {
            if files::has_log(path) {
                return Err(OpenError::LogOnReadOnly(path.into()));
            }
            open_present(path, purpose, |options| {
                options.read_only(true).immutable(true)
            })
            .await?
        }
        opened => opened?,
    };
    set(&mut conn, path, "query_only", "ON", "1").await?;
    Ok(conn)
}

async fn open_to_write(path: &Path, purpose: Purpose) -> Result<SqliteConnection, OpenError> {
    let patient = |options: SqliteConnectOptions| options.busy_timeout(WRITE_LOCK_TIMEOUT);
    let mut conn = open_present(path, purpose, patient).await?;
    refuse_old_sqlite(&mut conn)
        .await
        .map_err(|source| sqlite_error(path, source))??;
    set(&mut conn, path, "synchronous", "FULL", "2").await?;
    set(&mut conn, path, "fullfsync", "ON", "1").await?;
    set(&mut conn, path, "foreign_keys", "ON", "1").await?;
    // The gateway checkpoints the log concurrently with its commits. Without commits or without a gateway, a long
    // deletion would fill the disk with the log.
    let limit = format!("PRAGMA wal_autocheckpoint = {LOG_PAGES_OF_COMMANDS}");
    sqlx::query(AssertSqlSafe(limit))
        .execute(&mut conn)
        .await
        .map_err(|source| sqlite_error(path, source))?;
    Ok(conn)
}

/// Opens an existing database with the current schema.
async fn open_present(
    path: &Path,
    purpose: Purpose,
    with: impl FnOnce(SqliteConnectOptions) -> SqliteConnectOptions,
) -> Result<SqliteConnection, OpenError> {
    let absolute = path.canonicalize().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing(path.into()),
        _ => OpenError::Inaccessible {
            path: path.into(),
            source,
        },
    })?;
    // Compares bytes, like SQLite's default; Postgres has a collation of the same name, so one query works in
    // both.
    let options = options(&absolute).collation("C", str::cmp);
    let mut conn = with(options)
        .connect()
        .await
        .map_err(|source| sqlite_error(path, source))?;
    if refuse_foreign(&mut conn, path, purpose).await? {
        return Err(OpenError::Missing(path.into()));
    }
    let applied = refuse_newer(&mut conn, path, purpose).await?;
    if applied < purpose.latest_known() {
        return Err(OpenError::Older(path.into()));
    }
    Ok(conn)
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(Duration::from_secs(5))
        .statement_cache_capacity(STATEMENTS_MAX)
        .disable_statement_logging()
}

async fn refuse_old_sqlite(
    conn: &mut SqliteConnection,
) -> Result<Result<(), OpenError>, sqlx::Error> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(conn)
        .await?;
    let mut parts = found.split('.').map(|part| part.parse().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    let version = (part(), part(), part());
    Ok(if version < SQLITE_MIN {
        Err(OpenError::SqliteTooOld(found))
    } else {
        Ok(())
    })
}

/// Returns `true` if the database is empty; fails if it belongs to another program.
async fn refuse_foreign(
    conn: &mut SqliteConnection,
    path: &Path,
    purpose: Purpose,
) -> Result<bool, OpenError> {
    let found: Result<(i64, i64), sqlx::Error> = sqlx::query_as(
        // Only sqlx's table exists if the first migration was interrupted.
        "SELECT application_id, (SELECT count(*) FROM sqlite_schema \
         WHERE tbl_name <> '_sqlx_migrations') FROM pragma_application_id",
    )
    .fetch_one(&mut *conn)
    .await;
    match found.map_err(|source| sqlite_error(path, source))? {
        (id, _) if id == purpose.application_id() => Ok(false),
        (0, 0) => Ok(true),
        // A spool whose creation was interrupted is a store until its last migration.
        (APPLICATION_ID, _) if purpose == Purpose::Spool => match has_devices(conn).await {
            Ok(false) => Ok(false),
            Ok(true) => Err(OpenError::Foreign(path.into())),
            Err(source) => Err(sqlite_error(path, source)),
        },
        _ => Err(OpenError::Foreign(path.into())),
    }
}

async fn has_devices(conn: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM devices)")
        .fetch_one(conn)
        .await
}

/// Returns the schema version; fails if it is newer than supported.
async fn refuse_newer(
    conn: &mut SqliteConnection,
    path: &Path,
    purpose: Purpose,
) -> Result<i64, OpenError> {
    let applied = conn.list_applied_migrations(MIGRATIONS_TABLE).await;
    let applied = applied.map_err(|error| migration_error(path, error))?;
    let found = applied
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0);
    let known = purpose.latest_known();
    if found > known {
        return Err(OpenError::Newer {
            path: path.into(),
            found,
            known,
        });
    }
    Ok(found)
}

/// Sets a pragma and verifies that it reads back as `expected`.
async fn set(
    conn: &mut SqliteConnection,
    path: &Path,
    pragma: &'static str,
    wanted: &str,
    expected: &str,
) -> Result<(), OpenError> {
    let sqlite = |source| sqlite_error(path, source);
    let sql = format!("PRAGMA {pragma} = {wanted}");
    sqlx::query(AssertSqlSafe(sql))
        .execute(&mut *conn)
        .await
        .map_err(sqlite)?;
    let read_back = format!("SELECT CAST({pragma} AS TEXT) FROM pragma_{pragma}");
    let found = sqlx::query_scalar(AssertSqlSafe(read_back))
        .fetch_one(conn)
        .await;
    let found: String = found.map_err(sqlite)?;
    if found == expected {
        return Ok(());
    }
    Err(OpenError::Setting {
        path: path.into(),
        pragma,
        wanted: wanted.to_owned(),
        found,
    })
}

fn sqlite_error(path: &Path, source: sqlx::Error) -> OpenError {
    let path = path.to_owned();
    match super::primary_code(&source) {
        Some(super::NOTADB) => OpenError::NotADatabase(path),
        Some(super::CANTOPEN | super::READONLY | super::PERM) => OpenError::Inaccessible {
            path,
            source: io::Error::other(source),
        },
        _ => OpenError::Sqlite { path, source },
    }
}

fn migration_error(path: &Path, error: MigrateError) -> OpenError {
    match error {
        MigrateError::Execute(source) => sqlite_error(path, source),
        other => OpenError::Migration {
            path: path.into(),
            reason: other.to_string(),
        },
    }
}
