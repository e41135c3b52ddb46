use std::collections::BTreeMap;

use super::*;
use crate::config::store_url::StoreUrl;
use crate::store::conformance::{Peer, peer};
use crate::store::postgres::{PostgresStore, tests::Database};
use crate::store::sqlite::{SqliteSettings, SqliteStore};
use crate::store::{Batch, Store};

const BEGIN_US: i64 = 1_700_000_000_000_000;
const WIDTH_US: i64 = 10_000_000;

/// Stores frames of readings, each `every_us` after the one before; returns the readings.
async fn store_readings(
    writer: &mut impl Store,
    peer: &Peer,
    seq: &mut u64,
    from_us: i64,
    every_us: i64,
    frames: u64,
) -> Vec<(i64, f64)> {
    const ROWS: i64 = 20;
    let mut readings = Vec::new();
    let mut entries = Vec::new();
    for frame in 0..frames as i64 {
        let rows: Vec<(i64, f64)> = (0..ROWS)
            .map(|row| {
                let n = frame * ROWS + row;
                let value = if n % 7 == 0 {
                    f64::NAN
                } else {
                    (n * 37 % 101) as f64 - 50.0
                };
                (from_us + n * every_us, value)
            })
            .collect();
        *seq += 1;
        entries.push(peer.readings(*seq, &rows));
        readings.extend(rows);
    }
    let batch = Batch {
        entries,
        ..Batch::default()
    };
    writer.commit(&batch).await.unwrap();
    readings
}

/// Computes the intervals from all readings.
fn counted(readings: &[(i64, f64)]) -> Vec<Interval> {
    let mut found: BTreeMap<i64, Vec<f64>> = BTreeMap::new();
    for (ts, value) in readings {
        let index = (ts - BEGIN_US).div_euclid(WIDTH_US);
        if (0..INTERVALS).contains(&index) {
            found.entry(index).or_default().push(*value);
        }
    }
    let interval = |(index, values): (i64, Vec<f64>)| {
        let valid = values.iter().filter(|value| !value.is_nan());
        let extremes = valid.fold(None, |found: Option<(f64, f64)>, value| {
            let (low, high) = found.unwrap_or((*value, *value));
            Some((low.min(*value), high.max(*value)))
        });
        Interval {
            index,
            extremes,
            is_cut: values.len() >= READINGS_MAX as usize,
        }
    };
    found.into_iter().map(interval).collect()
}

async fn intervals_have_the_extremes<S: Store>(store: &StoreUrl, mut writer: S) {
    let (a, b) = (peer(&mut writer, "a").await, peer(&mut writer, "b").await);
    let mut seq = 0;
    // Before the begin, then an outage, then to beyond the end.
    let mut readings = store_readings(
        &mut writer,
        &a,
        &mut seq,
        BEGIN_US - 5 * WIDTH_US,
        WIDTH_US / 4,
        30,
    )
    .await;
    let other = store_readings(&mut writer, &b, &mut 0, BEGIN_US, WIDTH_US, 3).await;
    let late = BEGIN_US + 200 * WIDTH_US;
    readings.extend(store_readings(&mut writer, &a, &mut seq, late, WIDTH_US / 3, 40).await);
    let mut reader = Reconnecting::new(store);
    let ids = [a.series.0, b.series.0];
    for _ in 0..20 {
        let found = intervals(&mut reader, &ids, BEGIN_US, WIDTH_US)
            .await
            .unwrap();
        assert_eq!(found[&a.series.0], counted(&readings));
        assert_eq!(found[&b.series.0], counted(&other));
        // An empty commit compacts a part of level 0.
        writer.commit(&Batch::default()).await.unwrap();
    }
    // More readings than are read.
    let dense = store_readings(
        &mut writer,
        &a,
        &mut seq,
        BEGIN_US + 150 * WIDTH_US,
        WIDTH_US / 1000,
        100,
    )
    .await;
    let found = intervals(&mut reader, &ids[..1], BEGIN_US, WIDTH_US)
        .await
        .unwrap();
    let found = found[&a.series.0]
        .iter()
        .find(|interval| interval.index == 150);
    assert!(found.unwrap().is_cut && dense.len() == 2000, "{found:?}");
    assert_eq!(
        intervals(&mut reader, &[], BEGIN_US, WIDTH_US)
            .await
            .unwrap(),
        HashMap::new()
    );
    let series = series(&mut reader, a.device.0, 10, 0).await.unwrap();
    assert_eq!(series[0].channel, "temperature");
    assert_eq!(
        super::series(&mut reader, a.device.0, 10, 1).await.unwrap(),
        []
    );
}

#[tokio::test]
async fn intervals_have_the_extremes_in_sqlite() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
    intervals_have_the_extremes(&StoreUrl::Sqlite(path), store.unwrap()).await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn intervals_have_the_extremes_in_postgres() {
    let database = Database::create().await;
    let store = PostgresStore::open(database.settings()).await.unwrap();
    let url = StoreUrl::Postgres(database.settings().url);
    intervals_have_the_extremes(&url, { store }.remove(0)).await;
}
