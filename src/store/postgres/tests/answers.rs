//! The same queries return the same answers in SQLite and in Postgres.

use super::*;
use crate::store::admin::{Access, Connection, Row, Value};
use crate::store::conformance::{login, peer};
use crate::store::sqlite::{SqliteSettings, SqliteStore};
use crate::store::{Content, DeviceEvent, DeviceEventKind};
use crate::time::{Quality, ResolvedTime};

/// 2026-11-01T00:00:00Z
const START_US: i64 = 1_793_491_200_000_000;
const HOUR_US: i64 = 3_600_000_000;
const NAMES: [&str; 3] = [
    "pump-1",
    "Robert'); DROP TABLE readings; --",
    "Zähler 🌡 100%",
];

/// The query in the README, and for each view everything with the same syntax in both stores.
const QUESTIONS: [&str; 7] = [
    "SELECT device, channel, unit, ts_text, value, quality FROM telemetry
     ORDER BY device COLLATE \"C\", ts, value",
    "SELECT device, channel, unit, hour_text, n, min, round(mean * 1000) / 1000 AS mean, max
     FROM telemetry_hourly ORDER BY device COLLATE \"C\", hour",
    "SELECT device, stream, from_seq, to_seq, frames, reason, received_at_text FROM missing_frames
     ORDER BY device COLLATE \"C\"",
    "SELECT name, enabled FROM devices ORDER BY id",
    "SELECT code, detail, peer FROM quarantine",
    "SELECT kind, level, code, detail, count(frame_id) AS of_frames FROM device_events
     GROUP BY kind, level, code, detail ORDER BY code",
    "SELECT count(*), count(value), min(value), max(value) FROM telemetry WHERE value < 20.5",
];
/// Queries by time, in SQLite's and in Postgres's syntax.
const BY_TIME: [(&str, &str); 3] = [
    (
        "SELECT count(*), sum(n) FROM telemetry_hourly WHERE hour >= unixepoch('2026-11-01 10:00') * 1000000",
        "SELECT count(*), CAST(sum(n) AS bigint) FROM telemetry_hourly WHERE hour >= '2026-11-01 10:00Z'",
    ),
    (
        "SELECT count(*) FROM telemetry WHERE ts >= unixepoch('2026-11-01 10:00') * 1000000",
        "SELECT count(*) FROM telemetry WHERE ts >= '2026-11-01 10:00Z'",
    ),
    (
        "SELECT count(*) FROM telemetry WHERE ts >= unixepoch('now', '-5 minutes') * 1000000",
        "SELECT count(*) FROM telemetry WHERE ts >= now() - interval '5 minutes'",
    ),
];

/// Returns the statement whose answer the README shows.
fn question_of_the_readme() -> String {
    let readme = include_str!("../../../../README.md");
    let (_, question) = readme.split_once("fieldgate query \"").expect("a query");
    let (question, _) = question.split_once('"').expect("its end");
    question.replace("Water flow", "temperature")
}

/// Stores rows of every kind for each of [`NAMES`].
async fn fill(store: &mut impl Store) {
    for (n, name) in (0..).zip(NAMES) {
        let peer = peer(store, name).await;
        let value = |hour: i64| match hour % 7 {
            0 => f64::NAN,
            1 => -0.0,
            _ => 20.0 + f64::from(n) + hour as f64 / 10.0,
        };
        let mut entries: Vec<_> = (0..40)
            .map(|hour| {
                let at_us = START_US + hour * HOUR_US;
                let rows = [(at_us, value(hour)), (at_us + 1_500_000, value(hour + 1))];
                peer.readings(hour.cast_unsigned() + 1, &rows)
            })
            .collect();
        entries.push(peer.gap(41, 43));
        let mut refused = peer.gap(44, 44);
        refused.content = Content::Quarantined {
            code: 31,
            detail: "a column's data is too short (R55)".to_owned(),
            bytes: vec![0, 1, 255],
            peer: "192.0.2.1:9".to_owned(),
        };
        let mut event = peer.gap(45, 45);
        event.content = Content::Event {
            time: ResolvedTime {
                offset_us: 0,
                quality: Quality::Utc,
            },
            at_us: START_US + 7,
            level: 3,
            code: 900 + n as u16,
            text: "it's \"dry\"".to_owned(),
        };
        entries.extend([refused, event]);
        let events = vec![DeviceEvent {
            device: peer.device,
            session: None,
            at_us: START_US,
            kind: DeviceEventKind::Connected,
            code: n as u8,
            detail: "192.0.2.1:9".to_owned(),
        }];
        let batch = Batch {
            entries,
            events,
            logins: vec![login(name, 2, 1)],
            ..Batch::default()
        };
        store.commit(&batch).await.unwrap();
    }
}

async fn answer(connection: &mut Connection, sql: &str) -> Vec<Vec<Value>> {
    let mut rows = Vec::new();
    let on_row = |row: Row| {
        rows.push(row.0);
        std::ops::ControlFlow::<()>::Continue(())
    };
    connection.run(sql, on_row).await.expect(sql);
    rows
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn both_stores_return_the_same_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.db");
    let mut in_file = SqliteStore::open(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let mut on_server = OnServer::create().await;
    fill(&mut in_file).await;
    fill(on_server.store()).await;
    let mut file = Connection::open(&StoreUrl::Sqlite(path), Access::Read)
        .await
        .unwrap();
    let url = on_server.database.url();
    let mut server = Connection::open(&StoreUrl::Postgres(url), Access::Read)
        .await
        .unwrap();
    let readme = question_of_the_readme();
    for question in QUESTIONS.into_iter().chain([readme.as_str()]) {
        let (expected, found) = (
            answer(&mut file, question).await,
            answer(&mut server, question).await,
        );
        assert!(!expected.is_empty(), "{question}");
        assert_eq!(found, expected, "{question}");
    }
    for (of_file, of_server) in BY_TIME {
        assert_eq!(
            answer(&mut server, of_server).await,
            answer(&mut file, of_file).await,
            "{of_server}"
        );
    }
}
