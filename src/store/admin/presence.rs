//! Presence of devices: a gateway records each change as an event, and learns how often each device sends.
//!
//! Ingest writes nothing for this. The view `device_presence` computes the state of a device from its frames,
//! sessions and events; the table `presence` has the last recorded state and the intervals.
//!
//! Invariant: if several gateways share a store, exactly one records a change, because only one finds the former state.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use fieldgate_protocol::error::Code;
use serde::Deserialize;

use super::row::id_list;
use super::{Access, Argument, Connection, Pace, Poll, QueryError, Row};
use crate::config::store_url::StoreUrl;
use crate::metrics::Metrics;
use crate::time::SystemClock;

/// Number of devices per query and per transaction. Commits of SQLite wait while a transaction records the changes.
const DEVICES_AT_ONCE: i64 = 200;
/// Number of devices whose intervals are learned per round. Their last frames have to be read.
const LEARNED_AT_ONCE: usize = 64;
/// Pause after a transaction, during which gateways can commit.
const PAUSE: Duration = Duration::from_millis(10);
/// Number of a device's last frames from which its interval is learned.
const FRAMES_LEARNED: i64 = 128;
/// Number of spacings needed to learn the interval of a device that sends several frames at a time.
const SPACINGS_MIN: usize = 3;
/// Number of take-overs within [`TAKEN_OVER_WITHIN_US`] from which two devices are assumed to use one name. A device
/// that reconnects over a bad link causes fewer.
const TAKEN_OVER_MIN: i64 = 10;
const TAKEN_OVER_WITHIN_US: i64 = 600_000_000;
/// Minimum time between two events about a device's twin.
pub const TWIN_EVERY_US: i64 = 3_600_000_000;
const SECOND_US: i64 = 1_000_000;

/// Minimum time between two writes of [`ALIVE`].
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Records that a gateway is alive. Without it, other gateways consider its sessions as ended (`dead_gateways`).
const ALIVE: &str = "INSERT INTO gateways (id, alive_at, alive_since) VALUES ($1, now(), now())
    ON CONFLICT (id) DO UPDATE SET alive_at = excluded.alive_at, alive_since = CASE
        WHEN gateways.alive_at < now() - interval '2 minutes' THEN excluded.alive_since
        ELSE gateways.alive_since
    END";

/// State of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// Connected, or heard from within three of its intervals.
    Online,
    /// Not heard from for three of its intervals.
    Late,
    /// Late, and not heard from for a day.
    Silent,
    /// Has never sent a frame.
    Never,
    /// Disabled by an operator.
    Disabled,
}

impl Presence {
    /// All states, in the order of [`Presence`].
    pub const ALL: [Presence; 5] = [
        Presence::Online,
        Presence::Late,
        Presence::Silent,
        Presence::Never,
        Presence::Disabled,
    ];

    /// Returns its name in the store.
    pub const fn name(self) -> &'static str {
        match self {
            Presence::Online => "online",
            Presence::Late => "late",
            Presence::Silent => "silent",
            Presence::Never => "never",
            Presence::Disabled => "disabled",
        }
    }

    fn of(row: &Row, column: usize) -> Result<Presence, QueryError> {
        let name = row.text_or_null(column)?;
        let found = { Presence::ALL.into_iter() }.find(|state| Some(state.name()) == name);
        found.ok_or_else(|| QueryError::Unexpected {
            column,
            found: row.0[column].clone(),
        })
    }
}

/// Records changes of presence, and learns intervals.
pub struct PresenceWatch {
    store: StoreUrl,
    metrics: Arc<Metrics>,
    /// Name of this gateway among those of a Postgres database; `None` with SQLite, which has one gateway.
    gateway: Option<String>,
    alive_at: Option<Instant>,
    keepalive_s: i64,
    /// Start of the gateway: it could not hear from devices before.
    started_us: i64,
    /// The last device whose interval was learned.
    learned: i64,
    connection: Option<Connection>,
}

/// A device in the view `device_presence`.
struct Device {
    id: i64,
    /// `None` if the device is new.
    recorded: Option<Presence>,
    presence: Presence,
    interval_s: i64,
    learned_s: Option<i64>,
}

impl Device {
    fn of(row: &Row) -> Result<Device, QueryError> {
        Ok(Device {
            id: row.integer(0)?,
            recorded: match row.text_or_null(1)? {
                Some(_) => Some(Presence::of(row, 1)?),
                None => None,
            },
            presence: Presence::of(row, 2)?,
            interval_s: row.integer(3)?,
            learned_s: row.integer_or_null(4)?,
        })
    }
}

/// Result of one round over all devices.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// Number of devices by state.
    devices: BTreeMap<Presence, i64>,
    /// Number of devices whose twin was reported within [`TWIN_EVERY_US`].
    twins: i64,
}

/// Changes that one transaction records.
#[derive(Default)]
struct Changes {
    new: Vec<i64>,
    /// Ids by the states before and after.
    presence: BTreeMap<(Presence, Presence), Vec<i64>>,
    twins: Vec<i64>,
}

const DEVICES: &str = "SELECT device_id, recorded, presence, interval_s, learned_s
    FROM device_presence WHERE device_id > $1 ORDER BY device_id LIMIT $2";

impl PresenceWatch {
    /// Creates a watch of a gateway's store. Unless an operator set the interval of a device, it is at least
    /// `keepalive_s`.
    pub fn new(
        store: &StoreUrl,
        gateway: Option<String>,
        metrics: Arc<Metrics>,
        keepalive_s: u16,
    ) -> PresenceWatch {
        PresenceWatch {
            store: store.clone(),
            metrics,
            gateway,
            alive_at: None,
            keepalive_s: keepalive_s.into(),
            started_us: SystemClock::start().now().utc_us,
            learned: 0,
            connection: None,
        }
    }

    /// Checks each device once, and learns the intervals of some.
    async fn round(
        &mut self,
        connection: &mut Connection,
        now_us: i64,
    ) -> Result<Found, QueryError> {
        let mut found = Found::default();
        let mut after = 0;
        let mut has_learned = false;
        loop {
            self.stay_alive(connection).await?;
            let arguments = [after.into(), DEVICES_AT_ONCE.into()];
            let rows = connection.rows(DEVICES, &arguments).await?;
            let devices: Vec<Device> = rows.iter().map(Device::of).collect::<Result<_, _>>()?;
            let Some(last) = devices.last().map(|device| device.id) else {
                break;
            };
            let mut changes = Changes::default();
            for device in &devices {
                let state = self.judge(device, now_us, &mut changes);
                *found.devices.entry(state).or_default() += 1;
            }
            changes.twins = twins(connection, after, last, now_us).await?;
            self.record(connection, &changes, now_us).await?;
            if !has_learned && last > self.learned {
                self.learn(connection, &devices).await?;
                has_learned = true;
            }
            after = last;
        }
        if !has_learned {
            self.learned = 0;
        }
        let sql = "SELECT count(*) FROM presence WHERE twin_at > $1";
        let since = [Argument::Time(now_us - TWIN_EVERY_US)];
        found.twins = connection.integer(sql, &since).await?;
        Ok(found)
    }

    async fn stay_alive(&mut self, connection: &mut Connection) -> Result<(), QueryError> {
        let is_due = self
            .alive_at
            .is_none_or(|alive_at| alive_at.elapsed() >= ALIVE_EVERY);
        if let Some(gateway) = self.gateway.as_deref().filter(|_| is_due) {
            connection.step(ALIVE, &[gateway.into()]).await?;
            self.alive_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Returns the state of a device, and adds its change to `changes`. After a start, a device that was online has
    /// three intervals to reconnect.
    fn judge(&self, device: &Device, now_us: i64, changes: &mut Changes) -> Presence {
        let recorded = device.recorded.unwrap_or_else(|| {
            changes.new.push(device.id);
            Presence::Never
        });
        let patience_us = device.interval_s.saturating_mul(3 * SECOND_US);
        let is_missed = matches!(device.presence, Presence::Late | Presence::Silent);
        if recorded == Presence::Online && is_missed && now_us - self.started_us < patience_us {
            return recorded;
        }
        if recorded != device.presence {
            let change = (recorded, device.presence);
            changes.presence.entry(change).or_default().push(device.id);
        }
        device.presence
    }

    async fn record(
        &self,
        connection: &mut Connection,
        changes: &Changes,
        now_us: i64,
    ) -> Result<(), QueryError> {
        if changes.new.is_empty() && changes.presence.is_empty() && changes.twins.is_empty() {
            return Ok(());
        }
        connection.begin().await?;
        let recorded = self.record_all(connection, changes, now_us).await;
        connection.end(recorded).await?;
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    async fn record_all(
        &self,
        connection: &mut Connection,
        changes: &Changes,
        now_us: i64,
    ) -> Result<(), QueryError> {
        if !changes.new.is_empty() {
            let sql = format!(
                "INSERT INTO presence (device_id, learned_s) SELECT id, $1 FROM devices
                 WHERE id IN ({}) ON CONFLICT DO NOTHING",
                id_list(&changes.new)
            );
            connection.execute(&sql, &[self.keepalive_s.into()]).await?;
        }
        for ((from, to), devices) in &changes.presence {
            let sql = format!(
                "UPDATE presence SET state = $1 WHERE state = $2 AND device_id IN ({})
                 RETURNING device_id",
                id_list(devices)
            );
            let states = [to.name().into(), from.name().into()];
            let changed = connection.rows(&sql, &states).await?;
            let detail = format!("from {} to {}", from.name(), to.name());
            note(connection, &changed, "presence", &detail, now_us).await?;
        }
        if !changes.twins.is_empty() {
            let sql = format!(
                "UPDATE presence SET twin_at = $1 WHERE device_id IN ({})
                 AND (twin_at IS NULL OR twin_at <= $2) RETURNING device_id",
                id_list(&changes.twins)
            );
            let times = [
                Argument::Time(now_us),
                Argument::Time(now_us - TWIN_EVERY_US),
            ];
            let changed = connection.rows(&sql, &times).await?;
            let detail = "two devices use this name: they end each other's sessions";
            note(connection, &changed, "twin", detail, now_us).await?;
        }
        Ok(())
    }

    /// Learns the intervals of the first of `devices` that are next. Keeps an interval if the new one differs by at most
    /// a quarter.
    async fn learn(
        &mut self,
        connection: &mut Connection,
        devices: &[Device],
    ) -> Result<(), QueryError> {
        let next = devices.iter().filter(|device| device.id > self.learned);
        let next: Vec<&Device> = next.take(LEARNED_AT_ONCE).collect();
        let after = self.learned;
        let Some(last) = next.last().map(|device| device.id) else {
            return Ok(());
        };
        let rows = connection
            .rows(&arrivals_sql(), &[after.into(), last.into()])
            .await?;
        self.learned = last;
        let mut arrivals: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        for row in &rows {
            let of_device = arrivals.entry(row.integer(0)?).or_default();
            of_device.push(row.integer(1)?);
        }
        let mut cases = String::new();
        let mut changed = Vec::new();
        for device in next {
            let arrivals = arrivals.get(&device.id).map_or(&[][..], Vec::as_slice);
            let Some(interval_s) = interval_of(arrivals, self.keepalive_s) else {
                continue;
            };
            let is_close = |known_s: i64| (interval_s - known_s).abs() <= known_s / 4;
            if !device.learned_s.is_some_and(is_close) {
                let _ = write!(cases, " WHEN {} THEN {interval_s}", device.id);
                changed.push(device.id);
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let sql = format!(
            "UPDATE presence SET learned_s = CASE device_id{cases} END WHERE device_id IN ({})",
            id_list(&changed)
        );
        connection.step(&sql, &[]).await.map(drop)
    }
}

impl Poll for PresenceWatch {
    const TASK: &'static str = "presence";
    const PACE: Pace = Pace {
        interval: Duration::from_secs(2),
        timeout: Duration::from_secs(60),
        share: 10,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => open(&self.store).await?,
        };
        let now_us = SystemClock::start().now().utc_us;
        let found = self.round(&mut connection, now_us).await?;
        self.connection = Some(connection);
        for state in Presence::ALL {
            let devices = found.devices.get(&state).copied().unwrap_or_default();
            self.metrics.set_devices(state.name(), devices);
        }
        self.metrics.twin_devices.set(found.twins);
        Ok(())
    }
}

async fn open(store: &StoreUrl) -> Result<Connection, QueryError> {
    let mut connection = Connection::open(store, Access::Write).await?;
    if !connection.is_sqlite() {
        // Compiling a query would take a hundred times longer than running it.
        connection.execute("SET jit = off", &[]).await?;
    }
    Ok(connection)
}

/// Returns the query for the arrivals of the last frames of the devices after `$1` up to `$2`, by device, in the
/// order of their numbers.
pub fn arrivals_sql() -> String {
    format!(
        "SELECT st.device_id, f.received_at
         FROM streams AS st CROSS JOIN frames AS f
         WHERE f.stream_id = st.id
             AND f.seq > CASE WHEN st.durable_seq > {FRAMES_LEARNED}
                 THEN st.durable_seq - {FRAMES_LEARNED} ELSE 0 END
             AND st.device_id > $1 AND st.device_id <= $2
             AND NOT EXISTS (
                 SELECT 1 FROM streams AS s WHERE s.device_id = st.device_id AND s.id > st.id
             )
         ORDER BY st.device_id, f.seq"
    )
}

/// Returns the median time between arrivals, at least the keepalive; `None` if the arrivals do not show it yet.
/// Frames that arrive within a keepalive of the first count as one arrival, because a device that sleeps sends several
/// at a time. So a device that sends at shorter intervals has less than twice the keepalive.
fn interval_of(arrivals_us: &[i64], keepalive_s: i64) -> Option<i64> {
    let keepalive_us = keepalive_s * SECOND_US;
    let mut firsts: Vec<i64> = Vec::new();
    for &arrival in arrivals_us {
        if firsts
            .last()
            .is_none_or(|first| arrival - first >= keepalive_us)
        {
            firsts.push(arrival);
        }
    }
    let mut spacings: Vec<i64> = firsts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    spacings.sort_unstable();
    let are_single = firsts.len() == arrivals_us.len();
    let median_s = spacings.get(spacings.len() / 2)? / SECOND_US;
    (are_single || spacings.len() >= SPACINGS_MIN).then_some(median_s)
}

/// Returns the devices after `after` up to `last` whose sessions were taken over repeatedly.
async fn twins(
    connection: &mut Connection,
    after: i64,
    last: i64,
    now_us: i64,
) -> Result<Vec<i64>, QueryError> {
    let code = Code::TakenOver as u8;
    let sql = format!(
        "SELECT d.id FROM devices AS d WHERE d.id > $1 AND d.id <= $2 AND (
             SELECT count(*) FROM (
                 SELECT 1 AS one FROM device_events AS e
                 WHERE e.device_id = d.id AND e.at > $3 AND e.kind = 'disconnected' AND e.code = {code}
                 LIMIT {TAKEN_OVER_MIN}
             ) AS ends
         ) >= {TAKEN_OVER_MIN}"
    );
    let since = Argument::Time(now_us - TAKEN_OVER_WITHIN_US);
    let rows = connection
        .rows(&sql, &[after.into(), last.into(), since])
        .await?;
    rows.iter().map(|row| row.integer(0)).collect()
}

/// Writes an event for each of these devices that still exists.
async fn note(
    connection: &mut Connection,
    devices: &[Row],
    kind: &str,
    detail: &str,
    now_us: i64,
) -> Result<(), QueryError> {
    let ids: Vec<i64> = { devices.iter() }
        .map(|row| row.integer(0))
        .collect::<Result<_, _>>()?;
    if ids.is_empty() {
        return Ok(());
    }
    let sql = format!(
        "INSERT INTO device_events (device_id, at, kind, code, detail)
         SELECT id, $1, CAST($2 AS TEXT), 0, CAST($3 AS TEXT) FROM devices WHERE id IN ({})",
        id_list(&ids)
    );
    let values = [Argument::Time(now_us), kind.into(), detail.into()];
    connection.execute(&sql, &values).await.map(drop)
}

/// Sets the expected interval of a device in an open transaction; `None` lets gateways learn it again. Returns whether
/// the device exists.
pub async fn set_interval(
    connection: &mut Connection,
    name: &str,
    interval_s: Option<i64>,
    now_us: i64,
) -> Result<bool, QueryError> {
    let sql = "INSERT INTO presence (device_id, set_s) SELECT id, nullif($2, 0) FROM devices WHERE name = $1
        ON CONFLICT (device_id) DO UPDATE SET set_s = excluded.set_s RETURNING device_id";
    let values = [name.into(), interval_s.unwrap_or(0).into()];
    let devices = connection.rows(sql, &values).await?;
    let detail = match interval_s {
        Some(interval_s) => format!("{interval_s} s"),
        None => "learned".to_owned(),
    };
    note(connection, &devices, "interval_set", &detail, now_us).await?;
    Ok(!devices.is_empty())
}

#[cfg(test)]
mod tests;
