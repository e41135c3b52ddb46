//! A partition of `readings` for each UTC day, made before it is needed.
//!
//! Partitions are made for days near the present: from [`LATE_DAYS`] ago, for what devices kept while
//! they were offline, to [`AHEAD_DAYS`] from now. Readings of other times go to the default partition,
//! so a device with a wrong clock makes no tables. When the present comes near a day of which the
//! default partition holds readings already, they move with it.
//!
//! To make a partition, the default partition is locked, what it has of that day moves, and all of it is
//! looked through: the more it holds, the longer whoever stores into it has to wait.
//!
//! Invariant: nothing here keeps readings from being stored for longer than some seconds. The server
//! itself ends what takes longer, for it goes on with what is given up here. A partition that cannot be
//! made now is tried again later, and later still the more often it was in vain; until then its readings
//! go to the default partition.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex as SyncMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::civil::Date;
use jiff::{Timestamp as UtcTime, ToSpan, tz::TimeZone};
use tokio::sync::Mutex;

use super::link::{Link, Patience};
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
/// stored meanwhile would have to wait as well. After a second (`deadlock_timeout`) Postgres makes a
/// vacuum give way.
const LOCK_TIMEOUT_MS: u64 = 2000;
/// So long may readings take to move at the first try, and the look through the default partition. Twice
/// as long the second time, and four times from the third one on: all of it stays below the time after
/// which a server is given up that does not answer.
const WORK_TIMEOUT_MS: u64 = 3000;
/// A server that does not answer is given up sooner than by a commit, which waits for this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A commit makes no further partition when it has made some for so long.
const ROUND_MAX: Duration = Duration::from_secs(3);
/// From one look for partitions that an operator has detached to the next.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// After a partition could not be made, and at least before any other is tried.
pub(super) const RETRY_MIN: Duration = Duration::from_secs(60);
/// After a partition could not be made time and again.
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// The partitions; see the module.
pub(super) struct Partitions {
    url: PostgresUrl,
    /// `readings` is not partitioned by this scheme, so there is nothing to make.
    is_foreign: bool,
    /// Days since 1970 that have a partition, as far as is known.
    days: SyncMutex<BTreeSet<i64>>,
    /// Makes one at a time.
    maker: Mutex<Maker>,
}

struct Maker {
    /// `None` after an error, until the next try.
    conn: Option<Link>,
    /// No day is tried before.
    rests_until: Option<Instant>,
    /// When the next look for detached partitions is due.
    look_at: Instant,
    /// Days whose partition could not be made.
    retries: BTreeMap<i64, Retry>,
}

struct Retry {
    at: Instant,
    /// How often it was in vain.
    tries: u32,
}

impl Partitions {
    /// Makes those of the days to come.
    pub(super) async fn new(mut conn: Link, url: PostgresUrl) -> Result<Self, OpenError> {
        let is_foreign = sqlx::query_scalar(
            "SELECT NOT EXISTS (SELECT FROM pg_inherits
                 WHERE inhparent = 'readings'::regclass AND inhrelid = to_regclass('readings_default'))",
        )
        .fetch_one(&mut conn)
        .await
        .map_err(|error| open_error(&url, error))?;
        let partitions = Self {
            url,
            is_foreign,
            days: SyncMutex::default(),
            maker: Mutex::new(Maker {
                conn: Some(conn),
                rests_until: None,
                look_at: Instant::now() + LOOK_INTERVAL,
                retries: BTreeMap::new(),
            }),
        };
        partitions.make_for(&[], Instant::now()).await;
        Ok(partitions)
    }

    /// Makes the partitions that the readings of these entries need, and those of the days to come.
    pub(super) async fn make_for(&self, entries: &[Entry], now: Instant) {
        self.look_for_detached(now).await;
        let today = UtcTime::now().as_microsecond().div_euclid(DAY_US);
        let missing = self.missing(entries, today);
        if missing.is_empty() {
            return;
        }
        let mut maker = self.maker.lock().await;
        let began = Instant::now();
        for day in missing {
            // Another writer may have been here in the meantime.
            if self.lock().contains(&day) || !maker.may_try(day, now) {
                continue;
            }
            // Before it is tried: it may be given up at any moment.
            let tries = maker.put_off(day, now);
            match maker.make(&self.url, day, work_timeout_ms(tries)).await {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!(
                        partition = name(day),
                        look_s = wait_after(tries).as_secs(),
                        "partition is detached, its readings go to the default partition; attach it \
                         again, or rename it and a new one is made"
                    );
                    maker.rests_until = None;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(
                        day = %date(day),
                        reason = reason(&error),
                        retry_s = wait_after(tries).as_secs(),
                        "no partition could be made for a day; its readings go to the default one"
                    );
                    return;
                }
            }
            self.lock().insert(day);
            maker.retries.remove(&day);
            if began.elapsed() < ROUND_MAX {
                maker.rests_until = None;
            }
        }
    }

    /// Forgets days whose partition was detached or dropped since: they are tried again, and warned of.
    async fn look_for_detached(&self, now: Instant) {
        // Whoever makes partitions at this moment looks as well.
        let Ok(mut maker) = self.maker.try_lock() else {
            return;
        };
        if self.is_foreign || now < maker.look_at {
            return;
        }
        maker.look_at = now + LOOK_INTERVAL;
        match maker.attached(&self.url).await {
            Ok(attached) => self.lock().retain(|day| attached.contains(&name(*day))),
            // The commit that comes next says it better.
            Err(error) => tracing::debug!(%error, "partitions cannot be looked at"),
        }
    }

    /// Days that should have a partition and are not known to.
    fn missing(&self, entries: &[Entry], today: i64) -> BTreeSet<i64> {
        let window = today - LATE_DAYS..=today + AHEAD_DAYS;
        let mut missing = BTreeSet::new();
        if self.is_foreign {
            return missing;
        }
        let known = self.lock();
        for entry in entries {
            let Content::Readings(readings) = &entry.content else {
                continue;
            };
            // Times grow within a frame: few frames touch more than one day.
            let day_of = |time_us: Option<&i64>| time_us.map_or(today, |us| us.div_euclid(DAY_US));
            let span = day_of(readings.times_us.first())..=day_of(readings.times_us.last());
            if known.contains(span.start()) && span.start() == span.end() {
                continue;
            }
            let days = readings.times_us.iter().map(|us| us.div_euclid(DAY_US));
            missing.extend(days.filter(|day| window.contains(day) && !known.contains(day)));
        }
        missing.extend((today..=today + AHEAD_DAYS).filter(|day| !known.contains(day)));
        missing
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<i64>> {
        self.days.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maker {
    fn may_try(&self, day: i64, now: Instant) -> bool {
        let retry = self.retries.get(&day).map(|retry| retry.at);
        let not_before = retry.max(self.rests_until);
        not_before.is_none_or(|at| now >= at)
    }

    /// Has the day wait, and for a while all others, so that they do not fail one after the other. Gives
    /// back how often the day was tried before.
    fn put_off(&mut self, day: i64, now: Instant) -> u32 {
        let tries = self.retries.get(&day).map_or(0, |retry| retry.tries);
        let retry = Retry {
            at: now + wait_after(tries),
            tries: tries + 1,
        };
        self.retries.insert(day, retry);
        self.rests_until = Some(now + RETRY_MIN);
        tries
    }

    async fn make(
        &mut self,
        url: &PostgresUrl,
        day: i64,
        work_timeout_ms: u64,
    ) -> Result<bool, sqlx::Error> {
        // Given up unless all goes well, and if this is cancelled.
        let mut conn = self.conn(url).await?;
        let is_attached = make(&mut conn, day, work_timeout_ms).await?;
        self.conn = Some(conn);
        Ok(is_attached)
    }

    /// Names of the partitions that are attached.
    async fn attached(&mut self, url: &PostgresUrl) -> Result<BTreeSet<String>, sqlx::Error> {
        let mut conn = self.conn(url).await?;
        let attached: Vec<String> = sqlx::query_scalar(
            "SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
             WHERE inhparent = 'readings'::regclass AND NOT inhdetachpending",
        )
        .fetch_all(&mut conn)
        .await?;
        self.conn = Some(conn);
        Ok(attached.into_iter().collect())
    }

    async fn conn(&mut self, url: &PostgresUrl) -> Result<Link, sqlx::Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => {
                let connected = super::open::connect(url, true).await;
                connected.map_err(|error| sqlx::Error::Protocol(error.to_string()))?
            }
        };
        conn.set_patience(Patience::Within(ANSWER_TIMEOUT));
        Ok(conn)
    }
}

fn work_timeout_ms(tries: u32) -> u64 {
    WORK_TIMEOUT_MS << tries.min(2)
}

fn wait_after(tries: u32) -> Duration {
    (RETRY_MIN * (1 << tries.min(6))).min(RETRY_MAX)
}

/// Makes the partition of a day, unless another gateway has; returns whether it is attached, which an
/// operator may have undone. An error leaves nothing behind, but a transaction: the connection must be
/// given up.
async fn make(conn: &mut Link, day: i64, work_timeout_ms: u64) -> Result<bool, sqlx::Error> {
    let name = name(day);
    run(
        conn,
        format!(
            "BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
             SET LOCAL statement_timeout = {work_timeout_ms}; \
             SELECT pg_advisory_xact_lock({MAKERS_LOCK})"
        ),
    )
    .await?;
    let (exists, is_attached): (bool, bool) = sqlx::query_as(
        "SELECT to_regclass($1) IS NOT NULL, EXISTS (SELECT FROM pg_inherits
             WHERE inhrelid = to_regclass($1) AND inhparent = 'readings'::regclass
                 AND NOT inhdetachpending)",
    )
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
    run(conn, "COMMIT").await?;
    Ok(is_attached || !exists)
}

fn name(day: i64) -> String {
    format!("readings_{}", date(day).strftime("%Y%m%d"))
}

fn date(day: i64) -> Date {
    let epoch = UtcTime::UNIX_EPOCH.to_zoned(TimeZone::UTC).date();
    // Days near the present only.
    epoch.saturating_add(day.days())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_waits_longer_each_time_and_the_others_do_not() {
        let mut maker = Maker {
            conn: None,
            rests_until: None,
            look_at: Instant::now(),
            retries: BTreeMap::new(),
        };
        let mut now = Instant::now();
        let second = Duration::from_secs(1);
        for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert!(maker.may_try(7, now) && maker.may_try(8, now));
            maker.put_off(7, now);
            assert!(!maker.may_try(8, now + 59 * second));
            assert!(maker.may_try(8, now + 60 * second));
            now += 60 * minutes * second;
            assert!(!maker.may_try(7, now - second));
        }
        let timeouts = [0, 1, 2, 3, 99].map(work_timeout_ms);
        assert_eq!(timeouts, [3000, 6000, 12_000, 12_000, 12_000]);
    }
}
