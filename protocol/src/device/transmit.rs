//! What the device sends: the handshake, frames of the queue, and PING.

use super::{Device, Queue, State, TIME_EXCHANGE_US};
use crate::auth::{KEY_BYTES, NONCE_BYTES};
use crate::frame::{HEADER_BYTES, NoRoom, TRAILER_BYTES, VERSION};
use crate::message::{self, Auth, Gap, Hello, Ping};

impl Device<'_> {
    /// Writes the next frame to send into `out` and returns its length, or `None` if there is
    /// nothing to send now. `out` must hold the gateway's longest frame.
    pub fn poll_transmit(
        &mut self,
        queue: &mut impl Queue,
        now_us: u64,
        out: &mut [u8],
    ) -> Option<usize> {
        let written = match self.state {
            State::Offline | State::ExpectChallenge | State::ExpectWelcome => None,
            State::SendHello { nonce, utc_us } => {
                let len = self.write_hello(queue, nonce, utc_us, now_us, out).ok()?;
                self.state = State::ExpectChallenge;
                Some(len)
            }
            State::SendAuth => {
                let len = self.write_auth(now_us, out).ok()?;
                self.state = State::ExpectWelcome;
                Some(len)
            }
            State::Ready => self.write_next(queue, now_us, out),
        };
        if written.is_some() {
            self.sent_at_us = now_us;
        }
        written
    }

    fn write_hello(
        &mut self,
        queue: &impl Queue,
        nonce: [u8; NONCE_BYTES],
        utc_us: i64,
        now_us: u64,
        out: &mut [u8],
    ) -> Result<usize, NoRoom> {
        let hello = Hello {
            min_version: VERSION,
            max_version: VERSION,
            name: self.config.name,
            stream: self.config.stream,
            oldest_seq: queue.oldest_seq(),
            next_seq: queue.next_seq(),
            boot: self.config.boot,
            mono_us: now_us,
            utc_us,
            rx_bytes_max: self.config.rx_bytes_max,
            firmware: self.config.firmware,
            schema: self.config.schema,
            schema_hash: self.config.schema_hash,
            nonce,
            caps: 0,
            ext: &[],
        };
        let len = message::encode(&hello, 0, out)?;
        self.transcript.add(&out[HEADER_BYTES..len - TRAILER_BYTES]);
        Ok(len)
    }

    fn write_auth(&mut self, now_us: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let unsigned = Auth {
            mono_us: now_us,
            ext: &[],
            mac: [0; KEY_BYTES],
        };
        let len = message::encode(&unsigned, 0, out)?;
        self.transcript
            .add(&out[HEADER_BYTES..len - TRAILER_BYTES - KEY_BYTES]);
        let mac = self
            .transcript
            .device_mac(&self.config.key, &self.channel_binding);
        self.transcript.add(&mac);
        message::encode(&Auth { mac, ..unsigned }, 0, out)
    }

    fn write_next(&mut self, queue: &mut impl Queue, now_us: u64, out: &mut [u8]) -> Option<usize> {
        let limit_seq = self
            .limit_seq
            .min(self.durable_seq.saturating_add(self.config.window_frames));
        let may_send = now_us >= self.paused_until_us
            && self.next_send_seq <= limit_seq.min(self.probe_seq)
            && self.next_send_seq < queue.next_seq();
        // A device that is always sending must still exchange time.
        if !may_send || now_us >= self.time_at_us + TIME_EXCHANGE_US {
            let ping = self.write_ping_if_due(now_us, out);
            if ping.is_some() || !may_send {
                return ping;
            }
        }
        let len_max = out.len().min(self.tx_bytes_max);
        match self.write_sequenced(queue, now_us, &mut out[..len_max]) {
            Ok(len) => Some(len),
            Err(NoRoom) => {
                self.is_stuck = true;
                None
            }
        }
    }

    fn write_sequenced(
        &mut self,
        queue: &mut impl Queue,
        now_us: u64,
        out: &mut [u8],
    ) -> Result<usize, NoRoom> {
        let oldest_seq = queue.oldest_seq();
        let is_lost = self.next_send_seq < oldest_seq;
        if self.declare_due && !is_lost {
            let len = queue.write_declare(self.next_send_seq, out)?;
            self.declare_due = false;
            return Ok(len);
        }
        if self.in_flight() == 0 {
            self.progress_at_us = now_us;
        }
        if is_lost {
            let gap = Gap {
                from_seq: self.next_send_seq,
                reason: 0,
                ext: &[],
            };
            let len = message::encode(&gap, oldest_seq - 1, out)?;
            self.next_send_seq = oldest_seq;
            self.sent_seq = self.sent_seq.max(oldest_seq - 1);
            return Ok(len);
        }
        let len = queue.write_frame(self.next_send_seq, out)?;
        self.sent_seq = self.sent_seq.max(self.next_send_seq);
        self.next_send_seq += 1;
        Ok(len)
    }

    fn write_ping_if_due(&mut self, now_us: u64, out: &mut [u8]) -> Option<usize> {
        if self.ping_sent_at_us.is_some() || now_us < self.ping_due_us() {
            return None;
        }
        let (pong_sent_us, pong_mono_us) = self.pong;
        let ping = Ping {
            mono_us: now_us,
            pong_sent_us,
            pong_mono_us,
            ext: &[],
        };
        let len = message::encode(&ping, 0, out).ok()?;
        self.ping_sent_at_us = Some(now_us);
        Some(len)
    }
}
