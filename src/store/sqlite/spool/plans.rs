//! Checks the query plans of the drain: the cost of a chunk does not depend on how much waits after it.

use sqlx::{AssertSqlSafe, Executor, Row};

use super::read::OF_A_CHUNK;
use super::*;
use crate::store::admin::Access;
use crate::store::sqlite::open_existing;

/// Frames of one stream, with many gaps and quarantined frames.
const FILL: &str = "
    INSERT INTO devices (id, name) VALUES (1, 'a');
    INSERT INTO streams (id, device_id, stream, created_at) VALUES (1, 1, 1, 0);
    WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000)
        INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
        SELECT x, 1, x, 17, 5, 1 FROM n;
    INSERT INTO readings SELECT id, 1, id, 1.5 FROM frames WHERE id % 3 = 0;
    INSERT INTO gaps SELECT 1, seq, seq, 0, 5 FROM frames WHERE id % 3 = 1;
    INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
        SELECT 1, 1, seq, 5, '', 30, '', x'00' FROM frames WHERE id % 3 = 2;
    INSERT INTO device_events (device_id, at, kind, code, detail, frame_id)
        SELECT 1, 5, 'event', 0, '', id FROM frames WHERE id % 3 = 0;
    INSERT INTO device_events (device_id, at, kind, code, detail) SELECT 1, 5, 'connected', 0, '' FROM frames;";

#[tokio::test]
async fn chunks_are_read_and_deleted_through_indexes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spool.db");
    use crate::store::Store;
    let spool = SqliteStore::open_spool(&path, &SqliteSettings::default()).await;
    spool.unwrap().close().await.unwrap();
    let mut conn = open_existing(&path, Purpose::Spool, Access::Write)
        .await
        .unwrap();
    conn.execute(sqlx::raw_sql(FILL)).await.unwrap();
    for has_statistics in [false, true] {
        if has_statistics {
            conn.execute("ANALYZE").await.unwrap();
        }
        for sql in OF_A_CHUNK.into_iter().chain(FORGET) {
            let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"));
            let rows = sqlx::query(explain).fetch_all(&mut conn).await.unwrap();
            for row in rows {
                let step: String = row.get("detail");
                // Streams are few.
                assert!(
                    !step.starts_with("SCAN") || step.starts_with("SCAN s"),
                    "{sql}\n{step}"
                );
                assert!(!step.contains("TEMP B-TREE"), "{sql}\n{step}");
                let is_by_stream_alone = step.contains("(stream_id=?)");
                assert!(!is_by_stream_alone, "{sql}\n{step}");
            }
        }
    }
}
