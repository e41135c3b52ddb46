//! Verification of rows without a parent, which a walk from the devices down does not reach.

use super::store::{ReadError, Store};
use super::{Run, Verdict};

/// Kinds of orphaned rows, with the queries that count them.
const ORPHANS: [(&str, &str); 10] = [
    (
        "streams without a device",
        "SELECT count(*) FROM streams AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "series without a device",
        "SELECT count(*) FROM series AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "schemas without a device",
        "SELECT count(*) FROM schemas AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "clocks without a device",
        "SELECT count(*) FROM clocks AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "events without a device",
        "SELECT count(*) FROM device_events AS t
         WHERE NOT EXISTS (SELECT 1 FROM devices AS d WHERE d.id = t.device_id)",
    ),
    (
        "frames without a stream",
        "SELECT count(*) FROM frames AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "gaps without a stream",
        "SELECT count(*) FROM gaps AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "quarantined frames without a stream",
        "SELECT count(*) FROM quarantine AS t
         WHERE NOT EXISTS (SELECT 1 FROM streams AS s WHERE s.id = t.stream_id)",
    ),
    (
        "quarantined frames whose device is not their stream's",
        "SELECT count(*) FROM quarantine AS t JOIN streams AS s ON s.id = t.stream_id
         WHERE s.device_id <> t.device_id",
    ),
    // Skips from one series to the next, so that a large table need not be read.
    (
        "readings whose series does not exist",
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

/// Recent readings in SQLite that are not compacted yet.
const RECENT: (&str, &str) = (
    "recent readings whose series does not exist",
    "SELECT count(DISTINCT series_id) FROM readings_recent AS t
     WHERE NOT EXISTS (SELECT 1 FROM series AS s WHERE s.id = t.series_id)",
);

/// Counts devices whose quarantine usage is not the sum of their frames.
const WRONG_USAGE: &str = "SELECT count(*) FROM (
         SELECT device_id FROM (
             SELECT device_id, bytes FROM quarantine_usage
             UNION ALL SELECT device_id, -length(bytes) FROM quarantine
         ) AS moves GROUP BY device_id HAVING sum(bytes) <> 0
     ) AS wrong";

/// A device may observe a clock step as smaller by up to this, because both clocks drift.
const SLACK_US: u64 = 100_000;

/// Finds rows without a device, stream or series.
pub(super) async fn look_for_orphans(
    store: &mut Store,
    verdict: &mut Verdict,
) -> Result<(), ReadError> {
    let is_sqlite = matches!(store, Store::Sqlite(_));
    let readings = match is_sqlite {
        true => "readings_sorted",
        false => "readings",
    };
    for (what, sql) in ORPHANS.iter().chain(is_sqlite.then_some(&RECENT)) {
        let sql = sql.replace("READINGS", readings);
        let found = store.row(&sql, &[]).await?.integer(0)?;
        if found > 0 {
            verdict.differ(|| format!("{found} {what}: stored but not sent"));
        }
    }
    Ok(())
}

/// Verifies that the recorded usage of quarantine is that of its frames.
pub(super) async fn prove_quarantine_usage(
    store: &mut Store,
    verdict: &mut Verdict,
) -> Result<(), ReadError> {
    let devices = store.row(WRONG_USAGE, &[]).await?.integer(0)?;
    if devices > 0 {
        verdict.differ(|| {
            format!("{devices} devices whose quarantine_usage is not the sum of their frames")
        });
    }
    Ok(())
}

/// Verifies that devices observed every step of the gateway's clock during the runs.
pub(super) async fn prove_clock_steps(
    store: &mut Store,
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
                format!("clock step of {step_us} us at {before_us} us that no device observed")
            });
        }
    }
    Ok(())
}
