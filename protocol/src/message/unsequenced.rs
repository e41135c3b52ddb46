//! COMMAND, ACK, NACK, PING, PONG and BYE.

use serde::{Deserialize, Serialize};

use super::{DETAIL_BYTES_MAX, Message, check_ext, check_range, check_text};
use crate::error::Violation;
use crate::frame::types;
use crate::value::{MONO_US_MAX, check_utc};

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
    type Wire = Self;

    fn from_wire(command: Self) -> Result<Self, Violation> {
        check_ext(command.ext)?;
        Ok(command)
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
    type Wire = Self;

    fn from_wire(ack: Self) -> Result<Self, Violation> {
        check_ext(ack.ext)?;
        Ok(ack)
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
    type Wire = Self;

    fn from_wire(nack: Self) -> Result<Self, Violation> {
        check_text(nack.detail, DETAIL_BYTES_MAX)?;
        check_ext(nack.ext)?;
        Ok(nack)
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
    type Wire = Self;

    fn from_wire(ping: Self) -> Result<Self, Violation> {
        check_range("mono_us", ping.mono_us <= MONO_US_MAX)?;
        check_range("pong_mono_us", ping.pong_mono_us <= ping.mono_us)?;
        check_utc(ping.pong_sent_us)?;
        check_ext(ping.ext)?;
        Ok(ping)
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
    type Wire = Self;

    fn from_wire(pong: Self) -> Result<Self, Violation> {
        check_utc(pong.received_us)?;
        check_utc(pong.sent_us)?;
        check_ext(pong.ext)?;
        Ok(pong)
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
    type Wire = Self;

    fn from_wire(bye: Self) -> Result<Self, Violation> {
        check_text(bye.detail, DETAIL_BYTES_MAX)?;
        check_ext(bye.ext)?;
        Ok(bye)
    }
}
