//! Opens a database file, or says in one line why not and what to do.
//!
//! Invariants
//! - A file that is not a store of this program is never written to.
//! - One gateway at a time: it holds a lock on `<database>.lock` for as long as the store is open.
//! - Nobody gets a connection that does not sync each commit.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};

use super::{SqliteSettings, checkpoint, files};

/// Every version of the tables and views of a store.
static STORE_MIGRATIONS: LazyLock<Migrator> =
    LazyLock::new(|| with_common(sqlx::migrate!("migrations/store")));
/// And of a spool.
static SPOOL_MIGRATIONS: LazyLock<Migrator> =
    LazyLock::new(|| with_common(sqlx::migrate!("migrations/spool")));

/// What both have, and then what only one has.
fn with_common(own: Migrator) -> Migrator {
    let common = sqlx::migrate!("migrations/sqlite");
    Migrator::with_migrations(common.iter().chain(own.iter()).cloned().collect())
}

/// sqlx's own table of the migrations that were applied.
const MIGRATIONS_TABLE: &str = "_sqlx_migrations";
/// "FGat", set by the first migration.
const APPLICATION_ID: i64 = 1_179_083_124;
/// "FGsp", set by the first migration of a spool.
const SPOOL_APPLICATION_ID: i64 = 1_179_087_728;
/// The first release without the race between a reset of the log and a commit.
const SQLITE_MIN: (u32, u32, u32) = (3, 51, 3);
/// Every statement has a place in the cache of the writer's connection, in each of its sizes.
const STATEMENTS_MAX: usize = 256;

/// A gateway that was killed may hold the lock while the system takes it apart.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How long an editor waits for its turn to write: under load the gateway begins its next transaction
/// at once, and whoever waits finds the moment between by chance.
const EDITOR_PATIENCE: Duration = Duration::from_secs(30);

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A reader found no file.
    #[error("no database at {}: start `fieldgate serve` first, or give the right --data-dir or --store", .0.display())]
    Missing(PathBuf),
    /// The directory of the file does not exist.
    #[error("no directory {} to keep the database in: create it", .0.display())]
    NoDirectory(PathBuf),
    /// The file or its directory cannot be opened or written.
    #[error("cannot write {}: {source}: give this user access to it and its directory", path.display())]
    Inaccessible {
        /// What was to be opened.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file system keeps nobody out.
    #[error("could not lock {}: {source}; this file system has no locks, so keep the data on another one, best a local disk", path.display())]
    NoLocks {
        /// What was to be locked.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It cannot be read where it is.
    #[error("could not read {}: it is on a read-only medium, and its write-ahead log holds data that is not in it yet; copy it with {}-wal to where this user may write", .0.display(), .0.display())]
    LogOnReadOnly(PathBuf),
    /// Another process writes to it.
    #[error("{} is in use by another gateway: stop that one, or give another --data-dir or --store", .0.display())]
    InUse(PathBuf),
    /// The file has other content.
    #[error("{} is not an SQLite database: give another --data-dir or --store", .0.display())]
    NotADatabase(PathBuf),
    /// The file is a database of something else.
    #[error("{} is the database of another program: give another --data-dir or --store", .0.display())]
    Foreign(PathBuf),
    /// A later release of this program wrote it.
    #[error("{} was written by a newer fieldgate (its schema is version {found}, this program knows {known}): use that release", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Version of its schema.
        found: i64,
        /// The latest version this program knows.
        known: i64,
    },
    /// A reader found a database that has still to be brought up to date.
    #[error("{} has the schema of an older fieldgate: start `fieldgate serve` once to bring it up to date", .0.display())]
    Older(PathBuf),
    /// A migration was changed after it was applied, or broke off.
    #[error("the schema of {} cannot be brought up to date: {reason}", path.display())]
    Migration {
        /// The database.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The SQLite that was linked may lose data.
    #[error("SQLite {0} can lose committed data: build with SQLite 3.51.3 or later")]
    SqliteTooOld(String),
    /// A setting that durability or bounds rest on was not taken.
    #[error("SQLite does not accept {pragma} = {wanted} for {} (it says {found}): is this file system fit for a database?", path.display())]
    Setting {
        /// The database.
        path: PathBuf,
        /// Name of the setting.
        pragma: &'static str,
        /// Value that was asked for.
        wanted: String,
        /// Value read back.
        found: String,
    },
    /// The settings contradict each other.
    #[error("the store's settings are wrong: {0}")]
    Settings(&'static str),
    /// Anything else SQLite says.
    #[error("cannot open {}: {source}", path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// What it says.
        source: sqlx::Error,
    },
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// What was received, for good.
    Store,
    /// What was received, until it is in another store.
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

/// What a connection that writes is set to.
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

/// What keeps other gateways from a database.
#[derive(Debug)]
pub(super) struct Locks {
    /// On `<database>.lock`: found without opening the database.
    _name: File,
    /// On the database's own file: by whatever other name, or without the first file, it is the same.
    file: Option<File>,
}

impl Locks {
    /// Returns the database's own file, where it is locked.
    pub(super) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }
}

/// Takes the locks and creates the file if there is none; the path comes back absolute.
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
    // By any other name, or through a link, it must be the same lock.
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

/// Takes a lock as soon as it is free, if that is in time.
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

/// Readings are nobody else's business; SQLite gives the log the mode of the database.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Opens the connection that writes and brings the schema up to date.
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
    } else {
        // Before anything is set: a newer schema is not ours to touch.
        before = refuse_newer(&mut conn, path, settings.purpose).await?;
    }
    set(&mut conn, path, "journal_mode", "wal", "wal").await?;
    set(&mut conn, path, "synchronous", "FULL", "2").await?;
    set(&mut conn, path, "fullfsync", "ON", "1").await?;
    set(&mut conn, path, "checkpoint_fullfsync", "ON", "1").await?;
    set(&mut conn, path, "foreign_keys", "ON", "1").await?;
    // Bounds ANALYZE, which PRAGMA optimize may run: it looks at so many rows of an index.
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
        tracing::info!(%path, before, after, "schema brought up to date");
    }
    Ok(conn)
}

/// Opens the connection that moves the log into the database.
pub(super) async fn checkpointer(path: &Path) -> Result<SqliteConnection, OpenError> {
    // How long a checkpoint that has to reset the log waits for readers to leave.
    let options = options(path).busy_timeout(Duration::from_millis(200));
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

/// Creates the database at `path` or brings its schema up to date; gives back the schema's version
/// before (0 where there was none) and after.
///
/// # Errors
/// As for [`super::SqliteStore::open`].
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

/// Opens a connection that cannot write; for use beside a running gateway.
///
/// Keep its transactions short: while one is open, the gateway's write-ahead log grows.
///
/// # Errors
/// There is no database at `path`, or it is not one of this program's present schema.
pub async fn open_reader(path: &Path) -> Result<SqliteConnection, OpenError> {
    open_reader_of(path, Purpose::Store).await
}

pub(super) async fn open_reader_of(
    path: &Path,
    purpose: Purpose,
) -> Result<SqliteConnection, OpenError> {
    let opened = open_present(path, purpose, |options| options.read_only(true)).await;
    let mut conn = match opened {
        // SQLite wants to make a file beside it, which tells readers of the log.
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

/// Opens a connection that writes beside a running gateway, each in its turn: the one thing that may,
/// for it must leave alone what the gateway knows by heart (the ledger's ids, watermarks, and the
/// readings that are still to be sorted in).
///
/// # Errors
/// As [`open_reader`].
pub async fn open_editor(path: &Path) -> Result<SqliteConnection, OpenError> {
    open_editor_of(path, Purpose::Store).await
}

pub(super) async fn open_editor_of(
    path: &Path,
    purpose: Purpose,
) -> Result<SqliteConnection, OpenError> {
    let patient = |options: SqliteConnectOptions| options.busy_timeout(EDITOR_PATIENCE);
    let mut conn = open_present(path, purpose, patient).await?;
    refuse_old_sqlite(&mut conn)
        .await
        .map_err(|source| sqlite_error(path, source))??;
    set(&mut conn, path, "synchronous", "FULL", "2").await?;
    set(&mut conn, path, "fullfsync", "ON", "1").await?;
    set(&mut conn, path, "foreign_keys", "ON", "1").await?;
    // Moving pages is left to the gateway, which does it beside its commits.
    sqlx::query("PRAGMA wal_autocheckpoint = 0")
        .execute(&mut conn)
        .await
        .map_err(|source| sqlite_error(path, source))?;
    Ok(conn)
}

/// Opens what is there already, and of the present schema.
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
    // By bytes, as SQLite compares anyway: a query by this name is understood by Postgres, too.
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

/// `true` if the database is empty.
async fn refuse_foreign(
    conn: &mut SqliteConnection,
    path: &Path,
    purpose: Purpose,
) -> Result<bool, OpenError> {
    let found: Result<(i64, i64), sqlx::Error> = sqlx::query_as(
        // sqlx's own table stands alone where the first migration broke off.
        "SELECT application_id, (SELECT count(*) FROM sqlite_schema \
         WHERE tbl_name <> '_sqlx_migrations') FROM pragma_application_id",
    )
    .fetch_one(&mut *conn)
    .await;
    match found.map_err(|source| sqlite_error(path, source))? {
        (id, _) if id == purpose.application_id() => Ok(false),
        (0, 0) => Ok(true),
        // A spool that was killed while it was made is a store until its last migration.
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

/// Gives back the version of the schema.
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

/// Sets a pragma and demands that it reads back as `expected`.
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
