//! Properties that must hold for any bytes, as functions that panic if one is violated. Only the fuzz targets
//! (`tests/fuzz`) and tests call them.

mod session;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX, FrameError, Header};
use fieldgate_protocol::fuzz::reseal;

pub use self::session::session;

/// Returns the output of a future that completes without waiting.
pub(crate) fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Number of piece lengths in an input; they are used cyclically.
const CUTS: usize = 8;

/// Input: picks (one byte), lengths of the pieces in which the bytes arrive ([`CUTS`] bytes), and the bytes.
/// However the bytes are split, they decode to the same frames and the same error.
pub fn codec(input: &[u8]) {
    let Some(([picks, cuts @ ..], bytes)) = input.split_first_chunk::<{ CUTS + 1 }>() else {
        return;
    };
    let frame_bytes_max = [512, 4096, FRAME_BYTES_MAX][usize::from(picks % 4).min(2)];
    // Random bytes have no valid checksums, so every second input gets correct ones.
    let sealed = if picks & 4 == 0 {
        bytes.to_vec()
    } else {
        reseal_all(bytes)
    };
    let whole = received(frame_bytes_max, std::iter::once(sealed.as_slice()));
    let mut rest = sealed.as_slice();
    let pieces = cuts.iter().cycle().map_while(|cut| {
        let (piece, left) = rest.split_at(rest.len().min(usize::from(*cut) + 1));
        rest = left;
        (!piece.is_empty()).then_some(piece)
    });
    let cut = received(frame_bytes_max, pieces);
    assert_eq!(cut, whole);
    let frames = whole.frames.iter();
    let framed: Vec<u8> = frames.flat_map(|(_, _, bytes)| bytes).copied().collect();
    assert!(sealed.starts_with(&framed));
    assert!(whole.error.is_some() || framed.len() + whole.left_bytes == sealed.len());
}

fn reseal_all(mut bytes: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(bytes.len());
    let mut frame = [0; FRAME_BYTES_MAX];
    while let Some(len) = reseal(bytes, &mut frame) {
        sealed.extend_from_slice(&frame[..len]);
        bytes = &bytes[len..];
    }
    sealed.extend_from_slice(bytes);
    sealed
}

type Found = (Header, bool, Vec<u8>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Received {
    frames: Vec<Found>,
    error: Option<FrameError>,
    /// Bytes of an incomplete frame; 0 after an error.
    left_bytes: usize,
}

fn received<'a>(frame_bytes_max: usize, pieces: impl Iterator<Item = &'a [u8]>) -> Received {
    let (mut buffer, mut received) = (Vec::new(), Received::default());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        let mut rest = buffer.as_slice();
        loop {
            match frame::decode(rest, frame_bytes_max) {
                Ok(Some(frame)) => {
                    assert!(frame.bytes.len() <= frame_bytes_max);
                    let found = (frame.header, frame.intact, frame.bytes.to_vec());
                    received.frames.push(found);
                    rest = &rest[frame.bytes.len()..];
                }
                Ok(None) => break,
                Err(error) => {
                    received.error = Some(error);
                    return received;
                }
            }
        }
        buffer = rest.to_vec();
    }
    received.left_bytes = buffer.len();
    received
}
