//! Readings of a device over time: the extremes of each series in equal intervals.

use std::collections::HashMap;

use super::row::id_list;
use super::{Argument, QueryError, Reconnecting};

/// Number of intervals of a chart.
pub const INTERVALS: i64 = 288;
/// Only the first readings of an interval are read, up to this number.
pub const READINGS_MAX: i64 = 64;

/// A series of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Series {
    pub id: i64,
    pub channel: String,
    pub unit: String,
    pub kind: String,
}

/// Returns the series of a device in the order of their channels.
pub async fn series(
    store: &mut Reconnecting,
    device: i64,
    limit: i64,
    offset: i64,
) -> Result<Vec<Series>, QueryError> {
    let sql = "SELECT id, channel, unit, kind FROM series WHERE device_id = $1
        ORDER BY channel COLLATE \"C\", unit COLLATE \"C\", kind COLLATE \"C\" LIMIT $2 OFFSET $3";
    let rows = store
        .rows(sql, &[device.into(), limit.into(), offset.into()])
        .await?;
    let series = rows.iter().map(|row| {
        Ok(Series {
            id: row.integer(0)?,
            channel: row.text(1)?.to_owned(),
            unit: row.text(2)?.to_owned(),
            kind: row.text(3)?.to_owned(),
        })
    });
    series.collect()
}

/// An interval that has readings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// From 0 to [`INTERVALS`] - 1.
    pub index: i64,
    /// Smallest and largest value; `None` if all are missing ("sampled, no valid value").
    pub extremes: Option<(f64, f64)>,
    /// Whether it may have more readings than were read.
    pub is_cut: bool,
}

/// Returns the intervals of `width_us` from `begin_us` on that have readings, in their order, by series.
pub async fn intervals(
    store: &mut Reconnecting,
    series: &[i64],
    begin_us: i64,
    width_us: i64,
) -> Result<HashMap<i64, Vec<Interval>>, QueryError> {
    if series.is_empty() {
        return Ok(HashMap::new());
    }
    let list = id_list(series);
    let sql = match store.is_sqlite() {
        true => sqlite(&list),
        false => postgres(&list),
    };
    let arguments = [Argument::Time(begin_us), width_us.into()];
    let mut found: HashMap<i64, Vec<Interval>> = HashMap::new();
    for row in store.rows(&sql, &arguments).await? {
        let interval = Interval {
            index: row.integer(1)?,
            extremes: row.sample(3)?.zip(row.sample(4)?),
            is_cut: row.integer(2)? >= READINGS_MAX,
        };
        found.entry(row.integer(0)?).or_default().push(interval);
    }
    Ok(found)
}

/// For each interval, reads at most [`READINGS_MAX`] readings of `readings_sorted`, by index. Reads all of
/// `readings_unsorted`. The upper limit of the time is one expression, because SQLite uses the index for one limit only.
fn sqlite(series: &str) -> String {
    format!(
        "WITH RECURSIVE intervals (n, begin, until) AS (
            SELECT 0, $1, $1 + $2
            UNION ALL SELECT n + 1, until, until + $2 FROM intervals WHERE n < {INTERVALS} - 1
        )
        SELECT series_id, n, sum(readings), min(low), max(high) FROM (
            SELECT s.id AS series_id, i.n, count(*) AS readings, min(r.value) AS low, max(r.value) AS high
            FROM series AS s
            CROSS JOIN intervals AS i
            CROSS JOIN readings_sorted AS r ON r.series_id = s.id AND r.ts >= i.begin
                AND r.ts <= coalesce((
                    SELECT c.ts FROM readings_sorted AS c
                    WHERE c.series_id = s.id AND c.ts >= i.begin AND c.ts < i.until
                    ORDER BY c.ts LIMIT 1 OFFSET {READINGS_MAX} - 1
                ), i.until - 1)
            WHERE s.id IN ({series})
            GROUP BY 1, 2
            UNION ALL
            SELECT series_id, (ts - $1) / $2, count(*), min(value), max(value)
            FROM (
                SELECT u.series_id, u.ts + CAST(v.key AS INTEGER) AS ts, v.value
                FROM readings_unsorted AS u
                CROSS JOIN json_each(u.samples) AS v
                WHERE u.series_id IN ({series})
            )
            WHERE ts >= $1 AND ts < $1 + {INTERVALS} * $2
            GROUP BY 1, 2
        )
        GROUP BY 1, 2 ORDER BY 1, 2"
    )
}

fn postgres(series: &str) -> String {
    format!(
        "SELECT s.id, i.n, count(*), min(r.value), max(r.value)
        FROM series AS s
        CROSS JOIN generate_series(0::bigint, {INTERVALS} - 1) AS i (n)
        CROSS JOIN LATERAL (
            SELECT c.value FROM readings AS c
            WHERE c.series_id = s.id
                AND c.ts >= $1 + i.n * $2 * interval '1 microsecond'
                AND c.ts < $1 + (i.n + 1) * $2 * interval '1 microsecond'
            ORDER BY c.ts LIMIT {READINGS_MAX}
        ) AS r
        WHERE s.id IN ({series})
        GROUP BY 1, 2 ORDER BY 1, 2"
    )
}

#[cfg(test)]
mod tests;
