//! `/live`: the numbers of the page as server-sent events, at most once a second, when they change.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::fleet::numbers_by_key;
use super::rates::{Rate, Rates};
use crate::config::store_url::StoreUrl;
use crate::http::Shared;
use crate::http::problem::Problem;
use crate::metrics::Metrics;
use crate::store::admin::{Pace, Poll, QueryError, Reconnecting, fleet};

/// Maximum number of viewers. Each takes one of the HTTP connections.
const VIEWERS_MAX: usize = 32;
/// Maximum time without a message, so that proxies keep the connection open.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Values while the store does not answer.
const FAILED: &str = r#"{"failed":""}"#;

/// Values by key, as JSON; empty before the first were read.
type Values = Arc<str>;

/// The numbers that viewers receive.
pub struct Live {
    values: watch::Sender<Values>,
    slots: Arc<Semaphore>,
    rates: Arc<Rates>,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "numbers with {} viewers", self.values.receiver_count())
    }
}

impl Live {
    /// Creates the numbers, still without values.
    pub fn new(metrics: Arc<Metrics>, rates: Arc<Rates>) -> Live {
        Live {
            values: watch::Sender::new("".into()),
            slots: Arc::new(Semaphore::new(VIEWERS_MAX)),
            rates,
            metrics,
        }
    }

    /// Returns the rates at the present time.
    pub(super) fn rates(&self) -> Vec<Rate> {
        self.rates.shown(&self.metrics)
    }
}

/// Reads the numbers while there are viewers.
pub struct LiveNumbers {
    live: Arc<Live>,
    store: Reconnecting,
}

impl LiveNumbers {
    /// Creates the task's state without connecting to the store.
    pub fn new(store: &StoreUrl, live: Arc<Live>) -> LiveNumbers {
        LiveNumbers {
            live,
            store: Reconnecting::new(store),
        }
    }
}

impl Poll for LiveNumbers {
    const TASK: &'static str = "live numbers";
    const PACE: Pace = Pace {
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
        share: 20,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        if self.live.values.receiver_count() == 0 {
            // The next viewer does not get old numbers.
            self.live.values.send_replace("".into());
            return Ok(());
        }
        let numbers = match fleet::numbers(&mut self.store).await {
            Ok(numbers) => numbers,
            Err(error) => {
                self.live.values.send_replace(FAILED.into());
                return Err(error);
            }
        };
        let mut by_key: BTreeMap<_, _> = numbers_by_key(&numbers).into_iter().collect();
        by_key.extend({ self.live.rates().into_iter() }.map(|rate| (rate.key, rate.text)));
        let json = serde_json::to_string(&by_key).expect("it has only text keys");
        self.live.values.send_if_modified(|values| {
            let is_changed = **values != *json;
            *values = json.into();
            is_changed
        });
        Ok(())
    }
}

/// Sends the numbers of the page for as long as the viewer is connected.
pub(super) async fn live(State(site): State<Shared>) -> Result<Response, Problem> {
    let live = &site.pages.live;
    let slot = Arc::clone(&live.slots).try_acquire_owned().map_err(|_| {
        Problem::unavailable(format!("the page has {VIEWERS_MAX} viewers, the maximum"))
    })?;
    let mut values = live.values.subscribe();
    values.mark_changed();
    let events = stream::unfold((values, slot), |(mut values, slot)| async move {
        let event = match timeout(KEEPALIVE, values.changed()).await {
            Ok(Err(_)) => return None,
            Ok(Ok(())) => match &**values.borrow_and_update() {
                "" => ": no values yet\n\n".to_owned(),
                json => format!("data: {json}\n\n"),
            },
            Err(_) => ": keepalive\n\n".to_owned(),
        };
        Some((Ok::<_, Infallible>(event), (values, slot)))
    });
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}
