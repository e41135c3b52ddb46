//! The key that each device must prove.
//!
//! Most devices still have their first key, which is derived from the fleet key, and use no memory
//! here. When a device logs in, the store checks for changes that have not been read yet.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::FleetKey;
use crate::store::admin::device::{Changes, DeviceState};

/// Credentials of all devices.
#[derive(Debug)]
pub struct Credentials {
    fleet: FleetKey,
    /// By name: devices whose key is not the first one.
    replaced: RwLock<HashMap<String, Credential>>,
}

/// Credential of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credential {
    /// The device's key.
    pub key: DeviceKey,
    /// Number of the change that set the key; 0 for the first key.
    pub revision: i64,
}

impl Credentials {
    /// Creates credentials for a fleet without changes by operators.
    pub fn new(fleet: FleetKey) -> Credentials {
        Credentials {
            fleet,
            replaced: RwLock::default(),
        }
    }

    /// Returns the credential of the device with this name.
    pub fn of(&self, device: &str) -> Credential {
        let replaced = self.replaced.read().unwrap_or_else(PoisonError::into_inner);
        replaced.get(device).copied().unwrap_or_else(|| Credential {
            key: DeviceKey::derive(&self.fleet, device, 0),
            revision: 0,
        })
    }

    /// Applies changes by operators.
    pub fn take_in(&self, changes: &Changes) {
        let mut replaced = { &self.replaced }
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if changes.is_all {
            replaced.clear();
        }
        for device in &changes.devices {
            if let Some(former) = device.former_name() {
                // A new device with the former name starts with the first key.
                replaced.remove(former);
                continue;
            }
            if device.key_revision == 0 {
                replaced.remove(&device.name);
                continue;
            }
            let credential = Credential {
                key: self.key_of(device),
                revision: device.key_revision,
            };
            replaced.insert(device.name.clone(), credential);
        }
    }

    fn key_of(&self, device: &DeviceState) -> DeviceKey {
        let Some(sealed) = &device.key.sealed else {
            return DeviceKey::derive(&self.fleet, &device.name, device.key.version);
        };
        DeviceKey::unseal(&self.fleet, &device.name, sealed).unwrap_or_else(|error| {
            tracing::error!(
                device = device.device.0,
                %error,
                "could not decrypt individual device key; rotate it with `fieldgate device rotate-key`"
            );
            // No device has an empty name (SPEC R31), so no device has this key.
            DeviceKey::derive(&self.fleet, "", device.key.version)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::DeviceId;
    use crate::store::admin::device::{Position, StoredKey};

    fn fleet() -> FleetKey {
        FleetKey::from_bytes([7; 32])
    }

    fn state(name: &str, key: StoredKey, key_revision: i64) -> DeviceState {
        DeviceState {
            device: DeviceId(1),
            name: name.to_owned(),
            is_enabled: true,
            key,
            revision: 9,
            key_revision,
        }
    }

    fn changes(is_all: bool, devices: Vec<DeviceState>) -> Changes {
        Changes {
            devices,
            is_all,
            position: Position::default(),
        }
    }

    #[test]
    fn the_key_set_last_is_used() {
        let credentials = Credentials::new(fleet());
        let first = credentials.of("pump");
        assert_eq!(first.key, DeviceKey::derive(&fleet(), "pump", 0));
        assert_eq!(first.revision, 0);

        let derived = StoredKey {
            version: 2,
            sealed: None,
        };
        credentials.take_in(&changes(false, vec![state("pump", derived, 4)]));
        let second = credentials.of("pump");
        assert_eq!(second.key, DeviceKey::derive(&fleet(), "pump", 2));
        assert_eq!(second.revision, 4);
        assert_eq!(credentials.of("other").revision, 0);

        let own = DeviceKey::random().unwrap();
        let sealed = StoredKey {
            version: 3,
            sealed: Some(own.seal(&fleet(), "pump").unwrap()),
        };
        credentials.take_in(&changes(false, vec![state("pump", sealed, 5)]));
        assert_eq!(credentials.of("pump").key, own);

        // Another store: the changes of the first one do not apply.
        credentials.take_in(&changes(true, vec![]));
        assert_eq!(credentials.of("pump"), first);
    }

    #[test]
    fn no_device_has_a_key_that_cannot_be_decrypted() {
        let credentials = Credentials::new(fleet());
        let elsewhere = FleetKey::from_bytes([8; 32]);
        let own = DeviceKey::random().unwrap();
        let sealed = StoredKey {
            version: 1,
            sealed: Some(own.seal(&elsewhere, "pump").unwrap()),
        };
        credentials.take_in(&changes(false, vec![state("pump", sealed, 5)]));
        let credential = credentials.of("pump");
        assert_ne!(credential.key, own);
        for version in 0..3 {
            let derived = DeviceKey::derive(&fleet(), "pump", version);
            assert_ne!(credential.key, derived);
        }
    }
}
