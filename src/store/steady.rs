//! A reader for whoever looks into the store again and again, for as long as the gateway runs.

use std::path::PathBuf;

use super::reader::{Argument, OpenError, ReadError, Reader, Row};
use super::sqlite::spool::open_beside;
use crate::config::store_url::StoreUrl;

/// Connects when it is used, and again after an error.
pub struct SteadyReader {
    source: Source,
    reader: Option<Reader>,
}

enum Source {
    Store(StoreUrl),
    Spool(PathBuf),
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub enum SteadyError {
    /// The store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store does not answer.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl SteadyReader {
    /// Of a store.
    pub fn new(store: StoreUrl) -> SteadyReader {
        SteadyReader {
            source: Source::Store(store),
            reader: None,
        }
    }

    /// Of the spool in a file.
    pub fn of_spool(path: PathBuf) -> SteadyReader {
        SteadyReader {
            source: Source::Spool(path),
            reader: None,
        }
    }

    /// The rows of a query of this program's own.
    ///
    /// # Errors
    /// The store cannot be opened or does not answer; the next call tries to connect.
    ///
    /// # Cancel safety
    /// After a cancelled call the next one connects anew.
    pub async fn rows(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, SteadyError> {
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => self.source.open().await?,
        };
        let rows = reader.rows(sql, arguments).await?;
        self.reader = Some(reader);
        Ok(rows)
    }
}

impl Source {
    async fn open(&self) -> Result<Reader, OpenError> {
        match self {
            Source::Store(store) => Reader::open_watcher(store).await,
            Source::Spool(path) => Ok(Reader::Sqlite(open_beside(path).await?)),
        }
    }
}
