//! `fieldgate status`: shows a one-screen summary of a running gateway and its store, or of the store alone.
//!
//! It asks the gateway over HTTP, and reads the store, and the spool in the data directory if the store is in Postgres.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use axum::http::StatusCode;
use clap::Args;
use tokio::time::timeout;

use crate::config::Location;
use crate::config::store_url::{PostgresUrl, StoreUrl};
use crate::store::admin::{Access, Connection};
use crate::store::{spool, sqlite};
use crate::sys::disk::Place;
use crate::time::SystemClock;

use super::Error;
use super::gateway_http::{GatewayArgs, GatewayHttp, Refused};
use super::output::{self, count, write_facts};
use crate::text::{age, bytes_text, utc_text};

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

/// Maximum time for the answers of the gateway.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_BYTES_MAX: usize = 1 << 20;

#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    gateway: GatewayArgs,
}

/// Shows the summary. Shows the spool even if the database is unavailable.
pub async fn status(store: &StoreUrl, location: &Location, args: &StatusArgs) -> Result<(), Error> {
    let gateway = GatewayHttp::new(&args.gateway, location.secret_readers())?;
    let mut out = output::stdout();
    let now_us = SystemClock::start().now().utc_us;
    let mut facts = match store {
        StoreUrl::Sqlite(path) if !path.exists() => Vec::new(),
        StoreUrl::Sqlite(path) if !sqlite::is_in_use(path) => {
            vec![("gateway", "not running".to_owned())]
        }
        _ => running(&gateway, now_us).await,
    };
    if let StoreUrl::Postgres(_) = store {
        facts.extend(spooled(&location.spool(), now_us).await?);
    }
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
            if let StoreUrl::Postgres(_) = store {
                write_facts(&facts, &mut out)?;
                out.flush()?;
            }
            return Err(error.into());
        }
    }
    out.flush()?;
    Ok(())
}

/// Returns what a running gateway reports.
async fn running(gateway: &GatewayHttp, now_us: i64) -> Vec<Fact> {
    let url = &gateway.url;
    let asked = async {
        let (_, ready) = gateway.text("/readyz", ANSWER_BYTES_MAX).await?;
        let metrics = gateway.text("/metrics", ANSWER_BYTES_MAX).await?;
        Ok::<_, Refused>((ready, metrics))
    };
    let (ready, (code, metrics)) = match timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok(answers)) => answers,
        Ok(Err(Refused::Lost(reason))) => {
            return vec![("gateway", format!("no answer from {url}: {reason}"))];
        }
        Ok(Err(Refused::Failed(error))) => {
            return vec![("gateway", format!("no answer from {url}: {error}"))];
        }
        Err(_) => return vec![("gateway", format!("no answer from {url}"))],
    };
    let ready: serde_json::Value = serde_json::from_str(&ready).unwrap_or_default();
    let reasons = ready["reasons"].as_array().into_iter().flatten();
    let reasons: Vec<_> = reasons.filter_map(|reason| reason.as_str()).collect();
    let state = match ready["is_ready"].as_bool() {
        Some(true) => "ready".to_owned(),
        Some(false) => format!("not ready: {}", reasons.join(", ")),
        None => "no gateway".to_owned(),
    };
    let mut facts = vec![("gateway", format!("{state}, at {url}"))];
    if code == StatusCode::UNAUTHORIZED {
        facts.push((
            "",
            "needs a token to show more; use --token-file".to_owned(),
        ));
        return facts;
    }
    let value = |name: &str| {
        let mut lines = metrics.lines();
        lines.find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .parse::<f64>()
                .ok()
        })
    };
    let whole = |name: &str| value(name).map(|value| value as u64);
    if let Some(started_s) = value("process_start_time_seconds") {
        facts.push(("started", age((started_s * 1e6) as i64, now_us)));
    }
    if let Some(sessions) = whole("fieldgate_connections{state=\"session\"}") {
        facts.push(("connected", count(sessions, "device")));
    }
    if let Some(readings) = whole("fieldgate_queue_readings") {
        facts.push(("in the queue", count(readings, "reading")));
    }
    for place in Place::ALL {
        let of = |name| {
            whole(&format!(
                "fieldgate_disk_{name}{{place=\"{}\"}}",
                place.name()
            ))
        };
        if let (Some(free), Some(total)) = (of("free_bytes"), of("bytes")) {
            let low = of("low").filter(|low| *low == 1).map_or("", |_| ", low");
            let space = format!("{} of {} free", bytes_text(free), bytes_text(total));
            facts.push(("disk", format!("{space} for {}{low}", place.purpose())));
        }
    }
    facts
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

/// Returns the number of devices in each state that any is in, as a continuation of their total.
async fn presence(connection: &mut Connection) -> Result<String, Error> {
    let sql = "SELECT presence, count(*) FROM device_presence GROUP BY presence ORDER BY presence";
    let rows = connection.rows(sql, &[]).await?;
    let mut states = Vec::new();
    for row in &rows {
        let state = row.text(0)?;
        states.push(format!("{} {state}", row.integer(1)?));
    }
    Ok(match states.is_empty() {
        true => String::new(),
        false => format!(": {}", states.join(", ")),
    })
}

async fn counted(connection: &mut Connection, now_us: i64) -> Result<Vec<Fact>, Error> {
    // Streams keep running totals, so no large table is counted. The newest frame may not have the highest id if
    // several connections write. Frames in gaps are summed as doubles: a device may report a gap so long that
    // integers would overflow.
    let presence = presence(connection).await?;
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
            ("devices", format!("{}{}", number(0)?, presence)),
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
