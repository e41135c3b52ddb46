//! The running gateway: its listener, a task for each connection, the ingest task, and the drain.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::batcher::BatchLimits;
use crate::clock::SystemClock;
use crate::connection::{Connection, Shared};
use crate::ingest::{self, IngestQueue, QueueLimits};
use crate::registry::Registry;
use crate::session::SessionSettings;
use crate::store::{Store, StoreError};

/// After accept failed (descriptors run out, mostly): long enough for some to come free.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// What the gateway runs with.
#[derive(Clone)]
pub struct ServerSettings {
    /// For sessions.
    pub session: SessionSettings,
    /// For batches.
    pub batch: BatchLimits,
    /// For the queue.
    pub queue: QueueLimits,
    /// Connections at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// How long a drain may take.
    pub drain_timeout: Duration,
}

/// Why the gateway ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store cannot be trusted any more. Nothing after the last ACK is promised to anybody.
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    /// A bug: the ingest task panicked.
    #[error("the ingest task failed: {0}")]
    Ingest(#[from] JoinError),
    /// Frames that nobody was told are stored; devices send them again.
    #[error(
        "the store did not take the last frames within the drain time; devices will resend them"
    )]
    DrainTimeout,
}

/// Serves `listener` until `drain` is cancelled, then answers what was taken in and ends. `stores` are
/// the ways into one store that can be used at once.
pub async fn serve<S: Store>(
    listener: TcpListener,
    stores: Vec<S>,
    settings: ServerSettings,
    drain: CancellationToken,
) -> Result<(), ServeError> {
    let clock = SystemClock::start();
    let registry = Arc::new(Registry::default());
    let (queue, receivers) = ingest::queue(settings.queue, stores.len());
    let mut ingest = JoinSet::new();
    for (receiver, store) in receivers.into_iter().zip(stores) {
        ingest.spawn(receiver.run(store, settings.batch, Arc::clone(&registry), clock));
    }
    let shared = Arc::new(Shared {
        settings: Arc::new(settings.session),
        registry,
        clock,
        drain: drain.clone(),
    });
    let connections = TaskTracker::new();
    tokio::select! {
        () = accept(&listener, settings.connections_max, &connections, &shared, &queue) => {}
        () = drain.cancelled() => {}
        // While there is a queue, a lane ends only by failing.
        ended = all_ended(&mut ingest) => return ended,
    }
    drop(listener);
    drop(queue);
    connections.close();
    let drained = async {
        // The queue closes when the last connection is gone; then the store closes.
        connections.wait().await;
        all_ended(&mut ingest).await
    };
    match timeout(settings.drain_timeout, drained).await {
        Ok(ended) => ended,
        Err(_) => Err(ServeError::DrainTimeout),
    }
}

/// Waits until all lanes have ended, or one has failed.
async fn all_ended(ingest: &mut JoinSet<Result<(), StoreError>>) -> Result<(), ServeError> {
    while let Some(ended) = ingest.join_next().await {
        ended??;
    }
    Ok(())
}

/// Takes connections in for ever, each under a permit that was had before.
async fn accept(
    listener: &TcpListener,
    connections_max: usize,
    connections: &TaskTracker,
    shared: &Arc<Shared>,
    queue: &IngestQueue,
) {
    let permits = Arc::new(Semaphore::new(connections_max));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let (socket, peer) = accept_one(listener).await;
        match Connection::new(socket, peer, Arc::clone(shared), queue.clone()) {
            Ok(connection) => {
                connections.spawn(connection.serve(permit));
            }
            Err(error) => tracing::debug!(%peer, %error, "connection not served"),
        }
    }
}

async fn accept_one(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut is_failing = false;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                if !is_failing {
                    tracing::warn!(%error, "cannot accept connections; trying again");
                    is_failing = true;
                }
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
