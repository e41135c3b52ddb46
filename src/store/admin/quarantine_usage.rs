//! Bytes in quarantine, which a gateway queries repeatedly.

use std::collections::HashMap;
use std::path::PathBuf;

use super::{QueryError, Reconnecting, Row, Source};
use crate::config::store_url::StoreUrl;
use crate::store::DeviceId;

/// Bytes of the frames in quarantine, by device.
pub type QuarantineUsage = HashMap<DeviceId, u64>;

const BYTES: &str = "SELECT device_id, bytes FROM quarantine_usage";
/// By name, because a spool has its own ids.
const BYTES_BY_NAME: &str = "SELECT d.name, u.bytes
    FROM quarantine_usage AS u JOIN devices AS d ON d.id = u.device_id";

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
                let name = row.text(0)?.to_owned();
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

#[cfg(test)]
mod tests {
    use fieldgate_protocol::frame::types;

    use super::*;
    use crate::store::admin::replay::Understood;
    use crate::store::admin::{Access, Connection};
    use crate::store::conformance::{Peer, peer};
    use crate::store::sqlite::{SqliteSettings, SqliteStore};
    use crate::store::{Batch, Content, Entry, Store};

    fn quarantined(peer: &Peer, seq: u64, bytes: usize) -> Entry {
        let content = Content::Quarantined {
            code: 30,
            detail: String::new(),
            bytes: vec![7; bytes],
            peer: String::new(),
        };
        Entry {
            content,
            ..peer.gap(seq, seq)
        }
    }

    /// The removal of a device is tested with all tables, in `removal`.
    async fn usage_follows_purge_and_replay<S: Store>(url: &StoreUrl, mut writer: S) -> S {
        let [a, b] = [peer(&mut writer, "a").await, peer(&mut writer, "b").await];
        let entries = vec![
            quarantined(&b, 1, 50),
            quarantined(&a, 1, 3),
            quarantined(&a, 2, 4),
        ];
        let batch = Batch {
            entries,
            ..Batch::default()
        };
        writer.commit(&batch).await.unwrap();
        let mut usage = UsageReader::new(url, None);
        let expected = HashMap::from([(a.device, 7), (b.device, 50)]);
        assert_eq!(usage.bytes().await.unwrap(), expected);
        let mut connection = Connection::open(url, Access::Write).await.unwrap();
        let purge = "DELETE FROM quarantine WHERE seq = 1 AND device_id = $1";
        connection.step(purge, &[a.device.0.into()]).await.unwrap();
        let expected = HashMap::from([(a.device, 4), (b.device, 50)]);
        assert_eq!(usage.bytes().await.unwrap(), expected);
        let of_b = "q.device_id = $1";
        let arguments = [b.device.0.into()];
        let frames = connection.quarantined_frames(of_b, &arguments, 0, 9).await;
        let understood = Understood {
            frame_type: types::GAP,
            first_seq: 1,
            content: Content::Gap { reason: 0 },
            stamp: None,
        };
        let [frame] = &frames.unwrap()[..] else {
            panic!("one frame of b");
        };
        assert!(connection.replay(frame, &understood).await.unwrap());
        assert!(!connection.replay(frame, &understood).await.unwrap());
        let expected = HashMap::from([(a.device, 4)]);
        assert_eq!(usage.bytes().await.unwrap(), expected);
        connection
            .step("DELETE FROM quarantine", &[])
            .await
            .unwrap();
        let rows = "SELECT device_id FROM quarantine_usage";
        assert!(connection.rows(rows, &[]).await.unwrap().is_empty());
        writer
    }

    #[tokio::test]
    async fn usage_follows_purge_and_replay_in_sqlite() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
        let url = StoreUrl::Sqlite(path);
        let store = usage_follows_purge_and_replay(&url, store.unwrap()).await;
        store.close().await.unwrap();
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn usage_follows_purge_and_replay_in_postgres() {
        let database = crate::store::postgres::tests::Database::create().await;
        let store = crate::store::postgres::PostgresStore::open(database.settings()).await;
        let url = StoreUrl::Postgres(database.settings().url);
        usage_follows_purge_and_replay(&url, store.unwrap().swap_remove(0)).await;
    }
}
