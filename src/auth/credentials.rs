//! Which key a device has to prove.
//!
//! Most devices have the first key that derives from the fleet's, and need no memory here. What has changed and is
//! not seen here yet is found by the store, when the device logs in.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::FleetKey;
use crate::store::lifecycle::{Changes, DeviceState};

/// What devices have to prove.
#[derive(Debug)]
pub struct Credentials {
    fleet: FleetKey,
    /// By name; of devices whose key is not the first one.
    replaced: RwLock<HashMap<String, Credential>>,
}

/// What a device has to prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credential {
    /// Its key.
    pub key: DeviceKey,
    /// The change that gave it; 0 for the first key.
    pub revision: i64,
}

impl Credentials {
    /// Those of a fleet in which nobody has changed anything.
    pub fn new(fleet: FleetKey) -> Credentials {
        Credentials {
            fleet,
            replaced: RwLock::default(),
        }
    }

    /// What whoever has this name must prove.
    pub fn of(&self, device: &str) -> Credential {
        let replaced = self.replaced.read().unwrap_or_else(PoisonError::into_inner);
        replaced.get(device).copied().unwrap_or_else(|| Credential {
            key: DeviceKey::derive(&self.fleet, device, 0),
            revision: 0,
        })
    }

    /// Takes changes by operators into account.
    pub fn take_in(&self, changes: &Changes) {
        let mut replaced = { &self.replaced }
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if changes.is_all {
            replaced.clear();
        }
        for device in &changes.devices {
            if let Some(former) = device.former_name() {
                // The next device of that name begins with the first key.
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
            tracing::error!(device = device.device.0, %error, "a device cannot connect; rotate its key");
            // No device has an empty name (SPEC R31), so nobody has this key.
            DeviceKey::derive(&self.fleet, "", device.key.version)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::DeviceId;
    use crate::store::lifecycle::StoredKey;

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
        Changes { devices, is_all }
    }

    #[test]
    fn the_key_is_the_one_that_operators_gave_last() {
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

        // Another store: what was known of the first does not hold.
        credentials.take_in(&changes(true, vec![]));
        assert_eq!(credentials.of("pump"), first);
    }

    #[test]
    fn a_key_that_cannot_be_opened_is_nobodys() {
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
