//! The store in one SQLite file: opening it, and what must be true before it is trusted.
//!
//! `write` carries out commits, `wal` keeps the write-ahead log short, `read` is for everything that
//! only looks.
//!
//! Invariants
//! - WAL with `synchronous=FULL`, set and read back: a commit that returned is on the disk.
//! - One writer: the file next to the database is locked for as long as the store is open.
//! - SQLite is at least 3.51.3: older ones can lose committed transactions of a WAL that two
//!   connections use (the WAL-reset race).

mod read;
mod wal;
mod write;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};

pub use self::read::{ReadError, open_reader};
use self::wal::{Checkpointer, WalLimits};
use self::write::Statements;
use super::{Batch, Committed, Store, StoreError};

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations/sqlite");

/// The number in the file's header that says "Fieldgate"; set by the first migration.
const APPLICATION_ID: i32 = 1_179_079_729;
const VERSION_MIN: (u32, u32, u32) = (3, 51, 3);
/// Readers never make a writer wait in WAL; a checkpoint or another program may.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How a store uses memory and disk.
#[derive(Clone, Copy, Debug)]
pub struct SqliteSettings {
    /// Bytes of SQLite's page cache.
    pub cache_bytes: u64,
    /// Bytes of write-ahead log at which commits stop until readers let go of it.
    pub wal_bytes_max: u64,
}

impl Default for SqliteSettings {
    fn default() -> Self {
        SqliteSettings {
            cache_bytes: 256 << 20,
            wal_bytes_max: 1 << 30,
        }
    }
}

/// Why a store was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Directory or file cannot be created or written.
    #[error("cannot write {path}: {source}")]
    NotWritable {
        /// Which file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// Another process has the store.
    #[error(
        "{0} is in use by another fieldgate; stop that one first, or choose another --data-dir"
    )]
    InUse(PathBuf),
    /// Some other file.
    #[error("{0} is not a Fieldgate database; give another --store or --data-dir")]
    Foreign(PathBuf),
    /// A later version of this program made it.
    #[error(
        "{path} was made by a newer version of fieldgate (its schema has step {step}, this program \
         knows up to {known}); use that version"
    )]
    Newer {
        /// Which database.
        path: PathBuf,
        /// A migration this program does not have.
        step: i64,
        /// The last migration it has.
        known: i64,
    },
    /// A setting on which the promise rests did not take.
    #[error("{path}: {setting} is {found}, and must be {wanted}")]
    Setting {
        /// Which database.
        path: PathBuf,
        /// Which setting.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// Anything else SQLite says.
    #[error("cannot open {path}: {source}")]
    Sqlite {
        /// Which database.
        path: PathBuf,
        /// SQLite's word.
        source: sqlx::Error,
    },
    /// A migration failed.
    #[error("cannot bring {path} up to date: {source}")]
    Migrate {
        /// Which database.
        path: PathBuf,
        /// Why.
        source: MigrateError,
    },
}

/// The store in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    connection: SqliteConnection,
    statements: Statements,
    /// Highest id in `frames`.
    last_frame_id: i64,
    checkpointer: Checkpointer,
    /// Holds the lock.
    _lock: File,
}

impl SqliteStore {
    /// Opens or creates the database at `path` and brings its tables up to date.
    pub async fn open(path: &Path, settings: SqliteSettings) -> Result<SqliteStore, OpenError> {
        let lock = lock(path)?;
        let options = write_options(path, settings);
        let sqlite = |source| OpenError::Sqlite {
            path: path.to_owned(),
            source,
        };
        let mut connection = options
            .connect()
            .await
            .map_err(|error| foreign(path, error))?;
        check_identity(path, &mut connection).await?;
        MIGRATIONS
            .run(&mut connection)
            .await
            .map_err(|error| migrate_error(path, error))?;
        check_settings(path, &mut connection).await?;
        let last_frame_id = sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM frames")
            .fetch_one(&mut connection)
            .await
            .map_err(sqlite)?;
        sqlx::query("PRAGMA optimize=0x10002")
            .execute(&mut connection)
            .await
            .map_err(sqlite)?;
        let limits = WalLimits::new(settings.wal_bytes_max);
        let checkpoints = write_options(
            path,
            SqliteSettings {
                cache_bytes: 1 << 20,
                ..settings
            },
        );
        let checkpoints = checkpoints.connect().await.map_err(sqlite)?;
        Ok(SqliteStore {
            connection,
            statements: Statements::new(),
            last_frame_id,
            checkpointer: Checkpointer::start(checkpoints, limits),
            _lock: lock,
        })
    }
}

impl Store for SqliteStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        self.checkpointer.make_room(&mut self.connection).await?;
        let (statements, last_frame_id) = (&self.statements, self.last_frame_id);
        let written = write::commit(&mut self.connection, statements, last_frame_id, batch).await?;
        self.last_frame_id = written.last_frame_id;
        self.checkpointer.after_commit(&mut self.connection).await?;
        Ok(written.committed)
    }

    async fn close(mut self) -> Result<(), StoreError> {
        self.checkpointer.stop().await;
        for tidy in ["PRAGMA optimize", "PRAGMA wal_checkpoint(TRUNCATE)"] {
            sqlx::query(tidy)
                .execute(&mut self.connection)
                .await
                .map_err(write::classify)?;
        }
        self.connection.close().await.map_err(write::classify)
    }
}

/// What a migration run found and left: the last step before, and after; 0 before a new database.
pub async fn migrate(path: &Path) -> Result<(i64, i64), OpenError> {
    let _lock = lock(path)?;
    let options = write_options(path, SqliteSettings::default());
    let mut connection = options
        .connect()
        .await
        .map_err(|error| foreign(path, error))?;
    check_identity(path, &mut connection).await?;
    let before = schema_step(&mut connection).await;
    MIGRATIONS
        .run(&mut connection)
        .await
        .map_err(|error| migrate_error(path, error))?;
    let after = schema_step(&mut connection).await;
    let sqlite = |source| OpenError::Sqlite {
        path: path.to_owned(),
        source,
    };
    connection.close().await.map_err(sqlite)?;
    Ok((before, after))
}

/// The last migration a database has had; 0 where there is none.
async fn schema_step(connection: &mut SqliteConnection) -> i64 {
    sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
        .fetch_one(connection)
        .await
        .unwrap_or(0)
}

/// The last migration this program has.
fn known_step() -> i64 {
    MIGRATIONS
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0)
}

fn write_options(path: &Path, settings: SqliteSettings) -> SqliteConnectOptions {
    let cache_kib = i64::try_from(settings.cache_bytes / 1024).unwrap_or(i64::MAX);
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(100)
        .pragma("cache_size", format!("-{cache_kib}"))
        // Checkpoints are `wal`'s business, off the way of commits.
        .pragma("wal_autocheckpoint", "0")
        .pragma("journal_size_limit", wal::RESTART_BYTES.to_string())
        .pragma("analysis_limit", "400")
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let lock_path = PathBuf::from(format!("{}.lock", path.display()));
    let not_writable = |source| OpenError::NotWritable {
        path: lock_path.clone(),
        source,
    };
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(not_writable)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(path.to_owned())),
        Err(TryLockError::Error(source)) => Err(not_writable(source)),
    }
}

async fn check_identity(path: &Path, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let sqlite = |source| OpenError::Sqlite {
        path: path.to_owned(),
        source,
    };
    let version: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(&mut *connection)
        .await
        .map_err(sqlite)?;
    if parse_version(&version).is_none_or(|version| version < VERSION_MIN) {
        let wanted = "3.51.3 or later";
        let path = path.to_owned();
        return Err(OpenError::Setting {
            path,
            setting: "SQLite",
            found: version,
            wanted,
        });
    }
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_schema")
        .fetch_one(&mut *connection)
        .await
        .map_err(sqlite)?;
    let application_id: i32 = sqlx::query_scalar("PRAGMA application_id")
        .fetch_one(&mut *connection)
        .await
        .map_err(sqlite)?;
    if tables > 0 && application_id != APPLICATION_ID {
        return Err(OpenError::Foreign(path.to_owned()));
    }
    Ok(())
}

fn parse_version(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

async fn check_settings(path: &Path, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let checks = [
        ("PRAGMA journal_mode", "journal_mode", "wal"),
        ("PRAGMA synchronous", "synchronous", "2"),
    ];
    for (sql, setting, wanted) in checks {
        let row = sqlx::query(sql)
            .fetch_one(&mut *connection)
            .await
            .map_err(|source| OpenError::Sqlite {
                path: path.to_owned(),
                source,
            })?;
        let found = row
            .try_get::<String, _>(0)
            .or_else(|_| row.try_get::<i64, _>(0).map(|number| number.to_string()))
            .unwrap_or_default();
        if found != wanted {
            return Err(OpenError::Setting {
                path: path.to_owned(),
                setting,
                found,
                wanted,
            });
        }
    }
    Ok(())
}

/// SQLite says "file is not a database" where the first bytes are not its own.
fn foreign(path: &Path, error: sqlx::Error) -> OpenError {
    const SQLITE_NOTADB: &str = "26";
    let code = error.as_database_error().and_then(|error| error.code());
    if code.as_deref() == Some(SQLITE_NOTADB) {
        OpenError::Foreign(path.to_owned())
    } else {
        OpenError::Sqlite {
            path: path.to_owned(),
            source: error,
        }
    }
}

fn migrate_error(path: &Path, error: MigrateError) -> OpenError {
    let path = path.to_owned();
    match error {
        MigrateError::VersionMissing(step) | MigrateError::VersionTooNew(step, _) => {
            OpenError::Newer {
                path,
                step,
                known: known_step(),
            }
        }
        source => OpenError::Migrate { path, source },
    }
}
