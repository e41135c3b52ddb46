//! Operators' changes to devices: whether they may connect, and their keys. Commands write them, gateways read
//! them.
//!
//! Invariants
//! - Changes are numbered in commit order: a reader that has seen one has seen all earlier ones.
//! - A device's key changes only together with its `key_revision`.

use std::collections::HashMap;
use std::time::Duration;

use super::{Argument, Connection, Pace, QueryError, Reconnecting, Row, Value};
use crate::store::DeviceId;

/// Pace of polls for changes: a disabled device's session must end within a second, even behind a spool, where a
/// change takes two polls.
pub const CHANGES_PACE: Pace = Pace {
    interval: Duration::from_millis(250),
    timeout: Duration::from_secs(5),
    share: 1,
};

/// State of a device as set by operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    pub device: DeviceId,
    pub name: String,
    pub is_enabled: bool,
    pub key: StoredKey,
    /// Number of its latest change; 0 if there was none.
    pub revision: i64,
    /// Number of the change that set its current key; 0 for the first key.
    pub key_revision: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredKey {
    /// Number of times it was replaced.
    pub version: u32,
    /// Sealed individual key; `None` if the key is derived from the fleet key and the version.
    pub sealed: Option<Vec<u8>>,
}

const COLUMNS: &str = "id, name, enabled, key_version, sealed_key, revision, key_revision";

impl DeviceState {
    fn of(row: &Row) -> Result<DeviceState, QueryError> {
        Ok(DeviceState {
            device: DeviceId(row.integer(0)?),
            name: row.text(1)?.to_owned(),
            is_enabled: row.integer(2)? != 0,
            key: StoredKey {
                version: row.integer(3)? as u32,
                sealed: match &row.0[4] {
                    Value::Null => None,
                    _ => Some(row.bytes(4)?.to_vec()),
                },
            },
            revision: row.integer(5)?,
            key_revision: row.integer(6)?,
        })
    }

    /// Returns its former name if an operator removed it.
    pub fn former_name(&self) -> Option<&str> {
        let (_, name) = self.name.strip_prefix('#')?.split_once(' ')?;
        Some(name)
    }
}

#[derive(Debug)]
pub struct Changes {
    /// Changed devices, each once.
    pub devices: Vec<DeviceState>,
    /// Whether these are all devices that were ever changed, so that earlier knowledge is invalid.
    pub is_all: bool,
    /// Position after these changes.
    pub position: Position,
}

/// Position in a store's changes, with the store's mark, which is regenerated when the store is found to be
/// restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    latest: i64,
    mark: String,
}

/// Returns the changes after a position, or `None` if there are none. Returns all changes without a position, and
/// after the store was replaced by a backup.
pub async fn changes_since(
    store: &mut Reconnecting,
    seen: Option<&Position>,
) -> Result<Option<Changes>, QueryError> {
    let sql = "SELECT latest, (SELECT mark FROM store_identity) FROM device_revision";
    let rows = store.rows(sql, &[]).await?;
    let (latest, mark) = match rows.first() {
        Some(row) => (row.integer(0)?, row.text(1)?),
        None => (0, ""),
    };
    let seen = seen.filter(|seen| seen.mark == mark);
    let since = seen.map(|seen| seen.latest);
    if since == Some(latest) {
        return Ok(None);
    }
    let since = since.filter(|seen| *seen < latest);
    // A device that is being removed is in both tables, with the same values.
    let after = [since.unwrap_or(0).into()];
    let rows = store.rows(&changes_sql(), &after).await?;
    let devices: Vec<DeviceState> = rows.iter().map(DeviceState::of).collect::<Result<_, _>>()?;
    // More changes may have been committed since `latest` was read.
    let newest = devices.last().map_or(latest, |last| last.revision);
    Ok(Some(Changes {
        devices,
        is_all: since.is_none(),
        position: Position {
            latest: newest.max(latest),
            mark: mark.to_owned(),
        },
    }))
}

/// Returns the query for devices changed since `$1`. Its index contains only changed devices, which are few.
pub fn changes_sql() -> String {
    format!(
        "SELECT {COLUMNS} FROM devices WHERE revision > 0 AND revision > $1
         UNION
         SELECT device_id, '#' || device_id || ' ' || name, 0, CAST(0 AS BIGINT),
             CAST(NULL AS BYTEA), revision, revision
         FROM removed_devices WHERE revision > $1
         ORDER BY 6"
    )
}

pub async fn find(
    connection: &mut Connection,
    name: &str,
) -> Result<Option<DeviceState>, QueryError> {
    let found = select(connection, "WHERE name = $1", &[name.into()]).await?;
    Ok(found.into_iter().next())
}

/// Returns all devices by name.
pub async fn all(connection: &mut Connection) -> Result<Vec<DeviceState>, QueryError> {
    select(connection, "ORDER BY name COLLATE \"C\"", &[]).await
}

pub(super) async fn select(
    connection: &mut Connection,
    clauses: &str,
    arguments: &[Argument<'_>],
) -> Result<Vec<DeviceState>, QueryError> {
    let sql = format!("SELECT {COLUMNS} FROM devices {clauses}");
    let rows = connection.rows(&sql, arguments).await?;
    rows.iter().map(DeviceState::of).collect()
}

/// An open transaction that changes devices; the connection ends it.
pub struct DeviceEdit<'e> {
    connection: &'e mut Connection,
    revision: i64,
    at_us: i64,
}

impl<'e> DeviceEdit<'e> {
    /// Begins a transaction, after waiting for concurrent ones.
    pub async fn begin(
        connection: &'e mut Connection,
        at_us: i64,
    ) -> Result<DeviceEdit<'e>, QueryError> {
        connection.begin().await?;
        Ok(DeviceEdit {
            revision: next_revision(connection).await?,
            connection,
            at_us,
        })
    }

    /// Returns the devices in `names` that exist.
    pub async fn find<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<HashMap<String, DeviceState>, QueryError> {
        let mut found = HashMap::new();
        for name in names {
            if let Some(device) = find(self.connection, name).await? {
                found.insert(name.to_owned(), device);
            }
        }
        Ok(found)
    }

    /// Changes a device from the state `before`, with an audit event for each change; returns whether anything
    /// changed.
    pub async fn set(
        &mut self,
        name: &str,
        before: Option<&DeviceState>,
        is_enabled: bool,
        key: &StoredKey,
    ) -> Result<bool, QueryError> {
        let put = put(
            self.connection,
            name,
            before,
            is_enabled,
            key,
            self.revision,
        )
        .await?;
        let Some(put) = put else {
            return Ok(false);
        };
        let device = put.device;
        if before.is_none() {
            self.note(device, "added", "").await?;
        }
        if put.has_new_key {
            let detail = match key.sealed {
                Some(_) => "an individual key".to_owned(),
                None => format!("derived from the fleet key, version {}", key.version),
            };
            self.note(device, "key_changed", &detail).await?;
        }
        if put.is_let_in_or_out {
            let kind = if is_enabled { "enabled" } else { "disabled" };
            self.note(device, kind, "").await?;
        }
        Ok(true)
    }

    /// Renames a device to free its name, disables it and ends its sessions: the first step of
    /// [`super::removal`].
    pub async fn remove(&mut self, device: &DeviceState) -> Result<(), QueryError> {
        let (id, revision) = (device.device.0, self.revision);
        let name = format!("#{id} {}", device.name);
        let sql = "UPDATE devices SET name = $1, enabled = 0, key_version = 0, sealed_key = NULL,
                revision = $2, key_revision = $2
            WHERE id = $3";
        let values = [name.as_str().into(), revision.into(), id.into()];
        self.connection.execute(sql, &values).await?;
        let sql = "INSERT INTO removed_devices (device_id, name, revision, removed_at)
            VALUES ($1, $2, $3, $4)";
        let values = [
            id.into(),
            device.name.as_str().into(),
            revision.into(),
            Argument::Time(self.at_us),
        ];
        self.connection.execute(sql, &values).await.map(drop)
    }

    async fn note(&mut self, device: i64, kind: &str, detail: &str) -> Result<(), QueryError> {
        let sql = "INSERT INTO device_events (device_id, at, kind, code, detail)
            VALUES ($1, $2, $3, 0, $4)";
        let values = [
            device.into(),
            Argument::Time(self.at_us),
            kind.into(),
            detail.into(),
        ];
        self.connection.execute(sql, &values).await.map(drop)
    }
}

/// Returns the number of the change that the open transaction makes, and locks the counter until its end.
pub(super) async fn next_revision(connection: &mut Connection) -> Result<i64, QueryError> {
    let next = "UPDATE device_revision SET latest = latest + 1 RETURNING latest";
    connection.integer(next, &[]).await
}

pub(super) struct Put {
    device: i64,
    has_new_key: bool,
    is_let_in_or_out: bool,
}

/// Changes a device from the state `before`, with this change number; returns `None` if nothing differs.
pub(super) async fn put(
    connection: &mut Connection,
    name: &str,
    before: Option<&DeviceState>,
    is_enabled: bool,
    key: &StoredKey,
    revision: i64,
) -> Result<Option<Put>, QueryError> {
    let has_new_key = before.map_or(*key != StoredKey::default(), |before| before.key != *key);
    let is_let_in_or_out = before.map_or(!is_enabled, |before| before.is_enabled != is_enabled);
    if before.is_some() && !has_new_key && !is_let_in_or_out {
        return Ok(None);
    }
    let key_revision = match before {
        _ if has_new_key => revision,
        Some(before) => before.key_revision,
        None => 0,
    };
    let sql = "INSERT INTO devices (name, enabled, key_version, sealed_key, revision, key_revision)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (name) DO UPDATE SET enabled = excluded.enabled,
             key_version = excluded.key_version, sealed_key = excluded.sealed_key,
             revision = excluded.revision, key_revision = excluded.key_revision
         RETURNING id";
    let values = [
        name.into(),
        i64::from(is_enabled).into(),
        i64::from(key.version).into(),
        Argument::Bytes(key.sealed.as_deref()),
        revision.into(),
        key_revision.into(),
    ];
    Ok(Some(Put {
        device: connection.integer(sql, &values).await?,
        has_new_key,
        is_let_in_or_out,
    }))
}
