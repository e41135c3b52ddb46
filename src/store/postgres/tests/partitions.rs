//! Which day gets a partition, and what happens to readings that arrived before it existed.

use super::*;
use crate::store::conformance::{Peer, peer};
use crate::store::postgres::partitions::RETRY_MIN;

const DAY_US: i64 = 86_400_000_000;

fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

/// Returns the non-empty partitions and their numbers of readings.
async fn filled(database: &Database) -> Vec<(String, i64)> {
    sqlx::query_as("SELECT tableoid::regclass::text, count(*) FROM readings GROUP BY 1 ORDER BY 1")
        .fetch_all(&mut database.connect().await)
        .await
        .unwrap()
}

/// Returns the name of a time's partition: that of its month, or of its year if it is long ago.
fn name_of(us: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(us).unwrap();
    let year = |time: jiff::Timestamp| time.to_zoned(jiff::tz::TimeZone::UTC).year();
    let format = match year(time) < year(jiff::Timestamp::now()) - 1 {
        true => "readings_%Y",
        false => "readings_%Y%m",
    };
    time.strftime(format).to_string()
}

async fn store(h: &mut OnServer, peer: &Peer, seq: u64, times_us: &[i64]) {
    let rows: Vec<(i64, f64)> = times_us.iter().map(|us| (*us, 1.0)).collect();
    let batch = Batch {
        entries: vec![peer.readings(seq, &rows)],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
}

/// Commits a reading of the given time, `after` later.
async fn try_again(h: &OnServer, peer: &Peer, us: i64, after: Duration) {
    let entries = [peer.readings(1, &[(us, 1.0)])];
    let now = Instant::now() + after;
    h.store.partitions.make_for(&entries, now).await;
}

/// Waits until a statement waits for the default partition.
async fn awaits_default(conn: &mut PgConnection) {
    let waits = "SELECT EXISTS (SELECT FROM pg_locks
        WHERE relation = 'readings_default'::regclass AND NOT granted)";
    let mut does_wait = false;
    while !does_wait {
        let found = sqlx::query_scalar(waits).fetch_one(&mut *conn).await;
        does_wait = found.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn past_months_and_years_have_their_own_partition() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let now_us = now_us();
    let (late_us, too_late_us) = (now_us - 40 * DAY_US, -1);
    let old_us = now_us - 3 * 366 * DAY_US;
    let too_soon_us = now_us + 400 * DAY_US;
    let times_us = [too_late_us, old_us, late_us, now_us, too_soon_us];
    store(&mut h, &peer, 1, &times_us).await;
    let mut expected = vec![
        (name_of(late_us), 1),
        (name_of(now_us), 1),
        (name_of(old_us), 1),
        ("readings_default".to_owned(), 2),
    ];
    expected.sort();
    assert_eq!(filled(&h.database).await, expected);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn earlier_readings_move_to_the_partition_of_their_month() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let now_us = now_us();
    store(&mut h, &peer, 1, &[now_us]).await;
    // Simulate that the day was far in the future when its first readings arrived.
    let day = name_of(now_us);
    let moved = format!(
        "ALTER TABLE readings DETACH PARTITION {day}; INSERT INTO readings SELECT * FROM {day};
         DROP TABLE {day}"
    );
    h.run(&moved).await;
    assert_eq!(
        filled(&h.database).await,
        [("readings_default".to_owned(), 1)]
    );
    let mut h = h.reopen().await;
    assert_eq!(filled(&h.database).await, [(day.clone(), 1)]);
    store(&mut h, &peer, 2, &[now_us]).await;
    assert_eq!(filled(&h.database).await, [(day, 2)]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_long_query_does_not_block_commits() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let mut reader = h.database.connect().await;
    run(&mut reader, "BEGIN; SELECT count(*) FROM readings")
        .await
        .unwrap();
    let late_us = now_us() - 70 * DAY_US;
    store(&mut h, &peer, 1, &[late_us]).await;
    let default = "readings_default".to_owned();
    assert_eq!(filled(&h.database).await, [(default.clone(), 1)]);
    run(&mut reader, "COMMIT").await.unwrap();
    // Retried not with each commit, but after a while.
    store(&mut h, &peer, 2, &[late_us]).await;
    assert_eq!(filled(&h.database).await, [(default, 2)]);
    try_again(&h, &peer, late_us, RETRY_MIN).await;
    assert_eq!(filled(&h.database).await, [(name_of(late_us), 2)]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_full_default_partition_does_not_block_commits() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let (late_us, later_us) = (now_us() - 70 * DAY_US, now_us() - 35 * DAY_US);
    let default = "readings_default".to_owned();
    // Simulate enough readings that moving them takes four seconds: a lower limit cancels the statement.
    h.run(&format!(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF current_setting('statement_timeout')::interval < interval '4 s' THEN
                 RAISE EXCEPTION USING ERRCODE = 'query_canceled';
             END IF;
             RETURN OLD;
         END $$;
         CREATE TRIGGER dawdle BEFORE DELETE ON readings_default FOR EACH ROW
             WHEN (OLD.frame_id = 1) EXECUTE FUNCTION dawdle();
         INSERT INTO readings VALUES ({}, to_timestamp({}), 1, 1.0)",
        peer.series.0,
        late_us / 1_000_000
    ))
    .await;
    store(&mut h, &peer, 1, &[late_us]).await;
    store(&mut h, &peer, 2, &[late_us]).await;
    assert_eq!(filled(&h.database).await, [(default.clone(), 3)]);
    // Another day does not have to wait for this one.
    try_again(&h, &peer, later_us, RETRY_MIN).await;
    store(&mut h, &peer, 3, &[later_us]).await;
    let others = [(name_of(later_us), 1), (default.clone(), 3)];
    assert_eq!(filled(&h.database).await, others);
    // This one may take longer on the next attempt.
    try_again(&h, &peer, late_us, RETRY_MIN).await;
    let all = [(name_of(late_us), 3), (name_of(later_us), 1)];
    assert_eq!(filled(&h.database).await, all);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_cancelled_attempt_counts_as_a_failure() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let late_us = now_us() - 70 * DAY_US;
    let mut reader = h.database.connect().await;
    run(&mut reader, "BEGIN; SELECT count(*) FROM readings")
        .await
        .unwrap();
    let mut watch = h.database.connect().await;
    let times_us = [late_us];
    tokio::select! {
        biased;
        () = awaits_default(&mut watch) => {}
        () = store(&mut h, &peer, 1, &times_us) => panic!("it did not wait"),
    }
    run(&mut reader, "COMMIT").await.unwrap();
    store(&mut h, &peer, 1, &times_us).await;
    assert_eq!(
        filled(&h.database).await,
        [("readings_default".to_owned(), 1)]
    );
    try_again(&h, &peer, late_us, RETRY_MIN).await;
    assert_eq!(filled(&h.database).await, [(name_of(late_us), 1)]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_commit_that_races_with_a_new_partition_is_retried() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let now_us = now_us();
    let day = name_of(now_us);
    h.run(&format!(
        "ALTER TABLE readings DETACH PARTITION {day}; DROP TABLE {day}"
    ))
    .await;
    let mut other = h.database.connect().await;
    // Another gateway creates the partition while this one stores into the default partition.
    let made = format!(
        "BEGIN; CREATE TABLE {day} (LIKE readings INCLUDING ALL);
         LOCK TABLE readings_default IN ACCESS EXCLUSIVE MODE;
         ALTER TABLE readings ATTACH PARTITION {day}
             FOR VALUES FROM (date_trunc('month', to_timestamp({0}), 'UTC'))
             TO (date_trunc('month', to_timestamp({0}), 'UTC') + interval '1 month')",
        now_us / 1_000_000
    );
    run(&mut other, made).await.unwrap();
    let batch = Batch {
        entries: vec![peer.readings(1, &[(now_us, 1.0)])],
        ..Batch::default()
    };
    let mut watch = h.database.connect().await;
    let commit_other = async {
        awaits_default(&mut watch).await;
        run(&mut other, "COMMIT").await.unwrap();
    };
    let (met, ()) = tokio::join!(h.store.commit(&batch), commit_other);
    assert!(matches!(met, Err(StoreError::Transient(_))), "{met:?}");
    h.store().commit(&batch).await.unwrap();
    assert_eq!(filled(&h.database).await, [(day, 1)]);
    // An operator's constraint on the default partition also only postpones.
    h.run("ALTER TABLE readings_default ADD CONSTRAINT none CHECK (false)")
        .await;
    let batch = Batch {
        entries: vec![peer.readings(2, &[(0, 1.0)])],
        ..Batch::default()
    };
    let failed = h.store().commit(&batch).await;
    assert!(
        matches!(failed, Err(StoreError::Transient(_))),
        "{failed:?}"
    );
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_detached_partition_is_noticed() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let now_us = now_us();
    let day = name_of(now_us);
    h.run(&format!("ALTER TABLE readings DETACH PARTITION {day}"))
        .await;
    store(&mut h, &peer, 1, &[now_us]).await;
    let in_default = [("readings_default".to_owned(), 1)];
    assert_eq!(filled(&h.database).await, in_default);
    // The table belongs to the operator as long as it exists.
    try_again(&h, &peer, now_us, Duration::from_secs(61)).await;
    assert_eq!(filled(&h.database).await, in_default);
    h.run(&format!("DROP TABLE {day}")).await;
    try_again(&h, &peer, now_us, Duration::from_secs(300)).await;
    assert_eq!(filled(&h.database).await, [(day, 1)]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn gateways_that_create_the_same_partition_concurrently_agree() {
    let first = OnServer::create().await;
    let mut stores = Vec::new();
    for _ in 0..4 {
        stores.extend(
            PostgresStore::open(first.database.settings())
                .await
                .unwrap(),
        );
    }
    let late_us = now_us() - 70 * DAY_US;
    let mut making = tokio::task::JoinSet::new();
    for (n, mut store) in stores.into_iter().enumerate() {
        making.spawn(async move {
            let peer = peer(&mut store, &format!("device-{n}")).await;
            let batch = Batch {
                entries: vec![peer.readings(1, &[(late_us, 1.0)])],
                ..Batch::default()
            };
            store.commit(&batch).await.unwrap();
        });
    }
    making.join_all().await;
    assert_eq!(filled(&first.database).await, [(name_of(late_us), 4)]);
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_table_of_another_scheme_is_left_alone() {
    let h = OnServer::create().await;
    // A gateway treats a table that an extension partitions as a plain table.
    h.run(
        "DROP TABLE readings CASCADE;
         CREATE TABLE readings (series_id bigint NOT NULL, ts timestamptz NOT NULL,
             frame_id bigint NOT NULL, value double precision)",
    )
    .await;
    h.run(include_str!(
        "../../../../migrations/postgres/0002_views.sql"
    ))
    .await;
    let mut h = h.reopen().await;
    let peer = peer(h.store(), "a").await;
    store(&mut h, &peer, 1, &[now_us()]).await;
    assert_eq!(filled(&h.database).await, [("readings".to_owned(), 1)]);
    // Fails if the view does not exist or is empty.
    h.run("SELECT 1 / count(*) FROM telemetry").await;
}
