//! The payload of each frame type (R20 to R48): postcard, borrowed from the frame, completely
//! checked.
//!
//! Decoding accepts only the canonical encoding: no bytes after the message, and varints of the
//! shortest form. This module checks the limits of texts, lists and ranges. The two state machines
//! check whether a message is valid in the current state of the connection.

mod handshake;
mod sequenced;
mod unsequenced;

use postcard::ser_flavors::Size;
use serde::{Deserialize, Serialize};

pub use self::handshake::{Auth, Challenge, Hello, Welcome};
pub use self::sequenced::{Channel, Column, CommandResult, Data, Declare, Event, Gap};
pub use self::unsequenced::{Ack, Bye, Command, Nack, Ping, Pong};
use crate::error::Violation;
use crate::frame::{self, Frame, NoRoom, types};

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
pub trait Message<'a>: Serialize + Sized {
    /// Its frame type.
    const TYPE: u8;
    /// Its fields in order, before their values are checked.
    type Wire: Serialize + Deserialize<'a>;

    /// Checks field by field what the encoding does not guarantee (R23 to R26, R44).
    fn from_wire(wire: Self::Wire) -> Result<Self, Violation>;
}

/// Decodes the message from a payload of type `M::TYPE`.
pub fn decode<'a, M: Message<'a>>(payload: &'a [u8]) -> Result<M, Violation> {
    let mut reader = postcard::Deserializer::from_bytes(payload);
    let wire = M::Wire::deserialize(&mut reader).map_err(|_| Violation::Encoding)?;
    let rest = reader.finalize().map_err(|_| Violation::Encoding)?;
    if !rest.is_empty() {
        return Err(Violation::TrailingBytes);
    }
    // Only varints have several encodings, and all but the shortest are longer (R22).
    let shortest = postcard::serialize_with_flavor(&wire, Size::default());
    if shortest != Ok(payload.len()) {
        return Err(Violation::NotCanonical);
    }
    M::from_wire(wire)
}

/// Writes a complete frame with `message` as its payload; returns its length in bytes.
pub fn encode<'a, M: Message<'a>>(message: &M, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
    frame::encode(M::TYPE, seq, out, |payload| {
        Ok(postcard::to_slice(message, payload)
            .map_err(|_| NoRoom)?
            .len())
    })
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
