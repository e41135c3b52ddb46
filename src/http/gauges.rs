//! Gauges that nothing else in the gateway updates: sizes of files, and the expiry of the certificate.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::config::store_url::StoreUrl;
use crate::metrics::Metrics;
use crate::net::tls::Tls;
use crate::quota::quarantine::Gauge;
use crate::store::admin::{Pace, Poll, QueryError, Reconnecting};
use crate::store::spool;

/// Maximum time for counting the frames in the spool. The other gauges wait for it.
const COUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// Reads the gauges at an interval.
pub struct Gauges {
    /// Where the gauges are exported.
    pub metrics: Arc<Metrics>,
    /// Database.
    pub database: Database,
    /// Connection to it.
    pub store: Reconnecting,
    /// Path of the spool, if there is one.
    pub spool: Option<PathBuf>,
    /// Usage of quarantine.
    pub quarantine: Arc<Gauge>,
    /// Certificate of the TLS listener, if there is one.
    pub tls: Option<Arc<Tls>>,
}

/// A database whose size is measured.
pub enum Database {
    /// File of a SQLite database.
    File(PathBuf),
    /// Postgres database.
    Server,
}

impl Database {
    /// Creates the database's handle without connecting.
    pub fn new(store: &StoreUrl) -> Database {
        match store {
            StoreUrl::Sqlite(path) => Database::File(path.clone()),
            StoreUrl::Postgres(_) => Database::Server,
        }
    }
}

impl Poll for Gauges {
    const TASK: &'static str = "gauges";
    const PACE: Pace = Pace {
        interval: Duration::from_secs(5),
        timeout: Duration::from_secs(5),
        share: 10,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        let metrics = &self.metrics;
        metrics.quarantine_bytes.set(self.quarantine.bytes() as i64);
        metrics
            .quarantine_bytes_max
            .set(self.quarantine.bytes_max().cast_signed());
        let expires = self.tls.as_ref().and_then(|tls| tls.expires());
        metrics
            .certificate_expiry
            .set(expires.map_or(0, |expires| expires.as_second()));
        if let Some(spool) = &self.spool {
            if let Ok(usage) = spool::usage(spool).await {
                metrics.spool_bytes.set(usage.used_bytes.cast_signed());
                let oldest_us = usage.oldest_received_us.unwrap_or(0);
                metrics.spool_oldest.set(oldest_us / 1_000_000);
            }
            // Reads the whole spool, which may be large.
            let waiting = timeout(COUNT_TIMEOUT, spool::waiting(spool)).await;
            if let Ok(Ok(waiting)) = waiting {
                let frames = waiting.map_or(0, |waiting| waiting.frames);
                metrics.spool_frames.set(frames.cast_signed());
            }
        }
        match &self.database {
            Database::File(path) => {
                metrics.store_bytes.set(file_bytes(path));
                metrics.wal_bytes.set(file_bytes(&wal(path)));
            }
            Database::Server => {
                let sql = "SELECT pg_database_size(current_database()), (
                    SELECT CAST(greatest(sum(reltuples), 0) AS BIGINT) FROM pg_class
                    WHERE oid = to_regclass('readings_default'))";
                let rows = self.store.rows(sql, &[]).await?;
                if let Some(row) = rows.first() {
                    metrics.store_bytes.set(row.integer(0)?);
                    let readings = row.integer_or_null(1)?;
                    metrics
                        .default_partition_readings
                        .set(readings.unwrap_or(0));
                }
            }
        }
        let sql = "SELECT received_at FROM frames ORDER BY id LIMIT 1";
        let rows = self.store.rows(sql, &[]).await?;
        let oldest_us = match rows.first() {
            Some(row) => row.integer(0)?,
            None => 0,
        };
        metrics.frame_oldest.set(oldest_us / 1_000_000);
        Ok(())
    }
}

/// Returns the path of the write-ahead log next to a SQLite file.
fn wal(path: &Path) -> PathBuf {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    wal.into()
}

/// Returns the size of a file, or 0 if it does not exist.
fn file_bytes(path: &Path) -> i64 {
    fs::metadata(path).map_or(0, |file| file.len().cast_signed())
}
