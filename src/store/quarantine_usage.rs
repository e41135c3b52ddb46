//! What quarantine holds, in bytes, read beside whoever writes.

use std::collections::HashMap;
use std::path::PathBuf;

use super::DeviceId;
use super::reader::Row;
use super::steady::{SteadyError, SteadyReader};
use crate::config::store_url::StoreUrl;

/// Bytes of the frames in quarantine, by device.
pub type QuarantineUsage = HashMap<DeviceId, u64>;

const BYTES: &str = "SELECT device_id, CAST(sum(length(bytes)) AS BIGINT) FROM quarantine
    GROUP BY device_id";
/// By name, for a spool has ids of its own.
const BYTES_BY_NAME: &str = "SELECT d.name, CAST(sum(length(q.bytes)) AS BIGINT)
    FROM quarantine AS q JOIN devices AS d ON d.id = q.device_id GROUP BY d.name";

/// A way to look into quarantine.
pub struct UsageReader {
    store: SteadyReader,
    /// Where frames wait before they come to the store.
    spool: Option<Spool>,
}

struct Spool {
    reader: SteadyReader,
    /// What the store was found to hold, which counts while it is away.
    drained: HashMap<String, u64>,
}

impl UsageReader {
    /// Of `store`, and of the spool in front of it, if there is one.
    pub fn new(store: StoreUrl, spool: Option<PathBuf>) -> UsageReader {
        UsageReader {
            store: SteadyReader::new(store),
            spool: spool.map(|path| Spool {
                reader: SteadyReader::of_spool(path),
                drained: HashMap::new(),
            }),
        }
    }

    /// What it holds now, by the ids that sessions have: those of the spool, if there is one. What is
    /// on its way from the spool to the store may count twice.
    ///
    /// # Errors
    /// The store, or the spool, does not answer. While the store behind a spool is away, what it held
    /// last counts.
    pub async fn bytes(&mut self) -> Result<QuarantineUsage, SteadyError> {
        let Some(spool) = &mut self.spool else {
            return by_device(&self.store.rows(BYTES, &[]).await?);
        };
        // The spool first: what is drained meanwhile is then found in both, and never in neither.
        let waiting = by_device(&spool.reader.rows(BYTES, &[]).await?)?;
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

fn by_device(rows: &[Row]) -> Result<QuarantineUsage, SteadyError> {
    let bytes = |row: &Row| Ok((DeviceId(row.integer(0)?), row.integer(1)?.unsigned_abs()));
    rows.iter().map(bytes).collect()
}

impl Spool {
    /// Adds what is in the store, under the spool's ids.
    async fn with_drained(
        &mut self,
        mut bytes: QuarantineUsage,
    ) -> Result<QuarantineUsage, SteadyError> {
        // A device that the spool does not know is none of this gateway's, and has room of its own.
        let mut unknown = i64::MIN;
        for (name, drained) in &self.drained {
            let sql = "SELECT id FROM devices WHERE name = $1";
            let rows = self.reader.rows(sql, &[name.as_str().into()]).await?;
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
