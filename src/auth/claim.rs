//! Which fleet key the devices of a store belong to: the store keeps the key's fingerprint, and a gateway with
//! another key, whom no device could prove anything to, does not start.

use crate::auth::fleet_key::FleetKey;
use crate::store::editor::Editor;
use crate::store::reader::{ReadError, Reader};

/// What a store knows of its fleet key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The key has this fingerprint.
    Claimed(String),
    /// No gateway has started yet with a key.
    Unclaimed {
        /// Whether there are devices all the same.
        has_devices: bool,
    },
}

/// Why a gateway must not serve with the key that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The store's devices belong to another key, with this fingerprint.
    Other(String),
    /// There is no key, and the store has one or has devices.
    Lost,
}

/// Reads what the store knows of its key.
///
/// # Errors
/// The store does not answer.
pub async fn standing(reader: &mut Reader) -> Result<Standing, ReadError> {
    let rows = reader
        .rows("SELECT fingerprint FROM fleet_key", &[])
        .await?;
    if let Some(row) = rows.first() {
        let fingerprint = row.text_or_null(0)?.unwrap_or_default();
        return Ok(Standing::Claimed(fingerprint.to_owned()));
    }
    let device = reader.rows("SELECT id FROM devices LIMIT 1", &[]).await?;
    let has_devices = !device.is_empty();
    Ok(Standing::Unclaimed { has_devices })
}

impl Standing {
    /// Compares it with the key that a gateway has, or has not.
    pub fn mismatch(&self, key: Option<&FleetKey>) -> Option<Mismatch> {
        match (self, key) {
            (Standing::Claimed(store), Some(key)) if *store != key.fingerprint() => {
                Some(Mismatch::Other(store.clone()))
            }
            (Standing::Claimed(_), None) | (Standing::Unclaimed { has_devices: true }, None) => {
                Some(Mismatch::Lost)
            }
            _ => None,
        }
    }
}

/// Makes a key the store's unless it has one; returns what the store has then.
///
/// # Errors
/// The store does not answer or takes nothing.
pub async fn claim(editor: &mut Editor, key: &FleetKey) -> Result<Standing, ReadError> {
    if let claimed @ Standing::Claimed(_) = standing(editor).await? {
        return Ok(claimed);
    }
    let fingerprint = key.fingerprint();
    let insert = "INSERT INTO fleet_key (is_only, fingerprint) VALUES (true, $1)
        ON CONFLICT (is_only) DO NOTHING";
    editor
        .execute(insert, &[fingerprint.as_str().into()])
        .await?;
    standing(editor).await
}

/// Makes a key the store's, whichever it had.
///
/// # Errors
/// The store does not answer or takes nothing.
pub async fn adopt(editor: &mut Editor, key: &FleetKey) -> Result<(), ReadError> {
    let fingerprint = key.fingerprint();
    let upsert = "INSERT INTO fleet_key (is_only, fingerprint) VALUES (true, $1)
        ON CONFLICT (is_only) DO UPDATE SET fingerprint = excluded.fingerprint";
    editor
        .execute(upsert, &[fingerprint.as_str().into()])
        .await
        .map(drop)
}
