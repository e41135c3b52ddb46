//! Binds a store to its fleet key: the store keeps the key's fingerprint, and a gateway with
//! another key does not start, because no device could authenticate to it.

use crate::auth::fleet_key::FleetKey;
use crate::store::admin::{Connection, QueryError};

/// Fleet key state of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The store belongs to the key with this fingerprint.
    Claimed(String),
    /// No gateway has started with a key yet.
    Unclaimed {
        /// Whether the store has devices anyway.
        has_devices: bool,
    },
}

/// Reason why a gateway must not use its key with a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The store belongs to another key, with this fingerprint.
    Other(String),
    /// The gateway has no key, but the store has a fingerprint or devices.
    Lost,
}

/// Reads the store's fleet key state.
///
/// # Errors
/// The store is unavailable.
pub async fn standing(connection: &mut Connection) -> Result<Standing, QueryError> {
    let rows = connection
        .rows("SELECT fingerprint FROM fleet_key", &[])
        .await?;
    if let Some(row) = rows.first() {
        let fingerprint = row.text(0)?;
        return Ok(Standing::Claimed(fingerprint.to_owned()));
    }
    let device = connection
        .rows("SELECT id FROM devices LIMIT 1", &[])
        .await?;
    let has_devices = !device.is_empty();
    Ok(Standing::Unclaimed { has_devices })
}

impl Standing {
    /// Compares the state with the gateway's key, if it has one.
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

/// Stores the fingerprint of `key` unless the store has one; returns the resulting state.
///
/// # Errors
/// The store is unavailable or cannot be written.
pub async fn claim(connection: &mut Connection, key: &FleetKey) -> Result<Standing, QueryError> {
    if let claimed @ Standing::Claimed(_) = standing(connection).await? {
        return Ok(claimed);
    }
    let fingerprint = key.fingerprint();
    let insert = "INSERT INTO fleet_key (is_only, fingerprint) VALUES (true, $1)
        ON CONFLICT (is_only) DO NOTHING";
    connection
        .execute(insert, &[fingerprint.as_str().into()])
        .await?;
    standing(connection).await
}

/// Stores the fingerprint of `key`, replacing any other.
///
/// # Errors
/// The store is unavailable or cannot be written.
pub async fn adopt(connection: &mut Connection, key: &FleetKey) -> Result<(), QueryError> {
    let fingerprint = key.fingerprint();
    let upsert = "INSERT INTO fleet_key (is_only, fingerprint) VALUES (true, $1)
        ON CONFLICT (is_only) DO UPDATE SET fingerprint = excluded.fingerprint";
    connection
        .execute(upsert, &[fingerprint.as_str().into()])
        .await
        .map(drop)
}
