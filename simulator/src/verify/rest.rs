//! Rows that belong to nothing: no walk from the devices down would come by them.

use fieldgate::store::reader::{Argument, ReadError, Reader, Row};

use super::{Run, Verdict};

/// What belongs to nothing, and how many there are of it.
const ORPHANS: [(&str, &str); 10] = [
    (
        "streams of no device",
        "SELECT count(*) FROM streams AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "series of no device",
        "SELECT count(*) FROM series AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "schemas of no device",
        "SELECT count(*) FROM schemas AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "clocks of no device",
        "SELECT count(*) FROM clocks AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "events of no device",
        "SELECT count(*) FROM device_events AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "frames of no stream",
        "SELECT count(*) FROM frames AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "gaps of no stream",
        "SELECT count(*) FROM gaps AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "frames in quarantine of no stream",
        "SELECT count(*) FROM quarantine AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "frames in quarantine under another device than their stream's",
        "SELECT count(*) FROM quarantine AS t JOIN streams AS s ON s.id = t.stream_id
         WHERE s.device_id <> t.device_id",
    ),
    // From each series to the next: a large table need not be read for it.
    (
        "series of readings that are no series",
        "WITH RECURSIVE ids (id) AS (
             SELECT min(series_id) FROM READINGS
             UNION ALL
             SELECT (SELECT min(r.series_id) FROM READINGS AS r WHERE r.series_id > ids.id)
             FROM ids WHERE ids.id IS NOT NULL
         )
         SELECT count(*) FROM ids
         WHERE id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM series AS s WHERE s.id = ids.id)",
    ),
];

/// Readings that came last, in SQLite, and are not sorted in yet.
const RECENT: (&str, &str) = (
    "series of recent readings that are no series",
    "SELECT count(DISTINCT series_id) FROM readings_recent AS t
     WHERE NOT EXISTS (SELECT 1 FROM series AS s WHERE s.id = t.series_id)",
);

/// How much less than a step of the clock devices may have seen of it: both clocks drift.
const SLACK_US: u64 = 100_000;

/// Finds what belongs to no device, stream or series.
pub(super) async fn look_for_orphans(
    store: &mut Reader,
    verdict: &mut Verdict,
) -> Result<(), ReadError> {
    let is_sqlite = matches!(store, Reader::Sqlite(_));
    let readings = match is_sqlite {
        true => "readings_sorted",
        false => "readings",
    };
    for (what, sql) in ORPHANS.iter().chain(is_sqlite.then_some(&RECENT)) {
        let sql = sql.replace("READINGS", readings);
        let found = only_row(store, &sql, &[]).await?.integer(0)?;
        if found > 0 {
            verdict.differ(|| format!("{found} {what}: stored and not sent"));
        }
    }
    Ok(())
}

/// Steps of the gateway's clock during the runs are ones that devices saw.
pub(super) async fn prove_clock_steps(
    store: &mut Reader,
    runs: &[Run],
    verdict: &mut Verdict,
) -> Result<(), ReadError> {
    let spans: Vec<(i64, i64)> = runs.iter().filter_map(Run::span_us).collect();
    let clocks = runs.iter().filter_map(|run| run.ledger.clock_us);
    let seen_us = clocks.map(|(least_us, most_us)| most_us - least_us).max();
    let sql = "SELECT before_at, after_at, step_us FROM clock_steps ORDER BY id";
    for row in store.rows(sql, &[]).await? {
        let (before_us, after_us) = (row.integer(0)?, row.integer(1)?);
        let step_us = row.integer(2)?;
        let is_meanwhile = |span: &(i64, i64)| {
            [before_us, after_us]
                .iter()
                .any(|at_us| (span.0..=span.1).contains(at_us))
        };
        let is_seen = seen_us
            .is_some_and(|seen_us| step_us.unsigned_abs() <= seen_us.unsigned_abs() + SLACK_US);
        if spans.iter().any(is_meanwhile) && !is_seen {
            verdict.differ(|| {
                format!("the clock set by {step_us} us at {before_us} us: no device saw that")
            });
        }
    }
    Ok(())
}

/// The one row of a query, however long that takes: a large store is counted for minutes.
pub(super) async fn only_row(
    store: &mut Reader,
    sql: &str,
    arguments: &[Argument<'_>],
) -> Result<Row, ReadError> {
    let mut found = None;
    let on_row = |row| {
        found = Some(row);
        Ok(())
    };
    store.each(sql, arguments, on_row).await?;
    Ok(found.expect("an aggregate gives a row"))
}
