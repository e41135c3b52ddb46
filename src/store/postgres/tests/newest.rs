//! `latest` immediately, after a pause, and after a gateway was killed.

use super::*;
use crate::store::conformance::{Peer, peer};

const AT_US: i64 = 1_700_000_000_000_000;
const HOUR: Duration = Duration::from_secs(3600);

async fn store(h: &mut OnServer, peer: &Peer, seq: u64, at_us: i64, value: f64) {
    let batch = Batch {
        entries: vec![peer.readings(seq, &[(at_us, value)])],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
}

async fn tidy(h: &mut OnServer) {
    while h.store.tidy_after().is_some() {
        h.store.commit(&Batch::default()).await.unwrap();
    }
}

async fn latest(h: &OnServer) -> Option<f64> {
    sqlx::query_scalar("SELECT value FROM latest")
        .fetch_one(&mut h.database.connect().await)
        .await
        .unwrap()
}

/// Simulates that the store has written as many rows with their commits as it may.
fn keep_waiting(h: &mut OnServer) {
    h.store.newest.at_once = 0;
    h.store.newest.flushed_at = Instant::now() + HOUR;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn latest_is_current_immediately_or_when_the_store_is_tidy() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    assert_eq!(latest(&h).await, None);
    store(&mut h, &peer, 1, AT_US, 1.0).await;
    assert_eq!(latest(&h).await, Some(1.0));
    // An older one, and one of the same time that arrived later.
    store(&mut h, &peer, 2, AT_US - 1, 2.0).await;
    assert_eq!(latest(&h).await, Some(1.0));
    store(&mut h, &peer, 3, AT_US, 3.0).await;
    assert_eq!(latest(&h).await, Some(3.0));
    keep_waiting(&mut h);
    store(&mut h, &peer, 4, AT_US + 4, 4.0).await;
    assert_eq!(latest(&h).await, Some(3.0));
    // Soon after the last commit of a burst.
    let tidy_after = h.store.tidy_after().unwrap();
    assert!(tidy_after <= Duration::from_secs(1), "{tidy_after:?}");
    tidy(&mut h).await;
    assert_eq!(latest(&h).await, Some(4.0));
    // A time that was plausible to a gateway with a wrong clock is replaced.
    h.run("UPDATE newest SET ts = now() + interval '5 years'")
        .await;
    assert_eq!(latest(&h).await, None);
    store(&mut h, &peer, 5, AT_US + 5, 5.0).await;
    assert_eq!(latest(&h).await, Some(5.0));
    // Pending rows are written when a gateway exits.
    keep_waiting(&mut h);
    store(&mut h, &peer, 6, AT_US + 6, 6.0).await;
    let h = h.reopen().await;
    assert_eq!(latest(&h).await, Some(6.0));
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn rows_missed_by_a_killed_gateway_are_written_later() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    tidy(&mut h).await;
    keep_waiting(&mut h);
    store(&mut h, &peer, 1, AT_US, 1.0).await;
    store(&mut h, &peer, 2, AT_US - 5, 2.0).await;
    let OnServer {
        store: killed,
        database,
    } = h;
    drop(killed);
    let mut h = OnServer::in_database(database).await;
    assert_eq!(latest(&h).await, None);
    // Also while the gateway is never idle.
    let other = self::peer(h.store(), "b").await;
    let began = Instant::now();
    for seq in 1.. {
        let gap = Batch {
            entries: vec![other.gap(seq, seq)],
            ..Batch::default()
        };
        h.store().commit(&gap).await.unwrap();
        if latest(&h).await == Some(1.0) {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "not written after the restart"
        );
    }
    // Fails if there is no such row.
    let first = "SELECT 1 / count(*) FROM channels WHERE last_ts - first_ts = interval '5 us'";
    h.run(first).await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn latest_locks_no_partition() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    store(&mut h, &peer, 1, AT_US, 1.0).await;
    let mut conn = h.database.connect().await;
    run(&mut conn, "BEGIN; SELECT * FROM latest").await.unwrap();
    let locks: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
         WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'readings%'",
    )
    .fetch_one(&mut conn)
    .await
    .unwrap();
    assert_eq!(locks, 0);
}
