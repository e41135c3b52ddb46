//! The running gateway: its listeners, a task for each connection, the ingest task, and the drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ingest::batcher::BatchLimits;
use crate::ingest::registry::Registry;
use crate::ingest::{self, IngestQueue, QueueLimits};
use crate::net::socket::Socket;
use crate::net::tls::Tls;
use crate::server::admission::{Entrance, EntranceLimits};
use crate::server::connection::{Connection, Shared};
use crate::session::{SessionSettings, Submission};
use crate::store::{Refusal, Store, StoreError};
use crate::time::{SystemClock, watch};

pub mod admission;
mod connection;
pub mod device_watch;
pub mod supervisor;

/// What the system keeps of what a peer has not taken yet; it counts twice as much, for its own needs.
const SEND_BUFFER_BYTES: u32 = 32 * 1024;
/// Connections that wait to be accepted, as far as the system allows so many.
const BACKLOG: u32 = 1024;
/// From one time that refusals are written down to the next.
const REFUSALS_INTERVAL: Duration = Duration::from_secs(1);
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
    /// For those who connect.
    pub entrance: EntranceLimits,
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

/// Where devices connect.
#[derive(Debug)]
pub struct Listeners {
    /// In plain text.
    pub plain: TcpListener,
    /// Through TLS.
    pub tls: Option<TlsListener>,
}

/// Listens, on connections of whose outgoing bytes the system keeps little: devices are told a few hundred
/// bytes at a time, and one that does not read would have megabytes of the system's memory otherwise.
///
/// # Errors
/// The address is not this machine's, or taken.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A gateway may start again while connections of its predecessor time out.
    socket.set_reuseaddr(true)?;
    // Connections have it from their listener.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Where devices connect through TLS.
#[derive(Debug)]
pub struct TlsListener {
    /// The socket.
    pub listener: TcpListener,
    /// What each connection begins with.
    pub tls: Arc<Tls>,
}

/// Serves `listeners` until `drain` is cancelled, then answers what was taken in and ends. `stores` are
/// the ways into one store that can be used at once; `registry` comes to know who is connected.
pub async fn serve<S: Store>(
    listeners: Listeners,
    stores: Vec<S>,
    settings: ServerSettings,
    registry: Arc<Registry>,
    drain: CancellationToken,
) -> Result<(), ServeError> {
    let clock = SystemClock::start();
    let (queue, receivers) = ingest::queue(settings.queue, stores.len());
    let mut ingest = JoinSet::new();
    for (receiver, store) in receivers.into_iter().zip(stores) {
        ingest.spawn(receiver.run(store, settings.batch, Arc::clone(&registry), clock));
    }
    // With the queue it holds the lanes open, so it ends with the listeners.
    let watching = watch_clock(clock, queue.clone());
    let shared = Arc::new(Shared {
        settings: Arc::new(settings.session),
        registry,
        clock,
        drain: drain.clone(),
    });
    let connections = TaskTracker::new();
    let entrance = Arc::new(Entrance::new(settings.entrance));
    tokio::select! {
        () = accept(&listeners, &entrance, &connections, &shared, &queue) => {}
        never = write_refusals(&entrance, &queue) => never,
        () = watching => {}
        () = drain.cancelled() => {}
        // While there is a queue, a lane ends only by failing.
        ended = all_ended(&mut ingest) => return ended,
    }
    drop(listeners);
    connections.close();
    let drained = async {
        connections.wait().await;
        submit_refusals(&entrance, &queue).await;
        // With it the queue closes, and then the store.
        drop(queue);
        all_ended(&mut ingest).await
    };
    match timeout(settings.drain_timeout, drained).await {
        Ok(ended) => ended,
        Err(_) => Err(ServeError::DrainTimeout),
    }
}

/// Records each step of the wall clock.
async fn watch_clock(clock: SystemClock, queue: IngestQueue) {
    watch(clock, async |step| {
        queue
            .clone()
            .submit(Submission::Step(step), Arc::default())
            .await;
    })
    .await
}

/// Waits until all lanes have ended, or one has failed.
async fn all_ended(ingest: &mut JoinSet<Result<(), StoreError>>) -> Result<(), ServeError> {
    while let Some(ended) = ingest.join_next().await {
        ended??;
    }
    Ok(())
}

/// Brings refusals to the store, those of a while together.
async fn write_refusals<T>(entrance: &Entrance, queue: &IngestQueue) -> T {
    loop {
        sleep(REFUSALS_INTERVAL).await;
        submit_refusals(entrance, queue).await;
    }
}

async fn submit_refusals(entrance: &Entrance, queue: &IngestQueue) {
    for refusal in entrance.take_refusals() {
        let submission = Submission::Refusal(refusal);
        queue.clone().submit(submission, Arc::default()).await;
    }
}

/// Takes connections in for ever, each when there is room for it.
async fn accept(
    listeners: &Listeners,
    entrance: &Arc<Entrance>,
    connections: &TaskTracker,
    shared: &Arc<Shared>,
    queue: &IngestQueue,
) {
    loop {
        entrance.has_room(&shared.clock).await;
        let (tcp, peer, tls) = accept_one(listeners).await;
        let mailbox = Arc::default();
        let Some(visit) = entrance.enter(peer.ip(), &mailbox, &shared.clock).await else {
            let now = shared.clock.now();
            if let Some(not_logged) = entrance.may_log(peer.ip(), now.mono_us) {
                tracing::info!(%peer, not_logged, "connection closed: too many from its address");
            }
            entrance.note(Refusal {
                peer: peer.ip().to_canonical(),
                device: String::new(),
                code: 0,
                detail: "too many connections from its address".to_owned(),
                count: 1,
                first_at_us: now.utc_us,
                at_us: now.utc_us,
                is_told: false,
            });
            continue;
        };
        let connection = socket(tcp, tls).and_then(|socket| {
            Connection::new(
                socket,
                peer,
                visit,
                mailbox,
                Arc::clone(shared),
                queue.clone(),
            )
        });
        match connection {
            Ok(connection) => {
                connections.spawn(connection.serve());
            }
            Err(error) => tracing::debug!(%peer, %error, "connection not served"),
        }
    }
}

fn socket(tcp: TcpStream, tls: Option<&Tls>) -> io::Result<Socket> {
    // ACKs are small and must not wait for each other.
    tcp.set_nodelay(true)?;
    Ok(match tls {
        Some(tls) => Socket::tls(tcp, tls.connection()?),
        None => Socket::plain(tcp),
    })
}

/// The next connection of any listener, and what it is to be served with if it is not in plain text.
async fn accept_one(listeners: &Listeners) -> (TcpStream, SocketAddr, Option<&Tls>) {
    let mut is_failing = false;
    loop {
        let (accepted, tls) = tokio::select! {
            accepted = listeners.plain.accept() => (accepted, None),
            (accepted, tls) = accept_tls(listeners.tls.as_ref()) => (accepted, Some(tls)),
        };
        match accepted {
            Ok((tcp, mut peer)) => {
                // A socket of IPv6 that listens on every address shows IPv4 peers as IPv6 addresses.
                peer.set_ip(peer.ip().to_canonical());
                return (tcp, peer, tls);
            }
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

/// Waits for ever if there is no such listener.
async fn accept_tls(listener: Option<&TlsListener>) -> (io::Result<(TcpStream, SocketAddr)>, &Tls) {
    match listener {
        Some(TlsListener { listener, tls }) => (listener.accept().await, tls),
        None => std::future::pending().await,
    }
}
