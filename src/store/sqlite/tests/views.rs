//! The views: their content, and that they read no more than they need.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::{Harness, OnDisk, frames, plan, run};
use crate::store::conformance::peer;
use crate::store::{Batch, Entry, Store};

const DAY_US: i64 = 86_400_000_000;
/// Time at which the suite's entries arrive: 2023-11-14T22:13:20Z.
const AT_US: i64 = 1_700_000_000_000_000;

async fn texts(conn: &mut SqliteConnection, sql: &str) -> Vec<Option<String>> {
    let rows = sqlx::query(AssertSqlSafe(sql))
        .fetch_all(conn)
        .await
        .unwrap();
    let cells = rows
        .iter()
        .flat_map(|row| (0..row.len()).map(|cell| row.get(cell)));
    cells.collect()
}

fn some(cells: &[&str]) -> Vec<Option<String>> {
    cells.iter().map(|cell| Some((*cell).to_owned())).collect()
}

async fn store_readings(h: &mut OnDisk, entries: Vec<Entry>) {
    h.store
        .commit(&Batch {
            entries,
            ..Batch::default()
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn plans_use_the_index_with_and_without_statistics() {
    let mut h = OnDisk::create().await;
    for n in 0..30 {
        let peer = peer(&mut h.store, &format!("d{n}")).await;
        h.store.commit(&frames(&peer, 1..20, 30)).await.unwrap();
    }
    // The planner may scan a table of one row.
    let hours = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 2000)
        INSERT INTO reading_hours SELECT x * 3600000000 FROM n";
    run(h.conn(), hours).await;
    let one = "SELECT * FROM telemetry WHERE device = 'd7' AND channel = 'temperature'
        AND ts BETWEEN 100 AND 200";
    let text = "SELECT device, ts_text, value FROM telemetry WHERE device = 'd7'
        AND ts >= unixepoch('1970-01-01 00:00:00') * 1000000";
    let all = "SELECT * FROM telemetry WHERE ts > unixepoch('now', '-5 minutes') * 1000000";
    let narrow = "SELECT device, ts, value FROM telemetry WHERE ts > 100";
    let hourly = "SELECT * FROM telemetry_hourly WHERE device = 'd7'";
    let hours = "SELECT * FROM telemetry_hourly WHERE hour >= 100 AND hour < 200";
    let day =
        "SELECT hour, mean FROM telemetry_hourly WHERE device = 'd7' AND channel = 'temperature'
        AND hour >= unixepoch('2026-11-01') * 1000000";
    let latest = "SELECT * FROM latest";
    let channels = "SELECT * FROM channels WHERE device = 'd7'";
    for analyzed in [false, true] {
        if analyzed {
            run(h.conn(), "ANALYZE").await;
        }
        let mut reader = super::open_reader(&h.path()).await.unwrap();
        for (sql, by_device, by_time) in [
            (one, true, true),
            (text, true, true),
            (all, false, true),
            (narrow, false, true),
            (hourly, true, true),
            (hours, false, true),
            (day, true, true),
            (latest, false, true),
            (channels, true, true),
        ] {
            let plan = plan(&mut reader, &format!("EXPLAIN QUERY PLAN {sql}")).await;
            // Level 0 is small, and a query may build a temporary index for it.
            let plan = plan.replace("SEARCH u USING AUTOMATIC", "");
            let plan = plan.replace("SEARCH n USING AUTOMATIC", "");
            for scanned in ["SCAN r\n", "SCAN s\n", "SCAN f\n", "SCAN c\n", "AUTOMATIC"] {
                assert!(!plan.contains(scanned), "{sql}\n{plan}");
            }
            assert_eq!(plan.contains("(name=?)"), by_device, "{sql}\n{plan}");
            if sql == hours || sql == day {
                let by_hour = "SEARCH h USING INTEGER PRIMARY KEY (rowid>?";
                assert!(plan.contains(by_hour), "{sql}\n{plan}");
                let whole = "SEARCH r USING PRIMARY KEY (series_id=?)\n";
                assert!(!plan.contains(whole), "{sql}\n{plan}");
            }
            let range = plan.contains("PRIMARY KEY (series_id=? AND ts");
            assert_eq!(range, by_time, "{sql}\n{plan}");
        }
        let plan = plan(&mut reader, &format!("EXPLAIN QUERY PLAN {narrow}")).await;
        assert!(
            !plan.contains(" f "),
            "frames are read unnecessarily\n{plan}"
        );
    }
}

#[tokio::test]
async fn telemetry_shows_time_as_text() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let rows = [
        (i64::MIN, 0.5),
        (-1, 1.5),
        (AT_US + 1, 2.5),
        (AT_US + 2, f64::NAN),
        (i64::MAX, 3.5),
    ];
    store_readings(&mut h, vec![peer.readings(1, &rows)]).await;
    let times = texts(h.conn(), "SELECT ts_text FROM telemetry ORDER BY ts").await;
    let mut expected = vec![None];
    expected.extend(some(&[
        "1969-12-31T23:59:59.999999Z",
        "2023-11-14T22:13:20.000001Z",
    ]));
    expected.extend(some(&["2023-11-14T22:13:20.000002Z"]));
    expected.push(None);
    assert_eq!(times, expected);
    let sql = format!(
        "SELECT device, channel, unit, CAST(value AS TEXT), received_at_text, quality FROM telemetry
        WHERE ts = {}",
        AT_US + 1
    );
    let row = texts(h.conn(), &sql).await;
    let expected = [
        "a",
        "temperature",
        "Cel",
        "2.5",
        "2023-11-14T22:13:20.000000Z",
        "anchored",
    ];
    assert_eq!(row, some(&expected));
}

#[tokio::test]
async fn latest_is_not_frozen_by_a_clock_in_the_future() {
    let mut h = OnDisk::create().await;
    let a = peer(&mut h.store, "a").await;
    let b = peer(&mut h.store, "b").await;
    let in_2094 = 124 * 365 * DAY_US;
    let entries = vec![
        a.readings(
            1,
            &[
                (AT_US - 5, 1.0),
                (AT_US + DAY_US, 2.0),
                (AT_US + DAY_US + 1, 3.0),
            ],
        ),
        a.readings(2, &[(AT_US + DAY_US, 2.5), (in_2094, 4.0)]),
        b.readings(1, &[(in_2094, 5.0)]),
    ];
    store_readings(&mut h, entries).await;
    let rows = texts(
        h.conn(),
        "SELECT device, CAST(value AS TEXT) FROM latest ORDER BY 1",
    )
    .await;
    assert_eq!(
        rows,
        [Some("a".into()), Some("2.5".into()), Some("b".into()), None]
    );
}

#[tokio::test]
async fn hours_count_valid_values() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let hour = 3_600_000_000;
    let rows = [
        (-1, 9.0),
        (0, 1.0),
        (1, f64::NAN),
        (hour - 1, 3.0),
        (hour, 7.0),
    ];
    store_readings(&mut h, vec![peer.readings(1, &rows)]).await;
    let sql = "SELECT hour_text, CAST(n AS TEXT), CAST(min AS TEXT), CAST(mean AS TEXT),
        CAST(max AS TEXT) FROM telemetry_hourly WHERE device = 'a' ORDER BY hour";
    let expected = [
        ["1969-12-31T23:00Z", "1", "9.0", "9.0", "9.0"],
        ["1970-01-01T00:00Z", "2", "1.0", "2.0", "3.0"],
        ["1970-01-01T01:00Z", "1", "7.0", "7.0", "7.0"],
    ];
    assert_eq!(texts(h.conn(), sql).await, some(&expected.concat()));
}

#[tokio::test]
async fn status_shows_missing_frames() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    super::peer(&mut h.store, "b").await;
    let entries = vec![
        peer.readings(1, &[(1, 1.0), (2, 2.0)]),
        peer.gap(2, 4),
        peer.gap(3, 9),
    ];
    store_readings(&mut h, entries).await;
    let sql = "SELECT device, state, CAST(frames AS TEXT), CAST(readings AS TEXT),
        CAST(missing AS TEXT), CAST(quarantined AS TEXT), last_frame_at_text FROM device_status";
    let mut expected = some(&[
        "a",
        "disconnected",
        "3",
        "2",
        "8",
        "0",
        "2023-11-14T22:13:20Z",
    ]);
    expected.extend(some(&["b", "disconnected", "0", "0", "0", "0"]));
    expected.push(None);
    assert_eq!(texts(h.conn(), sql).await, expected);
    let sql = "SELECT device, CAST(from_seq AS TEXT), CAST(to_seq AS TEXT), CAST(frames AS TEXT)
        FROM missing_frames ORDER BY from_seq";
    assert_eq!(
        texts(h.conn(), sql).await,
        some(&["a", "2", "4", "3", "a", "5", "9", "5"])
    );
    // A device can report more lost frames than a sum can hold.
    let entries = vec![peer.gap(10, crate::store::ledger::SEQ_MAX)];
    store_readings(&mut h, entries).await;
    assert_eq!(
        texts(h.conn(), "SELECT CAST(frames AS TEXT) FROM device_status")
            .await
            .len(),
        2
    );
}
