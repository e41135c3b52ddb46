//! Checks the query plan of each command: large tables are read through their indexes, in stores with and without
//! statistics.

use crate::config::store_url::{PostgresUrl, StoreUrl};
use crate::store::admin::device::changes_sql;
use crate::store::admin::replay::quarantined_frames_sql;
use crate::store::admin::{Access, Argument, Connection, Value};
use crate::store::postgres;
use crate::store::sqlite::{self, SqliteSettings};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection as _, Executor};

use super::{device, quarantine, status};

/// Tables that grow with the data from devices.
const LARGE: [&str; 4] = ["readings", "frames", "device_events", "quarantine"];

/// Returns each query with its arguments. Only queries for one device have arguments.
fn queries() -> Vec<(String, Vec<Argument<'static>>)> {
    let of_devices = device::queries("d7").into_iter();
    let mut queries: Vec<_> = of_devices
        .map(|(sql, arguments)| (sql.to_owned(), arguments))
        .collect();
    queries.push((status::COUNTS.to_owned(), vec![]));
    let of_quarantine = quarantine::queries().into_iter();
    queries.extend(of_quarantine.map(|sql| (sql, vec![7.into()])));
    queries
}

/// Returns the queries for steps through all quarantined frames, and the query for changed devices, each with the
/// index that its plan must use in SQLite and in Postgres.
fn queries_in_steps() -> [(String, &'static str, &'static str); 3] {
    [
        (
            quarantined_frames_sql("1 = 1", 7, 64),
            "SEARCH q USING INTEGER PRIMARY KEY (rowid>?)",
            "Index Scan using quarantine_pkey",
        ),
        (
            quarantine::all_in_steps(),
            "(rowid>? AND rowid<?)",
            "Index Scan using quarantine_pkey",
        ),
        (
            changes_sql(),
            "SEARCH devices USING INDEX devices_by_revision (revision>?)",
            "devices_by_revision",
        ),
    ]
}

async fn plan(
    connection: &mut Connection,
    explain: &str,
    sql: &str,
    arguments: &[Argument<'_>],
) -> String {
    let rows = connection
        .rows(&format!("{explain} {sql}"), arguments)
        .await;
    let lines = rows.expect(sql).into_iter().map(|row| {
        let text = row.0.into_iter().filter_map(|value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        });
        text.collect::<String>() + "\n"
    });
    lines.collect()
}

/// Fills the tables with 30 devices and their compacted and recent readings.
const FILL_SQLITE: &str = "
    WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 30)
        INSERT INTO devices (id, name) SELECT x, 'd' || x FROM n;
    INSERT INTO streams (id, device_id, stream, created_at) SELECT id, id, 1, 0 FROM devices;
    INSERT INTO series (id, device_id, channel, unit, kind) SELECT id, id, 'level', 'm', 'f64' FROM devices;
    INSERT INTO device_events (device_id, at, kind, code, detail) SELECT id, 5, 'connected', 0, '' FROM devices;
    INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at) SELECT id, 1, 0, 0, 5 FROM devices;
    WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 200)
        INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
        SELECT d.id * 1000 + x, d.id, x, 17, 5, 1 FROM devices AS d CROSS JOIN n;
    WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 200)
        INSERT INTO readings_sorted SELECT d.id, x, d.id * 1000 + x, 1.5 FROM devices AS d CROSS JOIN n;
    INSERT INTO readings_recent (id, series_id, frame_id, ts, samples)
        SELECT id, id, id * 1000 + 1, 900, '{\"0\":1.5}' FROM devices;
    INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
        SELECT stream_id, stream_id, seq, 5, '', 30, '', x'00' FROM frames;";

#[tokio::test]
async fn command_queries_use_sqlite_indexes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.db");
    sqlite::migrate(&path, &SqliteSettings::default())
        .await
        .unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let mut conn = options.connect().await.unwrap();
    conn.execute(sqlx::raw_sql(FILL_SQLITE)).await.unwrap();
    for has_statistics in [false, true] {
        if has_statistics {
            conn.execute("ANALYZE").await.unwrap();
        }
        let mut connection = Connection::open(&StoreUrl::Sqlite(path.clone()), Access::Read)
            .await
            .unwrap();
        for (sql, key, _) in queries_in_steps() {
            let arguments = sql.contains("$1").then(|| 7.into());
            let plan = plan(
                &mut connection,
                "EXPLAIN QUERY PLAN",
                &sql,
                arguments.as_slice(),
            )
            .await;
            assert!(plan.contains(key), "{sql}\n{plan}");
        }
        for (sql, arguments) in queries() {
            let plan = plan(&mut connection, "EXPLAIN QUERY PLAN", &sql, &arguments).await;
            // Recent readings are few, and so are devices, series, streams and gaps.
            let large = [
                "r",
                "c",
                "cf",
                "f",
                "e",
                "q",
                "readings_sorted",
                "frames",
                "device_events",
            ];
            for table in large {
                assert!(!plan.contains(&format!("SCAN {table}\n")), "{sql}\n{plan}");
                assert!(
                    !plan.contains(&format!("SCAN {table} USING")),
                    "{sql}\n{plan}"
                );
            }
            if !arguments.is_empty() {
                let by_device = ["(device_id=?", "(name=?", "rowid=?"];
                assert!(
                    by_device.iter().any(|key| plan.contains(key)),
                    "{sql}\n{plan}"
                );
            }
        }
    }
}

/// Creates a database. The test drops it if it succeeds.
async fn database() -> (PostgresUrl, PostgresUrl, String) {
    let server = std::env::var("FIELDGATE_TEST_POSTGRES_URL").expect("a server for tests");
    let Ok(StoreUrl::Postgres(server)) = server.parse() else {
        panic!("FIELDGATE_TEST_POSTGRES_URL is not a URL of a Postgres server");
    };
    let name = format!("fieldgate_plans_{:016x}", rand::random::<u64>());
    let mut admin = server.options().connect().await.unwrap();
    let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'");
    admin.execute(AssertSqlSafe(create)).await.unwrap();
    (server.with_database(&name), server, name)
}

const FILL_POSTGRES: &str = "
    INSERT INTO devices (name) SELECT 'd' || x FROM generate_series(1, 30) AS x;
    INSERT INTO streams (device_id, stream, created_at) SELECT id, 1, now() FROM devices;
    INSERT INTO series (device_id, channel, unit, kind) SELECT id, 'level', 'm', 'f64' FROM devices;
    INSERT INTO device_events (device_id, at, kind, code, detail)
        SELECT id, now(), 'connected', 0, '' FROM devices;
    INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
        SELECT s.id * 1000 + x, s.id, x, 17, now(), 1 FROM streams AS s, generate_series(1, 200) AS x;
    INSERT INTO readings SELECT s.id, now(), s.id * 1000 + x, 1.5
        FROM series AS s, generate_series(1, 200) AS x;
    INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
        SELECT s.device_id, s.id, f.seq, now(), '', 30, '', ''
        FROM frames AS f JOIN streams AS s ON s.id = f.stream_id;";

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn command_queries_use_postgres_indexes() {
    let (url, server, name) = database().await;
    postgres::migrate(&url).await.unwrap();
    let mut conn = url.options().connect().await.unwrap();
    conn.execute(sqlx::raw_sql(FILL_POSTGRES)).await.unwrap();
    for has_statistics in [false, true] {
        if has_statistics {
            conn.execute("ANALYZE").await.unwrap();
        }
        let mut connection = Connection::open(&StoreUrl::Postgres(url.clone()), Access::Read)
            .await
            .unwrap();
        // The planner rightly scans tables as small as these. Without sequential scans, it scans a table only if no
        // index fits.
        connection
            .rows("SELECT set_config('enable_seqscan', 'off', false)", &[])
            .await
            .unwrap();
        for (sql, _, key) in queries_in_steps() {
            let arguments = sql.contains("$1").then(|| 7.into());
            let plan = plan(&mut connection, "EXPLAIN", &sql, arguments.as_slice()).await;
            assert!(plan.contains(key), "{sql}\n{plan}");
        }
        for (sql, arguments) in queries() {
            let plan = plan(&mut connection, "EXPLAIN", &sql, &arguments).await;
            for table in LARGE {
                // `status` counts quarantine, which is bounded.
                let is_read = plan.contains(&format!("Seq Scan on {table}"));
                let counts_all = table == "quarantine" && sql == status::COUNTS;
                assert!(!is_read || counts_all, "{sql}\n{plan}");
            }
        }
        // `latest`, also used by `device show`, reads no partition.
        let latest = "SELECT * FROM latest WHERE device = $1";
        let plan = plan(&mut connection, "EXPLAIN", latest, &["d7".into()]).await;
        assert!(!plan.contains("readings"), "{plan}");
    }
    conn.close().await.unwrap();
    let mut admin = server.options().connect().await.unwrap();
    let drop = format!("DROP DATABASE {name} WITH (FORCE)");
    admin.execute(AssertSqlSafe(drop)).await.unwrap();
}
