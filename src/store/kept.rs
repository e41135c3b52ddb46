//! What quarantine holds, in bytes, read beside whoever writes.

use std::collections::HashMap;
use std::path::PathBuf;

use sqlx::SqliteConnection;

use super::DeviceId;
use super::reader::{OpenError, ReadError, Reader};
use super::sqlite::spool::open_beside;
use super::url::StoreUrl;

/// Bytes of the frames in quarantine, by device.
pub type KeptBytes = HashMap<DeviceId, u64>;

const BYTES: &str = "SELECT device_id, CAST(sum(length(bytes)) AS BIGINT) FROM quarantine
    GROUP BY device_id";
/// By name, for a spool has ids of its own.
const BYTES_BY_NAME: &str = "SELECT d.name, CAST(sum(length(q.bytes)) AS BIGINT)
    FROM quarantine AS q JOIN devices AS d ON d.id = q.device_id GROUP BY d.name";

/// A way to look into quarantine. Connects when it is used, and again after an error.
pub struct KeptFrames {
    store: StoreUrl,
    reader: Option<Reader>,
    /// Where frames wait before they come to the store.
    spool: Option<Spool>,
}

struct Spool {
    path: PathBuf,
    conn: Option<SqliteConnection>,
    /// What the store was found to hold, which counts while it is away.
    drained: HashMap<String, u64>,
}

/// Why it is not known what quarantine holds.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store does not answer.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl KeptFrames {
    /// Of `store`, and of the spool in front of it, if there is one.
    pub fn new(store: StoreUrl, spool: Option<PathBuf>) -> KeptFrames {
        KeptFrames {
            store,
            reader: None,
            spool: spool.map(|path| Spool {
                path,
                conn: None,
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
    pub async fn bytes(&mut self) -> Result<KeptBytes, KeptError> {
        let Some(mut spool) = self.spool.take() else {
            let rows = self.rows(BYTES).await?;
            return rows
                .iter()
                .map(|row| Ok((DeviceId(row.integer(0)?), row.integer(1)?.unsigned_abs())))
                .collect();
        };
        // The spool first: what is drained meanwhile is then found in both, and never in neither.
        let waiting = spool.waiting().await;
        if let Ok(rows) = self.rows(BYTES_BY_NAME).await {
            spool.drained.clear();
            for row in rows {
                let name = row.text_or_null(0)?.unwrap_or_default().to_owned();
                spool.drained.insert(name, row.integer(1)?.unsigned_abs());
            }
        }
        let bytes = match waiting {
            Ok(waiting) => spool.with_drained(waiting).await,
            Err(error) => Err(error),
        };
        self.spool = Some(spool);
        bytes
    }

    async fn rows(&mut self, sql: &str) -> Result<Vec<super::reader::Row>, KeptError> {
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => Reader::open(&self.store).await?,
        };
        let rows = reader.rows(sql, &[]).await?;
        self.reader = Some(reader);
        Ok(rows)
    }
}

impl Spool {
    async fn waiting(&mut self) -> Result<KeptBytes, KeptError> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => open_beside(&self.path).await.map_err(OpenError::from)?,
        };
        let rows: Result<Vec<(i64, i64)>, sqlx::Error> =
            sqlx::query_as(BYTES).fetch_all(&mut conn).await;
        let rows = rows.map_err(ReadError::from)?;
        self.conn = Some(conn);
        let bytes = |(device, bytes): (i64, i64)| (DeviceId(device), bytes.unsigned_abs());
        Ok(rows.into_iter().map(bytes).collect())
    }

    /// Adds what is in the store, under the spool's ids.
    async fn with_drained(&mut self, mut bytes: KeptBytes) -> Result<KeptBytes, KeptError> {
        let Some(conn) = &mut self.conn else {
            return Ok(bytes);
        };
        // A device that the spool does not know is none of this gateway's, and has room of its own.
        let mut unknown = i64::MIN;
        for (name, drained) in &self.drained {
            let id: Result<Option<i64>, sqlx::Error> =
                sqlx::query_scalar("SELECT id FROM devices WHERE name = ?")
                    .bind(name)
                    .fetch_optional(&mut *conn)
                    .await;
            let device = id.map_err(ReadError::from)?.unwrap_or_else(|| {
                unknown += 1;
                unknown
            });
            *bytes.entry(DeviceId(device)).or_default() += drained;
        }
        Ok(bytes)
    }
}
