//! The payload of each frame type (R20 to R48): postcard, borrowed from the frame, checked whole.
//!
//! Decoding demands the one canonical encoding: nothing after the message, no varint longer than it
//! must be. Limits on texts, lists and ranges are checked here; what a message means in a connection's
//! state is for the two state machines.

use heapless::Vec;
use postcard::ser_flavors::Size;
use serde::{Deserialize, Serialize};

use crate::auth::{KEY_BYTES, NONCE_BYTES};
use crate::column::{Kind, check_time, check_utc};
use crate::error::Violation;
use crate::frame::{self, Frame, NoRoom, SEQ_MAX, types};

/// Channels of a schema, and columns of a DATA (R42, R53).
pub const CHANNELS_MAX: usize = 32;
/// Bytes of a device's name, a channel's name, a firmware text (R23).
pub const NAME_BYTES_MAX: usize = 32;
/// Bytes of a unit (R23).
pub const UNIT_BYTES_MAX: usize = 16;
/// Bytes of an event's text (R23).
pub const EVENT_TEXT_BYTES_MAX: usize = 128;
/// Bytes of the text in NACK and BYE (R23).
pub const DETAIL_BYTES_MAX: usize = 96;

/// A message with a frame type of its own.
pub trait Message<'a>: Serialize + Deserialize<'a> {
    /// The frame type that carries it.
    const TYPE: u8;

    /// Checks what the encoding alone does not.
    fn check(&self) -> Result<(), Violation>;
}

/// Reads the message that a payload of `M::TYPE` holds.
pub fn decode<'a, M: Message<'a>>(payload: &'a [u8]) -> Result<M, Violation> {
    let mut reader = postcard::Deserializer::from_bytes(payload);
    let message = M::deserialize(&mut reader).map_err(|_| Violation::Encoding)?;
    let rest = reader.finalize().map_err(|_| Violation::Encoding)?;
    if !rest.is_empty() {
        return Err(Violation::TrailingBytes);
    }
    // Only varints can be written in more than one way, and all but the shortest are longer (R22).
    let shortest = postcard::serialize_with_flavor(&message, Size::default());
    if shortest != Ok(payload.len()) {
        return Err(Violation::NotCanonical);
    }
    message.check()?;
    Ok(message)
}

/// Writes a whole frame with `message` as its payload; returns its length in bytes.
pub fn encode<'a, M: Message<'a>>(message: &M, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
    frame::encode(M::TYPE, seq, out, |room| {
        Ok(postcard::to_slice(message, room).map_err(|_| NoRoom)?.len())
    })
}

/// HELLO: who the device is and what its queue holds. Its layout holds for all versions (R30).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello<'a> {
    /// Lowest version the device speaks.
    pub min_version: u8,
    /// Highest version the device speaks.
    pub max_version: u8,
    /// The device's name.
    pub name: &'a str,
    /// The stream it continues.
    pub stream: u64,
    /// Oldest number its queue still holds; `next_seq` where it holds none.
    pub oldest_seq: u64,
    /// The number its next frame will get; the first of a stream is 1.
    pub next_seq: u64,
    /// Counts the device's boots, or is random for each.
    pub boot: u32,
    /// Microseconds since that boot, at most [`MONO_US_MAX`].
    pub mono_us: u64,
    /// The device's UTC in microseconds, 0 where it does not know it. Any value is let through: a
    /// wrong clock must not keep a device out.
    pub utc_us: i64,
    /// Longest frame it receives.
    pub rx_bytes_max: u16,
    /// Firmware version, for people.
    pub firmware: &'a str,
    /// The schema it sends with; 0 where it has none.
    pub schema: u16,
    /// That schema's hash; zeros where it has none.
    pub schema_hash: [u8; 8],
    /// Random for each connection.
    pub nonce: [u8; NONCE_BYTES],
    /// Capabilities; no bit is defined in version 1.
    pub caps: u32,
    /// Additions of later versions.
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

/// CHALLENGE: what the gateway chose, and its nonce.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge<'a> {
    /// The version of this connection.
    pub version: u8,
    /// Random for each connection.
    pub nonce: [u8; NONCE_BYTES],
    /// Longest frame the gateway receives once the device is authenticated.
    pub rx_bytes_max: u16,
    /// Capabilities; no bit is defined in version 1.
    pub caps: u32,
    /// Additions of later versions.
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
    /// Microseconds since boot at sending: with CHALLENGE it makes a round trip of known length.
    pub mono_us: u64,
    /// Additions of later versions.
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

/// Longest time since boot: 2^53 microseconds, 285 years (R50).
pub const MONO_US_MAX: u64 = 1 << 53;

/// WELCOME: proof of the gateway's key, and where the stream stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome<'a> {
    /// Stored through here: the device may delete that and resumes at the next.
    pub durable_seq: u64,
    /// Highest number it may send for now.
    pub limit_seq: u64,
    /// The device sends something at least this often.
    pub keepalive_s: u16,
    /// Without progress for this long the device connects anew.
    pub ack_timeout_s: u16,
    /// The gateway's UTC in microseconds.
    pub utc_us: i64,
    /// 1 if the schema named in HELLO is stored with that hash, else 0.
    pub schema_known: u8,
    /// Additions of later versions.
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
    /// The schema's number, 1 or more.
    pub schema: u16,
    /// Its channels.
    #[serde(borrow)]
    pub channels: Vec<Channel<'a>, CHANNELS_MAX>,
    /// Additions of later versions.
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

/// One channel of a [`Declare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel<'a> {
    /// Number within the schema.
    pub id: u8,
    /// Name, such as `temperature`.
    pub name: &'a str,
    /// SenML unit (RFC 8428), such as `Cel`; may be empty.
    pub unit: &'a str,
    /// One of [`Kind`].
    pub kind: u8,
    /// Value = integer * 10^exp10; 0 for the other kinds.
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
    /// The schema its channels are declared in.
    pub schema: u16,
    /// 0: times count from boot; 1: times are UTC.
    pub clock: u8,
    /// Of times and steps. 0: microseconds, 1: milliseconds, 2: seconds.
    pub time_unit: u8,
    /// The boot that times count from; with UTC, the boot they were taken in.
    pub boot: u32,
    /// Time of the first row.
    pub t0: i64,
    /// Rows, 1 to [`crate::column::ROWS_MAX`].
    pub rows: u16,
    /// Time from each row to the next; 0 where `dt` tells it.
    pub step: u32,
    /// Varints, one from each row to the next, each at least 1; empty where `step` tells it.
    #[serde(with = "serde_bytes")]
    pub dt: &'a [u8],
    /// The columns.
    #[serde(borrow)]
    pub columns: Vec<Column<'a>, CHANNELS_MAX>,
    /// Additions of later versions.
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

/// One column of a [`Data`]; decoded by [`crate::column`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column<'a> {
    /// Channel of the schema.
    pub channel: u8,
    /// How `data` is packed.
    pub encoding: u8,
    /// A bit for each row, lowest first, set where there is no valid value; empty where all have one.
    #[serde(with = "serde_bytes")]
    pub nulls: &'a [u8],
    /// The valid values.
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

/// GAP: what `from_seq` to the header's seq held is lost (R45).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap<'a> {
    /// First lost number.
    pub from_seq: u64,
    /// 0: overwritten by newer frames; 1: queue damaged; 2: erased on request. Others: as the device
    /// defines.
    pub reason: u8,
    /// Additions of later versions.
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

/// EVENT: something the device reports about itself (R46).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event<'a> {
    /// As in [`Data`].
    pub clock: u8,
    /// As in [`Data`].
    pub boot: u32,
    /// When, microseconds.
    pub time_us: i64,
    /// 0 debug, 1 info, 2 warning, 3 error, 4 critical.
    pub level: u8,
    /// The device's own code.
    pub code: u16,
    /// Short text.
    pub text: &'a str,
    /// Additions of later versions.
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

/// RESULT: outcome of a command (R48). Specified; not carried out by version 0.1 of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult<'a> {
    /// The command's id.
    pub id: u64,
    /// 0 done, 1 failed, 2 not supported, 3 expired.
    pub status: u8,
    /// What the command gave back.
    #[serde(with = "serde_bytes")]
    pub body: &'a [u8],
    /// Additions of later versions.
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

/// COMMAND: something to do (R48). Specified; never sent by version 0.1 of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command<'a> {
    /// The same for every offer of this command.
    pub id: u64,
    /// Milliseconds until it must not be carried out any more.
    pub ttl_ms: u32,
    /// What to do; defined between operator and firmware.
    pub kind: u16,
    /// How; defined between operator and firmware.
    #[serde(with = "serde_bytes")]
    pub body: &'a [u8],
    /// Additions of later versions.
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Command<'a> {
    const TYPE: u8 = types::COMMAND;

    fn check(&self) -> Result<(), Violation> {
        check_ext(self.ext)
    }
}

/// ACK: the header's seq, and all before it, is stored and synced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack<'a> {
    /// Highest number the device may send for now. Absolute, so nothing drifts.
    pub limit_seq: u64,
    /// Additions of later versions.
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Ack<'a> {
    const TYPE: u8 = types::ACK;

    fn check(&self) -> Result<(), Violation> {
        check_ext(self.ext)
    }
}

/// NACK: the header's seq is refused; `seq` 0 stands for an unsequenced frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nack<'a> {
    /// A [`crate::error::Code`] of class 1, 2 or 3.
    pub code: u8,
    /// The number the gateway takes next.
    pub expected_seq: u64,
    /// For class 1: wait this long.
    pub retry_after_ms: u32,
    /// For people.
    pub detail: &'a str,
    /// Additions of later versions.
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

/// PING: asks for the gateway's time, and gives it what it needs to measure the device's (R70).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping<'a> {
    /// Microseconds since boot at sending.
    pub mono_us: u64,
    /// `sent_us` of the latest PONG of this connection, 0 where there was none.
    pub pong_sent_us: i64,
    /// Microseconds since boot when that PONG arrived.
    pub pong_mono_us: u64,
    /// Additions of later versions.
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

/// PONG: answer to PING.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong<'a> {
    /// PING's `mono_us`.
    pub mono_us: u64,
    /// The gateway's UTC when PING arrived, microseconds.
    pub received_us: i64,
    /// The gateway's UTC when PONG left, microseconds.
    pub sent_us: i64,
    /// Additions of later versions.
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

/// BYE: the connection ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye<'a> {
    /// A [`crate::error::Code`] of class 4 or 5; a device that simply leaves says 0.
    pub code: u8,
    /// Connect again no sooner than this.
    pub retry_after_ms: u32,
    /// Lowest version the gateway speaks; 0 from a device.
    pub min_version: u8,
    /// Highest version the gateway speaks; 0 from a device.
    pub max_version: u8,
    /// For people.
    pub detail: &'a str,
    /// Additions of later versions.
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

/// The first number a frame covers: differs from its own only for a GAP that is intact and tells it (R45).
pub fn first_seq(frame: &Frame<'_>) -> u64 {
    let seq = frame.header.seq;
    if frame.header.frame_type != types::GAP || !frame.intact {
        return seq;
    }
    // Whatever is wrong with the rest of it: nothing else will ever come under these numbers.
    match postcard::take_from_bytes(frame.payload()) {
        Ok((from_seq, _)) if from_seq <= seq => from_seq,
        _ => seq,
    }
}

/// Whether `name` can be a device's (R31).
pub fn check_name(name: &str) -> Result<(), Violation> {
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'-');
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(Violation::Name)
    }
}

/// A channel's name: any text but an empty one.
fn check_label(text: &str) -> Result<(), Violation> {
    if text.is_empty() {
        Err(Violation::Name)
    } else {
        check_text(text, NAME_BYTES_MAX)
    }
}

/// U+0000 is refused because Postgres cannot keep it (R23).
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

/// Tag, length, value, again and again. Odd tags may be passed over, even ones are critical, and
/// version 1 knows none (R25, R26).
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
