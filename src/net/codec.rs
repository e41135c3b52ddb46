//! Frames out of a connection's bytes, by tokio-util's `Decoder`: whole frames come out, the beginning
//! of the next one stays in.

use bytes::BytesMut;
use fieldgate_protocol::frame::{self, Frame, FrameError, HEADER_BYTES, Header};
use tokio_util::codec::Decoder;

/// Cuts a connection's bytes into frames.
#[derive(Clone, Copy, Debug)]
pub struct FrameCodec {
    /// Longest frame; a longer one is refused by its header alone.
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
    /// The frame, borrowed.
    pub fn frame(&self) -> Frame<'_> {
        Frame {
            header: self.header,
            intact: self.intact,
            bytes: &self.bytes,
        }
    }
}

/// Why a connection gives no more frames.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Its bytes are not frames, or not allowed ones.
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
        // The header is right and within the limit, so its length can be believed.
        let wanted = match frame::decode_header(input, self.frame_bytes_max) {
            Ok(Some(header)) => header.frame_bytes(),
            _ => HEADER_BYTES,
        };
        input.reserve(wanted.saturating_sub(input.len()));
        Ok(None)
    }
}
