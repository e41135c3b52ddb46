//! The gateway's task for retention, which deletes even on a full disk.

use std::sync::Arc;
use std::time::Duration;

use super::{Action, Deleted, Round};
use crate::config::RetentionSettings;
use crate::config::store_url::StoreUrl;
use crate::metrics::Metrics;
use crate::store::admin::{Access, Connection, Pace, Poll, QueryError};
use crate::store::sqlite::LogMover;
use crate::store::sqlite::reserve::Reserve;
use crate::time::SystemClock;

/// Number of attempts of a round on a full disk. Each continues where the previous one had filled the disk.
const ATTEMPTS: u32 = 10;

/// Deletes what is too old, at intervals.
pub struct Retention {
    store: StoreUrl,
    settings: RetentionSettings,
    metrics: Arc<Metrics>,
    /// Log of a SQLite store.
    log: Option<LogMover>,
    /// Disk space for deletions from a SQLite store, if anything is to be deleted.
    reserve: Option<Reserve>,
}

impl Retention {
    /// Creates the task; reserves disk space if it deletes from a SQLite store, whose log is `log`.
    pub fn new(
        store: &StoreUrl,
        settings: RetentionSettings,
        metrics: Arc<Metrics>,
        log: Option<LogMover>,
    ) -> Retention {
        let reserve = match store {
            StoreUrl::Sqlite(path) if settings != RetentionSettings::default() => {
                Some(Reserve::of_store(path))
            }
            _ => None,
        };
        Retention {
            store: store.clone(),
            settings,
            metrics,
            log,
            reserve,
        }
    }

    async fn delete(&self) -> Result<(), QueryError> {
        let mut connection = Connection::open(&self.store, Access::Write).await?;
        let now_us = SystemClock::start().now().utc_us;
        let mut round = Round::new(&mut connection, &self.settings, now_us, Action::Delete);
        let ended = round.run().await;
        let deleted = round.deleted;
        self.metrics.deleted(&[
            ("readings", deleted.readings),
            ("partitions", deleted.partitions),
            ("frames", deleted.frames),
            ("gaps", deleted.gaps),
            ("quarantined", deleted.quarantined),
            ("events", deleted.events),
        ]);
        if deleted != Deleted::default() {
            tracing::info!(
                readings = deleted.readings,
                partitions = deleted.partitions,
                frames = deleted.frames,
                gaps = deleted.gaps,
                quarantined = deleted.quarantined,
                events = deleted.events,
                "deleted what is older than its retention"
            );
        }
        ended?;
        self.metrics.retention_round.set(now_us / 1_000_000);
        Ok(())
    }

    /// Makes space for the deletions themselves on a full disk: releases the reserve, and frees the log.
    async fn make_space(&mut self) {
        if self.reserve.as_mut().is_some_and(Reserve::release) {
            tracing::warn!(
                "disk full, using reserved space to delete what is older than its retention"
            );
        }
        if let Some(log) = &self.log {
            log.move_log().await;
        }
    }
}

impl Poll for Retention {
    const TASK: &'static str = "retention";
    const PACE: Pace = Pace {
        interval: Duration::from_secs(600),
        timeout: Duration::from_secs(6 * 3600),
        share: 1,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        if let Some(reserve) = &mut self.reserve
            && !self.metrics.is_disk_stopped()
        {
            reserve.restore();
        }
        for _ in 1..ATTEMPTS {
            match self.delete().await {
                Err(error) if error.is_disk_full() => self.make_space().await,
                done => return done,
            }
        }
        self.delete().await
    }
}
