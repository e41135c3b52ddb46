//! `fieldgate status`: shows a one-screen summary of the store.
//!
//! It reads only the store, and the spool in the data directory if the store is in Postgres. It works with and
//! without a running gateway.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use crate::config::SPOOL_FILE;
use crate::config::store_url::{PostgresUrl, StoreUrl};
use crate::store::admin::{Access, Connection};
use crate::store::spool;
use crate::time::SystemClock;

use super::Error;
use super::output::{self, age, bytes_text, count, utc_text, write_facts};

type Fact = (&'static str, String);

/// Counts for SQLite and Postgres.
pub(super) const COUNTS: &str = "SELECT (SELECT count(*) FROM devices), count(*),
        CAST(coalesce(sum(st.frames), 0) AS BIGINT), CAST(coalesce(sum(st.readings), 0) AS BIGINT),
        max((SELECT f.received_at FROM frames AS f
            WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1)),
        (SELECT count(*) FROM gaps),
        (SELECT sum(CAST(to_seq - from_seq AS DOUBLE PRECISION) + 1) FROM gaps),
        (SELECT count(*) FROM quarantine)
    FROM streams AS st";

/// Shows the summary. Shows the spool even if the database is unavailable.
pub async fn status(store: &StoreUrl, data_dir: &Path) -> Result<(), Error> {
    let mut out = output::stdout();
    let now_us = SystemClock::start().now().utc_us;
    let mut facts = match store {
        StoreUrl::Sqlite(_) => Vec::new(),
        StoreUrl::Postgres(_) => spooled(&data_dir.join(SPOOL_FILE), now_us).await?,
    };
    match Connection::open(store, Access::Read).await {
        Ok(mut connection) => {
            facts.extend(match store {
                StoreUrl::Sqlite(path) => file(path),
                StoreUrl::Postgres(url) => database(&mut connection, url).await?,
            });
            facts.extend(counted(&mut connection, now_us).await?);
            write_facts(&facts, &mut out)?;
        }
        Err(error) => {
            if !facts.is_empty() {
                write_facts(&facts, &mut out)?;
                out.flush()?;
            }
            return Err(error.into());
        }
    }
    out.flush()?;
    Ok(())
}

async fn spooled(path: &Path, now_us: i64) -> Result<Vec<Fact>, Error> {
    let Some(waiting) = spool::waiting(path).await? else {
        return Ok(Vec::new());
    };
    let waits = match waiting.oldest_received_us {
        None => "empty".to_owned(),
        Some(us) => format!(
            "{} with {} waiting for Postgres, oldest received {}",
            count(waiting.frames, "frame"),
            count(waiting.readings, "reading"),
            age(us, now_us)
        ),
    };
    Ok(vec![("spool", waits)])
}

fn file(path: &Path) -> Vec<Fact> {
    let bytes_of = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let mut wal = OsString::from(path);
    wal.push("-wal");
    let size = format!(
        "{}, and {} of write-ahead log",
        bytes_text(bytes_of(path)),
        bytes_text(bytes_of(wal.as_ref()))
    );
    vec![("store", path.display().to_string()), ("size", size)]
}

async fn database(connection: &mut Connection, url: &PostgresUrl) -> Result<Vec<Fact>, Error> {
    // For the default partition, read the planner's estimate (-1 before the first ANALYZE) and the size: counting
    // would scan the partition.
    let rows = connection
        .rows(
            "SELECT pg_database_size(current_database()),
                 count(c.oid) FILTER (WHERE c.relname <> 'readings_default'),
                 CAST(sum(c.reltuples) FILTER (WHERE c.relname = 'readings_default') AS BIGINT),
                 CAST(sum(pg_relation_size(c.oid)) FILTER (WHERE c.relname = 'readings_default')
                     AS BIGINT)
             FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
             WHERE i.inhparent = CAST('readings' AS regclass)",
            &[],
        )
        .await?;
    let mut facts = vec![("store", url.to_string())];
    for row in &rows {
        facts.push(("size", bytes_text(row.integer(0)?.unsigned_abs())));
        let partitions = count(row.integer(1)?.unsigned_abs(), "partition");
        let others = match (row.integer_or_null(2)?, row.integer_or_null(3)?) {
            // No default partition: the table is partitioned differently, or not at all.
            (None, _) | (_, None) => continue,
            (_, Some(0)) => String::new(),
            (Some(0..), Some(_)) => {
                let readings = count(row.integer(2)?.unsigned_abs(), "reading");
                format!(", plus about {readings} in readings_default")
            }
            (Some(_), Some(bytes)) => {
                let size = bytes_text(bytes.unsigned_abs());
                format!(", plus {size} in readings_default")
            }
        };
        facts.push(("partitions", format!("{partitions}{others}")));
    }
    Ok(facts)
}

async fn counted(connection: &mut Connection, now_us: i64) -> Result<Vec<Fact>, Error> {
    // Streams keep running totals, so no large table is counted. The newest frame may not have the highest id if
    // several connections write. Frames in gaps are summed as doubles: a device may report a gap so long that
    // integers would overflow.
    let rows = connection.rows(COUNTS, &[]).await?;
    let mut facts = Vec::new();
    for row in &rows {
        let number = |column| row.integer(column).map(|n| n.to_string());
        let last_frame = match row.integer_or_null(4)? {
            Some(us) => format!("{}, {}", utc_text(us), age(us, now_us)),
            None => "none yet".to_owned(),
        };
        let gaps = match (row.integer(5)?, row.real_or_null(6)?) {
            (gaps, Some(frames)) => format!("{gaps}, {frames} frames in total"),
            (gaps, None) => gaps.to_string(),
        };
        facts.extend([
            ("devices", number(0)?),
            ("streams", number(1)?),
            ("frames", number(2)?),
            ("readings", number(3)?),
            ("last frame", last_frame),
            ("gaps", gaps),
            ("quarantined", number(7)?),
        ]);
    }
    Ok(facts)
}
