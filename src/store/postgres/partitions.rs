//! A partition of `readings` for each UTC day, made before it is needed.
//!
//! Partitions are made for days near the present: from [`LATE_DAYS`] ago, for what devices kept while
//! they were offline, to [`AHEAD_DAYS`] from now. Readings of other times go to the default partition,
//! so a device with a wrong clock makes no tables. When the present comes near a day of which the
//! default partition holds readings already, they move with it.
//!
//! Invariant: nothing here keeps readings from being stored. A partition that cannot be made now is
//! tried again later, and until then its readings go to the default partition.

use std::collections::BTreeSet;
use std::sync::{Mutex as SyncMutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::civil::Date;
use jiff::{Timestamp as UtcTime, ToSpan, tz::TimeZone};
use sqlx::PgConnection;
use tokio::sync::Mutex;

use super::open::{OpenError, open_error, reason};
use super::run;
use crate::store::url::PostgresUrl;
use crate::store::{Content, Entry};

/// How old readings may be to have a partition of their day made.
const LATE_DAYS: i64 = 35;
/// How many days after today have a partition.
const AHEAD_DAYS: i64 = 2;
const DAY_US: i64 = 86_400_000_000;
/// "FGpt": gateways on one database make partitions one at a time.
const MAKERS_LOCK: i64 = 1_179_086_964;
/// A partition waits so long for queries that read the default partition, and no longer: what is
/// stored meanwhile would have to wait as well.
const LOCK_TIMEOUT_MS: u64 = 1000;
/// After a partition could not be made.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// The partitions; see the module.
pub(super) struct Partitions {
    url: PostgresUrl,
    known: SyncMutex<Known>,
    /// The connection that makes them; one at a time.
    maker: Mutex<Option<PgConnection>>,
}

struct Known {
    /// `readings` is not partitioned by this scheme, so there is nothing to make.
    is_foreign: bool,
    /// Days since 1970 that have a partition, as far as is known.
    days: BTreeSet<i64>,
    retry_at: Option<Instant>,
}

impl Partitions {
    /// Makes those of the days to come.
    pub(super) async fn new(mut conn: PgConnection, url: PostgresUrl) -> Result<Self, OpenError> {
        let is_foreign = sqlx::query_scalar(
            "SELECT NOT EXISTS (SELECT FROM pg_inherits
                 WHERE inhparent = 'readings'::regclass AND inhrelid = to_regclass('readings_default'))",
        )
        .fetch_one(&mut conn)
        .await
        .map_err(|error| open_error(&url, error))?;
        let partitions = Self {
            url,
            known: SyncMutex::new(Known {
                is_foreign,
                days: BTreeSet::new(),
                retry_at: None,
            }),
            maker: Mutex::new(Some(conn)),
        };
        partitions.make_for(&[]).await;
        Ok(partitions)
    }

    /// Makes the partitions that the readings of these entries need, and those of the days to come.
    pub(super) async fn make_for(&self, entries: &[Entry]) {
        let today = UtcTime::now().as_microsecond().div_euclid(DAY_US);
        let Some(missing) = self.missing(entries, today) else {
            return;
        };
        let mut maker = self.maker.lock().await;
        for day in missing {
            // Another writer may have been here in the meantime.
            if self.lock().days.contains(&day) {
                continue;
            }
            match self.make(&mut maker, day).await {
                Ok(()) => {
                    self.lock().days.insert(day);
                }
                Err(error) => {
                    tracing::warn!(
                        day = %date(day),
                        reason = reason(&error),
                        "no partition could be made for a day; its readings go to the default one"
                    );
                    self.lock().retry_at = Some(Instant::now() + RETRY_AFTER);
                    return;
                }
            }
        }
    }

    /// Days that should have a partition and are not known to; `None` if there are none, or if it is too
    /// early to try again.
    fn missing(&self, entries: &[Entry], today: i64) -> Option<BTreeSet<i64>> {
        let window = today - LATE_DAYS..=today + AHEAD_DAYS;
        let mut known = self.lock();
        if known.is_foreign || known.retry_at.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        known.retry_at = None;
        let mut missing = BTreeSet::new();
        for entry in entries {
            let Content::Readings(readings) = &entry.content else {
                continue;
            };
            // Times grow within a frame: few frames touch more than one day.
            let day_of = |time_us: Option<&i64>| time_us.map_or(today, |us| us.div_euclid(DAY_US));
            let span = day_of(readings.times_us.first())..=day_of(readings.times_us.last());
            if known.days.contains(span.start()) && span.start() == span.end() {
                continue;
            }
            let days = readings.times_us.iter().map(|us| us.div_euclid(DAY_US));
            missing.extend(days.filter(|day| window.contains(day) && !known.days.contains(day)));
        }
        missing.extend((today..=today + AHEAD_DAYS).filter(|day| !known.days.contains(day)));
        (!missing.is_empty()).then_some(missing)
    }

    async fn make(&self, maker: &mut Option<PgConnection>, day: i64) -> Result<(), sqlx::Error> {
        // Given up unless all goes well, and if this is cancelled.
        let mut conn = match maker.take() {
            Some(conn) => conn,
            None => {
                let connected = super::open::connect(&self.url, true).await;
                connected.map_err(|error| sqlx::Error::Protocol(error.to_string()))?
            }
        };
        make(&mut conn, day).await?;
        *maker = Some(conn);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the partition of a day, unless another gateway has. An error leaves nothing behind, but a
/// transaction: the connection must be given up.
async fn make(conn: &mut PgConnection, day: i64) -> Result<(), sqlx::Error> {
    let name = format!("readings_{}", date(day).strftime("%Y%m%d"));
    run(
        conn,
        format!(
            "BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
             SELECT pg_advisory_xact_lock({MAKERS_LOCK})"
        ),
    )
    .await?;
    let exists: bool = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
        .bind(&name)
        .fetch_one(&mut *conn)
        .await?;
    if !exists {
        let (from, to) = (date(day), date(day + 1));
        let range = format!("ts >= '{from} 00:00+00' AND ts < '{to} 00:00+00'");
        // Whoever stores into the default partition at this moment is awaited; then nobody can add to
        // what has to move.
        run(
            conn,
            format!(
                "CREATE TABLE {name} (LIKE readings INCLUDING ALL);
                 LOCK TABLE readings_default IN ACCESS EXCLUSIVE MODE;
                 WITH moved AS (DELETE FROM readings_default WHERE {range} RETURNING *)
                     INSERT INTO {name} SELECT * FROM moved;
                 ALTER TABLE readings ATTACH PARTITION {name}
                     FOR VALUES FROM ('{from} 00:00+00') TO ('{to} 00:00+00')"
            ),
        )
        .await?;
    }
    run(conn, "COMMIT").await
}

fn date(day: i64) -> Date {
    let epoch = UtcTime::UNIX_EPOCH.to_zoned(TimeZone::UTC).date();
    // Days near the present only.
    epoch.saturating_add(day.days())
}
