//! `/v1/feed`: committed readings, frame by frame, as server-sent events.
//!
//! Each reader has its own cursor, the id of the last frame that was sent to it, and pulls pages from the store after
//! the cursor. A slow reader therefore costs one page of memory. A reader that reconnects with its cursor misses no
//! event and gets none twice.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll as Ready};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Deserialize;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Close, Shared};
use crate::config::store_url::StoreUrl;
use crate::store::admin::feed::{self, Event, Filter, Page};
use crate::store::admin::{Pace, Poll, QueryError, Reconnecting};

/// Maximum number of readers. They leave half of the HTTP connections to other requests.
const READERS_MAX: usize = 64;
/// Maximum time to read a page from the store, including the wait for the connection that all readers share.
const PAGE_TIMEOUT: Duration = Duration::from_secs(20);
/// Delay before a failed page is read again.
const RETRY: Duration = Duration::from_secs(1);
/// Interval at which a reader without events receives its cursor.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// A reader that reads nothing for this time is disconnected.
const STALL_MAX: Duration = Duration::from_secs(60);

/// State that all readers share.
pub struct Feed {
    pages: Mutex<Pages>,
    settled: watch::Sender<i64>,
    slots: Arc<Semaphore>,
}

/// The connection for pages, and the latest page, which most readers need next.
struct Pages {
    store: Reconnecting,
    latest: Option<Arc<Page>>,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "feed with {} free slots", self.slots.available_permits())
    }
}

impl Feed {
    /// Creates the feed without connecting to the store.
    pub fn new(store: &StoreUrl) -> Feed {
        Feed {
            pages: Mutex::new(Pages {
                store: Reconnecting::new(store),
                latest: None,
            }),
            settled: watch::Sender::new(0),
            slots: Arc::new(Semaphore::new(READERS_MAX)),
        }
    }

    async fn now(&self) -> Result<i64, QueryError> {
        feed::settled(&mut self.pages.lock().await.store).await
    }

    async fn page(
        &self,
        after: i64,
        settled: i64,
        filter: &Filter,
    ) -> Result<Arc<Page>, QueryError> {
        let mut pages = self.pages.lock().await;
        if let Some(latest) = pages.latest.as_ref().filter(|latest| latest.after == after) {
            return Ok(Arc::clone(latest));
        }
        let page = Arc::new(feed::page(&mut pages.store, after, settled, filter).await?);
        if filter.is_all() {
            pages.latest = Some(Arc::clone(&page));
        }
        Ok(page)
    }
}

/// Wakes readers when frames have been committed.
pub struct FeedHead {
    store: Reconnecting,
    feed: Arc<Feed>,
}

impl FeedHead {
    /// Creates the task's state without connecting to the store.
    pub fn new(store: &StoreUrl, feed: Arc<Feed>) -> FeedHead {
        FeedHead {
            store: Reconnecting::new(store),
            feed,
        }
    }
}

impl Poll for FeedHead {
    const TASK: &'static str = "feed";
    const PACE: Pace = Pace {
        interval: Duration::from_millis(100),
        timeout: Duration::from_secs(5),
        share: 20,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        if self.feed.settled.receiver_count() == 0 {
            return Ok(());
        }
        let settled = feed::settled(&mut self.store).await?;
        self.feed
            .settled
            .send_if_modified(|known| std::mem::replace(known, settled) != settled);
        Ok(())
    }
}

/// Query parameters of a request.
#[derive(Debug, Deserialize)]
pub(super) struct Wanted {
    after: Option<i64>,
    #[serde(default)]
    device: String,
    #[serde(default)]
    channel: String,
}

/// Sends the events after the cursor in `Last-Event-ID` or `after`; without a cursor, the events from now on.
pub(super) async fn feed(
    State(site): State<Shared>,
    Extension(close): Extension<Close>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
) -> Response {
    let feed = Arc::clone(&site.feed);
    let Ok(slot) = Arc::clone(&feed.slots).try_acquire_owned() else {
        let why = "too many readers of the feed; retry later\n";
        let headers = [(RETRY_AFTER, "10")];
        return (StatusCode::SERVICE_UNAVAILABLE, headers, why).into_response();
    };
    let resumed = headers.get("last-event-id").map(|id| id.to_str());
    let resumed = resumed.map(|id| id.ok().and_then(|id| id.parse().ok()));
    let cursor = match (resumed, wanted.after) {
        (Some(None), _) => {
            let why = "Last-Event-ID is not a number; send the id of an event\n";
            return (StatusCode::BAD_REQUEST, why).into_response();
        }
        (Some(resumed), _) => resumed,
        (None, after) => after,
    };
    let cursor = match cursor {
        Some(cursor) => cursor,
        None => match timeout(PAGE_TIMEOUT, feed.now()).await {
            Ok(Ok(now)) => now,
            _ => {
                let why = "the store does not answer; retry later\n";
                return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
            }
        },
    };
    let (events, body) = mpsc::channel(1);
    let reader = Reader {
        feed,
        filter: Filter {
            device: wanted.device,
            channel: wanted.channel,
        },
        cursor,
        events,
        keepalive_at: Instant::now(),
        _slot: slot,
    };
    tokio::spawn(async move {
        if reader.run().await == End::Stalled {
            close.0.cancel();
        }
    });
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, Body::from_stream(Chunks(body))).into_response()
}

/// Reason why a reader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It closed its connection.
    Gone,
    /// It does not read.
    Stalled,
}

/// A reader of the feed.
struct Reader {
    feed: Arc<Feed>,
    filter: Filter,
    cursor: i64,
    /// Channel to the reader's connection. It holds one event, so a slow reader pauses this task.
    events: Sender<String>,
    keepalive_at: Instant,
    _slot: OwnedSemaphorePermit,
}

impl Reader {
    async fn run(mut self) -> End {
        match self.send_all().await {
            Err(end) => end,
        }
    }

    async fn send_all(&mut self) -> Result<Infallible, End> {
        let mut settled = self.feed.settled.subscribe();
        loop {
            if Instant::now() >= self.keepalive_at {
                self.send_cursor().await?;
            }
            let to = *settled.borrow_and_update();
            if to > self.cursor {
                self.send_page(to).await?;
                continue;
            }
            tokio::select! {
                changed = settled.changed() => changed.map_err(|_| End::Gone)?,
                () = self.events.closed() => return Err(End::Gone),
                () = sleep_until(self.keepalive_at) => {}
            }
        }
    }

    async fn send_page(&mut self, to: i64) -> Result<(), End> {
        let page = self.feed.page(self.cursor, to, &self.filter);
        let page = match timeout(PAGE_TIMEOUT, page).await {
            Ok(Ok(page)) => page,
            failed => {
                let error = failed.map_or("timed out".to_owned(), |failed| {
                    failed.map_or_else(|error| error.to_string(), |_| String::new())
                });
                tracing::debug!(error, "could not read a page of the feed, retrying");
                tokio::select! {
                    () = sleep(RETRY) => return Ok(()),
                    () = self.events.closed() => return Err(End::Gone),
                }
            }
        };
        for event in &page.events {
            if let Some(data) = json(event, &self.filter) {
                let id = event.frame_id;
                self.send(format!("id: {id}\ndata: {data}\n\n")).await?;
            }
        }
        self.cursor = page.to;
        Ok(())
    }

    /// Sends the cursor as an id without data, so that a browser reconnects with it.
    async fn send_cursor(&mut self) -> Result<(), End> {
        let cursor = self.cursor;
        self.send(format!(": keepalive\nid: {cursor}\n\n")).await
    }

    async fn send(&mut self, text: String) -> Result<(), End> {
        self.keepalive_at = Instant::now() + KEEPALIVE;
        match timeout(STALL_MAX, self.events.send(text)).await {
            Ok(sent) => sent.map_err(|_| End::Gone),
            Err(_) => Err(End::Stalled),
        }
    }
}

/// Returns an event as JSON with only the readings that match `filter`; `None` if no reading matches.
fn json(event: &Event, filter: &Filter) -> Option<String> {
    if !filter.device.is_empty() && event.device != filter.device {
        return None;
    }
    let json = |event: &Event| Some(serde_json::to_string(event).expect("it has only text keys"));
    if filter.channel.is_empty() {
        return json(event);
    }
    let mut event = event.clone();
    event
        .readings
        .retain(|reading| reading.channel == filter.channel);
    json(&event).filter(|_| !event.readings.is_empty())
}

/// The body of a response.
struct Chunks(Receiver<String>);

impl Stream for Chunks {
    type Item = Result<String, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Ready<Option<Self::Item>> {
        self.0.poll_recv(context).map(|text| text.map(Ok))
    }
}
