//! Frames that the gateway sends, written to a session's outbound bytes.
//!
//! Invariant: every ACK, and the durable number in a WELCOME, comes from a [`Receipt`].

use std::sync::Arc;

use fieldgate_protocol::auth::{KEY_BYTES, Transcript};
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{HANDSHAKE_FRAME_BYTES_MAX, HEADER_BYTES, TRAILER_BYTES, VERSION};
use fieldgate_protocol::message::{
    Ack, Bye, Challenge, DETAIL_BYTES_MAX, Message, Nack, Pong, Welcome, encode,
};

use crate::metrics::Metrics;
use crate::store::Receipt;

/// Output that the socket has not accepted yet.
#[derive(Debug)]
pub struct Outbound {
    bytes: Vec<u8>,
    /// Counts NACK and BYE.
    metrics: Arc<Metrics>,
}

impl Outbound {
    pub(super) fn new(metrics: Arc<Metrics>) -> Outbound {
        Outbound {
            bytes: Vec::new(),
            metrics,
        }
    }

    /// Returns the bytes to send, oldest first.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Removes the first `count` bytes, which were sent. Frees the memory of an empty buffer.
    pub fn consume(&mut self, count: usize) {
        if count == self.bytes.len() {
            self.bytes = Vec::new();
        } else {
            self.bytes.drain(..count);
        }
    }

    /// Writes the reply to HELLO and adds its payload to the transcript.
    pub(super) fn challenge(&mut self, challenge: &Challenge<'_>, transcript: &mut Transcript) {
        let frame = self.push(challenge, 0);
        transcript.add(&frame[HEADER_BYTES..frame.len() - TRAILER_BYTES]);
    }

    /// Writes the reply to AUTH: the position of the stream, authenticated with the device's key.
    pub(super) fn welcome(
        &mut self,
        receipt: Receipt,
        terms: WelcomeTerms,
        mut transcript: Transcript,
        key: &[u8; KEY_BYTES],
        channel_binding: &[u8; KEY_BYTES],
    ) {
        let mut welcome = Welcome {
            durable_seq: receipt.durable_seq(),
            limit_seq: receipt.durable_seq() + terms.window_frames,
            keepalive_s: terms.keepalive_s,
            ack_timeout_s: terms.ack_timeout_s,
            utc_us: terms.utc_us,
            schema_known: u8::from(terms.schema_known),
            ext: &[],
            mac: [0; KEY_BYTES],
        };
        let unsigned = self.push(&welcome, 0);
        let unsigned_bytes = unsigned.len();
        transcript.add(&unsigned[HEADER_BYTES..unsigned_bytes - TRAILER_BYTES - KEY_BYTES]);
        welcome.mac = transcript.gateway_mac(key, channel_binding);
        self.bytes.truncate(self.bytes.len() - unsigned_bytes);
        self.push(&welcome, 0);
    }

    /// Acknowledges everything through the receipt's number.
    pub(super) fn ack(&mut self, receipt: Receipt, window_frames: u64) {
        let durable_seq = receipt.durable_seq();
        self.push(
            &Ack {
                limit_seq: durable_seq + window_frames,
                ext: &[],
            },
            durable_seq,
        );
    }

    /// Refuses the frame `seq`.
    pub(super) fn nack(
        &mut self,
        code: Code,
        seq: u64,
        expected_seq: u64,
        retry_after_ms: u32,
        detail: &str,
    ) {
        self.metrics.nack(code);
        let detail = cut(detail);
        let code = code as u8;
        self.push(
            &Nack {
                code,
                expected_seq,
                retry_after_ms,
                detail,
                ext: &[],
            },
            seq,
        );
    }

    /// Writes the reply to PING.
    pub(super) fn pong(&mut self, pong: &Pong<'_>) {
        self.push(pong, 0);
    }

    /// Writes the end of the connection.
    pub(super) fn bye(&mut self, code: Code, retry_after_ms: u32, detail: &str) {
        self.metrics.bye(code);
        let (code, detail) = (code as u8, cut(detail));
        let (min_version, max_version) = (VERSION, VERSION);
        self.push(
            &Bye {
                code,
                retry_after_ms,
                min_version,
                max_version,
                detail,
                ext: &[],
            },
            0,
        );
    }

    /// Appends a frame and returns it.
    fn push<'m>(&mut self, message: &impl Message<'m>, seq: u64) -> &[u8] {
        let mut frame = [0; HANDSHAKE_FRAME_BYTES_MAX];
        let frame_bytes =
            encode(message, seq, &mut frame).expect("every message of a gateway fits 512 bytes");
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&frame[..frame_bytes]);
        &self.bytes[start..]
    }
}

/// Contents of a WELCOME apart from the position of the stream.
pub(super) struct WelcomeTerms {
    pub window_frames: u64,
    pub keepalive_s: u16,
    pub ack_timeout_s: u16,
    pub utc_us: i64,
    pub schema_known: bool,
}

/// Returns the longest prefix of `detail` that fits in a NACK or BYE.
fn cut(detail: &str) -> &str {
    &detail[..detail.floor_char_boundary(DETAIL_BYTES_MAX)]
}
