//! Vectors of keys, MACs and the four frames of the handshake.

use fieldgate_protocol::auth::{Transcript, derive_device_key, schema_hash};
use fieldgate_protocol::message::{Auth, Challenge, Hello, Welcome};

use super::*;

pub const FLEET_KEY: [u8; 32] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f,
    0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f,
];
pub const NAME: &str = "pump-07";
pub const DEVICE_NONCE: [u8; 16] = *b"device's nonce 1";
pub const GATEWAY_NONCE: [u8; 16] = *b"gateway's nonce1";
pub const STREAM: u64 = 0x1122_3344_5566_7788;

pub fn hello() -> Hello<'static> {
    Hello {
        min_version: 1,
        max_version: 1,
        name: NAME,
        stream: STREAM,
        oldest_seq: 1,
        next_seq: 3,
        boot: 7,
        mono_us: 1_000_000,
        utc_us: 0,
        rx_bytes_max: 4096,
        firmware: "2.4.1",
        schema: 1,
        schema_hash: schema_hash(payload_of(&message_frame(&declare(), 0))),
        nonce: DEVICE_NONCE,
        caps: 0,
        ext: &[],
    }
}

pub fn challenge() -> Challenge<'static> {
    Challenge {
        version: 1,
        nonce: GATEWAY_NONCE,
        rx_bytes_max: 4096,
        caps: 0,
        ext: &[],
    }
}

pub fn welcome(durable_seq: u64, schema_known: u8) -> Welcome<'static> {
    Welcome {
        durable_seq,
        limit_seq: durable_seq + 64,
        keepalive_s: 40,
        ack_timeout_s: 30,
        utc_us: 1_760_000_000_250_000,
        schema_known,
        ext: &[],
        mac: [0; 32],
    }
}

/// Returns the four frames, with both MACs.
pub fn frames(
    hello: &Hello<'_>,
    auth_mono_us: u64,
    welcome: Welcome<'_>,
    binding: &[u8; 32],
) -> [Vec<u8>; 4] {
    let key = derive_device_key(&FLEET_KEY, hello.name, 0);
    let mut transcript = Transcript::default();
    let hello = message_frame(hello, 0);
    let challenge = message_frame(&challenge(), 0);
    transcript.add(payload_of(&hello));
    transcript.add(payload_of(&challenge));
    let mut auth = Auth {
        mono_us: auth_mono_us,
        ext: &[],
        mac: [0; 32],
    };
    let unsigned = message_frame(&auth, 0);
    transcript.add(&payload_of(&unsigned)[..unsigned.len() - 20 - 32]);
    auth.mac = transcript.device_mac(&key, binding);
    transcript.add(&auth.mac);
    let unsigned = message_frame(&welcome, 0);
    transcript.add(&payload_of(&unsigned)[..unsigned.len() - 20 - 32]);
    let welcome = Welcome {
        mac: transcript.gateway_mac(&key, binding),
        ..welcome
    };
    [
        hello,
        challenge,
        message_frame(&auth, 0),
        message_frame(&welcome, 0),
    ]
}

fn entry(id: &str, welcome: Welcome<'_>, binding: [u8; 32], note: &str) -> Value {
    let [hello, challenge, auth, welcome] = frames(&hello(), 1_040_000, welcome, &binding);
    json!({
        "id": id, "note": note, "fleet_key": hex(&FLEET_KEY), "name": NAME, "channel_binding": hex(&binding),
        "hello": hex(&hello), "challenge": hex(&challenge), "auth": hex(&auth), "welcome": hex(&welcome),
        "device_mac": hex(&payload_of(&auth)[payload_of(&auth).len() - 32..]),
        "gateway_mac": hex(&payload_of(&welcome)[payload_of(&welcome).len() - 32..]),
    })
}

pub fn file() -> Value {
    let names = [
        (NAME, 0),
        ("a", 0),
        ("A.b_c:d-9", 0),
        ("12345678901234567890123456789012", 0),
        (NAME, 1),
        (NAME, 0x0403_0201),
    ];
    let keys: Vec<Value> = names
        .into_iter()
        .map(|(name, version)| {
            json!({
                "fleet_key": hex(&FLEET_KEY), "name": name, "key_version": version,
                "device_key": hex(&derive_device_key(&FLEET_KEY, name, version)),
            })
        })
        .collect();
    let declared = message_frame(&declare(), 0);
    json!({
        "about": "Keys, MACs and schema hash (SPEC.md R32-R41)",
        "keys": keys,
        "handshakes": [
            entry("plain-tcp", welcome(1, 1), [0; 32], "1 of 2 frames was stored before; the schema is known"),
            entry("bound-to-tls", welcome(0, 0), [0xAB; 32], "a channel binding; a stream not seen before"),
        ],
        "schema_hashes": [{ "declare": hex(payload_of(&declared)), "hash": hex(&schema_hash(payload_of(&declared))) }],
    })
}
