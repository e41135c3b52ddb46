//! The test vectors, written by `examples/vectors.rs` and checked by `tests/vectors.rs`.
//!
//! Expectations are written by hand next to each vector. [`judge`] derives them with the crate's
//! decoders, and `vectors/check.py` from SPEC.md alone. The tables keep each vector on one line,
//! exempt from rustfmt.

#[rustfmt::skip]
pub mod columns;
pub mod exchanges;
#[rustfmt::skip]
pub mod frames;
pub mod handshake;
pub mod judge;
#[rustfmt::skip]
pub mod messages;
pub mod primitives;
pub mod queue;
#[rustfmt::skip]
pub mod readings;
#[rustfmt::skip]
pub mod times;

use fieldgate_protocol::frame::{self, HEADER_BYTES, Header, OVERHEAD_BYTES, VERSION};
use fieldgate_protocol::message::{self, Channel, Column, Data, Declare, Message};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};
use serde::Serialize;
use serde_json::{Value, json};

/// The outcome of one frame at one receiver, in a state described in the file's `states`.
#[derive(Clone, Debug, Serialize)]
pub struct Vector {
    pub id: String,
    pub direction: &'static str,
    pub state: &'static str,
    pub hex: String,
    pub expect: Expect,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub fields: Value,
    pub note: &'static str,
}

/// Outcome at the receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Expect {
    /// The frame is accepted.
    Taken,
    /// More bytes are needed.
    Incomplete,
    /// The frame is skipped; nothing changes.
    PassedOver,
    /// The frame is dropped without a reply: its ACK is sent with a commit, or it was already
    /// requested again.
    Dropped,
    /// The number is durable already: the reply is an ACK.
    Ack { seq: u64 },
    /// The frame is refused; `consumed` says whether the number is used.
    Nack {
        code: u8,
        seq: u64,
        expected_seq: u64,
        consumed: bool,
    },
    /// The connection ends with a BYE of this code.
    Bye { code: u8 },
    /// The connection ends without a BYE.
    Close,
}

pub const TO_GATEWAY: &str = "to_gateway";
pub const TO_DEVICE: &str = "to_device";
pub const AWAIT_HELLO: &str = "await_hello";
pub const AWAIT_AUTH: &str = "await_auth";
pub const SERVING: &str = "serving";
pub const CRC_FAILED: &str = "serving_crc_failed_5";
pub const DROPPING: &str = "serving_dropping";
pub const DEVICE: &str = "device";

/// In the serving states, 3 is durable, 4 is accepted, and 5 is expected.
pub const DURABLE_SEQ: u64 = 3;
pub const EXPECTED_SEQ: u64 = 5;
pub const LIMIT_SEQ: u64 = DURABLE_SEQ + 64;

pub fn vector(
    id: impl Into<String>,
    state: &'static str,
    bytes: &[u8],
    expect: Expect,
    note: &'static str,
) -> Vector {
    Vector {
        id: id.into(),
        direction: if state == DEVICE {
            TO_DEVICE
        } else {
            TO_GATEWAY
        },
        state,
        hex: hex(bytes),
        expect,
        fields: Value::Null,
        note,
    }
}

/// Returns a NACK of class 2, or of class 3 with its number used.
pub fn nack(code: u8, seq: u64) -> Expect {
    Expect::Nack {
        code,
        seq,
        expected_seq: if code >= 30 { seq + 1 } else { EXPECTED_SEQ },
        consumed: code >= 30,
    }
}

/// Returns a NACK of the expected frame.
pub fn refused(code: u8) -> Expect {
    nack(code, EXPECTED_SEQ)
}

pub fn bye(code: u8) -> Expect {
    Expect::Bye { code }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
        .collect()
}

/// Returns a frame of version 1 without flags.
pub fn frame_of(frame_type: u8, seq: u64, payload: &[u8]) -> Vec<u8> {
    frame_with(VERSION, frame_type, 0, seq, payload)
}

/// Returns a frame with correct checksums and any other content.
pub fn frame_with(version: u8, frame_type: u8, flags: u8, seq: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; OVERHEAD_BYTES + payload.len()];
    out[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let header = Header {
        version,
        frame_type,
        flags,
        payload_bytes: u16::try_from(payload.len()).unwrap(),
        seq,
    };
    frame::seal(header, &mut out).unwrap();
    out
}

pub fn message_frame<'a, M: Message<'a>>(message: &M, seq: u64) -> Vec<u8> {
    let mut out = vec![0; 65_555];
    let len = message::encode(message, seq, &mut out).unwrap();
    out.truncate(len);
    out
}

pub fn payload_of(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..frame.len() - 4]
}

/// Returns the schema of the serving states: one channel of each kind.
pub fn declare() -> Declare<'static> {
    let channel = |id, name, unit, kind, exp10| Channel {
        id,
        name,
        unit,
        kind,
        exp10,
    };
    Declare {
        schema: 1,
        channels: [
            channel(1, "temperature", "Cel", Kind::Integer, -2),
            channel(2, "battery", "V", Kind::F32, 0),
            channel(3, "pressure", "hPa", Kind::F64, 0),
            channel(4, "door", "", Kind::Bool, 0),
        ]
        .into_iter()
        .collect(),
        ext: &[],
    }
}

/// Returns three readings of the temperature, one second apart: 21.57, 21.58, 21.56.
pub fn data() -> Data<'static> {
    Data {
        schema: 1,
        clock: Clock::Utc,
        time_unit: TimeUnit::Seconds,
        boot: 7,
        t0: 1_760_000_000,
        rows: 3,
        step: 1,
        dt: &[],
        columns: [Column {
            channel: 1,
            encoding: 1,
            nulls: &[],
            data: &[0xDA, 0x21, 0x02, 0x03],
        }]
        .into_iter()
        .collect(),
        ext: &[],
    }
}

/// Replaces the byte `old` in the payload of a frame, for a value that no message can have.
pub fn with_byte(frame: &[u8], at: usize, old: u8, new: u8) -> Vec<u8> {
    let header = frame::decode_header(frame, usize::MAX).unwrap().unwrap();
    let payload = replaced(payload_of(frame), at, &[old], &[new]);
    frame_of(header.frame_type, header.seq, &payload)
}

/// Replaces the bytes `old` in a payload.
pub fn replaced(payload: &[u8], at: usize, old: &[u8], new: &[u8]) -> Vec<u8> {
    assert_eq!(&payload[at..at + old.len()], old, "not the bytes expected");
    [&payload[..at], new, &payload[at + old.len()..]].concat()
}

/// Returns the name and content of every file.
pub fn files() -> Vec<(&'static str, Value)> {
    let states = json!({
        "await_hello": "the gateway after accepting; a whole frame is at most 512 bytes",
        "await_auth": "the gateway after a valid HELLO and its CHALLENGE; at most 512 bytes",
        "serving": {
            "version": 1, "frame_bytes_max": 4096, "durable_seq": DURABLE_SEQ,
            "expected_seq": EXPECTED_SEQ, "limit_seq": LIMIT_SEQ,
            "schemas": [hex(payload_of(&message_frame(&declare(), 0)))],
        },
        "serving_crc_failed_5": "as serving; the payload checksum of 5 was wrong once and NACK 22 was sent",
        "serving_dropping": "as serving, after a NACK of class 1 or 2 that expects 5",
        "device": "the device in whichever state awaits this type; a whole frame is at most 4096 bytes",
    });
    let file = |about: &str, vectors: Vec<Vector>| json!({ "about": about, "states": states, "vectors": vectors });
    vec![
        ("primitives.json", primitives::file()),
        ("columns.json", columns::file()),
        ("handshake.json", handshake::file()),
        ("exchanges.json", exchanges::file()),
        ("times.json", times::file()),
        (
            "frames.json",
            file(
                "Framing, order, credit and types (SPEC.md R1-R15, R44, R45, R100-R118)",
                frames::vectors(),
            ),
        ),
        (
            "messages.json",
            file(
                "Each message, its boundaries and its faults (SPEC.md R20-R48)",
                messages::vectors(),
            ),
        ),
        (
            "readings.json",
            file(
                "DATA frames: boundaries and faults (SPEC.md R50-R59)",
                readings::vectors(),
            ),
        ),
    ]
}

/// Returns all vectors of a single frame.
pub fn vectors() -> Vec<Vector> {
    [frames::vectors(), messages::vectors(), readings::vectors()].concat()
}

/// Renders a file with one vector per line, so that diffs show changed vectors.
pub fn render(file: &Value) -> String {
    let mut out = String::from("{\n");
    let entries = file.as_object().unwrap();
    for (i, (key, value)) in entries.iter().enumerate() {
        let comma = if i + 1 < entries.len() { "," } else { "" };
        match value {
            Value::Array(items) if items.iter().all(Value::is_object) => {
                let lines: Vec<String> = items.iter().map(|item| format!("    {item}")).collect();
                out += &format!("  \"{key}\": [\n{}\n  ]{comma}\n", lines.join(",\n"));
            }
            _ => out += &format!("  \"{key}\": {value}{comma}\n"),
        }
    }
    out + "}\n"
}
