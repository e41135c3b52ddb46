//! The database is restored to an earlier state while a store has cached its ids.

use sqlx::ConnectOptions;

use super::*;
use crate::store::Login;
use crate::store::conformance::{Peer, admitted, login};

impl Database {
    /// Copies the database, like a backup; closes its sessions.
    pub(in crate::store) async fn back_up(&self) {
        let name = &self.name;
        let mut admin = self.server.options().connect().await.unwrap();
        for sql in [
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"),
            format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            ),
            format!("CREATE DATABASE {name}_old TEMPLATE {name}"),
            format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"),
            format!("ALTER DATABASE {name}_old ALLOW_CONNECTIONS true"),
        ] {
            run(&mut admin, sql).await.unwrap();
        }
    }

    pub(in crate::store) async fn restored(&self) {
        let name = &self.name;
        let mut admin = self.server.options().connect().await.unwrap();
        for sql in [
            format!("DROP DATABASE {name} WITH (FORCE)"),
            format!("ALTER DATABASE {name}_old RENAME TO {name}"),
        ] {
            run(&mut admin, sql).await.unwrap();
        }
    }
}

fn frames(peer: &Peer, seqs: std::ops::RangeInclusive<u64>) -> Batch {
    let entry = |seq: u64| peer.readings(seq, &[(seq.cast_signed(), seq as f64)]);
    Batch {
        entries: seqs.map(entry).collect(),
        ..Batch::default()
    }
}

/// Commits a batch like the ingest task.
async fn commit(store: &mut PostgresStore, batch: &Batch) -> Result<Committed, StoreError> {
    loop {
        match store.commit(batch).await {
            Err(StoreError::Transient(_)) => {}
            done => return done,
        }
    }
}

async fn assert_replaced(store: &mut PostgresStore, batch: &Batch) {
    let refused = commit(store, batch).await.unwrap_err();
    assert!(matches!(refused, StoreError::Replaced(_)), "{refused}");
}

/// Returns a store that has cached the ids of `b`, which the database has assigned to `c` since it was
/// restored.
async fn with_ids_of_another() -> (OnServer, Peer) {
    let mut h = OnServer::create().await;
    peer(&mut h.store, "a").await;
    h.database.back_up().await;
    let mut late = h.store.commit(&Batch::default()).await;
    while late.is_err() {
        late = h.store.commit(&Batch::default()).await;
    }
    let b = peer(&mut h.store, "b").await;
    commit(&mut h.store, &frames(&b, 1..=3)).await.unwrap();
    h.database.restored().await;
    let mut other = PostgresStore::open(h.database.settings()).await.unwrap();
    let c = peer(&mut other[0], "c").await;
    assert_eq!(
        (b.device, b.stream, b.series),
        (c.device, c.stream, c.series)
    );
    (h, b)
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn ids_reassigned_to_another_device_are_not_used() {
    let (mut h, b) = with_ids_of_another().await;
    assert_replaced(&mut h.store, &frames(&b, 4..=4)).await;
    let dump = h.dump().await;
    assert_eq!((dump.frames.len(), dump.clocks.len()), (0, 2));

    let again = Login {
        oldest_seq: 4,
        ..login("b", 1, 5)
    };
    let admission = admitted(&mut h.store, again).await;
    assert_eq!(admission.receipt.durable_seq(), 3);
    let stream = admission.receipt.stream();
    assert_ne!(stream, b.stream);
    let dump = h.dump().await;
    assert_eq!(dump.gaps, [(stream.0, 1, 3, REASON_LOST_BY_STORE)]);
    let frames: Vec<_> = dump.frames.iter().map(|row| (&row.0[..], row.2)).collect();
    assert_eq!(frames, [("b", 3)]);
}

/// Clocks and events name a device but no stream whose owner could be compared: only the count of commits
/// detects the restore.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn clocks_are_not_stored_for_another_device_after_a_restore() {
    let (mut h, b) = with_ids_of_another().await;
    let before = h.dump().await.clocks;
    let clocks = Batch {
        clocks: vec![(b.device, login("b", 7, 1).clock)],
        ..Batch::default()
    };
    assert_replaced(&mut h.store, &clocks).await;
    assert_eq!(h.dump().await.clocks, before);
}

/// The same happens after a failover to a standby without the latest commits.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn frames_the_device_still_holds_are_not_recorded_as_lost() {
    let mut h = OnServer::create().await;
    let a = peer(&mut h.store, "a").await;
    commit(&mut h.store, &frames(&a, 1..=3)).await.unwrap();
    h.database.back_up().await;
    commit(&mut h.store, &frames(&a, 4..=6)).await.unwrap();
    h.database.restored().await;
    assert_replaced(&mut h.store, &frames(&a, 7..=7)).await;
    // The device received only the acknowledgement of 4.
    let again = Login {
        oldest_seq: 5,
        ..login("a", 1, 8)
    };
    let admission = admitted(&mut h.store, again.clone()).await;
    assert_eq!(admission.receipt.durable_seq(), 4);
    let stream = admission.receipt.stream();
    commit(&mut h.store, &frames(&a, 5..=7)).await.unwrap();
    assert_eq!(
        h.dump().await.gaps,
        [(stream.0, 4, 4, REASON_LOST_BY_STORE)]
    );
    // One gap is enough, and frames stored since are not lost.
    let admission = admitted(&mut h.store, again).await;
    assert_eq!(admission.receipt.durable_seq(), 7);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_partial_restore_is_detected_by_owners() {
    for sql in [
        "UPDATE streams SET durable_seq = 1",
        "UPDATE streams SET stream = 2",
        "UPDATE streams SET device_id = (SELECT id FROM devices WHERE name = 'b')",
        "UPDATE series SET device_id = (SELECT id FROM devices WHERE name = 'b')",
        "DELETE FROM readings; DELETE FROM frames; DELETE FROM streams",
    ] {
        let mut h = OnServer::create().await;
        let a = peer(&mut h.store, "a").await;
        let other = login("b", 7, 1);
        admitted(&mut h.store, other).await;
        commit(&mut h.store, &frames(&a, 1..=3)).await.unwrap();
        h.run(sql).await;
        // A new connection checks the series again.
        h.store.writer = None;
        let refused = commit(&mut h.store, &frames(&a, 4..=4)).await;
        assert!(
            matches!(refused, Err(StoreError::Replaced(_))),
            "{sql}: {refused:?}"
        );
    }
}

/// A COMMIT with unknown outcome may or may not have succeeded.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_commit_with_unknown_outcome_is_not_a_replaced_database() {
    let mut h = OnServer::create().await;
    let a = peer(&mut h.store, "a").await;
    for lost_after in ["BEGIN", "COMMIT"] {
        let mut writer = h.store.writer().await.unwrap();
        h.store.identity.begin(&mut writer.conn).await.unwrap();
        if lost_after == "COMMIT" {
            run(&mut writer.conn, "COMMIT").await.unwrap();
        }
        drop(writer);
        commit(&mut h.store, &frames(&a, 1..=3)).await.unwrap();
    }
    assert_eq!(h.dump().await.frames.len(), 3);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_writer_leaves_no_row_behind() {
    let mut h = OnServer::create().await;
    peer(&mut h.store, "a").await;
    let OnServer { store, database } = h;
    let mut conn = database.connect().await;
    let count = "SELECT count(*) FROM store_writers";
    let rows: i64 = sqlx::query_scalar(count)
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!(rows, 1);
    store.close().await.unwrap();
    let rows: i64 = sqlx::query_scalar(count)
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!(rows, 0);
}
