//! Deletes what is older than the retention of the store: readings, the ledger, quarantine and events.
//!
//! Runs concurrently with the commits, on a separate connection, a few rows at a time.
//!
//! Invariants: the newest reading of each series stays, the newest frame of each stream, and the frame of every reading
//! that stays. A frame that is sent again is recognized by its stream's durable_seq, so it needs no row.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::connection::Driver;
use super::{Argument, Connection, QueryError, Row};
use crate::config::RetentionSettings;
use crate::config::retention::ReadingRetention;
use crate::store::postgres::{self, Partition};
use crate::time::DAY_US;

pub use self::task::Retention;

mod task;

/// Number of rows that one query reads.
const ROWS_PER_PAGE: i64 = 500;
/// Number of readings that one transaction deletes, if all are of one series.
const READINGS_AT_ONCE: i64 = 2000;
/// A transaction deletes no further readings after this time.
const TRANSACTION_MAX: Duration = Duration::from_millis(20);
/// Pause after a transaction, during which gateways commit.
const PAUSE: Duration = Duration::from_millis(20);
/// Number of pages that one transaction returns to the file system.
const PAGES_AT_ONCE: i64 = 256;
/// A SQLite file keeps this part of its pages free, so that it does not shrink and grow again with each round.
const FREE_PAGES_SHARE: i64 = 32;

/// Numbers of deleted rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    pub readings: u64,
    /// Partitions of readings in Postgres.
    pub partitions: u64,
    pub frames: u64,
    pub gaps: u64,
    pub quarantined: u64,
    pub events: u64,
}

/// Whether a round deletes, or only counts what it would delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Delete,
    Count,
}

/// One pass over the store.
struct Round<'c> {
    connection: &'c mut Connection,
    settings: &'c RetentionSettings,
    now_us: i64,
    action: Action,
    deleted: Deleted,
    /// Frames of readings that stay although they are too old.
    kept: HashSet<i64>,
}

/// Checks the whole store once.
///
/// # Cancel safety
/// The next round continues.
pub async fn round(
    connection: &mut Connection,
    settings: &RetentionSettings,
    now_us: i64,
    action: Action,
) -> Result<Deleted, QueryError> {
    let mut round = Round::new(connection, settings, now_us, action);
    round.run().await?;
    Ok(round.deleted)
}

impl<'c> Round<'c> {
    fn new(
        connection: &'c mut Connection,
        settings: &'c RetentionSettings,
        now_us: i64,
        action: Action,
    ) -> Round<'c> {
        Round {
            connection,
            settings,
            now_us,
            action,
            deleted: Deleted::default(),
            kept: HashSet::new(),
        }
    }

    async fn run(&mut self) -> Result<(), QueryError> {
        let readings = self.settings.readings();
        let mut gone_before_us = None;
        if readings.is_limited() {
            gone_before_us = match self.connection.is_sqlite() {
                true => self.sorted_readings(&readings).await?,
                false => self.partitioned_readings(&readings).await?,
            };
        }
        if let (Some(days), Some(gone_before_us)) = (self.settings.frames_days, gone_before_us) {
            let before_us = self.before_us(days);
            self.frames(before_us, gone_before_us).await?;
            self.gaps(before_us).await?;
        }
        if let Some(days) = self.settings.quarantine_days {
            self.quarantine(self.before_us(days)).await?;
        }
        if let Some(days) = self.settings.reported_events_days {
            self.events(self.before_us(days)).await?;
        }
        if self.connection.is_sqlite() && self.action == Action::Delete {
            self.shrink().await?;
        }
        Ok(())
    }

    fn before_us(&self, days: u32) -> i64 {
        self.now_us.saturating_sub(i64::from(days) * DAY_US)
    }

    /// Deletes readings in SQLite; returns the time before which only readings that stay are left, if there is one.
    async fn sorted_readings(
        &mut self,
        retention: &ReadingRetention,
    ) -> Result<Option<i64>, QueryError> {
        self.readings_of_series("readings_sorted", retention, None)
            .await?;
        Ok(retention.longest().map(|days| self.before_us(days)))
    }

    /// Drops partitions in Postgres, and deletes readings of the default partition and those with a shorter retention
    /// than others. Returns the time before which no readings are left, if there is one.
    async fn partitioned_readings(
        &mut self,
        retention: &ReadingRetention,
    ) -> Result<Option<i64>, QueryError> {
        let longest = retention.longest();
        let before_us = longest.map(|days| self.before_us(days));
        let mut gone_before_us = before_us;
        if let Some(before_us) = before_us {
            for partition in self.partitions().await? {
                if partition.to_us > before_us {
                    gone_before_us = gone_before_us.min(Some(partition.from_us));
                    continue;
                }
                if self.action == Action::Count {
                    let sql = format!("SELECT count(*) FROM {}", partition.name);
                    let count = self.connection.integer(&sql, &[]).await?;
                    self.deleted.readings += count.unsigned_abs();
                } else if !self.drop_partition(&partition).await? {
                    gone_before_us = gone_before_us.min(Some(partition.from_us));
                    continue;
                }
                self.deleted.partitions += 1;
            }
            self.default_partition(before_us).await?;
        }
        if !retention.rules.is_empty() {
            self.readings_of_series("readings", retention, before_us)
                .await?;
        }
        Ok(gone_before_us)
    }

    async fn partitions(&mut self) -> Result<Vec<Partition>, QueryError> {
        match &mut self.connection.driver {
            Driver::Sqlite(_) => Ok(Vec::new()),
            Driver::Postgres(conn) => Ok(postgres::partitions(conn).await?),
        }
    }

    async fn drop_partition(&mut self, partition: &Partition) -> Result<bool, QueryError> {
        match &mut self.connection.driver {
            Driver::Sqlite(_) => Ok(false),
            Driver::Postgres(conn) => Ok(postgres::drop_partition(conn, partition).await?),
        }
    }

    async fn default_partition(&mut self, before_us: i64) -> Result<(), QueryError> {
        let exists = "SELECT CASE WHEN to_regclass('readings_default') IS NULL THEN 0 ELSE 1 END";
        if self.connection.integer(exists, &[]).await? == 0 {
            return Ok(());
        }
        let before = [Argument::Time(before_us)];
        if self.action == Action::Count {
            let sql = "SELECT count(*) FROM readings_default WHERE ts < $1";
            let count = self.connection.integer(sql, &before).await?;
            self.deleted.readings += count.unsigned_abs();
            return Ok(());
        }
        let sql = format!(
            "DELETE FROM readings_default WHERE ctid IN (
                 SELECT ctid FROM readings_default WHERE ts < $1 LIMIT {READINGS_AT_ONCE}
             )"
        );
        loop {
            let deleted = self.connection.step(&sql, &before).await?;
            self.deleted.readings += deleted;
            if deleted < READINGS_AT_ONCE as u64 {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Deletes readings by series, except those before `done_before_us`, which are gone.
    async fn readings_of_series(
        &mut self,
        table: &str,
        retention: &ReadingRetention,
        done_before_us: Option<i64>,
    ) -> Result<(), QueryError> {
        let page = "SELECT s.id, d.name, s.channel, s.unit FROM series AS s JOIN devices AS d ON d.id = s.device_id
            WHERE s.id > $1 ORDER BY s.id LIMIT $2";
        let mut after = 0;
        loop {
            let series = self
                .connection
                .rows(page, &[after.into(), ROWS_PER_PAGE.into()])
                .await?;
            let Some(last) = series.last() else {
                return Ok(());
            };
            after = last.integer(0)?;
            let mut excess = Vec::new();
            for row in &series {
                let Some(days) = retention.days_of(row.text(1)?, row.text(2)?, row.text(3)?) else {
                    continue;
                };
                let before_us = self.before_us(days);
                if Some(before_us) != done_before_us {
                    excess.extend(self.excess(table, row.integer(0)?, before_us).await?);
                }
            }
            match self.action {
                Action::Count => self.count_readings(table, &excess, done_before_us).await?,
                Action::Delete => self.delete_readings(table, excess).await?,
            }
        }
    }

    /// Returns the series with the time before which its readings are deleted, if it has any.
    async fn excess(
        &mut self,
        table: &str,
        series: i64,
        before_us: i64,
    ) -> Result<Option<(i64, i64)>, QueryError> {
        let oldest = format!("SELECT ts FROM {table} WHERE series_id = $1 ORDER BY ts LIMIT 1");
        let oldest = self.connection.rows(&oldest, &[series.into()]).await?;
        let Some(oldest) = oldest.first() else {
            return Ok(None);
        };
        if oldest.integer(0)? >= before_us {
            return Ok(None);
        }
        // As in the view `latest`.
        let day = match self.connection.is_sqlite() {
            true => "86400000000",
            false => "interval '1 day'",
        };
        let newest = format!(
            "SELECT r.ts, r.frame_id FROM {table} AS r JOIN frames AS f ON f.id = r.frame_id
             WHERE r.series_id = $1 AND r.ts <= $2 AND r.ts <= f.received_at + {day}
             ORDER BY r.ts DESC, r.frame_id DESC LIMIT 1"
        );
        let soon = Argument::Time(self.now_us.saturating_add(DAY_US));
        let newest = self
            .connection
            .rows(&newest, &[series.into(), soon])
            .await?;
        let Some(newest) = newest.first() else {
            return Ok(Some((series, before_us)));
        };
        let newest_us = newest.integer(0)?;
        if newest_us < before_us {
            // Later readings are not plausible, but stay as well.
            self.keep_frames(table, series, newest_us, before_us)
                .await?;
        }
        let before_us = before_us.min(newest_us);
        Ok((oldest.integer(0)? < before_us).then_some((series, before_us)))
    }

    /// Keeps the frames of a series' readings that stay although they are too old.
    async fn keep_frames(
        &mut self,
        table: &str,
        series: i64,
        from_us: i64,
        before_us: i64,
    ) -> Result<(), QueryError> {
        let sql =
            format!("SELECT frame_id FROM {table} WHERE series_id = $1 AND ts >= $2 AND ts < $3");
        let range = [Argument::Time(from_us), Argument::Time(before_us)];
        let arguments = [series.into(), range[0], range[1]];
        for row in self.connection.rows(&sql, &arguments).await? {
            self.kept.insert(row.integer(0)?);
        }
        Ok(())
    }

    async fn count_readings(
        &mut self,
        table: &str,
        excess: &[(i64, i64)],
        done_before_us: Option<i64>,
    ) -> Result<(), QueryError> {
        let is_counted = match done_before_us {
            Some(_) => "AND ts >= $3",
            None => "AND $3 IS NOT NULL",
        };
        let sql =
            format!("SELECT count(*) FROM {table} WHERE series_id = $1 AND ts < $2 {is_counted}");
        let done_before = Argument::Time(done_before_us.unwrap_or_default());
        for (series, before_us) in excess {
            let arguments = [(*series).into(), Argument::Time(*before_us), done_before];
            let count = self.connection.integer(&sql, &arguments).await?;
            self.deleted.readings += count.unsigned_abs();
        }
        Ok(())
    }

    async fn delete_readings(
        &mut self,
        table: &str,
        mut excess: Vec<(i64, i64)>,
    ) -> Result<(), QueryError> {
        while !excess.is_empty() {
            self.connection.begin().await?;
            let deleted = self.delete_some_readings(table, &mut excess).await;
            self.deleted.readings += self.connection.end(deleted).await?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Deletes readings for a short time, and removes the series that have no more of them from `excess`.
    async fn delete_some_readings(
        &mut self,
        table: &str,
        excess: &mut Vec<(i64, i64)>,
    ) -> Result<u64, QueryError> {
        let sql = format!(
            "DELETE FROM {table} WHERE series_id = $1 AND ts <= (
                 SELECT max(ts) FROM (
                     SELECT ts FROM {table} WHERE series_id = $1 AND ts < $2 ORDER BY ts LIMIT {READINGS_AT_ONCE}
                 ) AS oldest
             )"
        );
        let began = Instant::now();
        let mut rows = 0;
        while let Some((series, before_us)) = excess.last().copied() {
            let arguments = [series.into(), Argument::Time(before_us)];
            let deleted = self.connection.execute(&sql, &arguments).await?;
            rows += deleted;
            if deleted < READINGS_AT_ONCE as u64 {
                excess.pop();
            }
            if rows >= READINGS_AT_ONCE as u64 || began.elapsed() >= TRANSACTION_MAX {
                break;
            }
        }
        Ok(rows)
    }

    /// Deletes rows of the ledger that were received before `before_us`, and whose readings are gone: those before
    /// `gone_before_us`. The newest frame of a stream shows when its device was last heard, and a frame in quarantine
    /// can be replayed.
    async fn frames(&mut self, before_us: i64, gone_before_us: i64) -> Result<(), QueryError> {
        let is_newest = match self.connection.is_sqlite() {
            true => "",
            false => {
                "AND f.id NOT IN (SELECT n.frame_id FROM newest AS n WHERE n.frame_id IS NOT NULL)"
            }
        };
        let page = format!(
            "SELECT f.id, CASE WHEN f.received_at < $2 THEN 1 ELSE 0 END,
                 CASE WHEN f.received_at < $2 AND f.seq < st.durable_seq AND (f.last_ts IS NULL OR f.last_ts < $3)
                     {is_newest}
                     AND NOT EXISTS (SELECT 1 FROM quarantine AS q WHERE q.stream_id = f.stream_id AND q.seq = f.seq)
                 THEN 1 ELSE 0 END
             FROM frames AS f JOIN streams AS st ON st.id = f.stream_id
             WHERE f.id > $1 ORDER BY f.id LIMIT $4"
        );
        let mut after = 0;
        loop {
            let times = [Argument::Time(before_us), Argument::Time(gone_before_us)];
            let arguments = [after.into(), times[0], times[1], ROWS_PER_PAGE.into()];
            let rows = self.connection.rows(&page, &arguments).await?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            after = last.integer(0)?;
            let mut is_any_old = false;
            let mut ids = Vec::new();
            for row in &rows {
                is_any_old |= row.integer(1)? == 1;
                let id = row.integer(0)?;
                if row.integer(2)? == 1 && !self.kept.contains(&id) {
                    ids.push(id);
                }
            }
            self.deleted.frames += self.delete_by_id("frames", &ids).await?;
            // Ids are in the order of arrival, except for a few.
            if !is_any_old {
                return Ok(());
            }
        }
    }

    async fn gaps(&mut self, before_us: i64) -> Result<(), QueryError> {
        let page = "SELECT g.stream_id, g.from_seq FROM gaps AS g
            WHERE (g.stream_id, g.from_seq) > ($1, $2) AND g.received_at < $3
            ORDER BY g.stream_id, g.from_seq LIMIT $4";
        let (mut stream, mut seq) = (0, 0);
        loop {
            let before = Argument::Time(before_us);
            let arguments = [stream.into(), seq.into(), before, ROWS_PER_PAGE.into()];
            let rows = self.connection.rows(page, &arguments).await?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            (stream, seq) = (last.integer(0)?, last.integer(1)?);
            let keys: Vec<String> = { rows.iter() }
                .map(|row| Ok(format!("({},{})", row.integer(0)?, row.integer(1)?)))
                .collect::<Result<_, QueryError>>()?;
            let keys = keys.join(",");
            let sql = format!("DELETE FROM gaps WHERE (stream_id, from_seq) IN (VALUES {keys})");
            self.deleted.gaps += self.delete(&sql, rows.len()).await?;
        }
    }

    async fn quarantine(&mut self, before_us: i64) -> Result<(), QueryError> {
        let page =
            "SELECT id FROM quarantine WHERE id > $1 AND received_at < $2 ORDER BY id LIMIT $3";
        let mut after = 0;
        loop {
            let arguments = [
                after.into(),
                Argument::Time(before_us),
                ROWS_PER_PAGE.into(),
            ];
            let ids = ids(&self.connection.rows(page, &arguments).await?)?;
            let Some(last) = ids.last() else {
                return Ok(());
            };
            after = *last;
            self.deleted.quarantined += self.delete_by_id("quarantine", &ids).await?;
        }
    }

    /// Deletes events other than those that the pruner limits.
    async fn events(&mut self, before_us: i64) -> Result<(), QueryError> {
        let devices = "SELECT id FROM devices WHERE id > $1 ORDER BY id LIMIT $2";
        let of_devices = "SELECT e.id FROM devices AS d CROSS JOIN device_events AS e
            WHERE d.id > $1 AND d.id <= $2 AND e.device_id = d.id AND e.at < $3
                AND e.kind NOT IN ('connected', 'disconnected', 'refused', 'presence', 'twin')";
        let mut after = 0;
        loop {
            let page = self
                .connection
                .rows(devices, &[after.into(), ROWS_PER_PAGE.into()])
                .await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            let last = last.integer(0)?;
            let arguments = [after.into(), last.into(), Argument::Time(before_us)];
            let events = ids(&self.connection.rows(of_devices, &arguments).await?)?;
            for ids in events.chunks(ROWS_PER_PAGE as usize) {
                self.deleted.events += self.delete_by_id("device_events", ids).await?;
            }
            after = last;
        }
    }

    async fn delete_by_id(&mut self, table: &str, ids: &[i64]) -> Result<u64, QueryError> {
        if ids.is_empty() {
            return Ok(0);
        }
        let list: Vec<String> = ids.iter().map(i64::to_string).collect();
        let sql = format!("DELETE FROM {table} WHERE id IN ({})", list.join(","));
        self.delete(&sql, ids.len()).await
    }

    /// Deletes `rows` rows, or only counts them.
    async fn delete(&mut self, sql: &str, rows: usize) -> Result<u64, QueryError> {
        if self.action == Action::Count {
            return Ok(rows as u64);
        }
        let deleted = self.connection.step(sql, &[]).await?;
        tokio::time::sleep(PAUSE).await;
        Ok(deleted)
    }

    /// Returns free pages of a SQLite file to the file system, except for a small part.
    async fn shrink(&mut self) -> Result<(), QueryError> {
        let sql = "SELECT f.freelist_count - p.page_count / $1 FROM pragma_freelist_count AS f, pragma_page_count AS p";
        while self
            .connection
            .integer(sql, &[FREE_PAGES_SHARE.into()])
            .await?
            >= PAGES_AT_ONCE
        {
            let vacuum = format!("PRAGMA incremental_vacuum({PAGES_AT_ONCE})");
            self.connection.step(&vacuum, &[]).await?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

fn ids(rows: &[Row]) -> Result<Vec<i64>, QueryError> {
    rows.iter().map(|row| row.integer(0)).collect()
}

#[cfg(test)]
mod tests;
