//! Frames: a 16-byte header with its own checksum, a payload, and a checksum over both (R1 to R15).
//!
//! With the header checksum, a receiver can refuse a damaged payload by its sequence number and
//! still find the next frame. Nothing here allocates. A length is used only after the header
//! checksum is verified and the length is within the current limit.

use crc::{CRC_16_DNP, CRC_32_ISCSI, Crc};

/// First byte of every frame (R2).
pub const MAGIC: u8 = 0xA7;
/// The protocol version of this crate (R3).
pub const VERSION: u8 = 1;
/// Length of a header, in bytes.
pub const HEADER_BYTES: usize = 16;
/// Length of the checksum after the payload, in bytes.
pub const TRAILER_BYTES: usize = 4;
/// Length of a frame without its payload, in bytes.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TRAILER_BYTES;
/// Longest frame before the device is authenticated (R8).
pub const HANDSHAKE_FRAME_BYTES_MAX: usize = 512;
/// Longest frame unless the peers announce other limits (R8).
pub const DEFAULT_FRAME_BYTES_MAX: usize = 4096;
/// Upper bound for frame limits (R8).
pub const FRAME_BYTES_MAX: usize = 16384;
/// Highest sequence number and stream number, so that both fit a signed 64-bit integer in SQL
/// (R12).
pub const SEQ_MAX: u64 = i64::MAX as u64;

#[cfg(feature = "crc-tables")]
type Speed = crc::Table<16>;
#[cfg(not(feature = "crc-tables"))]
type Speed = crc::NoTable;

static HEADER_CRC: Crc<u16, Speed> = Crc::<u16, Speed>::new(&CRC_16_DNP);
static FRAME_CRC: Crc<u32, Speed> = Crc::<u32, Speed>::new(&CRC_32_ISCSI);

/// Type numbers (R13). `0x10..=0x1F` are sequenced; receivers may skip unknown types from `0x80`.
pub mod types {
    /// Device to gateway: the device's identity and the state of its queue.
    pub const HELLO: u8 = 0x01;
    /// Gateway to device: version, nonce, limits.
    pub const CHALLENGE: u8 = 0x02;
    /// Device to gateway: proof of the key.
    pub const AUTH: u8 = 0x03;
    /// Gateway to device: proof of the key, position of the stream.
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
    /// Gateway to device: an instruction.
    pub const COMMAND: u8 = 0x30;
    /// Device to gateway: keepalive and request for the time.
    pub const PING: u8 = 0x40;
    /// Gateway to device: answer to PING.
    pub const PONG: u8 = 0x41;
    /// Both directions: the connection ends, with a reason.
    pub const BYE: u8 = 0x7F;

    /// Returns whether frames of this type have a sequence number.
    pub const fn is_sequenced(frame_type: u8) -> bool {
        matches!(frame_type, 0x10..=0x1F)
    }

    /// Returns whether a receiver skips this type if it does not know it.
    pub const fn is_skippable(frame_type: u8) -> bool {
        frame_type >= 0x80
    }
}

/// A header with a verified checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of this frame.
    pub version: u8,
    /// One of [`types`].
    pub frame_type: u8,
    /// Reserved; 0.
    pub flags: u8,
    /// Length of the payload.
    pub payload_bytes: u16,
    /// Sequence number; 0 for unsequenced types. In ACK and NACK, the number they refer to.
    pub seq: u64,
}

impl Header {
    /// Returns the length of the whole frame, in bytes.
    pub const fn frame_bytes(&self) -> usize {
        OVERHEAD_BYTES + self.payload_bytes as usize
    }
}

/// A frame as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Header of the frame.
    pub header: Header,
    /// Whether the checksum over header and payload is correct (R6).
    pub intact: bool,
    /// The whole frame, including header and checksum.
    pub bytes: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Returns the bytes between header and checksum.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[HEADER_BYTES..self.bytes.len() - TRAILER_BYTES]
    }

    /// Returns the CRC-32C at the end of the frame, as received.
    pub fn crc(&self) -> u32 {
        let (_, crc) = self
            .bytes
            .split_last_chunk()
            .expect("a frame has a trailer");
        u32::from_le_bytes(*crc)
    }
}

/// Why the rest of a connection's bytes cannot be divided into frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first byte is not [`MAGIC`]: the peer uses another protocol (R2).
    Magic(u8),
    /// The header checksum is wrong (R4).
    HeaderCrc,
    /// The frame exceeds the current limit; reported before any of it is buffered (R8).
    TooLarge {
        /// Length of the whole frame.
        frame_bytes: usize,
    },
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            FrameError::Magic(byte) => {
                write!(f, "not an FWP frame: first byte is {byte:#04x} (R2)")
            }
            FrameError::HeaderCrc => f.write_str("header checksum wrong (R4)"),
            FrameError::TooLarge { frame_bytes } => {
                write!(f, "frame of {frame_bytes} bytes is over the limit (R8)")
            }
        }
    }
}

impl core::error::Error for FrameError {}

/// Decodes the header at the start of `input`; returns `None` while it is incomplete.
///
/// A wrong first byte is reported immediately, so that the receiver does not wait for more bytes of
/// another protocol.
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

/// Decodes the frame at the start of `input`; returns `None` while it is incomplete.
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

/// The output buffer is too small for the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

impl core::fmt::Display for NoRoom {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("buffer too small for the frame")
    }
}

impl core::error::Error for NoRoom {}

/// Writes a frame of version [`VERSION`] around the payload that `write_payload` writes into the
/// given space. Returns the length of the frame in bytes.
pub fn encode(
    frame_type: u8,
    seq: u64,
    out: &mut [u8],
    write_payload: impl FnOnce(&mut [u8]) -> Result<usize, NoRoom>,
) -> Result<usize, NoRoom> {
    let payload_max = out.len().checked_sub(OVERHEAD_BYTES).ok_or(NoRoom)?;
    let payload_bytes = write_payload(&mut out[HEADER_BYTES..HEADER_BYTES + payload_max])?;
    let header = Header {
        version: VERSION,
        frame_type,
        flags: 0,
        payload_bytes: u16::try_from(payload_bytes).map_err(|_| NoRoom)?,
        seq,
    };
    seal(header, out)
}

/// Writes header and checksums around the payload at `HEADER_BYTES` in `out`. Returns the length of
/// the frame in bytes.
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
