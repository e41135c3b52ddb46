//! The key of a single device, which is individual or derived from the fleet key; and the
//! encryption of individual keys in the store, which other users may be able to read.
//!
//! A sealed key is a random nonce of 12 bytes followed by the ChaCha20-Poly1305 (RFC 8439)
//! ciphertext of the key's 32 bytes: 60 bytes in all. The sealing key is derived from the fleet key
//! (HKDF-SHA256) with the device's name in the info, so a key sealed for one device cannot be
//! decrypted for another.
//!
//! Invariant: no key appears in a message of this module or in `Debug` output.

use std::fmt;

use fieldgate_protocol::auth::{KEY_BYTES, derive_device_key};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};

use crate::auth::fleet_key::{DigitsError, FleetKey, key_of_digits};

const SEAL_LABEL: &[u8] = b"fieldgate sealed device key v1";

/// The key of one device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeviceKey([u8; KEY_BYTES]);

/// A sealed key belongs to another fleet key or device, or is damaged.
#[derive(Debug, thiserror::Error)]
#[error("could not decrypt the device's individual key: wrong fleet key or damaged")]
pub struct UnsealError;

impl DeviceKey {
    /// Derives the device's key from the fleet key; `version` is 0 until the key is replaced (SPEC
    /// R32).
    pub fn derive(fleet: &FleetKey, device: &str, version: u32) -> DeviceKey {
        DeviceKey(derive_device_key(fleet.as_bytes(), device, version))
    }

    /// Generates a random key.
    ///
    /// # Errors
    /// The system provides no random numbers.
    pub fn random() -> Result<DeviceKey, getrandom::Error> {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        Ok(DeviceKey(key))
    }

    /// Parses a key of 64 hexadecimal digits.
    ///
    /// # Errors
    /// The text is not a key.
    pub fn parse(digits: &str) -> Result<DeviceKey, DigitsError> {
        key_of_digits(digits.trim().as_bytes()).map(DeviceKey)
    }

    /// Returns the key's bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// Returns the key as 64 hexadecimal digits, to configure the device.
    pub fn to_digits(&self) -> String {
        hex::encode(self.0)
    }

    /// Encrypts the key for the store.
    ///
    /// # Errors
    /// The system provides no random numbers.
    pub fn seal(&self, fleet: &FleetKey, device: &str) -> Result<Vec<u8>, getrandom::Error> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce)?;
        let mut sealed = nonce.to_vec();
        let mut key = self.0;
        let tag = sealing_key(fleet, device)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut key)
            .expect("32 bytes are within the limit of the cipher");
        sealed.extend_from_slice(&key);
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// Decrypts a key encrypted by [`DeviceKey::seal`].
    ///
    /// # Errors
    /// The key belongs to another fleet or device, or is damaged.
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
        .expect("the cipher's key size is within the limit of HKDF-SHA256")
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
    fn a_sealed_key_opens_only_for_its_device_and_fleet() {
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
    fn a_key_is_parsed_from_its_digits() {
        let key = DeviceKey::derive(&fleet(7), "pump", 3);
        assert_eq!(DeviceKey::parse(&key.to_digits()).unwrap(), key);
        assert_eq!(DeviceKey::parse(&(key.to_digits() + "\n")).unwrap(), key);
        assert!(DeviceKey::parse("ab").is_err());
        assert_ne!(key, DeviceKey::derive(&fleet(7), "pump", 0));
        assert_eq!(format!("{key:?}"), "DeviceKey(secret)");
    }
}
