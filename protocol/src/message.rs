//! The payload of each frame type (R20 to R48): postcard, borrowed from the frame, completely
//! checked.
//!
//! Decoding accepts only the canonical encoding: no bytes after the message, and varints of the
//! shortest form. This module checks the limits of texts, lists and ranges. The two state machines
//! check whether a message is valid in the current state of the connection.

use heapless::Vec;
use postcard::ser_flavors::Size;
use serde::{Deserialize, Serialize};

use crate::auth::{KEY_BYTES, NONCE_BYTES};
use crate::error::Violation;
use crate::frame::{self, Frame, NoRoom, SEQ_MAX, types};
use crate::value::{Kind, MONO_US_MAX, check_time, check_utc};

/// Maximum number of channels in a schema and of columns in a DATA (R42, R53).
pub const CHANNELS_MAX: usize = 32;
/// Maximum length of a device name, channel name or firmware version, in bytes (R23).
pub const NAME_BYTES_MAX: usize = 32;
/// Maximum length of a unit, in bytes (R23).
pub const UNIT_BYTES_MAX: usize = 16;
/// Maximum length of an event's text, in bytes (R23).
pub const EVENT_TEXT_BYTES_MAX: usize = 128;
/// Maximum length of the text in NACK and BYE, in bytes (R23).
pub const DETAIL_BYTES_MAX: usize = 96;

/// A message with a frame type of its own.
pub trait Message<'a>: Serialize + Deserialize<'a> {
    /// Its frame type.
    const TYPE: u8;

    /// Checks the rules that the encoding does not guarantee.
    fn check(&self) -> Result<(), Violation>;
}

/// Decodes the message from a payload of type `M::TYPE`.
pub fn decode<'a, M: Message<'a>>(payload: &'a [u8]) -> Result<M, Violation> {
    let mut reader = postcard::Deserializer::from_bytes(payload);
    let message = M::deserialize(&mut reader).map_err(|_| Violation::Encoding)?;
    let rest = reader.finalize().map_err(|_| Violation::Encoding)?;
    if !rest.is_empty() {
        return Err(Violation::TrailingBytes);
    }
    // Only varints have several encodings, and all but the shortest are longer (R22).
    let shortest = postcard::serialize_with_flavor(&message, Size::default());
    if shortest != Ok(payload.len()) {
        return Err(Violation::NotCanonical);
    }
    message.check()?;
    Ok(message)
}

/// Writes a complete frame with `message` as its payload; returns its length in bytes.
pub fn encode<'a, M: Message<'a>>(message: &M, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
    frame::encode(M::TYPE, seq, out, |payload| {
        Ok(postcard::to_slice(message, payload)
            .map_err(|_| NoRoom)?
            .len())
    })
}

/// HELLO: the device's identity and the state of its queue. Its layout is the same in all versions
/// (R30).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello<'a> {
    /// Lowest version that the device supports.
    pub min_version: u8,
    /// Highest version that the device supports.
    pub max_version: u8,
    /// The device's name.
    pub name: &'a str,
    /// The stream that the device continues.
    pub stream: u64,
    /// Oldest number in the device's queue; `next_seq` if the queue is empty.
    pub oldest_seq: u64,
    /// Number of the device's next new frame; the first of a stream is 1.
    pub next_seq: u64,
    /// Boot counter, or a random number for each boot.
    pub boot: u32,
    /// Microseconds since that boot, at most [`MONO_US_MAX`].
    pub mono_us: u64,
    /// The device's UTC in microseconds, 0 if unknown. Any value is accepted: a wrong clock must
    /// not lock a device out.
    pub utc_us: i64,
    /// Longest frame that the device receives, in bytes.
    pub rx_bytes_max: u16,
    /// Firmware version, informational.
    pub firmware: &'a str,
    /// Schema number used for new frames; 0 if none.
    pub schema: u16,
    /// Hash of that schema; zeros if none.
    pub schema_hash: [u8; 8],
    /// Random for each connection.
    pub nonce: [u8; NONCE_BYTES],
    /// Capabilities; no bit is defined in version 1.
    pub caps: u32,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Hello<'a> {
    const TYPE: u8 = types::HELLO;

    fn check(&self) -> Result<(), Violation> {
        check_name(self.name)?;
        check_text(self.firmware, NAME_BYTES_MAX)?;
        check_range("stream", self.stream <= SEQ_MAX)?;
        check_range("next_seq", (1..=SEQ_MAX).contains(&self.next_seq))?;
        check_range("oldest_seq", (1..=self.next_seq).contains(&self.oldest_seq))?;
        check_range("versions", self.min_version <= self.max_version)?;
        check_range("mono_us", self.mono_us <= MONO_US_MAX)?;
        check_ext(self.ext)
    }
}

/// CHALLENGE: version, nonce and limits chosen by the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge<'a> {
    /// Version of this connection.
    pub version: u8,
    /// Random for each connection.
    pub nonce: [u8; NONCE_BYTES],
    /// Longest frame that the gateway receives after authentication, in bytes.
    pub rx_bytes_max: u16,
    /// Capabilities; no bit is defined in version 1.
    pub caps: u32,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Challenge<'a> {
    const TYPE: u8 = types::CHALLENGE;

    fn check(&self) -> Result<(), Violation> {
        check_ext(self.ext)
    }
}

/// AUTH: proof of the device's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auth<'a> {
    /// Microseconds since boot at sending; together with CHALLENGE it gives the gateway a measured
    /// round trip.
    pub mono_us: u64,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
    /// See [`crate::auth::Transcript::device_mac`]. Always the payload's last 32 bytes.
    pub mac: [u8; KEY_BYTES],
}

impl<'a> Message<'a> for Auth<'a> {
    const TYPE: u8 = types::AUTH;

    fn check(&self) -> Result<(), Violation> {
        check_range("mono_us", self.mono_us <= MONO_US_MAX)?;
        check_ext(self.ext)
    }
}

/// WELCOME: proof of the gateway's key, and the position of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome<'a> {
    /// Highest durable number: the device may delete frames through it and resumes at the next one.
    pub durable_seq: u64,
    /// Highest number that the device may send for now.
    pub limit_seq: u64,
    /// Maximum interval between frames of the device, in seconds.
    pub keepalive_s: u16,
    /// Time without progress after which the device reconnects, in seconds.
    pub ack_timeout_s: u16,
    /// The gateway's UTC in microseconds.
    pub utc_us: i64,
    /// 1 if the schema named in HELLO is stored with that hash, otherwise 0.
    pub schema_known: u8,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
    /// See [`crate::auth::Transcript::gateway_mac`]. Always the payload's last 32 bytes.
    pub mac: [u8; KEY_BYTES],
}

impl<'a> Message<'a> for Welcome<'a> {
    const TYPE: u8 = types::WELCOME;

    fn check(&self) -> Result<(), Violation> {
        check_range("schema_known", self.schema_known <= 1)?;
        check_range("limit_seq", self.limit_seq >= self.durable_seq)?;
        check_range("keepalive_s", self.keepalive_s >= 1)?;
        check_range("ack_timeout_s", self.ack_timeout_s >= 1)?;
        check_utc(self.utc_us)?;
        check_ext(self.ext)
    }
}

/// DECLARE: the channels of a schema. Immutable for a device and number (R40).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declare<'a> {
    /// Schema number, at least 1.
    pub schema: u16,
    /// Channels of the schema.
    #[serde(borrow)]
    pub channels: Vec<Channel<'a>, CHANNELS_MAX>,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

/// One channel of a [`Declare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel<'a> {
    /// Id within the schema.
    pub id: u8,
    /// Name, such as `temperature`.
    pub name: &'a str,
    /// SenML unit (RFC 8428), such as `Cel`; may be empty.
    pub unit: &'a str,
    /// Byte of a [`Kind`].
    pub kind: u8,
    /// Value = integer * 10^exp10; 0 for kinds other than integer.
    pub exp10: i8,
}

impl<'a> Message<'a> for Declare<'a> {
    const TYPE: u8 = types::DECLARE;

    fn check(&self) -> Result<(), Violation> {
        check_range("schema", self.schema >= 1)?;
        if self.channels.is_empty() {
            return Err(Violation::Channels);
        }
        for (i, channel) in self.channels.iter().enumerate() {
            check_label(channel.name)?;
            check_text(channel.unit, UNIT_BYTES_MAX)?;
            let kind = Kind::from_wire(channel.kind).ok_or(Violation::Kind(channel.kind))?;
            let exponents = if kind == Kind::Integer {
                -22..=22
            } else {
                0..=0
            };
            if !exponents.contains(&channel.exp10) {
                return Err(Violation::Exponent(channel.exp10));
            }
            let earlier = &self.channels[..i];
            if earlier
                .iter()
                .any(|other| other.id == channel.id || other.name == channel.name)
            {
                return Err(Violation::Channels);
            }
        }
        check_ext(self.ext)
    }
}

/// DATA: rows of readings, by column (R50 to R59).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data<'a> {
    /// Number of the schema that declares the channels.
    pub schema: u16,
    /// 0: times count from boot; 1: times are UTC.
    pub clock: u8,
    /// Unit of times and steps. 0: microseconds, 1: milliseconds, 2: seconds.
    pub time_unit: u8,
    /// The boot that times count from; with UTC, the boot in which the times were recorded.
    pub boot: u32,
    /// Time of the first row.
    pub t0: i64,
    /// Number of rows, 1 to [`crate::column::ROWS_MAX`].
    pub rows: u16,
    /// Time between consecutive rows; 0 if `dt` holds the steps.
    pub step: u32,
    /// Varints, the time from each row to the next, each at least 1; empty if `step` holds it.
    #[serde(with = "serde_bytes")]
    pub dt: &'a [u8],
    /// Columns with values.
    #[serde(borrow)]
    pub columns: Vec<Column<'a>, CHANNELS_MAX>,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

/// One column of a [`Data`]; decoded by [`crate::column`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column<'a> {
    /// Channel id in the schema.
    pub channel: u8,
    /// Encoding of `data`.
    pub encoding: u8,
    /// One bit per row, lowest first, set if the row has no valid value; empty if all rows have
    /// one.
    #[serde(with = "serde_bytes")]
    pub nulls: &'a [u8],
    /// Encoded valid values.
    #[serde(with = "serde_bytes")]
    pub data: &'a [u8],
}

impl<'a> Message<'a> for Data<'a> {
    const TYPE: u8 = types::DATA;

    fn check(&self) -> Result<(), Violation> {
        check_range("clock", self.clock <= 1)?;
        check_range("time_unit", self.time_unit <= 2)?;
        check_ext(self.ext)
    }
}

/// GAP: the content of `from_seq` through the header's seq is lost (R45).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap<'a> {
    /// First lost number.
    pub from_seq: u64,
    /// 0: overwritten by newer frames; 1: queue damaged; 2: erased on request. Others are
    /// device-specific.
    pub reason: u8,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Gap<'a> {
    const TYPE: u8 = types::GAP;

    fn check(&self) -> Result<(), Violation> {
        check_range("from_seq", self.from_seq >= 1)?;
        check_ext(self.ext)
    }
}

/// EVENT: a report by the device about itself (R46).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event<'a> {
    /// See [`Data::clock`].
    pub clock: u8,
    /// See [`Data::boot`].
    pub boot: u32,
    /// Time of the event, in microseconds.
    pub time_us: i64,
    /// 0 debug, 1 info, 2 warning, 3 error, 4 critical.
    pub level: u8,
    /// Device-specific code.
    pub code: u16,
    /// Human-readable text.
    pub text: &'a str,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Event<'a> {
    const TYPE: u8 = types::EVENT;

    fn check(&self) -> Result<(), Violation> {
        check_range("clock", self.clock <= 1)?;
        check_time(self.clock, self.time_us)?;
        check_range("level", self.level <= 4)?;
        check_text(self.text, EVENT_TEXT_BYTES_MAX)?;
        check_ext(self.ext)
    }
}

/// RESULT: outcome of a command (R48). Specified, but not supported by version 0.1 of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult<'a> {
    /// Id of the command.
    pub id: u64,
    /// 0 done, 1 failed, 2 not supported, 3 expired.
    pub status: u8,
    /// Output of the command.
    #[serde(with = "serde_bytes")]
    pub body: &'a [u8],
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for CommandResult<'a> {
    const TYPE: u8 = types::RESULT;

    fn check(&self) -> Result<(), Violation> {
        check_range("status", self.status <= 3)?;
        check_ext(self.ext)
    }
}

/// COMMAND: an instruction to the device (R48). Specified, but never sent by version 0.1 of the
/// gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command<'a> {
    /// Id, the same in every offer of this command.
    pub id: u64,
    /// Milliseconds until the command expires.
    pub ttl_ms: u32,
    /// Kind of command, defined between operator and firmware.
    pub kind: u16,
    /// Arguments, defined between operator and firmware.
    #[serde(with = "serde_bytes")]
    pub body: &'a [u8],
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Command<'a> {
    const TYPE: u8 = types::COMMAND;

    fn check(&self) -> Result<(), Violation> {
        check_ext(self.ext)
    }
}

/// ACK: all numbers through the header's seq are stored and synced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack<'a> {
    /// Highest number that the device may send for now. Absolute, so that errors do not accumulate.
    pub limit_seq: u64,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Ack<'a> {
    const TYPE: u8 = types::ACK;

    fn check(&self) -> Result<(), Violation> {
        check_ext(self.ext)
    }
}

/// NACK: the frame with the header's seq is refused; `seq` 0 stands for an unsequenced frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nack<'a> {
    /// A [`crate::error::Code`] of class 1, 2 or 3.
    pub code: u8,
    /// The number that the gateway accepts next.
    pub expected_seq: u64,
    /// For class 1: milliseconds to wait before resending.
    pub retry_after_ms: u32,
    /// Human-readable detail.
    pub detail: &'a str,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Nack<'a> {
    const TYPE: u8 = types::NACK;

    fn check(&self) -> Result<(), Violation> {
        check_text(self.detail, DETAIL_BYTES_MAX)?;
        check_ext(self.ext)
    }
}

/// PING: requests the gateway's time, and carries the data to measure the device's clock (R70).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping<'a> {
    /// Microseconds since boot at sending.
    pub mono_us: u64,
    /// `sent_us` of the latest PONG on this connection, 0 if there was none.
    pub pong_sent_us: i64,
    /// Microseconds since boot when that PONG arrived.
    pub pong_mono_us: u64,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Ping<'a> {
    const TYPE: u8 = types::PING;

    fn check(&self) -> Result<(), Violation> {
        check_range("mono_us", self.mono_us <= MONO_US_MAX)?;
        check_range("pong_mono_us", self.pong_mono_us <= self.mono_us)?;
        check_utc(self.pong_sent_us)?;
        check_ext(self.ext)
    }
}

/// PONG: reply to PING.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong<'a> {
    /// `mono_us` of the PING.
    pub mono_us: u64,
    /// The gateway's UTC when PING arrived, in microseconds.
    pub received_us: i64,
    /// The gateway's UTC when PONG was sent, in microseconds.
    pub sent_us: i64,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Pong<'a> {
    const TYPE: u8 = types::PONG;

    fn check(&self) -> Result<(), Violation> {
        check_utc(self.received_us)?;
        check_utc(self.sent_us)?;
        check_ext(self.ext)
    }
}

/// BYE: the sender ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye<'a> {
    /// A [`crate::error::Code`] of class 4 or 5; 0 from a device that disconnects normally.
    pub code: u8,
    /// Milliseconds to wait before reconnecting.
    pub retry_after_ms: u32,
    /// Lowest version that the gateway supports; 0 from a device.
    pub min_version: u8,
    /// Highest version that the gateway supports; 0 from a device.
    pub max_version: u8,
    /// Human-readable detail.
    pub detail: &'a str,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Bye<'a> {
    const TYPE: u8 = types::BYE;

    fn check(&self) -> Result<(), Violation> {
        check_text(self.detail, DETAIL_BYTES_MAX)?;
        check_ext(self.ext)
    }
}

/// Returns the first number that a frame covers: its own, or `from_seq` of an intact GAP (R45).
pub fn first_seq(frame: &Frame<'_>) -> u64 {
    let seq = frame.header.seq;
    if frame.header.frame_type != types::GAP || !frame.intact {
        return seq;
    }
    // Valid even if the rest is not: no other frame will ever have these numbers.
    match postcard::take_from_bytes(frame.payload()) {
        Ok((from_seq, _)) if from_seq <= seq => from_seq,
        _ => seq,
    }
}

/// Checks that `name` is a valid device name (R31).
pub fn check_name(name: &str) -> Result<(), Violation> {
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'-');
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(Violation::Name)
    }
}

/// Checks a channel name: any valid text that is not empty.
fn check_label(text: &str) -> Result<(), Violation> {
    if text.is_empty() {
        Err(Violation::Name)
    } else {
        check_text(text, NAME_BYTES_MAX)
    }
}

/// Checks a text. Rejects U+0000, which Postgres cannot store (R23).
fn check_text(text: &str, bytes_max: usize) -> Result<(), Violation> {
    if text.len() > bytes_max {
        Err(Violation::TextTooLong)
    } else if text.contains('\0') {
        Err(Violation::Name)
    } else {
        Ok(())
    }
}

fn check_range(field: &'static str, within: bool) -> Result<(), Violation> {
    if within {
        Ok(())
    } else {
        Err(Violation::Range(field))
    }
}

/// Checks a sequence of tag, length, value. Odd tags may be skipped, even ones are critical, and
/// version 1 defines none (R25, R26).
fn check_ext(mut ext: &[u8]) -> Result<(), Violation> {
    while let [tag, len, rest @ ..] = ext {
        if tag % 2 == 0 {
            return Err(Violation::ExtCritical(*tag));
        }
        ext = rest.get(usize::from(*len)..).ok_or(Violation::ExtSyntax)?;
    }
    if ext.is_empty() {
        Ok(())
    } else {
        Err(Violation::ExtSyntax)
    }
}
