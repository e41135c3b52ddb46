//! The cost of logins and declares.

use super::admit::Admissions;
use super::*;
use crate::store::conformance::{admitted, comes_back, login, very_many};

/// Returns the number of rows of `series` that this connection's transaction has read so far.
async fn rows_read(conn: &mut Link) -> i64 {
    let read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables
        WHERE relname = 'series'";
    sqlx::query_scalar(read).fetch_one(conn).await.unwrap()
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn earlier_schemas_add_no_cost() {
    let mut h = OnServer::create().await;
    let device = admitted(h.store(), login("a", 1, 1)).await.device;
    let commit = async |h: &mut OnServer, schemas| {
        let (logins, _) = comes_back(device, 0);
        let declares = very_many(device, schemas);
        let batch = Batch {
            logins,
            declares,
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
    };
    // The server's statistics of the table, and its cached plans, date from when the table was small.
    commit(&mut h, 0..1).await;
    h.run("ANALYZE series").await;
    for schema in 1..7 {
        commit(&mut h, schema..schema + 1).await;
    }
    let (logins, declares) = comes_back(device, 6);
    let conn = &mut h.store.writer.as_mut().unwrap().conn;
    let bounds = DeviceBounds {
        device_series_max: u32::MAX,
        ..DeviceBounds::default()
    };
    let many = very_many(device, 1000..1700);
    run(&mut *conn, "BEGIN").await.unwrap();
    Admissions::new(conn, bounds)
        .declare(&many, &[])
        .await
        .unwrap();
    run(&mut *conn, "COMMIT").await.unwrap();
    run(&mut *conn, "BEGIN").await.unwrap();
    let before = rows_read(conn).await;
    Admissions::new(conn, DeviceBounds::default())
        .declare(&declares, &[])
        .await
        .unwrap();
    Admissions::new(conn, DeviceBounds::default())
        .login(&logins)
        .await
        .unwrap();
    // The channels of the redeclared schema, and of the one that the login names.
    assert_eq!(rows_read(conn).await - before, 2 * 32);
    run(conn, "COMMIT").await.unwrap();
}
