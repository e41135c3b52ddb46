//! Level-0 readings: shown exactly once at any time, and bit for bit.

use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{OnDisk, frames, run};
use crate::store::conformance::{Harness, Peer, peer};
use crate::store::sqlite::{SqliteSettings, SqliteStore};
use crate::store::{Batch, Store};

const VIEWS: [&str; 4] = [
    "SELECT * FROM readings",
    "SELECT * FROM telemetry",
    "SELECT * FROM latest",
    "SELECT * FROM telemetry_hourly",
];

async fn show(h: &mut OnDisk) -> Vec<Vec<String>> {
    let mut shown = Vec::new();
    for view in VIEWS {
        let mut rows = rows(h, view).await;
        rows.sort();
        shown.push(rows);
    }
    shown
}

/// Returns one line per row.
async fn rows(h: &mut OnDisk, sql: &str) -> Vec<String> {
    let columns: Vec<String> = sqlx::query_scalar("SELECT name FROM pragma_table_info(?)")
        .bind(sql.rsplit(' ').next().unwrap())
        .fetch_all(h.conn())
        .await
        .unwrap();
    let line = columns
        .iter()
        .map(|column| format!("quote({column})"))
        .collect::<Vec<_>>()
        .join(" || ' ' || ");
    let sql = sql.replace('*', &line);
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
        .fetch_all(h.conn())
        .await
        .unwrap()
}

/// Returns the store as a crash would leave it, opened again. (The log is never reset between two commits, so a
/// copy of the database and a later copy of the log match.)
async fn after_a_crash(h: &OnDisk) -> OnDisk {
    let directory = tempfile::tempdir().unwrap();
    for file in ["test.db", "test.db-wal"] {
        std::fs::copy(h.directory.path().join(file), directory.path().join(file)).unwrap();
    }
    let path = directory.path().join("test.db");
    let settings = SqliteSettings::default();
    let store = SqliteStore::open(path, &settings);
    OnDisk {
        store: store.await.unwrap(),
        directory,
    }
}

/// Commits frames one by one, with few readings each: many of one stream would bypass level 0.
async fn commit_each(h: &mut OnDisk, peer: &Peer, seqs: std::ops::Range<u64>, rows: i64) {
    for seq in seqs {
        let batch = frames(peer, seq..seq + 1, rows);
        h.store.commit(&batch).await.unwrap();
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Gathering,
    Sorting,
    Deleting,
    Tidy,
}

async fn phase(h: &mut OnDisk) -> Phase {
    let row: (i64, i64, i64, i64, i64) = sqlx::query_as(
        "SELECT sorted_id, sorting_id, series_id,
             (SELECT coalesce(min(id), 0) FROM readings_recent),
             (SELECT coalesce(max(id), 0) FROM readings_recent)
         FROM readings_sorting",
    )
    .fetch_one(h.conn())
    .await
    .unwrap();
    match row {
        (.., 0) => Phase::Tidy,
        (sorted, sorting, series, ..) if sorting > sorted && series > 0 => Phase::Sorting,
        (sorted, _, _, first, _) if first <= sorted => Phase::Deleting,
        _ => Phase::Gathering,
    }
}

#[tokio::test]
async fn each_reading_is_stored_once_after_a_crash_at_any_time() {
    let mut h = OnDisk::create().await;
    let peers: [Peer; 3] = [
        peer(&mut h.store, "a").await,
        peer(&mut h.store, "b").await,
        peer(&mut h.store, "c").await,
    ];
    let mut seen = BTreeSet::new();
    let mut expected = 0;
    let mut next_seq = 1;
    for _ in 0..3 {
        // Enough readings that compaction takes more than one commit.
        for peer in &peers {
            commit_each(&mut h, peer, next_seq..next_seq + 40, 50).await;
            expected += 40 * 50;
        }
        next_seq += 40;
        for _ in 0..3 {
            // When idle, a generation begins immediately and is compacted quickly; otherwise it is compacted in
            // slices.
            h.store.commit(&Batch::default()).await.unwrap();
            for peer in &peers {
                commit_each(&mut h, peer, next_seq..next_seq + 1, 50).await;
                expected += 50;
                seen.insert(phase(&mut h).await);
                let shown = show(&mut h).await;
                assert_eq!(shown[0].len(), expected);
                let mut crashed = after_a_crash(&h).await;
                assert_eq!(phase(&mut crashed).await, Phase::Tidy);
                assert_eq!(show(&mut crashed).await, shown);
            }
            next_seq += 1;
        }
        while h.store.tidy_after().is_some() {
            h.store.commit(&Batch::default()).await.unwrap();
            seen.insert(phase(&mut h).await);
            assert_eq!(show(&mut h).await[0].len(), expected);
        }
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

#[tokio::test]
async fn values_stored_as_text_keep_their_bits() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let mut random = StdRng::seed_from_u64(4);
    let mut values = vec![0.0, -0.0, 1e-9, 1e15, -1e-9, -1e15, 0.1 + 0.2, 1.0 / 3.0];
    values.extend((0..6_000).map(|_| {
        let magnitude: f64 = random.random_range(1e-9_f64.log2()..1e15_f64.log2());
        magnitude.exp2().copysign(random.random_range(-1.0..1.0))
    }));
    let sent: Vec<(i64, f64)> = (0..).zip(values).collect();
    for (seq, rows) in (1..).zip(sent.chunks(100)) {
        let batch = Batch {
            entries: vec![peer.readings(seq, rows)],
            ..Batch::default()
        };
        h.store.commit(&batch).await.unwrap();
    }
    assert_eq!(phase(&mut h).await, Phase::Gathering, "nothing waits");
    let sent: Vec<_> = sent.iter().map(|(_, v)| Some(v.to_bits())).collect();
    let bits = |dump: crate::store::conformance::Dump| -> Vec<_> {
        dump.readings.into_iter().map(|row| row.5).collect()
    };
    assert_eq!(bits(h.dump().await), sent, "as text");
    let mut crashed = after_a_crash(&h).await;
    assert_eq!(bits(crashed.dump().await), sent, "compacted by SQLite");
    assert_eq!(bits(h.reopen().await.dump().await), sent, "compacted");
}

#[tokio::test]
async fn values_without_exact_text_bypass_level_0() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    let entries = vec![
        peer.readings(1, &[(0, 1e16)]),
        peer.readings(2, &[(0, 1e-10)]),
        peer.readings(3, &[(0, f64::INFINITY)]),
        peer.readings(4, &[(i64::MIN, 1.0), (0, 1.0)]),
        peer.readings(5, &[(7, 1.0)]),
    ];
    let batch = Batch {
        entries,
        ..Batch::default()
    };
    h.store.commit(&batch).await.unwrap();
    assert_eq!(rows(&mut h, "SELECT * FROM readings_sorted").await.len(), 5);
    assert_eq!(
        rows(&mut h, "SELECT * FROM readings_unsorted").await.len(),
        1
    );
}

#[tokio::test]
async fn many_readings_of_a_series_bypass_level_0() {
    let mut h = OnDisk::create().await;
    let many = peer(&mut h.store, "many").await;
    let few = peer(&mut h.store, "few").await;
    let mut batch = frames(&many, 1..5, 30);
    batch.entries.extend(frames(&few, 1..2, 30).entries);
    h.store.commit(&batch).await.unwrap();
    assert_eq!(
        rows(&mut h, "SELECT * FROM readings_sorted").await.len(),
        120
    );
    assert_eq!(rows(&mut h, "SELECT * FROM readings").await.len(), 150);
}

#[tokio::test]
async fn a_closed_store_has_nothing_left_to_compact() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    commit_each(&mut h, &peer, 1..400, 100).await;
    assert!(h.store.tidy_after().is_some());
    let mut h = h.reopen().await;
    assert_eq!(phase(&mut h).await, Phase::Tidy);
    assert_eq!(
        rows(&mut h, "SELECT * FROM readings_sorted").await.len(),
        39_900
    );
    // Ids continue from their last value: none looks already compacted.
    h.store.commit(&frames(&peer, 400..401, 7)).await.unwrap();
    assert_eq!(rows(&mut h, "SELECT * FROM readings").await.len(), 39_907);
}

#[tokio::test]
async fn compaction_continues_after_a_transient_error() {
    let mut h = OnDisk::create().await;
    let peer = peer(&mut h.store, "a").await;
    commit_each(&mut h, &peer, 1..400, 100).await;
    h.store.commit(&Batch::default()).await.unwrap();
    run(h.conn(), "PRAGMA max_page_count = 60").await;
    while h.store.commit(&Batch::default()).await.is_ok() {
        assert!(h.store.tidy_after().is_some(), "the disk was never full");
    }
    assert_eq!(rows(&mut h, "SELECT * FROM readings").await.len(), 39_900);
    run(h.conn(), "PRAGMA max_page_count = 4294967294").await;
    while h.store.tidy_after().is_some() {
        h.store.commit(&Batch::default()).await.unwrap();
        assert_eq!(rows(&mut h, "SELECT * FROM readings").await.len(), 39_900);
    }
}
