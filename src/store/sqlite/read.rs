//! Connections that only look: for the command line, and for whoever proves what is stored.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};

use super::{OpenError, check_identity, known_step, schema_step};

/// Why a database cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nothing there.
    #[error("no database at {0}: start `fieldgate serve` first, or give --data-dir or --store")]
    Missing(PathBuf),
    /// There, and not ours or not readable.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// An earlier version made it.
    #[error("{0} was made by an older version of fieldgate; run `fieldgate migrate` first")]
    Older(PathBuf),
}

/// Opens the database at `path` so that nothing can be written through it, also while a gateway writes.
pub async fn open_reader(path: &Path) -> Result<SqliteConnection, ReadError> {
    if !path.exists() {
        return Err(ReadError::Missing(path.to_owned()));
    }
    let mut connection = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .busy_timeout(Duration::from_secs(5))
        .pragma("query_only", "ON")
        .connect()
        .await
        .map_err(|error| super::foreign(path, error))?;
    check_identity(path, &mut connection)
        .await
        .map_err(|error| match error {
            OpenError::Sqlite { path, source } => super::foreign(&path, source),
            error => error,
        })?;
    let (found, known) = (schema_step(&mut connection).await, known_step());
    if found > known {
        let path = path.to_owned();
        return Err(OpenError::Newer {
            path,
            step: found,
            known,
        }
        .into());
    }
    if found < known {
        return Err(ReadError::Older(path.to_owned()));
    }
    Ok(connection)
}
