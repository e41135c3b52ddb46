//! Each view over both stores with the same data: the same columns and the same rows, and no value makes a view
//! fail.

use super::*;
use crate::store::admin::{Access, Connection, Value};
use crate::store::conformance::{admitted, login, peer};
use crate::store::sqlite::{SqliteSettings, SqliteStore};
use crate::store::{
    Content, Declare, DeclareOutcome, DeclaredChannel, DeviceEvent, DeviceEventKind, Entry,
    SeriesId, SessionId,
};
use crate::time::{Quality, ResolvedTime};
use fieldgate_protocol::value::Kind;

/// Time at which the suite's entries arrive, 2023-11-14T22:13:20Z, and the start of its hour.
const AT_US: i64 = 1_700_000_000_000_000;
const HOUR_US: i64 = 3_600_000_000;
const DAY_US: i64 = 24 * HOUR_US;

/// Every view, in an order that both stores share. `silent_s` grows while the test runs.
const VIEWS: [&str; 8] = [
    "SELECT * FROM telemetry ORDER BY device COLLATE \"C\", channel, unit COLLATE \"C\", kind, ts, value",
    "SELECT * FROM latest ORDER BY device COLLATE \"C\", channel, unit COLLATE \"C\", kind",
    "SELECT * FROM channels ORDER BY device COLLATE \"C\", channel, unit COLLATE \"C\", kind",
    "SELECT * FROM telemetry_hourly
     ORDER BY device COLLATE \"C\", channel, unit COLLATE \"C\", kind, hour",
    "SELECT * FROM device_status ORDER BY device COLLATE \"C\"",
    "SELECT device, state, last_frame_at, last_frame_at_text FROM silent_devices
     ORDER BY device COLLATE \"C\"",
    "SELECT * FROM events ORDER BY device COLLATE \"C\", at, kind",
    "SELECT * FROM missing_frames ORDER BY device COLLATE \"C\", from_seq",
];

/// Values of one device within an hour. No mean, of one device or of several, exceeds the range of a double.
const VALUES: [&[f64]; 18] = [
    &[1.0, 3.0],
    &[1.5, 1e200, 1.6],
    &[1e154, 1e155, -1e155],
    &[1e308, 1e308, 1.0],
    &[f64::MAX, f64::MAX, f64::MAX],
    &[-f64::MAX, -f64::MAX, -f64::MAX],
    &[f64::MAX, -f64::MAX, 3.0],
    &[1e300, -1e300, 3.0],
    &[f64::INFINITY, 1.0],
    &[f64::NEG_INFINITY, 1e308, 2.0],
    &[f64::INFINITY, f64::NEG_INFINITY],
    &[f64::INFINITY, f64::MAX, f64::MAX],
    &[5e-324, 0.0],
    &[5e-324],
    &[1e-310, 2e-310, 3e-310],
    &[f64::MIN_POSITIVE, -f64::MIN_POSITIVE],
    &[f64::NAN, 2.0],
    &[f64::NAN, f64::NAN],
];

struct Both {
    file: SqliteStore,
    server: OnServer,
    directory: tempfile::TempDir,
}

impl Both {
    async fn create() -> Both {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.db");
        Both {
            file: SqliteStore::open(&path, &SqliteSettings::default())
                .await
                .unwrap(),
            server: OnServer::create().await,
            directory,
        }
    }

    /// Compacts all level-0 readings of SQLite.
    async fn tidy(&mut self) {
        while self.file.tidy_after().is_some() {
            self.file.commit(&Batch::default()).await.unwrap();
        }
    }

    async fn readers(&self) -> [Connection; 2] {
        let file = StoreUrl::Sqlite(self.directory.path().join("test.db"));
        let server = StoreUrl::Postgres(self.server.database.url());
        [
            Connection::open(&file, Access::Read).await.unwrap(),
            Connection::open(&server, Access::Read).await.unwrap(),
        ]
    }
}

/// Asserts that both stores return the same names and rows; returns them.
async fn same(readers: &mut [Connection; 2], sql: &str) -> (Vec<String>, Vec<Vec<Value>>) {
    let [file, server] = readers;
    let columns = file.columns(sql).await.expect(sql);
    assert_eq!(server.columns(sql).await.expect(sql), columns, "{sql}");
    let expected = file.rows(sql, &[]).await.expect(sql);
    let found = server.rows(sql, &[]).await.expect(sql);
    assert_eq!(found.len(), expected.len(), "{sql}");
    for (found, expected) in found.iter().zip(&expected) {
        for ((found, expected), column) in found.0.iter().zip(&expected.0).zip(&columns) {
            // Only a mean depends on the order of addition.
            let is_same = match (found, expected) {
                (Value::Real(found), Value::Real(expected)) if column == "mean" => {
                    found == expected
                        || (found / 2.0 - expected / 2.0).abs() <= expected.abs() * 1e-12
                }
                _ => found == expected,
            };
            assert!(is_same, "{column}: {found:?}, not {expected:?}\n{sql}");
        }
    }
    (columns, expected.into_iter().map(|row| row.0).collect())
}

/// Stores a device whose channel changes its kind and its unit.
async fn change_kinds(store: &mut impl Store) {
    let admission = admitted(store, login("meter", 1, 1)).await;
    let kinds = [
        (Kind::Integer, "Cel"),
        (Kind::F64, "Cel"),
        (Kind::F64, "°C"),
    ];
    for (n, (kind, unit)) in (1..).zip(kinds) {
        let declare = Declare {
            device: admission.device,
            schema: n,
            hash: [n as u8; 8],
            channels: vec![DeclaredChannel {
                id: 1,
                name: "temperature".to_owned(),
                unit: unit.to_owned(),
                kind,
                exp10: 0,
            }],
        };
        let batch = Batch {
            declares: vec![declare],
            ..Batch::default()
        };
        let DeclareOutcome::Accepted(schema) =
            store.commit(&batch).await.unwrap().declares.remove(0)
        else {
            panic!("a conflict");
        };
        let peer = crate::store::conformance::Peer {
            device: admission.device,
            stream: admission.receipt.stream(),
            series: SeriesId(schema.channels[0].series.0),
        };
        let at_us = AT_US + i64::from(n) * 1_000_000;
        let rows = [(at_us, 20.0 + f64::from(n)), (at_us + 1, 21.0)];
        store_all(store, vec![peer.readings(u64::from(n), &rows)]).await;
    }
}

async fn store_all(store: &mut impl Store, entries: Vec<Entry>) {
    let batch = Batch {
        entries,
        ..Batch::default()
    };
    store.commit(&batch).await.unwrap();
}

/// Stores rows of every kind that a view shows.
async fn fill(store: &mut impl Store) {
    change_kinds(store).await;
    let odd = peer(store, "it's \"odd\" 🌡").await;
    let mut event = odd.gap(6, 6);
    event.content = Content::Event {
        time: ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        },
        at_us: -1,
        level: 4,
        code: 900,
        text: "dry".to_owned(),
    };
    let far_us = AT_US + 70 * 365 * DAY_US;
    let entries = vec![
        odd.readings(1, &[(AT_US - DAY_US, 1.0), (AT_US, f64::NAN)]),
        // A clock in the future, and one that had not started.
        odd.readings(2, &[(far_us, 3.0), (far_us + 1, 4.0)]),
        odd.readings(3, &[(-1, 5.0), (0, 6.0)]),
        odd.gap(4, 5),
        event,
    ];
    store_all(store, entries).await;
    let batch = Batch {
        events: vec![DeviceEvent {
            device: odd.device,
            session: Some(SessionId(1)),
            at_us: AT_US,
            kind: DeviceEventKind::Connected,
            code: 0,
            detail: "192.0.2.1:9".to_owned(),
        }],
        ..Batch::default()
    };
    store.commit(&batch).await.unwrap();
    peer(store, "new").await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn each_view_is_the_same_in_both_stores() {
    let mut both = Both::create().await;
    fill(&mut both.file).await;
    fill(both.server.store()).await;
    let mut readers = both.readers().await;
    for is_tidy in [false, true] {
        if is_tidy {
            both.tidy().await;
        }
        for view in VIEWS {
            let (columns, rows) = same(&mut readers, view).await;
            assert!(!rows.is_empty(), "{view}");
            assert_times_are_typed(&columns, &rows, view);
            // No two rows of a view are equal, whatever changed in between.
            for (n, row) in rows.iter().enumerate() {
                assert!(!rows[..n].contains(row), "{row:?}\n{view}");
            }
        }
        // Of two readings in the future and two that are not, `latest` shows the newest of the latter.
        let ahead = "SELECT in_future, last_ts FROM channels WHERE in_future > 0";
        let ahead = same(&mut readers, ahead).await.1;
        assert_eq!(ahead, [[Value::Integer(2), Value::Integer(AT_US)]]);
        let kinds = "SELECT channel, unit, kind FROM latest WHERE device = 'meter'";
        assert_eq!(
            same(&mut readers, &format!("{kinds} ORDER BY 2, 3"))
                .await
                .1
                .len(),
            3
        );
    }
}

/// Asserts that each time is a number of microseconds, followed by a column with its text.
fn assert_times_are_typed(columns: &[String], rows: &[Vec<Value>], view: &str) {
    let is_time = |name: &str| {
        name == "hour" || name.ends_with("ts") || name.ends_with("_at") || name == "at"
    };
    for (n, name) in columns.iter().enumerate() {
        assert_ne!(name, "time", "{view}");
        if name.ends_with("_text") {
            assert_eq!(format!("{}_text", columns[n - 1]), *name, "{view}");
        }
        for row in rows {
            let fits = match &row[n] {
                Value::Null => true,
                Value::Integer(_) if is_time(name) => matches!(row[n + 1], Value::Text(_)),
                _ => !is_time(name),
            };
            assert!(fits, "{name}: {row:?}\n{view}");
        }
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    let valid: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| !value.is_nan())
        .collect();
    // Divide each value first, so that no sum exceeds the range of a double.
    let mean: f64 = valid.iter().map(|value| value / valid.len() as f64).sum();
    let mean = match valid.iter().all(|value| value.is_finite()) {
        true => mean.clamp(-f64::MAX, f64::MAX),
        false => mean,
    };
    (!valid.is_empty() && !mean.is_nan()).then_some(mean)
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn no_value_of_a_device_breaks_a_view() {
    async fn fill(store: &mut impl Store) {
        for (n, values) in VALUES.into_iter().enumerate() {
            let peer = peer(store, &format!("d{n:02}")).await;
            // One by one, so that an hour has both compacted readings and level-0 readings.
            for (seq, value) in (1..).zip(values) {
                let at_us = AT_US + 1000 * seq;
                store_all(
                    store,
                    vec![peer.readings(seq.cast_unsigned(), &[(at_us, *value)])],
                )
                .await;
            }
        }
    }
    let mut both = Both::create().await;
    fill(&mut both.file).await;
    fill(both.server.store()).await;
    let mut readers = both.readers().await;
    for is_tidy in [false, true] {
        if is_tidy {
            both.tidy().await;
        }
        for view in VIEWS {
            same(&mut readers, view).await;
        }
        let means = "SELECT device, n, mean FROM telemetry_hourly ORDER BY device COLLATE \"C\"";
        for (row, values) in same(&mut readers, means).await.1.iter().zip(VALUES) {
            let found = match row[2] {
                Value::Real(found) => Some(found),
                _ => None,
            };
            let expected = mean(values);
            let largest = values
                .iter()
                .fold(0.0_f64, |max, value| max.max(value.abs()));
            let is_near = match (found, expected) {
                (Some(found), Some(expected)) => {
                    found == expected
                        || (found / 2.0 - expected / 2.0).abs() <= largest * 1e-12 + 1e-323
                }
                (found, expected) => found == expected,
            };
            assert!(is_near, "{found:?}, not {expected:?}, of {values:?}");
        }
    }
}
