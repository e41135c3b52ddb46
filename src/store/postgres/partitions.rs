//! Creates a partition of `readings` for each UTC month, and for each year of the distant past, before it is
//! needed.
//!
//! A query locks every partition, with its indexes, that its plan cannot exclude. A query without a time, or
//! with a time computed from `now()`, locks all of them. So there are few: one for each month of this year and
//! the last, and one for each year before; twelve are added each year. Daily partitions would fill the server's
//! lock table within years.
//!
//! Partitions are created for days from [`FIRST_DAY`] to [`AHEAD_DAYS`] after today. Other readings go to the
//! default partition. When the default partition already holds readings of a day that now gets a partition,
//! they move with it. If part of a month already has a partition, for example one that an operator created,
//! each remaining day gets its own.
//!
//! Creating a partition locks the default partition, moves the period's readings out of it and scans the rest.
//! The more the default partition holds, the longer its writers wait.
//!
//! Invariant: creating partitions never delays a commit for longer than some seconds. The server itself aborts
//! work that takes longer, because it would continue after the gateway abandons it. A partition that cannot be
//! created is retried later, with a delay that grows after each failure; until then its readings go to the
//! default partition.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex as SyncMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::civil::Date;
use jiff::{Timestamp as UtcTime, ToSpan, tz::TimeZone};
use tokio::sync::Mutex;

use super::errors::reason;
use super::errors::{OpenError, open_error};
use super::link::{Link, Patience};
use super::run;
use super::timestamp::Timestamp;

use crate::config::store_url::PostgresUrl;
use crate::store::{Content, Entry};
use crate::time::{DAY_US, utc_now};

/// Days from 1970 to 2000-01-01; earlier readings get no partition.
const FIRST_DAY: i64 = 10_957;
/// Days that can have a partition. They end with November of the year 9999; later readings, from a wrong clock,
/// go to the default partition.
const DAYS: std::ops::Range<i64> = FIRST_DAY..2_932_866;
/// Number of days after today that get a partition.
const AHEAD_DAYS: i64 = 2;
/// Locks for a partition and its two indexes.
const LOCKS_OF_PARTITION: i64 = 3;
/// Number of concurrent queries over all partitions that the server should have locks for.
const QUERIES_AT_ONCE: i64 = 10;
/// Advisory lock "FGpt": gateways on one database create partitions one at a time.
const MAKERS_LOCK: i64 = 1_179_086_964;
/// Maximum wait, in milliseconds, for queries that read the default partition. It is short, because commits
/// into that partition also wait. After one second (`deadlock_timeout`) Postgres cancels a vacuum that blocks
/// the lock.
const LOCK_TIMEOUT_MS: u64 = 2000;
/// Maximum wait for the lock to drop a partition, in milliseconds. Commits queue behind it.
const DROP_TIMEOUT_MS: u64 = 300;
/// Maximum time, in milliseconds, to move readings and scan the default partition on the first attempt. It
/// doubles for the second attempt and doubles again from the third on. All of these are below the time after
/// which an unresponsive server is abandoned.
const WORK_TIMEOUT_MS: u64 = 3000;
/// Maximum wait for a response. It is shorter than that of a commit, which waits for this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A commit creates no further partitions after spending this long on them.
const ROUND_MAX: Duration = Duration::from_secs(3);
/// Interval between two checks for partitions that an operator has detached.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Minimum delay after a partition could not be created, and before any other is tried.
pub(super) const RETRY_MIN: Duration = Duration::from_secs(60);
/// Maximum delay after repeated failures.
const RETRY_MAX: Duration = Duration::from_secs(3600);

pub(super) struct Partitions {
    url: PostgresUrl,
    /// Whether `readings` is not partitioned by this module, so that there is nothing to create.
    is_foreign: bool,
    /// Days since 1970 that are known to have a partition.
    days: SyncMutex<BTreeSet<i64>>,
    /// Creates one partition at a time.
    maker: Mutex<Maker>,
}

struct Maker {
    /// `None` after an error, until the next attempt.
    conn: Option<Link>,
    /// No partition is tried before this time.
    rests_until: Option<Instant>,
    /// Time of the next check for detached partitions.
    look_at: Instant,
    /// Days whose partition could not be created.
    retries: BTreeMap<i64, Retry>,
}

struct Retry {
    at: Instant,
    tries: u32,
}

impl Partitions {
    /// Creates the partitions of the coming days.
    pub(super) async fn new(mut conn: Link, url: PostgresUrl) -> Result<Self, OpenError> {
        let is_foreign = sqlx::query_scalar(
            "SELECT NOT EXISTS (SELECT FROM pg_inherits
                 WHERE inhparent = 'readings'::regclass AND inhrelid = to_regclass('readings_default'))",
        )
        .fetch_one(&mut conn)
        .await
        .map_err(|error| open_error(&url, error))?;
        let locks = LockRoom::read(&mut conn).await;
        locks.map_err(|error| open_error(&url, error))?.warn();
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

    /// Returns whether `readings` is partitioned by this module.
    pub(super) fn are_own(&self) -> bool {
        !self.is_foreign
    }

    /// Returns whether the partitions of the coming days exist.
    #[cfg(test)]
    pub(super) fn are_complete(&self) -> bool {
        let today = utc_now().as_microsecond().div_euclid(DAY_US);
        self.missing(&[], today).is_empty()
    }

    /// Creates the partitions for the readings of these entries and for the coming days.
    pub(super) async fn make_for(&self, entries: &[Entry], now: Instant) {
        self.look_for_detached(now).await;
        let today = utc_now().as_microsecond().div_euclid(DAY_US);
        let missing = self.missing(entries, today);
        if missing.is_empty() {
            return;
        }
        let mut maker = self.maker.lock().await;
        let began = Instant::now();
        for day in missing {
            // Another writer may have created it in the meantime.
            if self.lock().contains(&day) || !maker.may_try(day, now) {
                continue;
            }
            // Recorded before the attempt, which may be cancelled at any time.
            let tries = maker.put_off(day, now);
            match maker.make(&self.url, day, work_timeout_ms(tries)).await {
                Ok(None) => {}
                Ok(Some(partition)) => {
                    tracing::warn!(
                        partition,
                        look_s = wait_after(tries).as_secs(),
                        "partition detached, using default partition; attach, rename or drop it"
                    );
                    maker.rests_until = None;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(
                        day = %date(day),
                        reason = reason(&error),
                        retry_s = wait_after(tries).as_secs(),
                        "could not create partition, using default partition"
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

    /// Forgets days whose partition was detached or dropped, so that they are retried and logged.
    async fn look_for_detached(&self, now: Instant) {
        // A task that is creating partitions checks them too.
        let Ok(mut maker) = self.maker.try_lock() else {
            return;
        };
        if self.is_foreign || now < maker.look_at {
            return;
        }
        maker.look_at = now + LOOK_INTERVAL;
        match maker.attached(&self.url).await {
            Ok(attached) => self.lock().retain(|day| {
                let day_us = day * DAY_US;
                attached
                    .iter()
                    .any(|(from, to)| (*from..*to).contains(&day_us))
            }),
            // The next commit reports the error better.
            Err(error) => tracing::debug!(%error, "could not list partitions"),
        }
    }

    /// Returns days that need a partition and may not have one.
    fn missing(&self, entries: &[Entry], today: i64) -> BTreeSet<i64> {
        let window = FIRST_DAY..=today + AHEAD_DAYS;
        let mut missing = BTreeSet::new();
        if self.is_foreign {
            return missing;
        }
        let known = self.lock();
        for entry in entries {
            let Content::Readings(readings) = &entry.content else {
                continue;
            };
            // Times increase within a frame, so few frames span several days.
            let day_of = |time_us: Option<&i64>| time_us.map_or(today, |us| us.div_euclid(DAY_US));
            let span = day_of(readings.times_us.first())..=day_of(readings.times_us.last());
            if known.contains(span.start()) && span.start() == span.end() {
                continue;
            }
            let days = readings.times_us.iter().map(|us| us.div_euclid(DAY_US));
            missing.extend(days.filter(|day| window.contains(day) && !known.contains(day)));
        }
        missing.extend((today..=today + AHEAD_DAYS).filter(|day| !known.contains(day)));
        missing.retain(|day| DAYS.contains(day));
        missing
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<i64>> {
        self.days.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Number of locks that the server has capacity for, and of partitions to lock.
#[derive(Debug)]
struct LockRoom {
    partitions: i64,
    per_transaction: i64,
    transactions: i64,
}

impl LockRoom {
    async fn read(conn: &mut Link) -> Result<LockRoom, sqlx::Error> {
        let (partitions, per_transaction, transactions) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM pg_inherits WHERE inhparent = 'readings'::regclass),
                 current_setting('max_locks_per_transaction')::bigint,
                 current_setting('max_connections')::bigint
                     + current_setting('max_prepared_transactions')::bigint",
        )
        .fetch_one(&mut *conn)
        .await?;
        Ok(LockRoom {
            partitions,
            per_transaction,
            transactions,
        })
    }

    /// Returns the `max_locks_per_transaction` needed for [`QUERIES_AT_ONCE`], if the setting is lower.
    fn lacks(&self) -> Option<i64> {
        let needed = self.partitions * LOCKS_OF_PARTITION * QUERIES_AT_ONCE;
        let wanted = needed.div_euclid(self.transactions.max(1)) + 1;
        (wanted > self.per_transaction).then_some(wanted)
    }

    fn warn(&self) {
        if let Some(wanted) = self.lacks() {
            tracing::warn!(
                partitions = self.partitions,
                max_locks_per_transaction = self.per_transaction,
                wanted,
                "max_locks_per_transaction too low for the number of partitions; raise it to avoid \
                 \"out of shared memory\" errors"
            );
        }
    }
}

impl Maker {
    fn may_try(&self, day: i64, now: Instant) -> bool {
        let retry = self.retries.get(&day).map(|retry| retry.at);
        let not_before = retry.max(self.rests_until);
        not_before.is_none_or(|at| now >= at)
    }

    /// Postpones the day, and briefly all others, so that they do not fail one after the other. Returns the
    /// number of earlier attempts for the day.
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
    ) -> Result<Option<String>, sqlx::Error> {
        // Dropped on any error and on cancellation.
        let mut conn = self.conn(url).await?;
        let detached = make(&mut conn, day, work_timeout_ms).await?;
        self.conn = Some(conn);
        Ok(detached)
    }

    /// Returns the time ranges of the attached partitions.
    async fn attached(&mut self, url: &PostgresUrl) -> Result<Vec<(i64, i64)>, sqlx::Error> {
        let mut conn = self.conn(url).await?;
        let attached = bounds(&mut conn).await?;
        self.conn = Some(conn);
        Ok(attached)
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

/// Creates the partition of a day if it does not exist. Returns the name of a table that has the partition's
/// name but is not attached, as an operator may have left it. After an error a transaction is still open, so
/// the connection must be dropped.
async fn make(
    conn: &mut Link,
    day: i64,
    work_timeout_ms: u64,
) -> Result<Option<String>, sqlx::Error> {
    run(
        conn,
        format!(
            "BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
             SET LOCAL statement_timeout = {work_timeout_ms}; \
             SELECT pg_advisory_xact_lock({MAKERS_LOCK})"
        ),
    )
    .await?;
    let today = utc_now().as_microsecond().div_euclid(DAY_US);
    let span = Span::to_make(day, today, &bounds(conn).await?);
    let mut detached = None;
    if let Some(span) = span {
        let exists: bool = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(&span.name)
            .fetch_one(&mut *conn)
            .await?;
        match exists {
            true => detached = Some(span.name),
            false => make_table(conn, &span).await?,
        }
    }
    run(conn, "COMMIT").await?;
    Ok(detached)
}

async fn make_table(conn: &mut Link, Span { name, from, to }: &Span) -> Result<(), sqlx::Error> {
    let range = format!("ts >= '{from} 00:00+00' AND ts < '{to} 00:00+00'");
    // Waits for current writers of the default partition; then no new rows can arrive among those that move.
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
    .await
}

/// Returns the time ranges of the existing partitions, in microseconds.
async fn bounds(conn: &mut Link) -> Result<Vec<(i64, i64)>, sqlx::Error> {
    let partitions = partitions(conn).await?;
    let bounds = partitions
        .into_iter()
        .map(|partition| (partition.from_us, partition.to_us));
    Ok(bounds.collect())
}

/// A partition of `readings` with a time range: from `from_us` to before `to_us`.
pub struct Partition {
    /// Its name, as SQL.
    pub name: String,
    pub from_us: i64,
    pub to_us: i64,
}

/// Returns the attached partitions except the default partition.
pub async fn partitions(conn: &mut Link) -> Result<Vec<Partition>, sqlx::Error> {
    let partitions: Vec<(String, Timestamp, Timestamp)> = sqlx::query_as(
        "SELECT c.oid::regclass::text, coalesce(nullif(translate(bound[1], '''', ''), 'MINVALUE'), '-infinity')::timestamptz,
             coalesce(nullif(translate(bound[2], '''', ''), 'MAXVALUE'), 'infinity')::timestamptz
         FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid,
             regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\((.*)\\) TO \\((.*)\\)') AS bound
         WHERE i.inhparent = 'readings'::regclass AND NOT i.inhdetachpending AND bound IS NOT NULL",
    )
    .fetch_all(&mut *conn)
    .await?;
    let partitions = partitions.into_iter().map(|(name, from, to)| Partition {
        name,
        from_us: from.0,
        to_us: to.0,
    });
    Ok(partitions.collect())
}

/// Drops a partition with its readings. Returns false if a query of someone else uses `readings` for longer than
/// [`DROP_TIMEOUT_MS`]: commits wait meanwhile.
pub async fn drop_partition(conn: &mut Link, partition: &Partition) -> Result<bool, sqlx::Error> {
    const LOCK_NOT_AVAILABLE: &str = "55P03";
    let name = &partition.name;
    let dropped = run(
        conn,
        format!(
            "BEGIN; SET LOCAL lock_timeout = {DROP_TIMEOUT_MS}; \
             SELECT pg_advisory_xact_lock({MAKERS_LOCK}); DROP TABLE {name}; COMMIT"
        ),
    )
    .await;
    let Err(error) = dropped else {
        return Ok(true);
    };
    run(conn, "ROLLBACK").await?;
    let code = error.as_database_error().and_then(|error| error.code());
    match code.as_deref() {
        Some(LOCK_NOT_AVAILABLE) => Ok(false),
        _ => Err(error),
    }
}

/// Time range of a partition: whole days, end exclusive.
#[derive(Debug, PartialEq)]
struct Span {
    name: String,
    from: Date,
    to: Date,
}

impl Span {
    /// Returns the range to create for a day; `None` if a partition covers it. `bounds` are the ranges of the
    /// existing partitions.
    fn to_make(day: i64, today: i64, bounds: &[(i64, i64)]) -> Option<Span> {
        let overlaps = |from_us: i64, to_us: i64| {
            let mut bounds = bounds.iter();
            bounds.any(|(from, to)| *from < to_us && from_us < *to)
        };
        if overlaps(day * DAY_US, (day + 1) * DAY_US) {
            return None;
        }
        let (of_day, day_after) = (date(day), date(day + 1));
        let day = ("%Y%m%d", of_day, day_after);
        let month = of_day.first_of_month();
        let month = ("%Y%m", month, month.saturating_add(1.month()));
        let year = of_day.first_of_year();
        let year = ("%Y", year, year.saturating_add(1.year()));
        let is_long_ago = of_day.year() < date(today).year() - 1;
        let spans = [Some(year).filter(|_| is_long_ago), Some(month), Some(day)];
        let mut spans = spans.into_iter().flatten();
        let free = spans.find(|(_, from, to)| !overlaps(us(*from), us(*to)));
        let (format, from, to) = free.unwrap_or(day);
        Some(Span {
            name: from.strftime(&format!("readings_{format}")).to_string(),
            from,
            to,
        })
    }
}

fn us(date: Date) -> i64 {
    let midnight = date.to_zoned(TimeZone::UTC);
    midnight.map_or(i64::MAX, |midnight| midnight.timestamp().as_microsecond())
}

fn date(day: i64) -> Date {
    let epoch = UtcTime::UNIX_EPOCH.to_zoned(TimeZone::UTC).date();
    epoch.saturating_add(day.days())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_stay_few_for_any_age_of_a_store() {
        let day_of = |year, month, day| us(Date::constant(year, month, day)).div_euclid(DAY_US);
        let mut bounds = Vec::new();
        let mut names = Vec::new();
        // For ten years, every twenty days, readings of each week since 2000.
        for today in (day_of(2026, 1, 15)..day_of(2036, 1, 15)).step_by(20) {
            let last = today + AHEAD_DAYS;
            for day in (FIRST_DAY..=last).step_by(7).chain([last]) {
                if let Some(span) = Span::to_make(day, today, &bounds) {
                    assert!((us(span.from)..us(span.to)).contains(&(day * DAY_US)));
                    bounds.push((us(span.from), us(span.to)));
                    names.push(span.name);
                }
            }
        }
        // 25 years, and the months of about eleven years.
        assert!(names.len() <= 25 + 12 * 11 + 1, "{}", names.len());
        for name in ["readings_2003", "readings_202511", "readings_203601"] {
            assert!(names.iter().any(|made| made == name), "{names:?}");
        }
        bounds.sort_unstable();
        assert!(bounds.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }

    #[test]
    fn a_server_with_few_locks_is_noticed() {
        let locks = |partitions| LockRoom {
            partitions,
            per_transaction: 64,
            transactions: 100,
        };
        assert_eq!(locks(158).lacks(), None);
        assert_eq!(locks(1825).lacks(), Some(548));
    }

    #[test]
    fn a_day_gets_its_own_partition_if_part_of_its_month_has_one() {
        let day_of = |day| us(Date::constant(2026, 11, day)).div_euclid(DAY_US);
        let taken = [(day_of(5) * DAY_US, day_of(6) * DAY_US)];
        let made = Span::to_make(day_of(9), day_of(27), &taken).unwrap();
        assert_eq!(made.name, "readings_20261109");
        assert_eq!(us(made.from), day_of(9) * DAY_US);
        assert_eq!(us(made.to), day_of(10) * DAY_US);
        assert_eq!(Span::to_make(day_of(5), day_of(27), &taken), None);
        let made = Span::to_make(day_of(9), day_of(27), &[]).unwrap();
        assert_eq!(made.name, "readings_202611");
    }

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
