//! What operators change about devices: whether they may connect, and their keys. Commands write it,
//! gateways read it.
//!
//! Invariants
//! - Changes get their numbers in the order of their commits: whoever has seen one has seen all before it.
//! - A device's key changes only together with its `key_revision`.

use std::collections::{HashMap, HashSet};

use super::DeviceId;
use super::editor::Editor;
use super::reader::{Argument, ReadError, Reader, Row, Value};
use super::steady::{SteadyError, SteadyReader};

/// A device as operators have left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Its row.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// Whether it may connect.
    pub is_enabled: bool,
    /// Its key.
    pub key: StoredKey,
    /// The change that it had last; 0 if there was none.
    pub revision: i64,
    /// The change that gave its present key; 0 for the first one.
    pub key_revision: i64,
}

/// The key of a device, as the store has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredKey {
    /// How often it was replaced.
    pub version: u32,
    /// The device's own, sealed; `None` if it derives from the fleet's key and the version.
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

    /// The name that it had, if an operator removed it.
    pub fn former_name(&self) -> Option<&str> {
        let (_, name) = self.name.strip_prefix('#')?.split_once(' ')?;
        Some(name)
    }
}

/// What has changed since it was last looked for.
#[derive(Debug)]
pub struct Changes {
    /// Each device once.
    pub devices: Vec<DeviceState>,
    /// All devices that were ever changed are among them: nothing that was known before holds.
    pub is_all: bool,
}

/// A way to look for changes.
pub struct ChangeReader {
    reader: SteadyReader,
    seen: Option<Seen>,
}

/// How far a store was looked at, and which one: its mark is drawn again when it is found to be put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    latest: i64,
    mark: String,
}

impl ChangeReader {
    /// Has seen nothing yet.
    pub fn new(reader: SteadyReader) -> ChangeReader {
        ChangeReader { reader, seen: None }
    }

    /// What is new; everything at first, and when the store is found to be another one (a backup).
    ///
    /// # Errors
    /// The store does not answer; what was not given is given the next time.
    ///
    /// # Cancel safety
    /// As after an error.
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
        // One that is being removed is in both, and alike.
        let sql = changes_sql();
        let since_revision = since.unwrap_or(0);
        let rows = self.reader.rows(&sql, &[since_revision.into()]).await?;
        let devices: Vec<DeviceState> =
            rows.iter().map(DeviceState::of).collect::<Result<_, _>>()?;
        // More may have been committed since `latest` was read.
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

    /// Has seen nothing any more: what was given last may get lost. Gives what it had seen.
    pub fn forget(&mut self) -> Option<Seen> {
        self.seen.take()
    }

    /// What was given last has arrived.
    pub fn remember(&mut self, seen: Option<Seen>) {
        self.seen = seen;
    }
}

/// Returns the query for devices that were changed since `$1`. Most devices never are: the index has only those
/// that were.
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

/// A device; `None` if there is none of that name.
///
/// # Errors
/// The store does not answer.
pub async fn find(reader: &mut Reader, name: &str) -> Result<Option<DeviceState>, ReadError> {
    let sql = format!("SELECT {COLUMNS} FROM devices WHERE name = $1");
    let rows = reader.rows(&sql, &[name.into()]).await?;
    rows.first().map(DeviceState::of).transpose()
}

/// Gives each device to `on_device`, by name, until that fails.
///
/// # Errors
/// The store does not answer, or as `on_device`.
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
    /// Begins; waits for others who are at it.
    ///
    /// # Errors
    /// The store does not answer.
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

    /// Those of `names` that there are.
    ///
    /// # Errors
    /// The store does not answer.
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

    /// Makes a device, which was `before`, so, with a line in the audit trail for each thing that
    /// changes; tells whether anything does.
    ///
    /// # Errors
    /// The store does not answer.
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
                Some(_) => "a key of its own".to_owned(),
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

    /// Lets a device give up its name, keeps it out and ends its sessions: the first step of
    /// [`super::removal`].
    ///
    /// # Errors
    /// The store does not answer.
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

    /// Ends with everything that was set.
    ///
    /// # Errors
    /// Nothing of it was done, or, if the connection was lost, nobody knows.
    pub async fn commit(self) -> Result<(), ReadError> {
        self.editor.commit().await
    }

    /// Ends with nothing.
    ///
    /// # Errors
    /// The store does not answer; nothing is set all the same.
    pub async fn rollback(self) -> Result<(), ReadError> {
        self.editor.rollback().await
    }
}

/// Makes the devices of a spool what they have become in the database, as one change of the spool's own: a
/// database that is put back to an earlier state counts from there, and sessions and logins are held against
/// numbers that only rise.
///
/// # Errors
/// The spool does not answer, and nothing was done.
pub async fn adopt(spool: &mut Editor, changes: &Changes) -> Result<(), ReadError> {
    spool.begin().await?;
    // Spools of before had the database's numbers, and after such a return one below their highest.
    let next = "UPDATE device_revision SET latest = 1 + max(latest,
            (SELECT coalesce(max(revision), 0) FROM devices WHERE revision > 0))
        RETURNING latest";
    let rows = spool.rows(next, &[]).await?;
    let revision = rows.first().map_or(Ok(1), |row| row.integer(0))?;
    for device in &changes.devices {
        // A spool does not know its id, and what it has of the name may be of the next device of that name.
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

/// Makes all devices but these what they were before anybody changed them.
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

/// What was done to a device.
struct Put {
    device: i64,
    has_new_key: bool,
    is_let_in_or_out: bool,
}

/// Makes a device, which was `before`, so, by the change of this number; `None` if it is so already.
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
