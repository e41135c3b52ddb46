//! Counts devices by presence, and reads pages of the table of devices.

use std::collections::HashMap;

use serde::Deserialize;

use super::presence::{Presence, TWIN_EVERY_US};
use super::row::id_list;
use super::{Argument, QueryError, Reconnecting, Row};
use crate::time::DAY_US;

/// Maximum number of a device's last frames that are read to find one with a quality of its time.
const FRAMES_SEARCHED: i64 = 16;

/// Devices by presence, and frames in quarantine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Number of devices for each state of [`Presence::ALL`].
    pub devices: [i64; Presence::ALL.len()],
    pub quarantined: i64,
}

/// A device that is being removed has a name that begins with '#'.
const NUMBERS: &str = "SELECT coalesce(p.state, 'never'), count(*)
    FROM devices AS d LEFT JOIN presence AS p ON p.device_id = d.id
    WHERE substr(d.name, 1, 1) <> '#' GROUP BY 1
    UNION ALL SELECT 'quarantined', count(*) FROM quarantine";

/// Counts the devices and the frames in quarantine.
pub async fn numbers(store: &mut Reconnecting) -> Result<Numbers, QueryError> {
    let mut numbers = Numbers::default();
    for row in store.rows(NUMBERS, &[]).await? {
        let name = row.text(0)?;
        let count = row.integer(1)?;
        match Presence::ALL.iter().position(|state| state.name() == name) {
            Some(state) => numbers.devices[state] = count,
            None if name == "quarantined" => numbers.quarantined = count,
            None => {}
        }
    }
    Ok(numbers)
}

/// Column by which devices are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    #[default]
    Name,
    /// The states that need attention first: silent, late, never, online, disabled.
    State,
    Seen,
    Missing,
}

/// Selects a page of devices.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Text that is part of the name, in upper or lower case; empty for all devices.
    pub text: String,
    pub state: Option<Presence>,
    pub order: Order,
    pub is_descending: bool,
    pub limit: i64,
    pub offset: i64,
    /// The present time, microseconds UTC.
    pub now_us: i64,
}

/// A device in the table. Times are microseconds UTC.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub id: i64,
    pub name: String,
    pub state: String,
    /// Time of the last login or frame, whichever is later.
    pub seen_at_us: Option<i64>,
    /// Number of lost frames that were reported today.
    pub missing_today: f64,
    /// How the time of the last frame was converted to UTC.
    pub quality: Option<&'static str>,
    pub firmware: Option<String>,
    /// Address, during a session.
    pub peer: Option<String>,
    /// Whether a second device used the name within the last hour.
    pub has_twin: bool,
}

const FROM: &str = "FROM devices AS d LEFT JOIN presence AS p ON p.device_id = d.id";
const WHERE: &str = "WHERE substr(d.name, 1, 1) <> '#'
    AND ($1 = '' OR replace(lower(d.name), lower($1), '') <> lower(d.name))
    AND ($2 = '' OR coalesce(p.state, 'never') = $2)";
const LAST_FRAME: &str =
    "(SELECT max((SELECT f.received_at FROM frames AS f WHERE f.stream_id = st.id
    ORDER BY f.seq DESC LIMIT 1)) FROM streams AS st WHERE st.device_id = d.id)";

/// Returns the number of devices that match, and a page of them.
pub async fn devices(
    store: &mut Reconnecting,
    wanted: &Selection,
) -> Result<(i64, Vec<Device>), QueryError> {
    let state = wanted.state.map_or("", Presence::name);
    let filter = [wanted.text.as_str().into(), state.into()];
    let rows = store
        .rows(&format!("SELECT count(*) {FROM} {WHERE}"), &filter)
        .await?;
    let total = rows.first().map_or(Ok(0), |row| row.integer(0))?;
    let mut arguments = filter.to_vec();
    arguments.push(wanted.limit.into());
    arguments.push(wanted.offset.into());
    let midnight = Argument::Time(wanted.now_us - wanted.now_us.rem_euclid(DAY_US));
    if wanted.order == Order::Missing {
        arguments.push(midnight);
    }
    let rows = store.rows(&ids_sql(wanted), &arguments).await?;
    let ids: Vec<i64> = rows
        .iter()
        .map(|row| row.integer(0))
        .collect::<Result<_, _>>()?;
    if ids.is_empty() {
        return Ok((total, Vec::new()));
    }
    let arguments = [midnight, FRAMES_SEARCHED.into()];
    let mut found = HashMap::new();
    for row in store.rows(&devices_sql(&ids), &arguments).await? {
        found.insert(row.integer(0)?, device(&row, wanted.now_us)?);
    }
    Ok((
        total,
        ids.iter().filter_map(|id| found.remove(id)).collect(),
    ))
}

fn ids_sql(wanted: &Selection) -> String {
    let direction = if wanted.is_descending { "DESC" } else { "ASC" };
    let (join, key) = match wanted.order {
        Order::Name => (String::new(), String::new()),
        Order::State => (
            String::new(),
            "CASE coalesce(p.state, 'never') WHEN 'silent' THEN 0 WHEN 'late' THEN 1 WHEN 'never' THEN 2
                WHEN 'online' THEN 3 ELSE 4 END"
                .to_owned(),
        ),
        Order::Seen => (
            String::new(),
            format!(
                "coalesce(CASE WHEN d.last_seen_at > {LAST_FRAME} THEN d.last_seen_at ELSE {LAST_FRAME} END,
                    d.last_seen_at)"
            ),
        ),
        Order::Missing => (
            "LEFT JOIN (SELECT st.device_id, sum(CAST(g.to_seq - g.from_seq + 1 AS double precision)) AS frames
                FROM gaps AS g JOIN streams AS st ON st.id = g.stream_id
                WHERE g.received_at >= $5 GROUP BY 1) AS lost ON lost.device_id = d.id"
                .to_owned(),
            "coalesce(lost.frames, 0)".to_owned(),
        ),
    };
    let order = match key.is_empty() {
        true => format!("d.name COLLATE \"C\" {direction}"),
        false => format!("{key} {direction} NULLS LAST, d.name COLLATE \"C\""),
    };
    format!("SELECT d.id {FROM} {join} {WHERE} ORDER BY {order} LIMIT $3 OFFSET $4")
}

fn devices_sql(ids: &[i64]) -> String {
    let ids = id_list(ids);
    format!(
        "SELECT d.id, d.name, coalesce(p.state, 'never'), d.last_seen_at, {LAST_FRAME},
            (SELECT sum(CAST(g.to_seq - g.from_seq + 1 AS double precision))
                FROM streams AS st JOIN gaps AS g ON g.stream_id = st.id
                WHERE st.device_id = d.id AND g.received_at >= $1),
            (SELECT l.quality FROM (SELECT f.seq, f.quality FROM frames AS f
                WHERE f.stream_id = (SELECT max(st.id) FROM streams AS st WHERE st.device_id = d.id)
                ORDER BY f.seq DESC LIMIT $2) AS l
                WHERE l.quality IS NOT NULL ORDER BY l.seq DESC LIMIT 1),
            d.firmware, (SELECT max(se.peer) FROM sessions AS se WHERE se.device_id = d.id), p.twin_at
        {FROM} WHERE d.id IN ({ids})"
    )
}

fn device(row: &Row, now_us: i64) -> Result<Device, QueryError> {
    let text = |column| Ok::<_, QueryError>(row.text_or_null(column)?.map(str::to_owned));
    let twin_at = row.integer_or_null(9)?;
    Ok(Device {
        id: row.integer(0)?,
        name: text(1)?.unwrap_or_default(),
        state: text(2)?.unwrap_or_default(),
        seen_at_us: row.integer_or_null(3)?.max(row.integer_or_null(4)?),
        missing_today: row.sample(5)?.unwrap_or(0.0),
        quality: row.quality(6)?,
        firmware: text(7)?,
        peer: text(8)?,
        has_twin: twin_at.is_some_and(|at| at > now_us.saturating_sub(TWIN_EVERY_US)),
    })
}

#[cfg(test)]
mod tests;
