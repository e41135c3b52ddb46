//! Bytes in quarantine, which a gateway queries repeatedly.

use std::collections::HashMap;
use std::path::PathBuf;

use super::{QueryError, Reconnecting, Row, Source};
use crate::config::store_url::StoreUrl;
use crate::store::DeviceId;

/// Bytes of the frames in quarantine, by device.
pub type QuarantineUsage = HashMap<DeviceId, u64>;

const BYTES: &str = "SELECT device_id, CAST(sum(length(bytes)) AS BIGINT) FROM quarantine
    GROUP BY device_id";
/// By name, because a spool has its own ids.
const BYTES_BY_NAME: &str = "SELECT d.name, CAST(sum(length(q.bytes)) AS BIGINT)
    FROM quarantine AS q JOIN devices AS d ON d.id = q.device_id GROUP BY d.name";

/// Queries the usage of a gateway's store and spool.
pub struct UsageReader {
    store: Reconnecting,
    /// Spool from which frames drain into the store.
    spool: Option<Spool>,
}

struct Spool {
    connection: Reconnecting,
    /// Latest known usage of the store, by device name; it counts while the store is unavailable.
    drained: HashMap<String, u64>,
}

impl UsageReader {
    /// Creates a reader for `store`, and for the spool in front of it, if there is one.
    pub fn new(store: &StoreUrl, spool: Option<PathBuf>) -> UsageReader {
        UsageReader {
            store: Reconnecting::new(store),
            spool: spool.map(|path| Spool {
                connection: Reconnecting::new(Source::Spool(path)),
                drained: HashMap::new(),
            }),
        }
    }

    /// Returns the usage by the ids that sessions use: those of the spool, if there is one. Frames that are being
    /// drained may count twice.
    ///
    /// # Errors
    /// The store, or the spool in front of it, is unavailable. If only the store behind a spool is unavailable, its
    /// latest known usage counts.
    pub async fn bytes(&mut self) -> Result<QuarantineUsage, QueryError> {
        let Some(spool) = &mut self.spool else {
            return by_device(&self.store.rows(BYTES, &[]).await?);
        };
        // The spool first: then frames that drain meanwhile count twice rather than not at all.
        let waiting = by_device(&spool.connection.rows(BYTES, &[]).await?)?;
        if let Ok(rows) = self.store.rows(BYTES_BY_NAME, &[]).await {
            spool.drained.clear();
            for row in rows {
                let name = row.text_or_null(0)?.unwrap_or_default().to_owned();
                spool.drained.insert(name, row.integer(1)?.unsigned_abs());
            }
        }
        spool.with_drained(waiting).await
    }
}

fn by_device(rows: &[Row]) -> Result<QuarantineUsage, QueryError> {
    let bytes = |row: &Row| Ok((DeviceId(row.integer(0)?), row.integer(1)?.unsigned_abs()));
    rows.iter().map(bytes).collect()
}

impl Spool {
    /// Adds the usage of the store, under the spool's ids.
    async fn with_drained(
        &mut self,
        mut bytes: QuarantineUsage,
    ) -> Result<QuarantineUsage, QueryError> {
        // A device that the spool does not know belongs to another gateway, and has its own share.
        let mut unknown = i64::MIN;
        for (name, drained) in &self.drained {
            let sql = "SELECT id FROM devices WHERE name = $1";
            let rows = self.connection.rows(sql, &[name.as_str().into()]).await?;
            let device = match rows.first() {
                Some(row) => row.integer(0)?,
                None => {
                    unknown += 1;
                    unknown
                }
            };
            *bytes.entry(DeviceId(device)).or_default() += drained;
        }
        Ok(bytes)
    }
}
