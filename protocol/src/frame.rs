//! Frames: a 16-byte header with its own checksum, a payload, a checksum over all (R1 to R15).
//!
//! The header's checksum lets a damaged payload be refused by its sequence number instead of guessing
//! where the next frame begins. Nothing here allocates; a length is believed only after the header's
//! checksum has been found right and the length within the limit of the moment.

use crc::{CRC_16_DNP, CRC_32_ISCSI, Crc};

/// First byte of every frame (R2).
pub const MAGIC: u8 = 0xA7;
/// The protocol version of this crate (R3).
pub const VERSION: u8 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the checksum after the payload.
pub const TRAILER_BYTES: usize = 4;
/// Bytes of a frame without its payload.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TRAILER_BYTES;
/// Longest frame before the device is authenticated (R8).
pub const HANDSHAKE_FRAME_BYTES_MAX: usize = 512;
/// Longest frame unless both sides say otherwise (R8).
pub const DEFAULT_FRAME_BYTES_MAX: usize = 4096;
/// Longest frame at all (R8).
pub const FRAME_BYTES_MAX: usize = 16384;
/// Highest sequence number and stream number: both fit a signed 64-bit integer of SQL (R12).
pub const SEQ_MAX: u64 = i64::MAX as u64;

#[cfg(feature = "crc-tables")]
type Speed = crc::Table<16>;
#[cfg(not(feature = "crc-tables"))]
type Speed = crc::NoTable;

static HEADER_CRC: Crc<u16, Speed> = Crc::<u16, Speed>::new(&CRC_16_DNP);
static FRAME_CRC: Crc<u32, Speed> = Crc::<u32, Speed>::new(&CRC_32_ISCSI);

/// Type numbers (R13). `0x10..=0x1F` are sequenced, from `0x80` up may be skipped.
pub mod types {
    /// Device to gateway: who it is and what it holds.
    pub const HELLO: u8 = 0x01;
    /// Gateway to device: version, nonce, limits.
    pub const CHALLENGE: u8 = 0x02;
    /// Device to gateway: proof of the key.
    pub const AUTH: u8 = 0x03;
    /// Gateway to device: proof of the key, where the stream stands.
    pub const WELCOME: u8 = 0x04;
    /// Device to gateway: channels of a schema.
    pub const DECLARE: u8 = 0x08;
    /// Sequenced: readings.
    pub const DATA: u8 = 0x11;
    /// Sequenced: numbers whose content the device lost.
    pub const GAP: u8 = 0x12;
    /// Sequenced: outcome of a command.
    pub const RESULT: u8 = 0x13;
    /// Sequenced: something the device reports about itself.
    pub const EVENT: u8 = 0x14;
    /// Gateway to device: durable through the header's seq.
    pub const ACK: u8 = 0x20;
    /// Gateway to device: the header's seq is refused.
    pub const NACK: u8 = 0x21;
    /// Gateway to device: something to do.
    pub const COMMAND: u8 = 0x30;
    /// Device to gateway: are you there, and what time is it?
    pub const PING: u8 = 0x40;
    /// Gateway to device: answer to PING.
    pub const PONG: u8 = 0x41;
    /// Either way: the connection ends, and why.
    pub const BYE: u8 = 0x7F;

    /// Whether frames of this type carry a number of the stream.
    pub const fn is_sequenced(frame_type: u8) -> bool {
        matches!(frame_type, 0x10..=0x1F)
    }

    /// Whether a receiver that does not know this type passes over it.
    pub const fn is_skippable(frame_type: u8) -> bool {
        frame_type >= 0x80
    }
}

/// A header whose checksum was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of this frame.
    pub version: u8,
    /// One of [`types`].
    pub frame_type: u8,
    /// Reserved; 0.
    pub flags: u8,
    /// Bytes of the payload.
    pub payload_bytes: u16,
    /// Number within the stream; 0 for types that have none (ACK and NACK: the number they speak of).
    pub seq: u64,
}

impl Header {
    /// Bytes of the whole frame.
    pub const fn frame_bytes(&self) -> usize {
        OVERHEAD_BYTES + self.payload_bytes as usize
    }
}

/// A frame as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Whether the checksum over header and payload is right (R6).
    pub intact: bool,
    /// All of it, header and checksum included.
    pub bytes: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The bytes between header and checksum.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[HEADER_BYTES..self.bytes.len() - TRAILER_BYTES]
    }

    /// The CRC-32C at its end, as it was sent.
    pub fn crc(&self) -> u32 {
        let (_, crc) = self
            .bytes
            .split_last_chunk()
            .expect("a frame has a trailer");
        u32::from_le_bytes(*crc)
    }
}

/// Why no further frame can be found in a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first byte is not [`MAGIC`]: another protocol speaks (R2).
    Magic(u8),
    /// The header's checksum is wrong (R4).
    HeaderCrc,
    /// Longer than allowed now; told before any of it is kept (R8).
    TooLarge {
        /// Bytes of the whole frame.
        frame_bytes: usize,
    },
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            FrameError::Magic(byte) => write!(f, "first byte {byte:#04x} is not FWP (R2)"),
            FrameError::HeaderCrc => f.write_str("header checksum wrong (R4)"),
            FrameError::TooLarge { frame_bytes } => {
                write!(f, "frame of {frame_bytes} bytes is over the limit (R8)")
            }
        }
    }
}

impl core::error::Error for FrameError {}

/// Finds the header at the start of `input`; `None` while it is incomplete.
///
/// A wrong first byte is told at once, so that another protocol's peer is not waited for.
pub fn decode_header(input: &[u8], frame_bytes_max: usize) -> Result<Option<Header>, FrameError> {
    if let Some(&first) = input.first()
        && first != MAGIC
    {
        return Err(FrameError::Magic(first));
    }
    let Some(bytes) = input.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let (covered, checksum) = bytes.split_at(HEADER_BYTES - 2);
    if HEADER_CRC.checksum(covered).to_le_bytes() != checksum {
        return Err(FrameError::HeaderCrc);
    }
    let [
        _,
        version,
        frame_type,
        flags,
        len0,
        len1,
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        ..,
    ] = *bytes;
    let header = Header {
        version,
        frame_type,
        flags,
        payload_bytes: u16::from_le_bytes([len0, len1]),
        seq: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
    };
    if header.frame_bytes() > frame_bytes_max {
        return Err(FrameError::TooLarge {
            frame_bytes: header.frame_bytes(),
        });
    }
    Ok(Some(header))
}

/// Finds the frame at the start of `input`; `None` while it is incomplete.
pub fn decode(input: &[u8], frame_bytes_max: usize) -> Result<Option<Frame<'_>>, FrameError> {
    let Some(header) = decode_header(input, frame_bytes_max)? else {
        return Ok(None);
    };
    let Some(bytes) = input.get(..header.frame_bytes()) else {
        return Ok(None);
    };
    let (covered, checksum) = bytes.split_at(bytes.len() - TRAILER_BYTES);
    let intact = FRAME_CRC.checksum(covered).to_le_bytes() == checksum;
    Ok(Some(Frame {
        header,
        intact,
        bytes,
    }))
}

/// The output has no room for the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

impl core::fmt::Display for NoRoom {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("no room for the frame")
    }
}

impl core::error::Error for NoRoom {}

/// Writes a frame of version [`VERSION`] around the payload that `write_payload` puts into the space
/// it is given, and returns the frame's length in bytes.
pub fn encode(
    frame_type: u8,
    seq: u64,
    out: &mut [u8],
    write_payload: impl FnOnce(&mut [u8]) -> Result<usize, NoRoom>,
) -> Result<usize, NoRoom> {
    let room = out.len().checked_sub(OVERHEAD_BYTES).ok_or(NoRoom)?;
    let payload_bytes = write_payload(&mut out[HEADER_BYTES..HEADER_BYTES + room])?;
    let header = Header {
        version: VERSION,
        frame_type,
        flags: 0,
        payload_bytes: u16::try_from(payload_bytes).map_err(|_| NoRoom)?,
        seq,
    };
    seal(header, out)
}

/// Writes header and checksums around the payload that already stands at `HEADER_BYTES` in `out`,
/// and returns the frame's length in bytes.
pub fn seal(header: Header, out: &mut [u8]) -> Result<usize, NoRoom> {
    let frame_bytes = header.frame_bytes();
    let frame = out.get_mut(..frame_bytes).ok_or(NoRoom)?;
    frame[0] = MAGIC;
    frame[1] = header.version;
    frame[2] = header.frame_type;
    frame[3] = header.flags;
    frame[4..6].copy_from_slice(&header.payload_bytes.to_le_bytes());
    frame[6..14].copy_from_slice(&header.seq.to_le_bytes());
    let header_crc = HEADER_CRC.checksum(&frame[..14]);
    frame[14..16].copy_from_slice(&header_crc.to_le_bytes());
    let (covered, checksum) = frame.split_at_mut(frame_bytes - TRAILER_BYTES);
    checksum.copy_from_slice(&FRAME_CRC.checksum(covered).to_le_bytes());
    Ok(frame_bytes)
}
