//! `/v1/feed`: committed readings, frame by frame, as server-sent events.
//!
//! Each reader has its own cursor, the id of the last frame that was sent to it, and pulls pages from the store after
//! the cursor. A slow reader therefore costs one page of memory. A reader that reconnects with its cursor misses no
//! event and gets none twice. `/v1/feed/ws` sends the same events over a WebSocket (`feed_ws.rs`).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll as Ready};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Deserialize;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::problem::{Parameters, Problem, storable};
use super::{Client, Shared};
use crate::config::IngestSettings;
use crate::config::store_url::StoreUrl;
use crate::metrics::Metrics;
use crate::store::admin::feed::{self, Event, Filter, Head, PAGE_FRAMES, Page};
use crate::store::admin::{Pace, Poll, QueryError, Reconnecting};

/// Maximum number of readers. They leave half of the HTTP connections to other requests.
const READERS_MAX: usize = 64;
/// Maximum time to read a page from the store, including the wait for the connection that all readers share.
const PAGE_TIMEOUT: Duration = Duration::from_secs(20);
/// Delay before a failed page is read again.
const RETRY: Duration = Duration::from_secs(1);
/// While more than a tenth of the queue for the store is used, pages take about 1/[`BUSY_SHARE`] of the time, because
/// reading them uses the processor that ingest needs.
const BUSY_QUEUE_DIVISOR: usize = 10;
const BUSY_SHARE: u32 = 40;
/// Minimum number of frames in a page while the store is busy. Smaller pages would not save time, because each costs
/// several queries.
const BUSY_FRAMES_MIN: i64 = 16;
/// Maximum pause between two pages: all readers wait for it in turn, within [`PAGE_TIMEOUT`].
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Time in which a page is read while the store is busy, if it is small enough.
const BUSY_PAGE: Duration = PAUSE_MAX.checked_div(BUSY_SHARE - 1).unwrap();
/// Interval at which a reader without events receives its cursor.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// A reader that reads nothing for this time is disconnected.
const STALL_MAX: Duration = Duration::from_secs(60);

/// State that all readers share.
pub struct Feed {
    pages: Mutex<Pages>,
    /// End of the feed; `None` before it is first read.
    head: watch::Sender<Option<Head>>,
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    /// Numbers of readings and bytes in the queue above which the store is busy.
    busy: (i64, i64),
    stall_max: Duration,
}

/// The connection for pages, and the latest page, which most readers need next.
struct Pages {
    store: Reconnecting,
    latest: Option<Arc<Texts>>,
    /// Maximum number of frames in the next page.
    frames_max: i64,
    /// The same while the store is busy.
    busy_frames_max: i64,
    /// Earliest time of the next page while the store is busy.
    next_at: Instant,
}

/// A page with the JSON of each event, which most readers send unchanged.
struct Texts {
    page: Page,
    json: Vec<Arc<str>>,
}

impl Texts {
    fn new(page: Page) -> Texts {
        let json = page.events.iter().map(json).collect();
        Texts { page, json }
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "feed with {} free slots", self.slots.available_permits())
    }
}

impl Feed {
    /// Creates the feed without connecting to the store.
    pub fn new(store: &StoreUrl, metrics: Arc<Metrics>, ingest: &IngestSettings) -> Feed {
        let busy = |limit: usize| (limit / BUSY_QUEUE_DIVISOR) as i64;
        Feed {
            pages: Mutex::new(Pages {
                store: Reconnecting::new(store),
                latest: None,
                frames_max: PAGE_FRAMES,
                busy_frames_max: PAGE_FRAMES,
                next_at: Instant::now(),
            }),
            head: watch::Sender::new(None),
            slots: Arc::new(Semaphore::new(READERS_MAX)),
            metrics,
            busy: (
                busy(ingest.queue_readings_max),
                busy(ingest.queue_bytes_max),
            ),
            stall_max: STALL_MAX,
        }
    }

    /// Reads the end of the feed.
    async fn now(&self) -> Result<Head, QueryError> {
        let mut pages = self.pages.lock().await;
        let head = feed::head(&mut pages.store).await?;
        let known = self.head.send_replace(Some(head));
        if known.is_some_and(|known| known.newest > head.newest) {
            // After a restore, the same ids belong to other frames.
            pages.latest = None;
        }
        Ok(head)
    }

    fn is_busy(&self) -> bool {
        let (readings, bytes) = self.busy;
        self.metrics.queue_readings.get() > readings || self.metrics.queue_bytes.get() > bytes
    }

    async fn page(
        &self,
        after: i64,
        settled: i64,
        filter: &Filter,
    ) -> Result<Arc<Texts>, QueryError> {
        let mut pages = self.pages.lock().await;
        if let Some(latest) = pages
            .latest
            .as_ref()
            .filter(|latest| latest.page.after == after)
        {
            return Ok(Arc::clone(latest));
        }
        let is_busy = self.is_busy();
        if is_busy {
            sleep_until(pages.next_at).await;
        }
        let began = Instant::now();
        let frames_max = pages.frames_max;
        let limit = match is_busy {
            true => frames_max.min(pages.busy_frames_max),
            false => frames_max,
        };
        // A page of frames with long time spans may take too long. So the next one is smaller, also if this one is
        // cancelled.
        pages.frames_max = (frames_max / 4).max(1);
        let page = feed::page(&mut pages.store, limit, after, settled, filter).await?;
        pages.frames_max = match limit == frames_max {
            true => (frames_max * 2).min(PAGE_FRAMES),
            false => frames_max,
        };
        let page = Arc::new(Texts::new(page));
        let took = began.elapsed();
        if is_busy {
            pages.busy_frames_max = match took > BUSY_PAGE {
                true => (limit / 2).max(BUSY_FRAMES_MIN),
                false => (limit * 2).min(PAGE_FRAMES),
            };
        }
        pages.next_at = Instant::now() + (took * (BUSY_SHARE - 1)).min(PAUSE_MAX);
        if filter.is_all() {
            pages.latest = Some(Arc::clone(&page));
        }
        Ok(page)
    }

    /// Sends the events after the cursor `after` to the receiver; without a cursor, the events from now on. Closes
    /// the connection of a client that does not read.
    pub(super) async fn subscribe(
        self: &Arc<Self>,
        after: Option<i64>,
        filter: Filter,
        client: Client,
    ) -> Result<Receiver<Message>, Problem> {
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let slot = slot.map_err(|_| {
            let error = format!("the feed has {READERS_MAX} readers, the maximum");
            Problem::unavailable(error)
        })?;
        let Ok(Ok(head)) = timeout(PAGE_TIMEOUT, self.now()).await else {
            return Err(Problem::no_store());
        };
        if after.is_some_and(|after| after > head.newest) {
            return Err(Problem::new(
                StatusCode::CONFLICT,
                "the cursor is beyond the newest frame, because the store was restored to an earlier state",
                "reconnect without a cursor, or with after=0",
            ));
        }
        let (messages, receiver) = mpsc::channel(1);
        let reader = Reader {
            feed: Arc::clone(self),
            filter,
            cursor: after.unwrap_or(head.settled),
            messages,
            keepalive_at: Instant::now(),
            _slot: slot,
        };
        tokio::spawn(async move {
            if reader.run().await == End::Stalled {
                client.close();
            }
        });
        Ok(receiver)
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
        if self.feed.head.receiver_count() == 0 {
            return Ok(());
        }
        let head = Some(feed::head(&mut self.store).await?);
        self.feed
            .head
            .send_if_modified(|known| std::mem::replace(known, head) != head);
        Ok(())
    }
}

/// What a reader receives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The readings of a frame, as JSON.
    Event { id: i64, json: Arc<str> },
    /// The cursor, if there are no events.
    Cursor(i64),
    /// The last message: the store was restored to an earlier state, so the cursor is invalid.
    Reset,
}

impl Message {
    /// Formats it as a server-sent event. An id without data moves the cursor with which a browser reconnects.
    fn server_sent(&self) -> String {
        match self {
            Message::Event { id, json } => format!("id: {id}\ndata: {json}\n\n"),
            Message::Cursor(id) => format!(": keepalive\nid: {id}\n\n"),
            Message::Reset => "event: reset\ndata: {}\n\n".to_owned(),
        }
    }
}

/// Query parameters of a request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    after: Option<i64>,
    #[serde(default)]
    device: String,
    #[serde(default)]
    channel: String,
}

impl Wanted {
    /// Returns the cursor, if there is one, and the filter.
    pub(super) fn checked(self) -> Result<(Option<i64>, Filter), Problem> {
        let Wanted {
            after,
            device,
            channel,
        } = self;
        if after.is_some_and(|after| after < 0) {
            let error = "invalid query: after is negative";
            return Err(Problem::bad_request(error, "use the id of an event, or 0"));
        }
        let device = storable("device", device)?;
        let channel = storable("channel", channel)?;
        Ok((after, Filter { device, channel }))
    }
}

/// Sends the events after the cursor in `Last-Event-ID` or `after`; without a cursor, the events from now on.
pub(super) async fn feed(
    State(site): State<Shared>,
    Extension(client): Extension<Client>,
    Parameters(wanted): Parameters<Wanted>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (after, filter) = wanted.checked()?;
    let cursor = match headers.get("last-event-id") {
        Some(id) => {
            let id = id.to_str().ok().and_then(|id| id.parse().ok());
            let id = id.filter(|id| *id >= 0);
            Some(id.ok_or_else(|| {
                let fix = "send the id of an event";
                Problem::bad_request("Last-Event-ID is not a cursor", fix)
            })?)
        }
        None => after,
    };
    let messages = site.feed.subscribe(cursor, filter, client).await?;
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, Body::from_stream(ServerSent(messages))).into_response())
}

/// Reason why a reader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It closed its connection.
    Gone,
    /// It does not read.
    Stalled,
    /// Its cursor is invalid.
    Reset,
}

/// A reader of the feed.
struct Reader {
    feed: Arc<Feed>,
    filter: Filter,
    cursor: i64,
    /// Channel to the reader's connection. It holds one message, so a slow reader pauses this task.
    messages: Sender<Message>,
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
        let mut head = self.feed.head.subscribe();
        loop {
            if Instant::now() >= self.keepalive_at {
                self.send(Message::Cursor(self.cursor)).await?;
            }
            let Head { settled, newest } = head.borrow_and_update().unwrap_or_default();
            if newest < self.cursor && self.is_beyond_newest().await {
                self.send(Message::Reset).await?;
                return Err(End::Reset);
            }
            if settled > self.cursor {
                self.send_page(settled).await?;
                continue;
            }
            tokio::select! {
                changed = head.changed() => changed.map_err(|_| End::Gone)?,
                () = self.messages.closed() => return Err(End::Gone),
                () = sleep_until(self.keepalive_at) => {}
            }
        }
    }

    /// Returns whether the cursor is beyond the newest frame in the store. The head that readers share may be older
    /// than the cursor.
    async fn is_beyond_newest(&self) -> bool {
        let now = timeout(PAGE_TIMEOUT, self.feed.now()).await;
        matches!(now, Ok(Ok(head)) if head.newest < self.cursor)
    }

    async fn send_page(&mut self, to: i64) -> Result<(), End> {
        let page = self.feed.page(self.cursor, to, &self.filter);
        let texts = match timeout(PAGE_TIMEOUT, page).await {
            Ok(Ok(page)) => page,
            failed => {
                let error = failed.map_or("timed out".to_owned(), |failed| {
                    failed.map_or_else(|error| error.to_string(), |_| String::new())
                });
                tracing::debug!(error, "could not read a page of the feed, retrying");
                tokio::select! {
                    () = sleep(RETRY) => return Ok(()),
                    () = self.messages.closed() => return Err(End::Gone),
                }
            }
        };
        let Texts { page, json } = &*texts;
        for (event, json) in page.events.iter().zip(json) {
            if let Some(json) = matching(event, json, &self.filter) {
                let id = event.frame_id;
                self.send(Message::Event { id, json }).await?;
            }
        }
        self.cursor = page.to;
        Ok(())
    }

    async fn send(&mut self, message: Message) -> Result<(), End> {
        self.keepalive_at = Instant::now() + KEEPALIVE;
        match timeout(self.feed.stall_max, self.messages.send(message)).await {
            Ok(sent) => sent.map_err(|_| End::Gone),
            Err(_) => Err(End::Stalled),
        }
    }
}

fn json(event: &Event) -> Arc<str> {
    let json = serde_json::to_string(event).expect("it has only text keys");
    json.into()
}

/// Returns the JSON of an event, whose whole JSON is `json`, with only the readings that match `filter`; `None` if no
/// reading matches.
fn matching(event: &Event, json: &Arc<str>, filter: &Filter) -> Option<Arc<str>> {
    if !filter.device.is_empty() && event.device != filter.device {
        return None;
    }
    if filter.channel.is_empty() {
        return Some(Arc::clone(json));
    }
    let mut event = event.clone();
    event
        .readings
        .retain(|reading| reading.channel == filter.channel);
    (!event.readings.is_empty()).then(|| self::json(&event))
}

/// The body of a response.
struct ServerSent(Receiver<Message>);

impl Stream for ServerSent {
    type Item = Result<String, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Ready<Option<Self::Item>> {
        let message = self.0.poll_recv(context);
        message.map(|message| message.map(|message| Ok(message.server_sent())))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::http::page::Live;
    use crate::http::{Guard, Site, serve};
    use crate::store::admin::{Access, Connection, poll_every};
    use crate::store::sqlite::{SqliteSettings, migrate};

    const PATIENCE: Duration = Duration::from_secs(60);
    /// The events are larger than the buffers of a connection.
    const FRAMES: usize = 60;
    const READINGS: usize = 5000;
    /// Minimum size of the events in bytes.
    const EVENT_BYTES: usize = FRAMES * READINGS * 40;

    async fn fill(url: &StoreUrl) {
        let StoreUrl::Sqlite(path) = url else {
            unreachable!()
        };
        migrate(path, &SqliteSettings::default()).await.unwrap();
        let mut store = Connection::open(url, Access::Write).await.unwrap();
        store.begin().await.unwrap();
        for sql in [
            "INSERT INTO devices (name) VALUES ('a')".to_owned(),
            "INSERT INTO streams (device_id, stream, created_at) SELECT id, 1, 0 FROM devices".to_owned(),
            "INSERT INTO series (device_id, channel, unit, kind) SELECT id, 'b', 'm', 'f64' FROM devices".to_owned(),
            format!(
                "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < {FRAMES})
                 INSERT INTO frames (stream_id, seq, type, received_at, readings, first_ts, last_ts)
                 SELECT s.id, x, 17, x * {READINGS}, {READINGS}, (x - 1) * {READINGS} + 1, x * {READINGS} FROM n, streams AS s"
            ),
            format!(
                "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n WHERE x < {READINGS} - 1)
                 INSERT INTO readings_sorted (series_id, ts, frame_id, value)
                 SELECT s.id, f.received_at - x, f.id, 0.5 FROM n, frames AS f, series AS s"
            ),
        ] {
            store.execute(&sql, &[]).await.unwrap();
        }
        store.commit().await.unwrap();
    }

    async fn eventually(mut has_happened: impl FnMut() -> bool) {
        let happened = async {
            while !has_happened() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, happened).await.expect("it happens");
    }

    /// Connects to the feed at `path`.
    async fn connect(addr: std::net::SocketAddr, path: &str) -> TcpStream {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        let request = format!(
            "GET {path}?after=0 HTTP/1.1\r\nHost: {addr}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        socket
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_is_disconnected() {
        let directory = tempfile::tempdir().unwrap();
        let url = StoreUrl::Sqlite(directory.path().join("a.db"));
        fill(&url).await;
        let mut feed = Feed::new(&url, Arc::default(), &IngestSettings::default());
        feed.stall_max = Duration::from_millis(500);
        let feed = Arc::new(feed);
        let (metrics, drain) = (Arc::new(Metrics::default()), CancellationToken::new());
        let (_guard, admitted) = watch::channel(Guard::new([], None));
        let live = Arc::new(Live::new(Arc::clone(&metrics), Arc::default()));
        let site = Site::new(admitted, metrics, &url, Arc::clone(&feed), live, drain);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, site));
        tokio::spawn(poll_every::<(), _>(FeedHead::new(&url, Arc::clone(&feed))));
        let readers = || READERS_MAX - feed.slots.available_permits();
        for path in ["/v1/feed", "/v1/feed/ws"] {
            let mut stalled = connect(addr, path).await;
            eventually(|| readers() == 1).await;
            eventually(|| readers() == 0).await;
            // The rest of the buffers, and then the end.
            let mut text = Vec::new();
            let read = timeout(PATIENCE, stalled.read_to_end(&mut text)).await;
            drop(read.expect("the connection ends"));
            assert!(text.len() < EVENT_BYTES, "{path}: {}", text.len());

            // One that pauses for a shorter time receives all.
            let mut slow = connect(addr, path).await;
            let (mut received, mut buffer) = (0, vec![0; 1 << 20]);
            let mut pauses = 0;
            while received < EVENT_BYTES {
                let read = timeout(PATIENCE, slow.read(&mut buffer)).await;
                let read = read.expect("no silence").unwrap();
                assert_ne!(read, 0, "{path}: {received}");
                received += read;
                if received / (2 << 20) > pauses {
                    pauses += 1;
                    sleep(Duration::from_millis(100)).await;
                }
            }
            drop(slow);
            eventually(|| readers() == 0).await;
        }
    }
}
