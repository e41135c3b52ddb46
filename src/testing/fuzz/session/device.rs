//! Frames of devices: valid handshakes, and frames of every type.

use std::sync::LazyLock;

use fieldgate_protocol::auth::{
    KEY_BYTES, NO_CHANNEL_BINDING, Transcript, derive_device_key, schema_hash,
};
use fieldgate_protocol::column::{encode_f64, encode_integers, encoding};
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, HANDSHAKE_FRAME_BYTES_MAX, HEADER_BYTES, TRAILER_BYTES, VERSION,
};
use fieldgate_protocol::message::{
    Auth, Bye, Challenge, Column, Data, Event, Gap, Hello, Message, Ping, encode,
};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

use crate::testing;

pub(super) const FLEET_KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];
/// Nonce of every connection, so that AUTH is the same in each.
pub(super) const NONCE: [u8; 16] = [9; 16];
pub(super) const BOOT: u32 = 7;
const STEP_MS: u32 = 250;
/// Number of schemas that a device uses: more than a session keeps.
const SCHEMAS: u8 = 10;
const CONTENTS: [[(&str, Kind, i8); 2]; 2] = [
    [("temperature", Kind::Integer, -2), ("level", Kind::F64, 0)],
    [("open", Kind::Bool, 0), ("level", Kind::F32, 0)],
];

/// A handshake that proves a device's key.
pub(super) struct Known {
    pub name: &'static str,
    pub stream: u64,
    pub next_seq: u64,
    pub schema: Option<(u16, [u8; 8])>,
    pub hello: Vec<u8>,
    pub auth: Vec<u8>,
    key: [u8; KEY_BYTES],
    transcript: Transcript,
}

/// A device that can always continue, one whose queue was lost, a second stream, and a second device.
pub(super) static KNOWN: LazyLock<[Known; 4]> = LazyLock::new(|| {
    let right = schema_hash(payload(&declare(0)));
    [
        Known::new("fuzz-a", 5, 1 << 40, Some((1, right))),
        Known::new("fuzz-a", 5, 3, None),
        Known::new("fuzz-a", 6, 1 << 62, Some((1, [1; 8]))),
        Known::new("fuzz-b", 5, 1 << 40, Some((2, right))),
    ]
});

/// The answer to every HELLO.
pub(super) static CHALLENGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let challenge = Challenge {
        version: VERSION,
        nonce: NONCE,
        rx_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
        caps: 0,
        ext: &[],
    };
    framed(&challenge, 0)
});

impl Known {
    fn new(
        name: &'static str,
        stream: u64,
        next_seq: u64,
        schema: Option<(u16, [u8; 8])>,
    ) -> Known {
        let (number, hash) = schema.unwrap_or_default();
        let hello = Hello {
            min_version: VERSION,
            max_version: VERSION,
            name,
            stream,
            oldest_seq: 1,
            next_seq,
            boot: BOOT,
            mono_us: 1_000_000,
            utc_us: 0,
            rx_bytes_max: 4096,
            firmware: "1",
            schema: number,
            schema_hash: hash,
            nonce: [3; 16],
            caps: 0,
            ext: &[],
        };
        let hello = framed(&hello, 0);
        let mut auth = Auth {
            mono_us: 1_040_000,
            ext: &[],
            mac: [0; KEY_BYTES],
        };
        let unsigned = framed(&auth, 0);
        let unsigned = payload(&unsigned);
        let key = derive_device_key(&FLEET_KEY, name, 0);
        let mut transcript = Transcript::default();
        transcript.add(payload(&hello));
        transcript.add(payload(&CHALLENGE));
        transcript.add(&unsigned[..unsigned.len() - KEY_BYTES]);
        auth.mac = transcript.device_mac(&key, &NO_CHANNEL_BINDING);
        transcript.add(&auth.mac);
        Known {
            name,
            stream,
            next_seq,
            schema,
            hello,
            auth: framed(&auth, 0),
            key,
            transcript,
        }
    }

    /// Returns whether the gateway has proved that it has the key (R36).
    pub(super) fn believes(&self, welcome_payload: &[u8], mac: &[u8; KEY_BYTES]) -> bool {
        let mut transcript = self.transcript.clone();
        transcript.add(&welcome_payload[..welcome_payload.len() - KEY_BYTES]);
        transcript.verify_gateway_mac(&self.key, &NO_CHANNEL_BINDING, mac)
    }
}

fn payload(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..frame.len() - TRAILER_BYTES]
}

fn framed<'m>(message: &impl Message<'m>, seq: u64) -> Vec<u8> {
    let mut frame = vec![0; HANDSHAKE_FRAME_BYTES_MAX];
    let frame_bytes = encode(message, seq, &mut frame).expect("all of them are short");
    frame.truncate(frame_bytes);
    frame
}

fn channels(pick: u8) -> (u16, [(&'static str, Kind, i8); 2]) {
    let content = CONTENTS[usize::from(pick / SCHEMAS) % CONTENTS.len()];
    (u16::from(pick % SCHEMAS) + 1, content)
}

/// Returns a DECLARE; `pick` selects number and content.
pub(super) fn declare(pick: u8) -> Vec<u8> {
    let (schema, channels) = channels(pick);
    framed(&testing::declare(schema, &channels), 0)
}

/// Returns DATA that is valid if the schema of `pick` was declared; each byte of `raw` is a row.
pub(super) fn data(seq: u64, pick: u8, utc_us: Option<i64>, raw: &[u8]) -> Vec<u8> {
    let (schema, channels) = channels(pick);
    let packed = channels.map(|(_, kind, _)| {
        let mut bytes = vec![0; 10 * raw.len() + 1];
        let integers: Vec<i64> = { raw.iter() }
            .map(|raw| match kind {
                Kind::Bool => i64::from(raw % 2),
                _ => i64::from(*raw) * 1_000 - 90_000,
            })
            .collect();
        let floats = || integers.iter().map(|raw| *raw as f64 / 8.0);
        let (encoding, used) = match kind {
            Kind::Integer | Kind::Bool => {
                encode_integers(&integers, &mut bytes).expect("enough space")
            }
            Kind::F64 => {
                let used = encode_f64(&floats().collect::<Vec<_>>(), &mut bytes);
                (encoding::RAW, used.expect("enough space"))
            }
            Kind::F32 => {
                bytes = { floats() }
                    .flat_map(|value| (value as f32).to_le_bytes())
                    .collect();
                (encoding::RAW, bytes.len())
            }
        };
        bytes.truncate(used);
        (encoding, bytes)
    });
    let data = Data {
        schema,
        clock: utc_us.map_or(Clock::Boot, |_| Clock::Utc),
        time_unit: TimeUnit::Milliseconds,
        boot: BOOT + u32::from(pick / 128),
        t0: utc_us.map_or(1_100, |us| us / 1_000),
        rows: raw.len() as u16,
        step: STEP_MS,
        dt: &[],
        columns: packed
            .iter()
            .zip(1..)
            .map(|((encoding, data), channel)| Column {
                channel,
                encoding: *encoding,
                nulls: &[],
                data,
            })
            .collect(),
        ext: &[],
    };
    framed(&data, seq)
}

pub(super) fn event(seq: u64, code: u8, utc_us: i64) -> Vec<u8> {
    let event = Event {
        clock: Clock::Utc,
        boot: BOOT,
        time_us: utc_us,
        level: code % 5,
        code: u16::from(code),
        text: "door open",
        ext: &[],
    };
    framed(&event, seq)
}

pub(super) fn gap(from_seq: u64, seq: u64) -> Vec<u8> {
    let gap = Gap {
        from_seq,
        reason: 1,
        ext: &[],
    };
    framed(&gap, seq)
}

/// Returns a PING that refers to the PONG sent at `pong_sent_us`, or to none.
pub(super) fn ping(mono_us: u64, pong_sent_us: i64) -> Vec<u8> {
    let ping = Ping {
        mono_us,
        pong_sent_us,
        pong_mono_us: mono_us.saturating_sub(100),
        ext: &[],
    };
    framed(&ping, 0)
}

pub(super) fn bye() -> Vec<u8> {
    let bye = Bye {
        code: 0,
        retry_after_ms: 0,
        min_version: 0,
        max_version: 0,
        detail: "",
        ext: &[],
    };
    framed(&bye, 0)
}
