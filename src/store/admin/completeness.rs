//! Completeness by device and day: how many of the numbers that a device assigned to its frames are in the ledger.
//!
//! A device numbers its frames consecutively, and in a stream the times of its data rise with the numbers. So the first
//! number of a day is found by a binary search in the ledger, and the frames of the day need not be counted.

use std::collections::{BTreeMap, BTreeSet};

use super::row::id_list;
use super::{Argument, QueryError, Reconnecting, Row};
use crate::time::DAY_US;

/// A frame that arrives later than this after the end of its day is late.
pub const LATE_AFTER_US: i64 = 3_600_000_000;
/// Maximum number of rows of the ledger that are read to find one with a time.
const ROWS_SEARCHED: i64 = 64;
/// Maximum number of searches in one query.
const PROBES_AT_ONCE: usize = 2000;

/// A day of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Day {
    /// Numbers that arrived, including frames in quarantine.
    pub received: i64,
    /// Those of them that arrived more than an hour after the end of the day.
    pub late: i64,
    /// Numbers that are lost: a gap covers them.
    pub missing: i64,
}

impl Day {
    fn add(&mut self, other: Day) {
        self.received = self.received.saturating_add(other.received);
        self.late = self.late.saturating_add(other.late);
        self.missing = self.missing.saturating_add(other.missing);
    }
}

/// Days of a device, in their order; `None` for a day without any number.
pub type Days = Vec<Option<Day>>;

/// A stream whose numbers are searched.
#[derive(Clone, Copy, Debug)]
struct Stream {
    id: i64,
    device: i64,
    /// First and last number in the ledger, including a gap.
    first: i64,
    last: i64,
}

/// Returns the `days` days from `begin_us` on, the start of a day in UTC, for each of `devices`.
pub async fn days(
    store: &mut Reconnecting,
    devices: &[i64],
    begin_us: i64,
    days: usize,
) -> Result<BTreeMap<i64, Days>, QueryError> {
    let mut found: BTreeMap<i64, Days> = { devices.iter() }
        .map(|device| (*device, vec![None; days]))
        .collect();
    let streams = streams(store, devices, begin_us).await?;
    let borders = borders(store, &streams, begin_us, days).await?;
    let gaps = gaps(store, &streams, &borders).await?;
    for (stream, borders) in streams.iter().zip(&borders) {
        let of_device = found
            .entry(stream.device)
            .or_insert_with(|| vec![None; days]);
        let none = Vec::new();
        let gaps = gaps.get(&stream.id).unwrap_or(&none);
        for (index, day) in of_device.iter_mut().enumerate() {
            let range = (borders.first[index], borders.first[index + 1] - 1);
            if range.0 > range.1 {
                continue;
            }
            let missing = lost(gaps, range);
            let arrived = |range: (i64, i64)| (range.1 - range.0 + 1 - lost(gaps, range)).max(0);
            let late = (borders.late[index].max(range.0), range.1);
            day.get_or_insert_default().add(Day {
                received: arrived(range),
                late: if late.0 <= late.1 { arrived(late) } else { 0 },
                missing,
            });
        }
    }
    Ok(found)
}

/// Returns the devices' streams whose last frame was received at or after `begin_us`.
async fn streams(
    store: &mut Reconnecting,
    devices: &[i64],
    begin_us: i64,
) -> Result<Vec<Stream>, QueryError> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT s.id, s.device_id,
            (SELECT coalesce(g.from_seq, f.seq) FROM frames AS f
                LEFT JOIN gaps AS g ON g.stream_id = f.stream_id AND g.to_seq = f.seq
                WHERE f.stream_id = s.id ORDER BY f.seq LIMIT 1),
            (SELECT f.seq FROM frames AS f WHERE f.stream_id = s.id ORDER BY f.seq DESC LIMIT 1)
        FROM streams AS s
        WHERE s.device_id IN ({}) AND (SELECT f.received_at FROM frames AS f WHERE f.stream_id = s.id
            ORDER BY f.seq DESC LIMIT 1) >= $1
        ORDER BY s.id",
        id_list(devices)
    );
    let rows = store.rows(&sql, &[Argument::Time(begin_us)]).await?;
    let stream = |row: &Row| {
        Ok(Stream {
            id: row.integer(0)?,
            device: row.integer(1)?,
            first: row.integer(2)?,
            last: row.integer(3)?,
        })
    };
    rows.iter().map(stream).collect()
}

/// First numbers of the days of a stream.
#[derive(Debug)]
struct Borders {
    /// First number of each day by the time of its data, and of the day after the last one.
    first: Vec<i64>,
    /// For each day, the first number that arrived too late for it.
    late: Vec<i64>,
}

/// A binary search for the first number whose time is at least `at_us`.
#[derive(Clone, Copy, Debug)]
struct Search {
    stream: i64,
    at_us: i64,
    is_by_arrival: bool,
    /// The number is greater than `below`, and at most `up_to`.
    below: i64,
    up_to: i64,
}

impl Search {
    fn middle(&self) -> i64 {
        self.below + (self.up_to - self.below) / 2
    }

    fn is_done(&self) -> bool {
        self.up_to - self.below <= 1
    }
}

async fn borders(
    store: &mut Reconnecting,
    streams: &[Stream],
    begin_us: i64,
    days: usize,
) -> Result<Vec<Borders>, QueryError> {
    let day_us = |index: usize| begin_us + DAY_US * index as i64;
    let mut searches = Vec::new();
    for stream in streams {
        let search = |at_us, is_by_arrival| Search {
            stream: stream.id,
            at_us,
            is_by_arrival,
            below: stream.first - 1,
            up_to: stream.last + 1,
        };
        searches.extend((0..=days).map(|index| search(day_us(index), false)));
        searches.extend((0..days).map(|index| search(day_us(index + 1) + LATE_AFTER_US, true)));
    }
    search_all(store, &mut searches).await?;
    let of_stream = |searches: &[Search]| {
        let mut numbers = searches.iter().map(|search| search.up_to);
        let first: Vec<i64> = numbers.by_ref().take(days + 1).collect();
        Borders {
            // The clock of a device may jump back: a day does not begin before the one before it.
            first: rising(&first),
            late: numbers.collect(),
        }
    };
    Ok(searches.chunks(2 * days + 1).map(of_stream).collect())
}

fn rising(numbers: &[i64]) -> Vec<i64> {
    let mut highest = i64::MIN;
    let rise = |number: &i64| {
        highest = highest.max(*number);
        highest
    };
    numbers.iter().map(rise).collect()
}

/// Runs all searches, a step of each in one query.
async fn search_all(store: &mut Reconnecting, searches: &mut [Search]) -> Result<(), QueryError> {
    for some in searches.chunks_mut(PROBES_AT_ONCE) {
        while some.iter().any(|search| !search.is_done()) {
            step(store, some).await?;
        }
    }
    Ok(())
}

async fn step(store: &mut Reconnecting, searches: &mut [Search]) -> Result<(), QueryError> {
    let mut open: BTreeSet<usize> = (0..searches.len()).collect();
    open.retain(|index| !searches[*index].is_done());
    let probe = |index: &usize| {
        let search = &searches[*index];
        format!("({index}, {}, {})", search.stream, search.middle())
    };
    let probes: Vec<String> = open.iter().map(probe).collect();
    for row in store.rows(&probe_sql(&probes.join(", ")), &[]).await? {
        let index = usize::try_from(row.integer(0)?).unwrap_or(usize::MAX);
        let Some(search) = searches.get_mut(index) else {
            continue;
        };
        open.remove(&index);
        let number = row.integer(1)?;
        let arrived_us = row.integer(2)?;
        let data_us = row.integer_or_null(3)?.unwrap_or(arrived_us);
        let time_us = match search.is_by_arrival {
            true => arrived_us,
            false => data_us,
        };
        if time_us < search.at_us {
            // No row has a number between the middle and this one, unless it was stored since.
            search.below = number.min(search.up_to - 1);
        } else {
            search.up_to = search.middle();
        }
    }
    for index in open {
        // The rows from here on were deleted since the search began.
        searches[index].up_to = searches[index].middle();
    }
    Ok(())
}

/// Returns the query of probes `(index, stream, number)`. Its rows have, for each probe, the first number in the ledger
/// from this number on, its time of arrival, and the time of the data of the first row from there that has one.
///
/// A time that is not plausible (`suspect`) is not used; the arrival is.
fn probe_sql(probes: &str) -> String {
    format!(
        "WITH probe (n, stream_id, seq) AS (VALUES {probes})
        SELECT p.n, f.seq, f.received_at, (
            SELECT CASE t.quality WHEN 3 THEN t.received_at ELSE t.last_ts END
            FROM (SELECT c.seq, c.quality, c.received_at, c.last_ts FROM frames AS c
                WHERE c.stream_id = p.stream_id AND c.seq >= p.seq ORDER BY c.seq LIMIT {ROWS_SEARCHED}) AS t
            WHERE t.last_ts IS NOT NULL ORDER BY t.seq LIMIT 1)
        FROM probe AS p
        JOIN frames AS f ON f.stream_id = p.stream_id AND f.seq = (
            SELECT c.seq FROM frames AS c
            WHERE c.stream_id = p.stream_id AND c.seq >= p.seq ORDER BY c.seq LIMIT 1)"
    )
}

/// Returns the gaps of each stream from its first border on, as first and last number, in their order.
async fn gaps(
    store: &mut Reconnecting,
    streams: &[Stream],
    borders: &[Borders],
) -> Result<BTreeMap<i64, Vec<(i64, i64)>>, QueryError> {
    let mut gaps: BTreeMap<i64, Vec<(i64, i64)>> = BTreeMap::new();
    if streams.is_empty() {
        return Ok(gaps);
    }
    let first = streams.iter().zip(borders).map(|(stream, borders)| {
        let first = borders.first.first().copied().unwrap_or(0);
        format!("({}, {first})", stream.id)
    });
    let first: Vec<String> = first.collect();
    let sql = format!(
        "WITH first (stream_id, seq) AS (VALUES {})
        SELECT g.stream_id, g.from_seq, g.to_seq FROM first JOIN gaps AS g ON g.stream_id = first.stream_id
        WHERE g.to_seq >= first.seq ORDER BY g.stream_id, g.from_seq",
        first.join(", ")
    );
    for row in store.rows(&sql, &[]).await? {
        let gap = (row.integer(1)?, row.integer(2)?);
        gaps.entry(row.integer(0)?).or_default().push(gap);
    }
    Ok(gaps)
}

/// Returns how many numbers of `range` are in `gaps`.
fn lost(gaps: &[(i64, i64)], range: (i64, i64)) -> i64 {
    let within = gaps.iter().map(|gap| {
        let (from, to) = (gap.0.max(range.0), gap.1.min(range.1));
        if from <= to { to - from + 1 } else { 0 }
    });
    within.fold(0, i64::saturating_add)
}

#[cfg(test)]
mod tests;
