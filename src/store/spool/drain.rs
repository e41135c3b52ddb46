//! The task that drains a spool into its database.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;

use super::SpoolError;
use super::destination::Destination;
use crate::store::StoreError;
use crate::store::postgres::{OpenError, PostgresSettings, REASON_LOST_BY_STORE, SpoolClaim, feed};
use crate::store::sqlite::SqliteStore;
use crate::store::sqlite::spool::{Chunk, Cursor, SpoolReader};
use crate::time::SystemClock;

/// Interval between attempts while the database is unavailable.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of streams in one transaction that records a gap for each.
const STREAMS_AT_ONCE: usize = 4096;

pub(super) struct Drain {
    pub(super) feeder: Feeder,
    pub(super) arrived: Arc<Notify>,
    pub(super) stop: CancellationToken,
    pub(super) abort: CancellationToken,
    /// `None` while the database is unavailable.
    pub(super) destination: Option<Destination>,
    /// Read while the previous chunk was committed.
    pub(super) next: Option<Chunk>,
}

/// A spool, and what is needed to connect to its database.
pub(super) struct Feeder {
    pub(super) settings: PostgresSettings,
    pub(super) reader: SpoolReader,
    pub(super) spool: Arc<Mutex<SqliteStore>>,
    pub(super) path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
enum DrainError {
    /// It may continue later.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The spool must not continue.
    #[error(transparent)]
    Refused(OpenError),
}

impl Drain {
    pub(super) async fn run(mut self) -> Option<String> {
        let mut failure: Option<String> = None;
        loop {
            let wait = match self.drain_chunk().await {
                Ok(is_empty) => {
                    if failure.take().is_some() {
                        tracing::info!("Postgres available again, draining the spool");
                    }
                    if !is_empty {
                        continue;
                    }
                    None
                }
                Err(DrainError::Refused(error)) => return Some(error.to_string()),
                Err(DrainError::Store(error)) => {
                    // The database may have other ids when it returns.
                    self.destination = None;
                    self.next = None;
                    let reason = error.to_string();
                    if failure.as_ref() != Some(&reason) {
                        tracing::warn!(%reason, "Postgres unavailable, frames stay in the spool");
                        failure = Some(reason);
                    }
                    Some(RETRY_INTERVAL)
                }
            };
            if self.stop.is_cancelled() {
                return None;
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = self.arrived.notified(), if wait.is_none() => {}
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
            }
        }
    }

    /// Moves the oldest chunk to the database; returns whether the spool was empty.
    async fn drain_chunk(&mut self) -> Result<bool, DrainError> {
        let mut chunk = match self.next.take() {
            Some(chunk) => chunk,
            None => read(&mut self.feeder.reader, Cursor::default()).await?,
        };
        if chunk.is_empty() {
            return Ok(true);
        }
        // Safe to abort: the spool deletes the chunk only afterwards.
        let abort = self.abort.clone();
        let next = tokio::select! {
            next = self.send(&mut chunk) => next?,
            () = abort.cancelled() => {
                return Err(StoreError::Transient("the gateway is shutting down".to_owned()).into());
            }
        };
        self.feeder.spool.lock().await.forget(&chunk).await?;
        if let Some(destination) = &mut self.destination {
            destination.store.advance_drained();
        }
        // An empty chunk may have been read before more frames arrived.
        self.next = Some(next).filter(|next| !next.is_empty());
        Ok(false)
    }

    /// Commits a chunk to the database; returns the next one.
    async fn send(&mut self, chunk: &mut Chunk) -> Result<Chunk, DrainError> {
        let destination = match &mut self.destination {
            Some(destination) => destination,
            none => none.insert(self.feeder.connect().await?),
        };
        let reader = &mut self.feeder.reader;
        let mut batch = destination.translate(chunk, reader).await?;
        let (committed, next) =
            tokio::join!(destination.commit(&mut batch), read(reader, chunk.end));
        committed?;
        Ok(next?)
    }
}

impl Feeder {
    /// Connects for the first time; `None` if the database is unavailable, because a spool works without it. If the
    /// file was restored to an earlier state, continues from the positions in the database.
    pub(super) async fn begin(&mut self) -> Result<Option<Destination>, SpoolError> {
        let mut connected = self.try_connect().await?;
        if let Err(OpenError::SpoolRestored { .. }) = connected {
            tracing::error!(
                "spool was restored to an earlier state; frames that it acknowledged later and did not drain are \
                 lost, devices continue from the positions in the database"
            );
            let standing = feed::read_standing(&self.settings).await?;
            let mut spool = self.spool.lock().await;
            spool.take_over(&standing).await?;
            spool.set_drained(standing.drained).await?;
            drop(spool);
            connected = self.try_connect().await?;
        }
        match connected {
            Ok(mut destination) => {
                // The drain detects this failure again.
                let recorded = self.record_lost(&mut destination).await;
                Ok(recorded.ok().map(|()| destination))
            }
            Err(copied @ OpenError::SpoolCopied { .. }) => Err(copied.into()),
            Err(error) => {
                tracing::debug!(%error, "spool starts without its database");
                Ok(None)
            }
        }
    }

    async fn connect(&mut self) -> Result<Destination, DrainError> {
        let mut destination = match self.try_connect().await? {
            Ok(destination) => destination,
            Err(error @ (OpenError::SpoolCopied { .. } | OpenError::SpoolRestored { .. })) => {
                return Err(DrainError::Refused(error));
            }
            Err(error) => return Err(StoreError::Transient(error.to_string()).into()),
        };
        self.record_lost(&mut destination).await?;
        Ok(destination)
    }

    /// Claims the database for this gateway, and connects.
    async fn try_connect(&self) -> Result<Result<Destination, OpenError>, StoreError> {
        let mut spool = self.spool.lock().await;
        let identity = spool.identity().await?;
        drop(spool);
        let inode = fs::metadata(&self.path).map_or(0, |file| file.ino().cast_signed());
        let request = feed::ClaimRequest {
            is_other_file: ![0, inode].contains(&identity.inode),
            identity,
        };
        let claimed = match feed::claim(&self.settings, &request).await {
            Ok(claimed) => claimed,
            Err(error) => return Ok(Err(error)),
        };
        self.spool.lock().await.end_claim(inode).await?;
        let feed::ClaimRequest { identity, .. } = request;
        // The database may be one commit ahead: the spool may have crashed before it deleted the content.
        if claimed.drained > identity.drained + 1 {
            let url = self.settings.url.clone();
            return Ok(Err(OpenError::SpoolRestored { url }));
        }
        let settings = PostgresSettings {
            spool: Some(SpoolClaim {
                id: identity.id,
                instance: identity.next_instance,
                drained: identity.drained,
                found_drained: claimed.drained,
            }),
            ..self.settings.clone()
        };
        Ok(Destination::open(settings, claimed.is_restored).await)
    }

    /// If the database was restored, resends everything that it may lack except readings, and records a gap for
    /// each stream in their place.
    async fn record_lost(&mut self, destination: &mut Destination) -> Result<(), StoreError> {
        if !destination.is_restored {
            return Ok(());
        }
        tracing::error!(
            "database was restored to an earlier state; frames that this spool had drained later become gaps of \
             reason 254"
        );
        self.spool.lock().await.repeat_changes().await?;
        let at_us = SystemClock::start().now().utc_us;
        let drained = self.reader.drained(REASON_LOST_BY_STORE, at_us).await;
        let drained = drained.map_err(|error| StoreError::Transient(error.to_string()))?;
        for streams in drained.chunks(STREAMS_AT_ONCE) {
            let mut chunk = Chunk::of(streams.to_vec());
            let mut batch = destination.translate(&mut chunk, &mut self.reader).await?;
            destination.commit(&mut batch).await?;
        }
        Ok(())
    }
}

async fn read(reader: &mut SpoolReader, after: Cursor) -> Result<Chunk, StoreError> {
    let chunk = reader.chunk(after).await;
    chunk.map_err(|error| StoreError::Transient(error.to_string()))
}
