//! Limits, locks and rejections by the server: abandoned statements are terminated there, batches that are too
//! large are split, and the gateway waits for problems that an operator can fix.

use super::*;
use crate::config::PostgresOptions;
use crate::store::Content;
use crate::store::admin::{Access, Connection};
use crate::store::conformance::{Peer, eventually};
use crate::time::{Quality, ResolvedTime};

/// Far longer than the server needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections with a statement that waits for a lock.
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
    AND application_name LIKE 'fieldgate%' AND wait_event_type = 'Lock'";
const ALL: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
    AND application_name LIKE 'fieldgate%'";

fn batch(peer: &Peer, seqs: std::ops::RangeInclusive<u64>) -> Batch {
    let entry = |seq: u64| peer.readings(seq, &[(seq.cast_signed(), 1.0)]);
    Batch {
        entries: seqs.map(entry).collect(),
        ..Batch::default()
    }
}

async fn count(conn: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(conn).await.unwrap()
}

async fn comes_down_to(conn: &mut PgConnection, sql: &'static str, most: i64) {
    let is_down = async || count(conn, sql).await <= most;
    eventually("abandoned statements are terminated", is_down).await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_forgotten_lock_uses_up_no_connections() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    Backends::of(&h.database.url()).set_timeouts(PATIENCE, Duration::from_millis(300));
    let (mut forgotten, mut server) = (h.database.connect().await, h.database.connect().await);
    for lock in ["readings", "streams", "frames"] {
        run(
            &mut forgotten,
            format!("BEGIN; LOCK TABLE {lock} IN ACCESS EXCLUSIVE MODE"),
        )
        .await
        .unwrap();
        for _ in 0..10 {
            let failed = h.store().commit(&batch(&peer, 1..=3)).await;
            assert!(
                matches!(failed, Err(StoreError::Transient(_))),
                "{failed:?}"
            );
            let most = count(&mut server, ALL).await;
            assert!(most <= 12, "{most} connections");
        }
        comes_down_to(&mut server, WAITING, 0).await;
        run(&mut forgotten, "ROLLBACK").await.unwrap();
    }
    Backends::of(&h.database.url()).set_timeouts(PATIENCE, PATIENCE);
    h.store().commit(&batch(&peer, 1..=3)).await.unwrap();
    // One that writes, one that creates partitions, and the two of this test.
    comes_down_to(&mut server, ALL, 4).await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_query_that_is_dropped_ends_at_the_server() {
    let database = Database::create().await;
    open::migrate(&database.url()).await.unwrap();
    let mut server = database.connect().await;
    let store = StoreUrl::Postgres(database.url());
    let mut connection = Connection::open(&store, Access::Read).await.unwrap();
    let mut holder = database.connect().await;
    run(&mut holder, "SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let waits = connection.rows("SELECT CAST(pg_advisory_lock(1) AS TEXT)", &[]);
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'
        AND state = 'active' AND pid <> pg_backend_pid() AND datname = current_database()";
    let is_running = async || count(&mut server, waiting).await > 0;
    tokio::select! {
        rows = waits => panic!("{rows:?}"),
        () = eventually("the query runs", is_running) => {}
    }
    drop(connection);
    comes_down_to(&mut server, waiting, 0).await;
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn limits_of_the_role_do_not_apply_to_the_gateway() {
    let database = Database::create().await;
    let name = &database.name;
    for (setting, value) in [
        ("statement_timeout", "1ms"),
        ("lock_timeout", "1ms"),
        ("idle_in_transaction_session_timeout", "1ms"),
        ("idle_session_timeout", "1ms"),
        ("default_transaction_read_only", "on"),
        ("synchronous_commit", "off"),
        ("standard_conforming_strings", "off"),
        ("quote_all_identifiers", "on"),
        ("transform_null_equals", "on"),
        ("default_transaction_isolation", "serializable"),
    ] {
        let set = format!("ALTER DATABASE {name} SET {setting} = '{value}'");
        let mut server = database.server.options().connect().await.unwrap();
        run(&mut server, set).await.unwrap();
    }
    let settings = PostgresSettings {
        options: PostgresOptions::default(),
        ..database.settings()
    };
    // The limit of a millisecond applies until a statement has changed it, which may take longer.
    let mut opened = None;
    eventually("the store opens", async || {
        match PostgresStore::open(settings.clone()).await {
            Ok(mut stores) => opened = Some(stores.remove(0)),
            Err(error) => assert!(error.may_pass(), "{error}"),
        }
        opened.is_some()
    })
    .await;
    let mut store = opened.unwrap();
    let peer = peer(&mut store, "a").await;
    for seq in 1..=20 {
        store.commit(&batch(&peer, seq..=seq)).await.unwrap();
    }
    let now = Batch {
        entries: vec![peer.readings(21, &[(SystemClock::start().now().utc_us, 1.0)])],
        ..Batch::default()
    };
    store.commit(&now).await.unwrap();
    let conn = &mut store.writer.as_mut().unwrap().conn;
    let elsewhere = sqlx::query_scalar("SELECT count(*) FROM readings_default");
    let elsewhere: i64 = elsewhere.fetch_one(&mut *conn).await.unwrap();
    assert_eq!(elsewhere, 20);
    assert!(store.partitions.are_complete(), "partitions are found");
    let conn = &mut store.writer.as_mut().unwrap().conn;
    let setting = sqlx::query_scalar("SELECT current_setting('synchronous_commit')");
    let setting: String = setting.fetch_one(conn).await.unwrap();
    assert_eq!(setting, "on");
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn the_operators_synchronous_commit_is_never_lowered() {
    let database = Database::create().await;
    for setting in ["local", "remote_write", "on", "remote_apply"] {
        let set = format!(
            "ALTER DATABASE {} SET synchronous_commit = {setting}",
            database.name
        );
        run(&mut database.server.options().connect().await.unwrap(), set)
            .await
            .unwrap();
        let mut conn = open::connect(&database.url(), false).await.unwrap();
        let shown = sqlx::query_scalar("SELECT current_setting('synchronous_commit')");
        let shown: String = shown.fetch_one(&mut conn).await.unwrap();
        assert_eq!(shown, setting);
        conn.close().await;
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_batch_that_is_too_large_is_committed_in_parts() {
    for code in [
        "query_canceled",
        "out_of_memory",
        "program_limit_exceeded",
        "configuration_limit_exceeded",
    ] {
        let mut h = OnServer::create().await;
        let peer = peer(h.store(), "a").await;
        let refuse = format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF (SELECT count(*) FROM new_rows) > 3 THEN
                     RAISE EXCEPTION 'too much at once' USING ERRCODE = '{code}';
                 END IF; RETURN NULL; END $$;
             CREATE TRIGGER refuse AFTER INSERT ON frames REFERENCING NEW TABLE AS new_rows
                 FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        );
        h.run(&refuse).await;
        let committed = h.store().commit(&batch(&peer, 1..=40)).await.unwrap();
        assert_eq!(committed.receipts.len(), 1, "{code}");
        assert_eq!(committed.receipts[0].durable_seq(), 40, "{code}");
        assert_eq!(h.dump().await.readings.len(), 40, "{code}");
        // The size stays at what passes, and grows again when more passes.
        h.run("DROP TRIGGER refuse ON frames").await;
        for seq in 41..=80 {
            h.store().commit(&batch(&peer, seq..=seq)).await.unwrap();
        }
        h.store().commit(&batch(&peer, 81..=120)).await.unwrap();
        assert_eq!(h.dump().await.frames.len(), 120, "{code}");
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn the_store_waits_for_problems_that_an_operator_can_fix() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    let refusals = [
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE EXCEPTION 'not on Sundays'; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
            "DROP TRIGGER refuse ON readings",
            "not on Sundays",
        ),
        (
            "ALTER TABLE readings ADD CONSTRAINT plausible CHECK (value < 0) NOT VALID",
            "ALTER TABLE readings DROP CONSTRAINT plausible",
            "plausible",
        ),
        (
            "CREATE UNIQUE INDEX once ON frames (type)",
            "DROP INDEX once",
            "once",
        ),
        (
            "ALTER TABLE frames RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO frames",
            "frames",
        ),
        (
            "ALTER TABLE readings ADD COLUMN note text NOT NULL DEFAULT 'x';
             ALTER TABLE readings ALTER COLUMN note DROP DEFAULT",
            "ALTER TABLE readings DROP COLUMN note",
            "note",
        ),
        (
            "CREATE ROLE fieldgate_lesser; GRANT USAGE ON SCHEMA public TO fieldgate_lesser;
             CREATE FUNCTION lessen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE EXCEPTION 'permission denied for table readings'
                     USING ERRCODE = 'insufficient_privilege'; END $$;
             CREATE TRIGGER lessen BEFORE INSERT ON frames FOR EACH STATEMENT EXECUTE FUNCTION lessen()",
            "DROP TRIGGER lessen ON frames; DROP OWNED BY fieldgate_lesser; DROP ROLE fieldgate_lesser",
            "permission denied",
        ),
    ];
    for (seq, (refuse, allow, words)) in (1..).zip(refusals) {
        // The index must be created before there are two equal rows.
        let seqs = 2 * seq..=2 * seq + 1;
        let seqs = if seq == 1 { 1..=3 } else { seqs };
        if words == "once" {
            h.run("TRUNCATE frames").await;
        }
        h.run(refuse).await;
        for _ in 0..2 {
            let error = h
                .store()
                .commit(&batch(&peer, seqs.clone()))
                .await
                .unwrap_err();
            assert!(matches!(error, StoreError::Transient(_)), "{error:?}");
            assert!(error.to_string().contains(words), "{error}");
        }
        h.run(allow).await;
        let committed = h.store().commit(&batch(&peer, seqs.clone())).await.unwrap();
        assert_eq!(committed.receipts[0].durable_seq(), *seqs.end());
    }
}

/// Behaves like a proxy whose server is down, or like another protocol.
#[tokio::test]
async fn a_peer_that_closes_immediately_may_become_a_server_later() {
    for answer in [&b""[..], b"HTTP/1.1 503 Service Unavailable\r\n\r\n"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // Unread data would reset the connection.
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 64]).await;
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await;
            }
        });
        let Ok(StoreUrl::Postgres(url)) = format!("postgres://u@{address}/d").parse() else {
            panic!("{address} is an address");
        };
        for _ in 0..20 {
            let error = open::connect(&url, false).await.err().unwrap();
            assert!(error.may_pass(), "{error}");
            let text = error.to_string();
            assert!(
                !text.contains("0x00") && !text.contains("abandoned"),
                "{text}"
            );
        }
    }
}

fn report() -> Content {
    Content::Event {
        time: ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        },
        at_us: 5,
        level: 1,
        code: 7,
        text: "door open".to_owned(),
    }
}

/// Covers INSERT and COPY.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn rows_dropped_silently_by_a_trigger_are_detected() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    h.run(
        "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
    )
    .await;
    let mut server = h.database.connect().await;
    let (mut next_seq, mut stored) = (1, 0);
    for (table, event) in [
        ("frames", "INSERT"),
        ("readings", "INSERT"),
        ("streams", "UPDATE"),
        ("device_events", "INSERT"),
    ] {
        let drop_rows = format!(
            "CREATE TRIGGER drop_it BEFORE {event} ON {table} FOR EACH ROW EXECUTE FUNCTION drop_it()"
        );
        for rows in [1, 12_000] {
            let samples: Vec<(i64, f64)> = (0..rows).map(|us| (us, 1.0)).collect();
            let mut entry = peer.readings(next_seq, &samples);
            if table == "device_events" {
                entry.content = report();
            } else {
                stored += rows;
            }
            let batch = Batch {
                entries: vec![entry],
                ..Batch::default()
            };
            run(&mut server, drop_rows.clone()).await.unwrap();
            let failed = h.store().commit(&batch).await.unwrap_err();
            let text = failed.to_string();
            assert!(
                matches!(failed, StoreError::Transient(_)),
                "{table}: {text}"
            );
            assert!(
                text.contains(table) && text.contains("drops rows"),
                "{text}"
            );
            run(&mut server, format!("DROP TRIGGER drop_it ON {table}"))
                .await
                .unwrap();
            h.store().commit(&batch).await.unwrap();
            next_seq += 1;
        }
    }
    assert_eq!(
        count(&mut server, "SELECT count(*) FROM readings").await,
        stored
    );
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_violation_of_an_own_key_is_fatal() {
    let mut h = OnServer::create().await;
    let peer = peer(h.store(), "a").await;
    h.store().commit(&batch(&peer, 1..=2)).await.unwrap();
    // Simulate that another gateway stored it without moving the stream.
    h.run(
        "INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
         SELECT id + 1, stream_id, 3, type, received_at, readings FROM frames WHERE seq = 2",
    )
    .await;
    let failed = h.store().commit(&batch(&peer, 3..=3)).await;
    assert!(matches!(failed, Err(StoreError::Fatal(_))), "{failed:?}");
}
