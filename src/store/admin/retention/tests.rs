use std::sync::Arc;

use super::*;
use crate::config::store_url::StoreUrl;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::store::admin::{Access, Poll};
use crate::store::postgres::PostgresStore;
use crate::store::postgres::tests::Database;
use crate::store::sqlite::{SqliteSettings, SqliteStore};
use crate::time::SystemClock;

const NOW_US: i64 = 1_700_000_000_000_000;

fn settings(rule: &str) -> RetentionSettings {
    RetentionSettings {
        readings_days: Some(90),
        retention_rule: vec![rule.parse().unwrap()],
        frames_days: Some(100),
        quarantine_days: Some(50),
        reported_events_days: Some(60),
    }
}

async fn run(connection: &mut Connection, sql: &str, days_ago: i64) {
    let at = Argument::Time(NOW_US - days_ago * DAY_US);
    connection.execute(sql, &[at]).await.unwrap();
}

/// Fills a store: `pump` sent a frame with a temperature and a vibration every ten days from 120 days ago, `fan`
/// sent two temperatures 200 and 190 days ago, and none since.
async fn fill(connection: &mut Connection) {
    let is_sqlite = connection.is_sqlite();
    for sql in [
        "INSERT INTO devices (name, first_seen_at) VALUES ('pump', $1), ('fan', $1)",
        "INSERT INTO streams (device_id, stream, durable_seq, created_at) VALUES (1, 1, 13, $1), (2, 1, 2, $1)",
    ] {
        run(connection, sql, 300).await;
    }
    for series in [
        "1, 'temperature', 'Cel', 'f64'",
        "1, 'vibration', 'mm/s', 'f64'",
        "2, 'temperature', 'Cel', 'f64'",
    ] {
        let sql = format!(
            "INSERT INTO series (device_id, channel, unit, kind) SELECT {series} WHERE $1 IS NOT NULL"
        );
        run(connection, &sql, 0).await;
    }
    let readings = if is_sqlite {
        "readings_sorted"
    } else {
        "readings"
    };
    let pump = (1..)
        .zip((0..=120).rev().step_by(10))
        .map(|(seq, days)| (1, seq, days));
    for (id, (stream, seq, days)) in (1..).zip([(2, 1, 200), (2, 2, 190)].into_iter().chain(pump)) {
        let frame = format!(
            "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, quality, first_ts, last_ts)
             VALUES ({id}, {stream}, {seq}, 17, $1, 2, 0, $1, $1)"
        );
        run(connection, &frame, days).await;
        let series = if stream == 1 { &[1, 2][..] } else { &[3] };
        for series in series {
            let sql = format!(
                "INSERT INTO {readings} (series_id, ts, frame_id, value) VALUES ({series}, $1, {id}, 1.5)"
            );
            run(connection, &sql, days).await;
            if !is_sqlite {
                let sql = format!(
                    "INSERT INTO newest (series_id, first_ts, ts, frame_id, value) VALUES ({series}, $1, $1, {id}, 1.5)
                     ON CONFLICT (series_id) DO UPDATE SET ts = excluded.ts, frame_id = excluded.frame_id"
                );
                run(connection, &sql, days).await;
            }
        }
    }
    for days in [70, 60, 40] {
        let gap = format!("INSERT INTO gaps VALUES (1, {days}, {days}, 0, $1)");
        run(connection, &gap, days + 50).await;
        let sql = format!(
            "INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
             SELECT 1, 1, {days}, $1, '', 30, '', bytes FROM (SELECT {} AS bytes) AS b",
            if is_sqlite { "x'00'" } else { "'\\x00'::bytea" }
        );
        run(connection, &sql, days).await;
        for kind in ["event", "disabled", "connected"] {
            let sql = format!(
                "INSERT INTO device_events (device_id, at, kind, code, detail) VALUES (1, $1, '{kind}', 0, '')"
            );
            run(connection, &sql, days + 1).await;
        }
    }
}

/// Returns the ages in days of the rows that `sql` returns.
async fn ages(connection: &mut Connection, sql: &str) -> Vec<i64> {
    let rows = connection.rows(sql, &[]).await.unwrap();
    let age = |row: &Row| (NOW_US - row.integer(0).unwrap()) / DAY_US;
    rows.iter().map(age).collect()
}

async fn what_is_too_old_is_deleted(mut connection: Connection) {
    let is_sqlite = connection.is_sqlite();
    fill(&mut connection).await;
    let settings = settings("channel=vib*,days=30");
    let counted = round(&mut connection, &settings, NOW_US, Action::Count)
        .await
        .unwrap();
    let deleted = round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    assert_eq!(counted, deleted);
    // In Postgres the newest reading is in the table `newest` as well, and its partition is not kept for it.
    let of_fan = if is_sqlite { 1 } else { 2 };
    let expected = Deleted {
        readings: 3 + 9 + of_fan,
        partitions: 0,
        frames: 2 + 1,
        gaps: 2,
        quarantined: 2,
        events: 4,
    };
    assert_eq!(deleted, expected);
    let of_series =
        |series| format!("SELECT ts FROM readings WHERE series_id = {series} ORDER BY ts");
    let temperatures = ages(&mut connection, &of_series(1)).await;
    assert_eq!(temperatures, [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]);
    assert_eq!(ages(&mut connection, &of_series(2)).await, [30, 20, 10, 0]);
    let frames = "SELECT received_at FROM frames WHERE stream_id = $STREAM ORDER BY id";
    let of_pump = ages(&mut connection, &frames.replace("$STREAM", "1")).await;
    assert_eq!(of_pump, [100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 0]);
    assert_eq!(
        ages(&mut connection, &frames.replace("$STREAM", "2")).await,
        [190]
    );
    let latest = "SELECT ts FROM latest ORDER BY device, channel";
    assert_eq!(ages(&mut connection, latest).await, [190, 0, 0]);
    let of_session = "SELECT at FROM device_events WHERE kind = 'connected' ORDER BY at";
    assert_eq!(ages(&mut connection, of_session).await, [71, 61, 41]);
    let again = round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    assert_eq!(again, Deleted::default());
}

#[tokio::test]
async fn what_is_too_old_is_deleted_in_sqlite() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    let store = SqliteStore::open(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let connection = Connection::open(&StoreUrl::Sqlite(path), Access::Write)
        .await
        .unwrap();
    what_is_too_old_is_deleted(connection).await;
    store.close().await.unwrap();
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn what_is_too_old_is_deleted_in_postgres() {
    let database = Database::create().await;
    let store = PostgresStore::open(database.settings()).await.unwrap();
    let url = StoreUrl::Postgres(database.settings().url);
    what_is_too_old_is_deleted(Connection::open(&url, Access::Write).await.unwrap()).await;
    drop(store);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_partition_is_dropped_unless_a_query_uses_it() {
    let database = Database::create().await;
    let store = PostgresStore::open(database.settings()).await.unwrap();
    let url = StoreUrl::Postgres(database.settings().url);
    let mut connection = Connection::open(&url, Access::Write).await.unwrap();
    fill(&mut connection).await;
    let old = "CREATE TABLE readings_2020 PARTITION OF readings
        FOR VALUES FROM ('2020-01-01 00:00Z') TO ('2021-01-01 00:00Z')";
    connection.execute(old, &[]).await.unwrap();
    let insert =
        "INSERT INTO readings SELECT 1, '2020-05-01Z', n, 1 FROM generate_series(1, 1000) AS n";
    connection.execute(insert, &[]).await.unwrap();
    let settings = settings("unit=mm/s,days=90");
    let counted = round(&mut connection, &settings, NOW_US, Action::Count)
        .await
        .unwrap();
    assert_eq!((counted.partitions, counted.readings), (1, 1000 + 6 + 2));

    let mut query = Connection::open(&url, Access::Write).await.unwrap();
    query.begin().await.unwrap();
    query
        .integer("SELECT count(*) FROM readings", &[])
        .await
        .unwrap();
    let deleted = round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    // No frame of a partition that stays is deleted.
    assert_eq!((deleted.partitions, deleted.frames), (0, 0));
    query.commit().await.unwrap();
    let deleted = round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    assert_eq!((deleted.partitions, deleted.frames), (1, 3));
    let left = "SELECT count(*) FROM readings WHERE ts < '2021-01-01Z'";
    assert_eq!(connection.integer(left, &[]).await.unwrap(), 0);
    drop(store);
}

/// A store that lost most of its readings is not much larger than a fresh copy.
#[tokio::test]
async fn the_file_of_a_store_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    let store = SqliteStore::open(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let url = StoreUrl::Sqlite(path);
    let mut connection = Connection::open(&url, Access::Write).await.unwrap();
    fill(&mut connection).await;
    let many = "WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < 299999)
        INSERT INTO readings_sorted SELECT 1, $1 - n * 1000000, n, n / 3.0 FROM n";
    run(&mut connection, many, 95).await;
    let pages = "SELECT page_count FROM pragma_page_count";
    let full = connection.integer(pages, &[]).await.unwrap();
    let settings = settings("unit=mm/s,days=90");
    let deleted = round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    assert_eq!(deleted.readings, 300_000 + 6 + 1);
    let left = connection.integer(pages, &[]).await.unwrap();
    let copy = directory.path().join("copy.db");
    connection
        .execute(&format!("VACUUM INTO '{}'", copy.display()), &[])
        .await
        .unwrap();
    let mut copy = Connection::open(&StoreUrl::Sqlite(copy), Access::Read)
        .await
        .unwrap();
    let fresh = copy.integer(pages, &[]).await.unwrap();
    assert!(
        fresh * 10 < full,
        "{full} pages, and {fresh} in a fresh copy"
    );
    assert!(
        left - fresh <= fresh / 10 + PAGES_AT_ONCE,
        "{left} pages, and {fresh} in a fresh copy"
    );
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_gateway_counts_what_it_deletes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    let store = SqliteStore::open(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let url = StoreUrl::Sqlite(path);
    let mut connection = Connection::open(&url, Access::Write).await.unwrap();
    fill(&mut connection).await;
    let settings = settings("unit=mm/s,days=90");
    let now_us = SystemClock::start().now().utc_us;
    let counted = round(&mut connection, &settings, now_us, Action::Count)
        .await
        .unwrap();
    assert!(counted.readings > 0);
    let metrics = Arc::new(Metrics::default());
    let mut retention = Retention::new(&url, settings, Arc::clone(&metrics), None);
    retention.poll().await.unwrap();
    // A second round finds nothing.
    retention.poll().await.unwrap();
    for (content, count) in [("readings", counted.readings), ("frames", counted.frames)] {
        let line = format!("fieldgate_retention_deleted_total{{content=\"{content}\"}} {count}\n");
        assert!(metrics.text().contains(&line), "{line}{}", metrics.text());
    }
    assert!(metrics.retention_round.get() >= now_us / 1_000_000);
    store.close().await.unwrap();
}

/// A reading whose clock was ahead of its receipt is not the newest plausible one, even after that time has passed.
#[tokio::test]
async fn the_newest_plausible_reading_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    let store = SqliteStore::open(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let mut connection = Connection::open(&StoreUrl::Sqlite(path), Access::Write)
        .await
        .unwrap();
    fill(&mut connection).await;
    // Received 190 days ago.
    for sql in [
        "UPDATE readings_sorted SET ts = $1 WHERE series_id = 3 AND frame_id = 2",
        "UPDATE frames SET first_ts = $1, last_ts = $1 WHERE id = 2",
    ] {
        run(&mut connection, sql, 150).await;
    }
    let latest = "SELECT ts FROM latest WHERE device = 'fan' AND ts IS NOT NULL";
    assert_eq!(ages(&mut connection, latest).await, [200]);
    let settings = settings("channel=vib*,days=30");
    round(&mut connection, &settings, NOW_US, Action::Delete)
        .await
        .unwrap();
    assert_eq!(ages(&mut connection, latest).await, [200]);
    store.close().await.unwrap();
}
