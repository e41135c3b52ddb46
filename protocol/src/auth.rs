//! Keys and the two MACs of the handshake (R32 to R37).
//!
//! A CRC does not prove who sent a frame. The MACs prove, once per connection, that both sides hold
//! the device's key. Comparison takes constant time.

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// Length of a key, a MAC and a channel binding, in bytes.
pub const KEY_BYTES: usize = 32;
/// Length of a nonce, in bytes.
pub const NONCE_BYTES: usize = 16;
/// Channel binding of a plain TCP connection (R34).
pub const NO_CHANNEL_BINDING: [u8; KEY_BYTES] = [0; KEY_BYTES];

const DEVICE_KEY_LABEL: &[u8] = b"fieldgate device v1";
const DEVICE_MAC_LABEL: &[u8] = b"fieldgate device v1";
const GATEWAY_MAC_LABEL: &[u8] = b"fieldgate gateway v1";

/// Derives a device's key from the fleet key (R32). `key_version` is 0 until the key is replaced.
pub fn derive_device_key(
    fleet_key: &[u8; KEY_BYTES],
    name: &str,
    key_version: u32,
) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    // Names contain no zero byte, so the boundary between name and version is unambiguous.
    let version = key_version.to_le_bytes();
    let (separator, version): (&[u8], &[u8]) = match key_version {
        0 => (&[], &[]),
        _ => (&[0], &version),
    };
    let info = [DEVICE_KEY_LABEL, name.as_bytes(), separator, version];
    Hkdf::<Sha256>::new(None, fleet_key)
        .expand_multi_info(&info, &mut key)
        .expect("32 bytes are within the limit of HKDF-SHA256");
    key
}

/// Hash of the payloads exchanged so far (R33).
#[derive(Clone, Debug, Default)]
pub struct Transcript(Sha256);

impl Transcript {
    /// Adds a payload, or the part before its MAC.
    pub fn add(&mut self, payload: &[u8]) {
        self.0.update(payload);
    }

    /// Returns the device's MAC over HELLO, CHALLENGE and AUTH without its MAC (R35).
    pub fn device_mac(
        &self,
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
    ) -> [u8; KEY_BYTES] {
        self.mac(DEVICE_MAC_LABEL, key, channel_binding)
            .finalize()
            .into_bytes()
            .into()
    }

    /// Verifies the device's `mac` in constant time.
    pub fn verify_device_mac(
        &self,
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
        mac: &[u8; KEY_BYTES],
    ) -> bool {
        self.mac(DEVICE_MAC_LABEL, key, channel_binding)
            .verify_slice(mac)
            .is_ok()
    }

    /// Returns the gateway's MAC over HELLO, CHALLENGE, AUTH including its MAC, and WELCOME without
    /// its MAC (R36).
    pub fn gateway_mac(
        &self,
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
    ) -> [u8; KEY_BYTES] {
        self.mac(GATEWAY_MAC_LABEL, key, channel_binding)
            .finalize()
            .into_bytes()
            .into()
    }

    /// Verifies the gateway's `mac` in constant time.
    pub fn verify_gateway_mac(
        &self,
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
        mac: &[u8; KEY_BYTES],
    ) -> bool {
        self.mac(GATEWAY_MAC_LABEL, key, channel_binding)
            .verify_slice(mac)
            .is_ok()
    }

    fn mac(
        &self,
        label: &[u8],
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
    ) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key)
            .expect("HMAC accepts keys of any length");
        mac.update(label);
        mac.update(channel_binding);
        mac.update(&self.0.clone().finalize());
        mac
    }
}

/// Returns the identifier of a schema's content: the first 8 bytes of the SHA-256 of DECLARE's
/// payload (R41).
pub fn schema_hash(declare_payload: &[u8]) -> [u8; 8] {
    SchemaHasher(Sha256::new_with_prefix(declare_payload)).finish()
}

/// [`schema_hash`] of a payload that comes in parts.
#[derive(Default)]
pub(crate) struct SchemaHasher(Sha256);

impl SchemaHasher {
    pub(crate) fn finish(self) -> [u8; 8] {
        let digest: [u8; 32] = self.0.finalize().into();
        let [a, b, c, d, e, f, g, h, ..] = digest;
        [a, b, c, d, e, f, g, h]
    }
}

impl Extend<u8> for SchemaHasher {
    fn extend<I: IntoIterator<Item = u8>>(&mut self, bytes: I) {
        bytes.into_iter().for_each(|byte| self.0.update([byte]));
    }
}
