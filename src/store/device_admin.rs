//! Operators' changes to devices: whether they may connect, and their keys. Commands write them, gateways read
//! them.
//!
//! Invariants
//! - Changes are numbered in commit order: a reader that has seen one has seen all earlier ones.
//! - A device's key changes only together with its `key_revision`.

use std::collections::{HashMap, HashSet};

use super::DeviceId;
use super::editor::Editor;
use super::reader::{Argument, ReadError, Reader, Row, Value};
use super::steady::{SteadyError, SteadyReader};

/// State of a device as set by operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Row id of the device.
    pub device: DeviceId,
    /// Name of the device.
    pub name: String,
    /// Whether the device may connect.
    pub is_enabled: bool,
    /// Stored key of the device.
    pub key: StoredKey,
    /// Number of its latest change; 0 if there was none.
    pub revision: i64,
    /// Number of the change that set its current key; 0 for the first key.
    pub key_revision: i64,
}

/// A device's key as stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredKey {
    /// Number of times it was replaced.
    pub version: u32,
    /// Sealed individual key; `None` if the key is derived from the fleet key and the version.
    pub sealed: Option<Vec<u8>>,
}

const COLUMNS: &str = "id, name, enabled, key_version, sealed_key, revision, key_revision";

impl DeviceState {
    fn of(row: &Row) -> Result<DeviceState, ReadError> {
        Ok(DeviceState {
            device: DeviceId(row.integer(0)?),
            name: row.text_or_null(1)?.unwrap_or_default().to_owned(),
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

/// Changes since the previous call.
#[derive(Debug)]
pub struct Changes {
    /// Changed devices, each once.
    pub devices: Vec<DeviceState>,
    /// Whether these are all devices that were ever changed, so that earlier knowledge is invalid.
    pub is_all: bool,
}

/// Polls for changes.
pub struct ChangeReader {
    reader: SteadyReader,
    seen: Option<Seen>,
}

/// Position in a store's changes, with the store's mark, which is regenerated when the store is found to be
/// restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    latest: i64,
    mark: String,
}

impl ChangeReader {
    /// Creates a reader that has seen no changes.
    pub fn new(reader: SteadyReader) -> ChangeReader {
        ChangeReader { reader, seen: None }
    }

    /// Returns new changes; all changes on the first call and after the store was replaced by a backup.
    ///
    /// # Errors
    /// The store is unavailable. The next call returns the same changes.
    ///
    /// # Cancel safety
    /// The next call returns the same changes.
    pub async fn changes(&mut self) -> Result<Option<Changes>, SteadyError> {
        let sql = "SELECT latest, (SELECT mark FROM store_identity) FROM device_revision";
        let rows = self.reader.rows(sql, &[]).await?;
        let (latest, mark) = match rows.first() {
            Some(row) => (row.integer(0)?, row.text_or_null(1)?.unwrap_or_default()),
            None => (0, ""),
        };
        let seen = self.seen.as_ref().filter(|seen| seen.mark == mark);
        let since = seen.map(|seen| seen.latest);
        if since == Some(latest) {
            return Ok(None);
        }
        let since = since.filter(|seen| *seen < latest);
        // A device that is being removed is in both tables, with the same values.
        let sql = changes_sql();
        let since_revision = since.unwrap_or(0);
        let rows = self.reader.rows(&sql, &[since_revision.into()]).await?;
        let devices: Vec<DeviceState> =
            rows.iter().map(DeviceState::of).collect::<Result<_, _>>()?;
        // More changes may have been committed since `latest` was read.
        let newest = devices.last().map_or(latest, |last| last.revision);
        self.seen = Some(Seen {
            latest: newest.max(latest),
            mark: mark.to_owned(),
        });
        Ok(Some(Changes {
            devices,
            is_all: since.is_none(),
        }))
    }

    /// Resets the position, because the last result may get lost; returns the previous position.
    pub fn forget(&mut self) -> Option<Seen> {
        self.seen.take()
    }

    /// Restores the position after the last result has arrived.
    pub fn remember(&mut self, seen: Option<Seen>) {
        self.seen = seen;
    }
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

/// Returns the device with a name, or `None`.
///
/// # Errors
/// The store is unavailable.
pub async fn find(reader: &mut Reader, name: &str) -> Result<Option<DeviceState>, ReadError> {
    let sql = format!("SELECT {COLUMNS} FROM devices WHERE name = $1");
    let rows = reader.rows(&sql, &[name.into()]).await?;
    rows.first().map(DeviceState::of).transpose()
}

/// Passes each device to `on_device`, by name, until that fails.
///
/// # Errors
/// The store is unavailable, or `on_device` failed.
pub async fn each(
    reader: &mut Reader,
    mut on_device: impl FnMut(DeviceState) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let sql = format!("SELECT {COLUMNS} FROM devices ORDER BY name COLLATE \"C\"");
    let on_row = |row: Row| on_device(DeviceState::of(&row)?);
    reader.each(&sql, &[], on_row).await
}

/// An open transaction that changes devices.
pub struct DeviceEdit<'e> {
    editor: &'e mut Editor,
    revision: i64,
    at_us: i64,
}

impl<'e> DeviceEdit<'e> {
    /// Begins a transaction, after waiting for concurrent ones.
    ///
    /// # Errors
    /// The store is unavailable.
    pub async fn begin(editor: &'e mut Editor, at_us: i64) -> Result<DeviceEdit<'e>, ReadError> {
        editor.begin().await?;
        let next = "UPDATE device_revision SET latest = latest + 1 RETURNING latest";
        let rows = editor.rows(next, &[]).await?;
        let revision = rows.first().map_or(Ok(1), |row| row.integer(0))?;
        Ok(DeviceEdit {
            editor,
            revision,
            at_us,
        })
    }

    /// Returns the devices in `names` that exist.
    ///
    /// # Errors
    /// The store is unavailable.
    pub async fn find<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<HashMap<String, DeviceState>, ReadError> {
        let mut found = HashMap::new();
        for name in names {
            if let Some(device) = find(self.editor, name).await? {
                found.insert(name.to_owned(), device);
            }
        }
        Ok(found)
    }

    /// Changes a device from the state `before`, with an audit event for each change; returns whether anything
    /// changed.
    ///
    /// # Errors
    /// The store is unavailable.
    pub async fn set(
        &mut self,
        name: &str,
        before: Option<&DeviceState>,
        is_enabled: bool,
        key: &StoredKey,
    ) -> Result<bool, ReadError> {
        let put = put(self.editor, name, before, is_enabled, key, self.revision).await?;
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
    ///
    /// # Errors
    /// The store is unavailable.
    pub async fn remove(&mut self, device: &DeviceState) -> Result<(), ReadError> {
        let (id, revision) = (device.device.0, self.revision);
        let name = format!("#{id} {}", device.name);
        let sql = "UPDATE devices SET name = $1, enabled = 0, key_version = 0, sealed_key = NULL,
                revision = $2, key_revision = $2
            WHERE id = $3";
        let values = [name.as_str().into(), revision.into(), id.into()];
        self.editor.execute(sql, &values).await?;
        let sql = "INSERT INTO removed_devices (device_id, name, revision, removed_at)
            VALUES ($1, $2, $3, $4)";
        let values = [
            id.into(),
            device.name.as_str().into(),
            revision.into(),
            Argument::Time(self.at_us),
        ];
        self.editor.execute(sql, &values).await.map(drop)
    }

    async fn note(&mut self, device: i64, kind: &str, detail: &str) -> Result<(), ReadError> {
        let sql = "INSERT INTO device_events (device_id, at, kind, code, detail)
            VALUES ($1, $2, $3, 0, $4)";
        let values = [
            device.into(),
            Argument::Time(self.at_us),
            kind.into(),
            detail.into(),
        ];
        self.editor.execute(sql, &values).await.map(drop)
    }

    /// Commits all changes.
    ///
    /// # Errors
    /// Nothing was changed or, if the connection was lost, the outcome is unknown.
    pub async fn commit(self) -> Result<(), ReadError> {
        self.editor.commit().await
    }

    /// Discards all changes.
    ///
    /// # Errors
    /// The store is unavailable; nothing is changed in that case either.
    pub async fn rollback(self) -> Result<(), ReadError> {
        self.editor.rollback().await
    }
}

/// Updates the spool's devices to their state in the database and assigns the spool's own revision. A restored
/// database reuses revisions, but sessions and logins are checked against revisions that only increase.
///
/// # Errors
/// The spool is unavailable; nothing was changed.
pub async fn adopt(spool: &mut Editor, changes: &Changes) -> Result<(), ReadError> {
    spool.begin().await?;
    // Earlier spools used the database's numbers and, after such a restore, one below their highest.
    let next = "UPDATE device_revision SET latest = 1 + max(latest,
            (SELECT coalesce(max(revision), 0) FROM devices WHERE revision > 0))
        RETURNING latest";
    let rows = spool.rows(next, &[]).await?;
    let revision = rows.first().map_or(Ok(1), |row| row.integer(0))?;
    for device in &changes.devices {
        // A spool does not know the device's id, and its rows under that name may belong to the name's next
        // device.
        if device.former_name().is_some() {
            continue;
        }
        let before = find(spool, &device.name).await?;
        let DeviceState { name, key, .. } = device;
        put(
            spool,
            name,
            before.as_ref(),
            device.is_enabled,
            key,
            revision,
        )
        .await?;
    }
    if changes.is_all {
        let changed = changes.devices.iter().map(|device| device.name.as_str());
        undo_others(spool, &changed.collect(), revision).await?;
    }
    spool.commit().await
}

/// Resets all other devices to their state before any change.
async fn undo_others(
    spool: &mut Editor,
    changed: &HashSet<&str>,
    revision: i64,
) -> Result<(), ReadError> {
    let sql = format!("SELECT {COLUMNS} FROM devices WHERE revision > 0");
    for row in &spool.rows(&sql, &[]).await? {
        let device = DeviceState::of(row)?;
        if !changed.contains(device.name.as_str()) {
            let first = StoredKey::default();
            put(spool, &device.name, Some(&device), true, &first, revision).await?;
        }
    }
    Ok(())
}

/// Changes made to a device.
struct Put {
    device: i64,
    has_new_key: bool,
    is_let_in_or_out: bool,
}

/// Changes a device from the state `before`, with this change number; returns `None` if nothing differs.
async fn put(
    editor: &mut Editor,
    name: &str,
    before: Option<&DeviceState>,
    is_enabled: bool,
    key: &StoredKey,
    revision: i64,
) -> Result<Option<Put>, ReadError> {
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
    let rows = editor.rows(sql, &values).await?;
    Ok(Some(Put {
        device: rows.first().map_or(Ok(0), |row| row.integer(0))?,
        has_new_key,
        is_let_in_or_out,
    }))
}
