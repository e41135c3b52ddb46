//! Keeps the newest plausible reading of each series in a separate table. Without it, `latest` would search
//! every partition for each series.
//!
//! A commit with few series writes their rows directly. For many series, the rows of several commits are written
//! together once a second, which costs little and delays `latest` by a second or two. Rows that remain when no more
//! readings arrive are written by the commit of an empty batch a second later.
//!
//! Invariants
//! - A row names a stored reading: readings of a failed commit are left out.
//! - After a start, a gateway rebuilds, from `readings`, the rows that a killed gateway did not write, at 100 series
//!   per second.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::link::Link;
use super::timestamp::Timestamp;
use crate::store::rows::{Frame, Run};
use crate::store::{Content, Readings};

/// Maximum number of rows per second that a writer writes directly in the commits of their readings.
const ROWS_AT_ONCE: usize = 1000;
/// Interval between the writes of all other rows.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time, in microseconds, by which a plausible reading is ahead of its receipt.
const AHEAD_MAX_US: i64 = 86_400_000_000;
/// Number of series that one commit looks up in `readings`.
const CHECKED_AT_ONCE: i64 = 100;
/// Time between two such lookups.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum duration of such a lookup, in milliseconds. If it takes longer, the rows of its series stay outdated
/// until their next readings.
const CHECK_TIMEOUT_MS: u32 = 5000;

/// Rows that a writer has not written yet.
#[derive(Debug)]
pub(super) struct Newest {
    pending: BTreeMap<i64, Row>,
    pub(super) flushed_at: Instant,
    /// Rows that may still be written directly, as of `flushed_at`.
    pub(super) at_once: usize,
    /// Last series looked up after the start; `None` when all were.
    checked: Option<i64>,
    checked_at: Instant,
    /// Whether to write with each commit. A spool commits many frames at a time, and commits nothing when it is
    /// empty.
    is_prompt: bool,
}

/// Time of a series' first reading, and its newest plausible one if any.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    first_us: i64,
    newest: Option<Reading>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    ts_us: i64,
    frame: i64,
    value: Option<f64>,
}

impl Newest {
    /// Creates the state of a writer. `checks` is whether to look for rows that an earlier gateway did not
    /// write, `is_prompt` whether to write with each commit.
    pub(super) fn new(checks: bool, is_prompt: bool) -> Self {
        Self {
            pending: BTreeMap::new(),
            flushed_at: Instant::now(),
            at_once: ROWS_AT_ONCE,
            checked: checks.then_some(0),
            checked_at: Instant::now(),
            is_prompt,
        }
    }

    /// See [`crate::store::Store::tidy_after`].
    pub(super) fn tidy_after(&self) -> Option<Duration> {
        let is_tidy = self.pending.is_empty() && (self.checked.is_none() || self.is_prompt);
        (!is_tidy).then_some(FLUSH_INTERVAL)
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes the readings of frames that are about to be committed.
    pub(super) fn take(&mut self, frames: &[Frame<'_>]) {
        for frame in frames {
            if let Content::Readings(readings) = &frame.item.entry.content {
                self.take_readings(frame.id, frame.item.entry.received_at_us, readings);
            }
        }
    }

    fn take_readings(&mut self, frame: i64, received_at_us: i64, readings: &Readings) {
        let times_us = &readings.times_us;
        let Some(first_us) = times_us.iter().min() else {
            return;
        };
        let latest_us = received_at_us.saturating_add(AHEAD_MAX_US);
        let plausible = times_us
            .iter()
            .enumerate()
            .filter(|(_, us)| **us <= latest_us);
        let newest_at = plausible.max_by_key(|(_, us)| **us).map(|(at, _)| at);
        for run in Run::of(frame, readings) {
            let newest = newest_at.map(|at| Reading {
                ts_us: times_us[at],
                frame,
                value: Some(run.values[at]).filter(|value| !value.is_nan()),
            });
            let row = Row {
                first_us: *first_us,
                newest,
            };
            let known = self.pending.entry(run.series).or_insert(row);
            known.first_us = known.first_us.min(*first_us);
            let age = |reading: &Reading| (reading.ts_us, reading.frame);
            if known.newest.as_ref().map(age) < newest.as_ref().map(age) {
                known.newest = newest;
            }
        }
    }

    /// Writes the rows that are due, within a transaction. Returns whether to call [`Newest::flushed`] after
    /// COMMIT.
    pub(super) async fn flush(
        &self,
        conn: &mut Link,
        is_idle: bool,
        now: Instant,
    ) -> Result<bool, sqlx::Error> {
        let is_due = is_idle
            || self.is_prompt
            || self.pending.len() <= self.at_once(now)
            || now.saturating_duration_since(self.flushed_at) >= FLUSH_INTERVAL;
        if !is_due || self.pending.is_empty() {
            return Ok(false);
        }
        upsert(conn, &self.pending).await?;
        Ok(true)
    }

    /// Records, after COMMIT, that the flushed rows are written.
    pub(super) fn flushed(&mut self, now: Instant) {
        self.at_once = self.at_once(now).saturating_sub(self.pending.len());
        self.flushed_at = now;
        self.pending.clear();
    }

    fn at_once(&self, now: Instant) -> usize {
        let waited_ms = now.saturating_duration_since(self.flushed_at).as_millis();
        let regained =
            ROWS_AT_ONCE.saturating_mul(usize::try_from(waited_ms).unwrap_or(usize::MAX));
        ROWS_AT_ONCE.min(self.at_once + regained / 1000)
    }

    /// Looks up some series for rows that an earlier gateway did not write, once a second or when the store is idle;
    /// call it after COMMIT. Only the freshness of these rows depends on it, so an error ends it.
    pub(super) async fn check(
        &mut self,
        conn: &mut Link,
        is_idle: bool,
        now: Instant,
    ) -> Result<(), sqlx::Error> {
        let is_time = is_idle
            || self.is_prompt
            || now.saturating_duration_since(self.checked_at) >= CHECK_INTERVAL;
        let Some(checked) = self.checked.take_if(|_| is_time) else {
            return Ok(());
        };
        self.checked_at = now;
        super::run(
            conn,
            format!("BEGIN; SET LOCAL statement_timeout = {CHECK_TIMEOUT_MS}"),
        )
        .await?;
        match check(conn, checked).await {
            Ok(last) => {
                super::run(conn, "COMMIT").await?;
                self.checked = last;
            }
            Err(error) if error.as_database_error().is_some() => {
                super::run(conn, "ROLLBACK").await?;
                let reason = super::errors::reason(&error);
                tracing::warn!(reason, "could not rebuild newest readings after startup");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Writes the changes caused by the readings of `runs`, which arrived in one frame.
pub(in crate::store) async fn insert_newest(
    conn: &mut Link,
    frame: i64,
    received_at_us: i64,
    readings: &Readings,
) -> Result<(), sqlx::Error> {
    let mut newest = Newest::new(false, false);
    newest.take_readings(frame, received_at_us, readings);
    upsert(conn, &newest.pending).await
}

/// Rows are written in series order, so that two writers cannot deadlock. A time in the future was recorded
/// while a gateway's clock was wrong.
const IS_NEWER: &str = "(newest.ts IS NULL OR newest.ts > now() + interval '1 day'
    OR (excluded.ts, excluded.frame_id) > (newest.ts, newest.frame_id))";

fn on_conflict() -> String {
    let newer = |column: &str| {
        format!("{column} = CASE WHEN {IS_NEWER} THEN excluded.{column} ELSE newest.{column} END")
    };
    format!(
        "ON CONFLICT (series_id) DO UPDATE SET first_ts = least(newest.first_ts, excluded.first_ts), {}, {}, {}
         WHERE excluded.first_ts < newest.first_ts OR {IS_NEWER}",
        newer("ts"),
        newer("frame_id"),
        newer("value")
    )
}

async fn upsert(conn: &mut Link, rows: &BTreeMap<i64, Row>) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let newest = || rows.values().map(|row| row.newest);
    let sql = format!(
        "INSERT INTO newest (series_id, first_ts, ts, frame_id, value)
         SELECT new.* FROM unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[], $4::bigint[],
             $5::double precision[]) AS new (series_id, first_ts, ts, frame_id, value)
         WHERE new.frame_id IS NULL OR EXISTS (SELECT FROM frames AS f WHERE f.id = new.frame_id)
         ORDER BY new.series_id {}",
        on_conflict()
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(rows.keys().copied().collect::<Vec<i64>>())
        .bind(
            rows.values()
                .map(|row| Timestamp(row.first_us))
                .collect::<Vec<_>>(),
        )
        .bind(
            newest()
                .map(|newest| newest.map(|newest| Timestamp(newest.ts_us)))
                .collect::<Vec<_>>(),
        )
        .bind(
            newest()
                .map(|newest| newest.map(|newest| newest.frame))
                .collect::<Vec<_>>(),
        )
        .bind(
            newest()
                .map(|newest| newest.and_then(|newest| newest.value))
                .collect::<Vec<_>>(),
        )
        .execute(conn)
        .await
        .map(drop)
}

/// Returns the last series that was looked up, or `None` if there are no more.
async fn check(conn: &mut Link, checked: i64) -> Result<Option<i64>, sqlx::Error> {
    let last: Option<i64> = sqlx::query_scalar(
        "SELECT max(id) FROM (SELECT id FROM series WHERE id > $1 ORDER BY id LIMIT $2) AS next",
    )
    .bind(checked)
    .bind(CHECKED_AT_ONCE)
    .fetch_one(&mut *conn)
    .await?;
    let Some(last) = last else {
        return Ok(None);
    };
    let sql = format!(
        "INSERT INTO newest (series_id, first_ts, ts, frame_id, value)
         SELECT s.id, least(o.ts, n.first_ts), r.ts, r.frame_id, r.value
         FROM series AS s
         LEFT JOIN newest AS n ON n.series_id = s.id
         LEFT JOIN LATERAL (
             SELECT c.ts FROM readings AS c
             WHERE c.series_id = s.id AND c.ts < coalesce(n.first_ts, 'infinity')
             ORDER BY c.ts LIMIT 1
         ) AS o ON true
         LEFT JOIN LATERAL (
             SELECT c.ts, c.frame_id, c.value
             FROM readings AS c
             JOIN frames AS f ON f.id = c.frame_id
             WHERE c.series_id = s.id
                 AND c.ts >= coalesce(n.ts, '-infinity')
                 AND c.ts <= now() + interval '1 day'
                 AND c.ts <= f.received_at + interval '1 day'
             ORDER BY c.ts DESC, c.frame_id DESC
             LIMIT 1
         ) AS r ON true
         WHERE s.id > $1 AND s.id <= $2 AND least(o.ts, n.first_ts) IS NOT NULL
         ORDER BY s.id {}",
        on_conflict()
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(checked)
        .bind(last)
        .execute(conn)
        .await?;
    Ok(Some(last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SeriesId;
    use crate::time::{Quality, ResolvedTime};

    fn readings(times_us: &[i64], values: &[f64]) -> Readings {
        Readings {
            time: ResolvedTime {
                offset_us: 0,
                quality: Quality::Utc,
            },
            times_us: times_us.to_vec(),
            series: vec![SeriesId(7)],
            values: values.to_vec(),
            too_old: 0,
        }
    }

    #[test]
    fn the_newest_plausible_reading_is_kept_and_the_first_of_all() {
        let mut newest = Newest::new(false, false);
        newest.take_readings(
            3,
            50,
            &readings(&[10, 30, AHEAD_MAX_US + 51], &[1.0, 3.0, 9.0]),
        );
        newest.take_readings(4, 50, &readings(&[5, 20], &[0.5, 2.0]));
        let row = newest.pending[&7];
        let reading = |frame, value| Reading {
            ts_us: 30,
            frame,
            value,
        };
        assert_eq!((row.first_us, row.newest), (5, Some(reading(3, Some(3.0)))));
        // Of two readings with the same time, the later arrival counts.
        newest.take_readings(5, 50, &readings(&[30], &[f64::NAN]));
        assert_eq!(newest.pending[&7].newest, Some(reading(5, None)));
        newest.pending.clear();
        newest.take_readings(6, 50, &readings(&[AHEAD_MAX_US + 51], &[1.0]));
        assert_eq!(newest.pending[&7].newest, None);
    }

    #[test]
    fn immediate_writes_are_bounded() {
        let mut newest = Newest::new(false, false);
        let start = newest.flushed_at;
        let row = Row {
            first_us: 0,
            newest: None,
        };
        newest.pending = (0..600).map(|series| (series, row)).collect();
        newest.flushed(start);
        assert_eq!(newest.at_once(start), 400);
        assert_eq!(newest.at_once(start + Duration::from_millis(100)), 500);
        assert_eq!(newest.at_once(start + Duration::from_secs(9)), ROWS_AT_ONCE);
    }
}
