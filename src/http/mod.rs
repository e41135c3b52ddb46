//! The HTTP listener: the page, health checks, metrics, the API, and the feed of committed readings.
//!
//! Invariant: a request never delays ingest. Requests run in their own tasks, whose number is bounded, and read the
//! store through connections of their own.

mod devices;
pub mod feed;
mod feed_ws;
pub mod gauges;
mod guard;
mod health;
mod openapi;
pub mod page;
mod problem;
mod query;
mod token;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, any, get, post};
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use self::feed::Feed;
pub use self::guard::Guard;
pub use self::token::Tokens;
use crate::config::store_url::StoreUrl;
use crate::metrics::{self, Metrics};

/// Maximum number of open connections; further ones wait.
const CONNECTIONS_MAX: usize = 128;
/// Maximum time to receive the header of a request, and maximum idle time between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a request's header, in bytes.
const HEADER_BYTES_MAX: usize = 16 << 10;
/// A peer that reads nothing for this time, although an answer waits for it, is disconnected: it would keep its slot.
#[cfg(target_os = "linux")]
const UNREAD_MAX_MS: u32 = 90_000;
/// Pause after a failed accept, usually for lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// State that all requests share.
pub(super) type Shared = Arc<Site>;

/// Data that requests read, and the guard that admits requests.
#[derive(Debug)]
pub struct Site {
    guard: watch::Receiver<Guard>,
    metrics: Arc<Metrics>,
    feed: Arc<Feed>,
    reader: devices::Reader,
    queries: query::Queries,
    pages: page::Pages,
    drain: CancellationToken,
}

/// The connection of a request. It counts as open while this exists, also after an upgrade.
#[derive(Clone)]
pub(super) struct Client {
    close: CancellationToken,
    _slot: Arc<OwnedSemaphorePermit>,
}

impl Client {
    /// Closes the connection, even if the peer does not read.
    fn close(&self) {
        self.close.cancel();
    }

    async fn closed(&self) {
        self.close.cancelled().await;
    }
}

impl Site {
    /// Creates a site that answers requests which the guard admits. `/readyz` reports not ready once `drain` is
    /// cancelled.
    pub fn new(
        guard: watch::Receiver<Guard>,
        metrics: Arc<Metrics>,
        store: &StoreUrl,
        feed: Arc<Feed>,
        live: Arc<page::Live>,
        drain: CancellationToken,
    ) -> Site {
        Site {
            guard,
            metrics,
            feed,
            reader: devices::Reader::new(store),
            queries: query::Queries::new(store),
            pages: page::Pages::new(store, live),
            drain,
        }
    }
}

fn router(site: Site) -> Router {
    let shared = Arc::new(site);
    let guard = axum::middleware::from_fn_with_state(Arc::clone(&shared), guard::guard);
    page::routes()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi::openapi))
        .nest("/v1", api())
        // Not a path below `/v1` for a nested router.
        .route("/v1/", any(problem::not_found))
        .layer(guard)
        .with_state(shared)
}

/// Paths below `/v1`, with their methods and handlers.
fn routes() -> [(&'static str, &'static str, MethodRouter<Shared>); 6] {
    [
        ("/devices", "get", get(devices::list)),
        ("/devices/{name}", "get", get(devices::show)),
        ("/devices/{name}/latest", "get", get(devices::latest)),
        ("/query", "post", post(query::query)),
        ("/feed", "get", get(feed::feed)),
        ("/feed/ws", "get", get(feed_ws::feed_ws)),
    ]
}

fn api() -> Router<Shared> {
    let mut api = Router::new();
    for (path, _, handler) in routes() {
        api = api.route(path, handler);
    }
    api.fallback(problem::not_found)
        .method_not_allowed_fallback(problem::method_not_allowed)
}

async fn metrics(State(site): State<Shared>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], site.metrics.text())
}

/// Answers requests, even while the gateway shuts down. Never returns.
pub async fn serve(listener: TcpListener, site: Site) {
    let router = router(site);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = Arc::clone(&slots)
            .acquire_owned()
            .await
            .expect("never closed");
        match listener.accept().await {
            Ok((socket, _)) => {
                limit_unread(&socket);
                let client = Client {
                    close: CancellationToken::new(),
                    _slot: Arc::new(slot),
                };
                tokio::spawn(answer(socket, router.clone(), client));
            }
            Err(error) => {
                tracing::debug!(%error, "could not accept HTTP connection, retrying");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Makes the system close the connection if the peer reads nothing (TCP_USER_TIMEOUT, tcp(7)).
fn limit_unread(socket: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(socket, UNREAD_MAX_MS) {
        tracing::debug!(%error, "could not limit the time of an unread answer");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = socket;
}

async fn answer(socket: TcpStream, router: Router, client: Client) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX);
    let service = TowerToHyperService::new(router.layer(Extension(client.clone())));
    let answering = http
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    tokio::select! {
        answered = answering => if let Err(error) = answered {
            tracing::debug!(%error, "HTTP connection failed");
        },
        () = client.closed() => {}
    }
}
