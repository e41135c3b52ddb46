//! The key of a single device: derived from the fleet's, or the device's own; and how its own is kept
//! where everybody reads who may read the store.
//!
//! A sealed key is a random nonce of 12 bytes and what ChaCha20-Poly1305 (RFC 8439) makes of the key's 32
//! bytes: 60 bytes in all. The key that seals derives from the fleet's (HKDF-SHA256) with the device's name
//! in the info, so what is sealed for one device opens for no other.
//!
//! Invariant: a key is in no message of this module, nor in anything's `Debug`.

use std::fmt;

use fieldgate_protocol::auth::{KEY_BYTES, derive_device_key};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};

use crate::auth::fleet_key::{DigitsError, FleetKey, key_of_digits};

const SEAL_LABEL: &[u8] = b"fieldgate sealed device key v1";

/// The key of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeviceKey([u8; KEY_BYTES]);

/// A sealed key was sealed under another fleet key or for another device, or is damaged.
#[derive(Debug, thiserror::Error)]
#[error("the device's own key was sealed under another fleet key, or is damaged")]
pub struct UnsealError;

impl DeviceKey {
    /// The key that derives from the fleet's; `version` is 0 until it is replaced (SPEC R32).
    pub fn derive(fleet: &FleetKey, device: &str, version: u32) -> DeviceKey {
        DeviceKey(derive_device_key(fleet.as_bytes(), device, version))
    }

    /// A key of the system's randomness.
    ///
    /// # Errors
    /// The system gives none.
    pub fn random() -> Result<DeviceKey, getrandom::Error> {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        Ok(DeviceKey(key))
    }

    /// The key that 64 hexadecimal digits stand for.
    ///
    /// # Errors
    /// They are something else.
    pub fn parse(digits: &str) -> Result<DeviceKey, DigitsError> {
        key_of_digits(digits.trim().as_bytes()).map(DeviceKey)
    }

    /// The key itself.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key as 64 hexadecimal digits, for whoever puts it into the device.
    pub fn to_digits(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The key, encrypted for the store.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn seal(&self, fleet: &FleetKey, device: &str) -> Result<Vec<u8>, getrandom::Error> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce)?;
        let mut sealed = nonce.to_vec();
        let mut key = self.0;
        let tag = sealing_key(fleet, device)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut key)
            .expect("32 bytes are within what the cipher can take");
        sealed.extend_from_slice(&key);
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// The key that [`DeviceKey::seal`] made `sealed` of.
    ///
    /// # Errors
    /// It was another fleet's or device's, or is damaged.
    pub fn unseal(fleet: &FleetKey, device: &str, sealed: &[u8]) -> Result<DeviceKey, UnsealError> {
        let (nonce, key) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(UnsealError)?;
        let mut key = key.to_vec();
        let key = sealing_key(fleet, device)
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut key)
            .map_err(|_| UnsealError)?;
        let key: &[u8] = key;
        key.try_into().map(DeviceKey).map_err(|_| UnsealError)
    }
}

fn sealing_key(fleet: &FleetKey, device: &str) -> LessSafeKey {
    let info = [SEAL_LABEL, device.as_bytes()];
    let okm = Salt::new(HKDF_SHA256, &[]).extract(fleet.as_bytes());
    let okm = okm.expand(&info, &CHACHA20_POLY1305);
    let key: UnboundKey = okm
        .expect("a key of the cipher is within what HKDF-SHA256 can give")
        .into();
    LessSafeKey::new(key)
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceKey(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(byte: u8) -> FleetKey {
        FleetKey::from_bytes([byte; KEY_BYTES])
    }

    #[test]
    fn what_is_sealed_opens_for_its_device_and_fleet_alone() {
        let key = DeviceKey::random().unwrap();
        let sealed = key.seal(&fleet(1), "pump").unwrap();
        assert_eq!(sealed.len(), 60);
        assert_eq!(DeviceKey::unseal(&fleet(1), "pump", &sealed).unwrap(), key);
        assert!(DeviceKey::unseal(&fleet(1), "pumq", &sealed).is_err());
        assert!(DeviceKey::unseal(&fleet(2), "pump", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert!(DeviceKey::unseal(&fleet(1), "pump", &damaged).is_err());
            assert!(DeviceKey::unseal(&fleet(1), "pump", &sealed[..at]).is_err());
        }
        assert!(!sealed.windows(8).any(|part| part == &key.0[..8]));
        assert_ne!(key.seal(&fleet(1), "pump").unwrap(), sealed);
    }

    #[test]
    fn digits_are_the_key() {
        let key = DeviceKey::derive(&fleet(7), "pump", 3);
        assert_eq!(DeviceKey::parse(&key.to_digits()).unwrap(), key);
        assert_eq!(DeviceKey::parse(&(key.to_digits() + "\n")).unwrap(), key);
        assert!(DeviceKey::parse("ab").is_err());
        assert_ne!(key, DeviceKey::derive(&fleet(7), "pump", 0));
        assert_eq!(format!("{key:?}"), "DeviceKey(secret)");
    }
}
