//! `fieldgate status`: what is stored, in one screen. It looks at the store alone, so it works beside
//! a running gateway and without one. Beside a store in Postgres there may be a spool in the data directory.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use fieldgate::config::SPOOL_FILE;
use fieldgate::store::reader::Reader;
use fieldgate::store::spool;
use fieldgate::store::url::{PostgresUrl, StoreUrl};
use fieldgate::time::SystemClock;

use super::Error;
use super::output::{self, age, bytes_text, count, utc_text, write_facts};

type Fact = (&'static str, String);

/// What both stores count.
pub(super) const COUNTS: &str = "SELECT (SELECT count(*) FROM devices), count(*),
        CAST(coalesce(sum(st.frames), 0) AS BIGINT), CAST(coalesce(sum(st.readings), 0) AS BIGINT),
        max((SELECT f.received_at FROM frames AS f
            WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1)),
        (SELECT count(*) FROM gaps),
        (SELECT sum(CAST(to_seq - from_seq AS DOUBLE PRECISION) + 1) FROM gaps),
        (SELECT count(*) FROM quarantine)
    FROM streams AS st";

/// Shows it. What waits in a spool is shown also while the database is away.
pub async fn status(store: &StoreUrl, data_dir: &Path) -> Result<(), Error> {
    let mut out = output::stdout();
    let now_us = SystemClock::start().now().utc_us;
    let mut facts = match store {
        StoreUrl::Sqlite(_) => Vec::new(),
        StoreUrl::Postgres(_) => spooled(&data_dir.join(SPOOL_FILE), now_us).await?,
    };
    match Reader::open(store).await {
        Ok(mut reader) => {
            facts.extend(match store {
                StoreUrl::Sqlite(path) => file(path),
                StoreUrl::Postgres(url) => database(&mut reader, url).await?,
            });
            facts.extend(counted(&mut reader, now_us).await?);
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
            "{} with {} wait for Postgres, the oldest came {}",
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

async fn database(reader: &mut Reader, url: &PostgresUrl) -> Result<Vec<Fact>, Error> {
    // Of the default partition the planner's estimate (-1 before the first) and the size: counting
    // would read the whole of it.
    let rows = reader
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
            // Partitioned otherwise, or not at all.
            (None, _) | (_, None) => continue,
            (_, Some(0)) => String::new(),
            (Some(0..), Some(_)) => {
                let readings = count(row.integer(2)?.unsigned_abs(), "reading");
                format!(", and about {readings} of other times")
            }
            (Some(_), Some(bytes)) => {
                let size = bytes_text(bytes.unsigned_abs());
                format!(", and {size} of readings of other times")
            }
        };
        facts.push(("partitions", format!("{partitions}{others}")));
    }
    Ok(facts)
}

async fn counted(reader: &mut Reader, now_us: i64) -> Result<Vec<Fact>, Error> {
    // Streams keep running totals: nothing here counts a large table. The newest frame need not have
    // the highest id where several connections write. Frames in gaps are summed as doubles: a device
    // may claim a gap so long that whole numbers would overflow.
    let rows = reader.rows(COUNTS, &[]).await?;
    let mut facts = Vec::new();
    for row in &rows {
        let number = |column| row.integer(column).map(|n| n.to_string());
        let last_frame = match row.integer_or_null(4)? {
            Some(us) => format!("{}, {}", utc_text(us), age(us, now_us)),
            None => "none yet".to_owned(),
        };
        let gaps = match (row.integer(5)?, row.real_or_null(6)?) {
            (gaps, Some(frames)) => format!("{gaps}, of {frames} frames in all"),
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
