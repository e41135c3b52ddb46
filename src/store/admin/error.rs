//! Errors of connections and queries.

use sqlx::postgres::PgDatabaseError;

use super::Value;
use super::connection::QUERY_TIMEOUT;
use crate::store::{postgres, sqlite};

/// SQLite's code for a statement that was stopped.
const SQLITE_INTERRUPT: i32 = 9;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Sqlite(#[from] sqlite::OpenError),
    #[error(transparent)]
    Postgres(#[from] postgres::OpenError),
}

#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store rejects the statement or is unavailable.
    #[error("{}", message(.0))]
    Sql(#[from] sqlx::Error),
    /// The query was stopped, because it kept the gateway from shortening its write-ahead log.
    #[error(
        "could not finish the query within {} s, and stopped it because it keeps the gateway from shortening its write-ahead log; retry when the machine is less busy",
        QUERY_TIMEOUT.as_secs()
    )]
    TooSlow,
    /// A row with content that this program never writes.
    #[error("unexpected value {found:?} in column {column} of a row; check the store for damage")]
    Unexpected { column: usize, found: Value },
}

impl QueryError {
    /// Returns whether the statement would have written on a read-only connection.
    pub fn is_write(&self) -> bool {
        const SQLITE_READONLY: i32 = 8;
        const READ_ONLY_SQL_TRANSACTION: &str = "25006";
        let QueryError::Sql(sqlx::Error::Database(error)) = self else {
            return false;
        };
        match error.try_downcast_ref::<PgDatabaseError>() {
            Some(error) => error.code() == READ_ONLY_SQL_TRANSACTION,
            None => {
                let code: Option<i32> = error.code().and_then(|code| code.parse().ok());
                // The low byte is the primary code.
                code.is_some_and(|code| code & 0xFF == SQLITE_READONLY)
            }
        }
    }

    /// Returns whether SQLite could not write for lack of disk space.
    pub fn is_disk_full(&self) -> bool {
        match self {
            QueryError::Open(OpenError::Sqlite(sqlite::OpenError::Sqlite { source, .. }))
            | QueryError::Sql(source) => sqlite::is_disk_full(source),
            _ => false,
        }
    }

    /// Returns why the statement failed.
    pub fn cause(&self) -> Cause {
        let error = match self {
            QueryError::Sql(error) => error,
            QueryError::TooSlow => return Cause::Stopped,
            _ => return Cause::Store,
        };
        let Some(error) = error.as_database_error() else {
            return match error {
                sqlx::Error::Encode(_) => Cause::Statement,
                _ => Cause::Store,
            };
        };
        match error.try_downcast_ref::<PgDatabaseError>() {
            Some(error) if error.code() == "57014" => Cause::Stopped,
            // Classes of errors of the server: connection, resources, operator, system, internal.
            Some(error) => match &error.code()[..2] {
                "08" | "53" | "57" | "58" | "XX" => Cause::Store,
                _ => Cause::Statement,
            },
            None => {
                let code: Option<i32> = error.code().and_then(|code| code.parse().ok());
                match code.map(|code| code & 0xFF) {
                    Some(SQLITE_INTERRUPT) => Cause::Stopped,
                    Some(1 | 18 | 20 | 25) => Cause::Statement,
                    _ => Cause::Store,
                }
            }
        }
    }

    /// Returns the hint of a Postgres error.
    pub fn hint(&self) -> Option<&str> {
        match self {
            QueryError::Sql(sqlx::Error::Database(error)) => {
                error.try_downcast_ref::<PgDatabaseError>()?.hint()
            }
            _ => None,
        }
    }
}

/// Why a statement failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The statement or its parameters.
    Statement,
    /// It took too long.
    Stopped,
    /// The store.
    Store,
}

pub(super) fn is_interrupted(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse().ok()) == Some(SQLITE_INTERRUPT)
}

/// Returns the database's message on one line, if there is one.
fn message(error: &sqlx::Error) -> String {
    match error.as_database_error() {
        Some(error) => error.message().replace('\n', " "),
        None => error.to_string(),
    }
}
