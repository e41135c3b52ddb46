//! A tokio-util `Decoder` that extracts whole frames from a connection's bytes and keeps an
//! incomplete one.

use bytes::BytesMut;
use fieldgate_protocol::frame::{self, Frame, FrameError, HEADER_BYTES, Header};
use tokio_util::codec::Decoder;

/// Decoder for the frames of a connection.
#[derive(Clone, Copy, Debug)]
pub struct FrameCodec {
    /// Longest frame, in bytes; a longer one is rejected by its header.
    pub frame_bytes_max: usize,
}

/// A frame that owns its bytes.
#[derive(Clone, Debug)]
pub struct OwnedFrame {
    header: Header,
    intact: bool,
    bytes: BytesMut,
}

impl OwnedFrame {
    /// Returns the frame, borrowed.
    pub fn frame(&self) -> Frame<'_> {
        Frame {
            header: self.header,
            intact: self.intact,
            bytes: &self.bytes,
        }
    }
}

/// Reason why a connection yields no more frames.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The bytes are not valid frames.
    #[error("{0}")]
    Frame(FrameError),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Decoder for FrameCodec {
    type Item = OwnedFrame;
    type Error = CodecError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<OwnedFrame>, CodecError> {
        let found = frame::decode(input, self.frame_bytes_max).map_err(CodecError::Frame)?;
        if let Some(Frame { header, intact, .. }) = found {
            let bytes = input.split_to(header.frame_bytes());
            return Ok(Some(OwnedFrame {
                header,
                intact,
                bytes,
            }));
        }
        // The header checksum is correct and the length within the limit, so it can be used.
        let wanted = match frame::decode_header(input, self.frame_bytes_max) {
            Ok(Some(header)) => header.frame_bytes(),
            _ => HEADER_BYTES,
        };
        input.reserve(wanted.saturating_sub(input.len()));
        Ok(None)
    }
}
