//! `/v1/devices`: devices, their state, and their newest readings.

use std::fmt;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

use super::Shared;
use super::problem::{Name, Nothing, Parameters, Problem, storable};
use crate::config::store_url::StoreUrl;
use crate::store::admin::feed::Number;
use crate::store::admin::presence::Presence;
use crate::store::admin::{Argument, QueryError, Reconnecting, Row};

/// Maximum time for an answer, with the requests that wait for the same connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const PAGE_DEFAULT: u32 = 100;
pub(super) const PAGE_MAX: u32 = 1000;
/// Maximum number of readings in `latest`.
pub(super) const LATEST_MAX: u32 = 1000;

/// The connection for these requests, which are read one at a time.
pub(super) struct Reader(Mutex<Reconnecting>);

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reader")
    }
}

impl Reader {
    /// Creates it without connecting.
    pub(super) fn new(store: &StoreUrl) -> Reader {
        Reader(Mutex::new(Reconnecting::new(store)))
    }

    /// Waits for the connection.
    pub(super) async fn store(&self) -> MutexGuard<'_, Reconnecting> {
        self.0.lock().await
    }

    async fn rows(&self, sql: &str, arguments: &[Argument<'_>]) -> Result<Vec<Row>, Problem> {
        within(async { self.store().await.rows(sql, arguments).await }).await
    }
}

/// Waits for the answer of the store, at most [`ANSWER_TIMEOUT`].
pub(super) async fn within<T>(
    answer: impl Future<Output = Result<T, QueryError>>,
) -> Result<T, Problem> {
    match timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(failed(&error)),
        Err(_) => Err(Problem::no_store()),
    }
}

fn failed(error: &QueryError) -> Problem {
    tracing::debug!(%error, "could not read for an HTTP request");
    Problem::no_store()
}

/// Query of a request for devices.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    state: Option<Presence>,
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    after: String,
    limit: Option<u32>,
}

/// A page of devices, by name.
#[derive(Debug, Serialize)]
pub(super) struct Devices {
    devices: Vec<Device>,
    /// Cursor of the next page, if there is one.
    next: Option<String>,
}

/// A device. Times are microseconds UTC.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Device {
    pub(super) device: String,
    enabled: bool,
    state: String,
    pub(super) presence: String,
    pub(super) interval_s: i64,
    pub(super) is_interval_set: bool,
    pub(super) firmware: Option<String>,
    pub(super) first_seen_at: Option<i64>,
    pub(super) last_seen_at: Option<i64>,
    pub(super) last_frame_at: Option<i64>,
    pub(super) frames: i64,
    pub(super) readings: i64,
    pub(super) missing: i64,
    quarantined: i64,
}

pub(super) const DEVICES: &str =
    "SELECT device, enabled, state, presence, interval_s, is_interval_set, firmware,
        first_seen_at, last_seen_at, last_frame_at, frames, readings, missing, quarantined
    FROM device_status
    WHERE device IN (SELECT name FROM devices WHERE name > $1 COLLATE \"C\"
        AND substr(name, 1, length($2)) = $2 ORDER BY name COLLATE \"C\" LIMIT $3)
    ORDER BY device COLLATE \"C\"";
/// The state is only in the view.
pub(super) const DEVICES_IN_STATE: &str =
    "SELECT device, enabled, state, presence, interval_s, is_interval_set,
        firmware, first_seen_at, last_seen_at, last_frame_at, frames, readings, missing, quarantined
    FROM device_status
    WHERE device > $1 COLLATE \"C\" AND substr(device, 1, length($2)) = $2 AND presence = $4
    ORDER BY device COLLATE \"C\" LIMIT $3";
pub(super) const DEVICE: &str =
    "SELECT device, enabled, state, presence, interval_s, is_interval_set, firmware,
        first_seen_at, last_seen_at, last_frame_at, frames, readings, missing, quarantined
    FROM device_status WHERE device = $1";
pub(super) const LATEST: &str = "SELECT channel, unit, kind, ts, value, received_at, quality FROM latest
    WHERE device = $1 AND ts IS NOT NULL ORDER BY channel COLLATE \"C\", unit COLLATE \"C\", kind COLLATE \"C\" LIMIT $2";

impl Device {
    fn of(row: &Row) -> Result<Device, QueryError> {
        Ok(Device {
            device: row.text(0)?.to_owned(),
            enabled: row.integer(1)? != 0,
            state: row.text(2)?.to_owned(),
            presence: row.text(3)?.to_owned(),
            interval_s: row.integer(4)?,
            is_interval_set: row.integer(5)? != 0,
            firmware: row.text_or_null(6)?.map(str::to_owned),
            first_seen_at: row.integer_or_null(7)?,
            last_seen_at: row.integer_or_null(8)?,
            last_frame_at: row.integer_or_null(9)?,
            frames: row.integer(10)?,
            readings: row.integer(11)?,
            missing: row.integer(12)?,
            quarantined: row.integer(13)?,
        })
    }
}

/// Lists devices.
pub(super) async fn list(
    State(site): State<Shared>,
    Parameters(wanted): Parameters<Wanted>,
) -> Result<Json<Devices>, Problem> {
    let limit = wanted.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        let error = format!("invalid query: limit is not from 1 to {PAGE_MAX}");
        return Err(Problem::bad_request(
            error,
            "ask for several pages with after",
        ));
    }
    // One more shows whether there is a next page.
    let rows = i64::from(limit) + 1;
    let after = storable("after", wanted.after)?;
    let prefix = storable("prefix", wanted.prefix)?;
    let mut arguments = vec![after.as_str().into(), prefix.as_str().into(), rows.into()];
    let sql = match wanted.state {
        Some(state) => {
            arguments.push(state.name().into());
            DEVICES_IN_STATE
        }
        None => DEVICES,
    };
    let rows = site.reader.rows(sql, &arguments).await?;
    let devices: Result<Vec<_>, _> = rows.iter().map(Device::of).collect();
    let mut devices = devices.map_err(|error| failed(&error))?;
    let has_more = devices.len() > limit as usize;
    devices.truncate(limit as usize);
    let last = devices.last().map(|last| last.device.clone());
    Ok(Json(Devices {
        next: last.filter(|_| has_more),
        devices,
    }))
}

/// Shows a device.
pub(super) async fn show(
    State(site): State<Shared>,
    Name(name): Name,
    Parameters(Nothing {}): Parameters<Nothing>,
) -> Result<Json<Device>, Problem> {
    device(&site.reader, &name).await.map(Json)
}

/// Returns a device, or a problem with status 404.
pub(super) async fn device(reader: &Reader, name: &str) -> Result<Device, Problem> {
    let rows = match name.contains('\0') {
        true => Vec::new(),
        false => reader.rows(DEVICE, &[name.into()]).await?,
    };
    let Some(row) = rows.first() else {
        let fix = "see /v1/devices for the names of all devices";
        return Err(Problem::new(StatusCode::NOT_FOUND, "no such device", fix));
    };
    Device::of(row).map_err(|error| failed(&error))
}

/// The newest readings of a device.
#[derive(Debug, Serialize)]
pub(super) struct Latest {
    device: String,
    latest: Vec<Newest>,
}

/// The newest plausible reading of a series. Times are microseconds UTC.
#[derive(Debug, Serialize)]
pub(super) struct Newest {
    pub(super) channel: String,
    pub(super) unit: String,
    kind: String,
    pub(super) ts: i64,
    pub(super) value: Number,
    received_at: i64,
    pub(super) quality: Option<String>,
}

/// Shows the newest readings of a device.
pub(super) async fn latest(
    State(site): State<Shared>,
    Name(name): Name,
    Parameters(Nothing {}): Parameters<Nothing>,
) -> Result<Json<Latest>, Problem> {
    let Device { device, .. } = device(&site.reader, &name).await?;
    let latest = newest(&site.reader, &device).await?;
    Ok(Json(Latest { device, latest }))
}

/// Returns the newest readings of a device.
pub(super) async fn newest(reader: &Reader, name: &str) -> Result<Vec<Newest>, Problem> {
    let arguments = [name.into(), i64::from(LATEST_MAX).into()];
    let rows = reader.rows(LATEST, &arguments).await?;
    let newest = |row: &Row| {
        Ok(Newest {
            channel: row.text(0)?.to_owned(),
            unit: row.text(1)?.to_owned(),
            kind: row.text(2)?.to_owned(),
            ts: row.integer(3)?,
            value: row.sample(4)?.into(),
            received_at: row.integer(5)?,
            quality: row.text_or_null(6)?.map(str::to_owned),
        })
    };
    let latest: Result<Vec<_>, QueryError> = rows.iter().map(newest).collect();
    latest.map_err(|error| failed(&error))
}
