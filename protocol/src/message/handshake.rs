//! HELLO, CHALLENGE, AUTH and WELCOME (R30 to R39).

use serde::{Deserialize, Serialize};

use super::{Message, NAME_BYTES_MAX, check_ext, check_name, check_range, check_text};
use crate::auth::{KEY_BYTES, NONCE_BYTES};
use crate::error::Violation;
use crate::frame::{SEQ_MAX, types};
use crate::value::{MONO_US_MAX, check_utc};

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
    type Wire = Self;

    fn from_wire(hello: Self) -> Result<Self, Violation> {
        check_name(hello.name)?;
        check_text(hello.firmware, NAME_BYTES_MAX)?;
        check_range("stream", hello.stream <= SEQ_MAX)?;
        check_range("next_seq", (1..=SEQ_MAX).contains(&hello.next_seq))?;
        check_range(
            "oldest_seq",
            (1..=hello.next_seq).contains(&hello.oldest_seq),
        )?;
        check_range("versions", hello.min_version <= hello.max_version)?;
        check_range("mono_us", hello.mono_us <= MONO_US_MAX)?;
        check_ext(hello.ext)?;
        Ok(hello)
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
    type Wire = Self;

    fn from_wire(challenge: Self) -> Result<Self, Violation> {
        check_ext(challenge.ext)?;
        Ok(challenge)
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
    type Wire = Self;

    fn from_wire(auth: Self) -> Result<Self, Violation> {
        check_range("mono_us", auth.mono_us <= MONO_US_MAX)?;
        check_ext(auth.ext)?;
        Ok(auth)
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
    type Wire = Self;

    fn from_wire(welcome: Self) -> Result<Self, Violation> {
        check_range("schema_known", welcome.schema_known <= 1)?;
        check_range("limit_seq", welcome.limit_seq >= welcome.durable_seq)?;
        check_range("keepalive_s", welcome.keepalive_s >= 1)?;
        check_range("ack_timeout_s", welcome.ack_timeout_s >= 1)?;
        check_utc(welcome.utc_us)?;
        check_ext(welcome.ext)?;
        Ok(welcome)
    }
}
