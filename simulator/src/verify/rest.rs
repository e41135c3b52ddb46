//! Rows that belong to nothing: no walk from the devices down would come by them.

use fieldgate::store::reader::{Argument, ReadError, Reader, Row};

use super::Verdict;

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
