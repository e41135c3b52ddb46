//! What the gateway sends: the handshake, ACK, NACK and PONG.

use super::{Device, FIXES_MAX, Fault, Notice, Queue, RETRY_AFTER_MS_MAX, State};
use crate::auth::KEY_BYTES;
use crate::error::{Class, Code};
use crate::frame::{self, Frame, VERSION, types};
use crate::message::{self, Ack, Bye, Challenge, Nack, Pong, Welcome};

impl Device<'_> {
    /// Handles the frame at the start of `input`, if it is complete. Returns its length, or 0 if more bytes are
    /// needed: remove that many bytes, and call again unless it is 0.
    pub fn handle_input(
        &mut self,
        input: &[u8],
        queue: &mut impl Queue,
        now_us: u64,
    ) -> Result<(usize, Option<Notice>), Fault> {
        let found = frame::decode(input, usize::from(self.config.rx_bytes_max))
            .map_err(|_| Fault::Protocol("not a frame, or one that is too long"))?;
        let Some(frame) = found else {
            return Ok((0, None));
        };
        let notice = self.handle_frame(&frame, queue, now_us)?;
        Ok((frame.bytes.len(), notice))
    }

    /// Handles a frame from the gateway.
    pub fn handle_frame(
        &mut self,
        frame: &Frame<'_>,
        queue: &mut impl Queue,
        now_us: u64,
    ) -> Result<Option<Notice>, Fault> {
        if !frame.intact {
            return Err(Fault::Protocol("checksum"));
        }
        if types::is_skippable(frame.header.frame_type) {
            return Ok(None);
        }
        if frame.header.version != VERSION || frame.header.flags != 0 {
            return Err(Fault::Protocol("version or flags"));
        }
        match (self.state, frame.header.frame_type) {
            (_, types::BYE) => {
                let bye: Bye<'_> = parse(frame)?;
                Err(Fault::Bye {
                    code: bye.code,
                    retry_after_ms: bye.retry_after_ms,
                })
            }
            (State::ExpectChallenge, types::CHALLENGE) => self.handle_challenge(frame),
            (State::ExpectWelcome, types::WELCOME) => self.handle_welcome(frame, queue, now_us),
            (State::Ready, types::ACK) => self.handle_ack(frame, queue, now_us),
            (State::Ready, types::NACK) => self.handle_nack(frame, now_us),
            (State::Ready, types::PONG) => self.handle_pong(frame, now_us),
            _ => Err(Fault::Protocol("type not allowed in this state")),
        }
    }

    fn handle_challenge(&mut self, frame: &Frame<'_>) -> Result<Option<Notice>, Fault> {
        let challenge: Challenge<'_> = parse(frame)?;
        if challenge.version != VERSION {
            return Err(Fault::Protocol("version that was not offered"));
        }
        self.tx_bytes_max = usize::from(challenge.rx_bytes_max);
        self.transcript.add(frame.payload());
        self.state = State::SendAuth;
        Ok(None)
    }

    fn handle_welcome(
        &mut self,
        frame: &Frame<'_>,
        queue: &mut impl Queue,
        now_us: u64,
    ) -> Result<Option<Notice>, Fault> {
        let welcome: Welcome<'_> = parse(frame)?;
        let payload = frame.payload();
        self.transcript.add(&payload[..payload.len() - KEY_BYTES]);
        let (key, binding) = (&self.config.key, &self.channel_binding);
        if !self
            .transcript
            .verify_gateway_mac(key, binding, &welcome.mac)
        {
            return Err(Fault::NotOurGateway);
        }
        if welcome.durable_seq >= queue.next_seq() {
            return Err(Fault::Protocol("durable_seq above the highest number sent"));
        }
        self.state = State::Ready;
        self.durable_seq = welcome.durable_seq;
        self.limit_seq = welcome.limit_seq;
        self.next_send_seq = welcome.durable_seq + 1;
        self.sent_seq = welcome.durable_seq;
        self.declare_due = welcome.schema_known == 0;
        self.keepalive_us = u64::from(welcome.keepalive_s) * 1_000_000;
        self.ack_timeout_us = u64::from(welcome.ack_timeout_s) * 1_000_000;
        self.progress_at_us = now_us;
        self.time_at_us = now_us;
        queue.delete_through(welcome.durable_seq);
        Ok(Some(Notice::Welcomed {
            utc_us: welcome.utc_us,
        }))
    }

    fn handle_ack(
        &mut self,
        frame: &Frame<'_>,
        queue: &mut impl Queue,
        now_us: u64,
    ) -> Result<Option<Notice>, Fault> {
        let ack: Ack<'_> = parse(frame)?;
        let through_seq = frame.header.seq;
        if through_seq >= queue.next_seq() {
            return Err(Fault::Protocol("ACK above the highest number sent"));
        }
        self.limit_seq = self.limit_seq.max(ack.limit_seq);
        if self.paused_until_us > now_us {
            // The cause of the pause is gone.
            self.paused_until_us = 0;
            self.progress_at_us = now_us;
        }
        if through_seq >= self.probe_seq {
            self.probe_seq = u64::MAX;
        }
        if through_seq <= self.durable_seq {
            return Ok(None);
        }
        self.attempts = 0;
        self.fixes = 0;
        self.durable_seq = through_seq;
        // A gateway that still held frames of an earlier connection may be ahead of this one.
        self.next_send_seq = self.next_send_seq.max(through_seq + 1);
        self.sent_seq = self.sent_seq.max(through_seq);
        self.progress_at_us = now_us;
        queue.delete_through(through_seq);
        Ok(Some(Notice::Acked { through_seq }))
    }

    fn handle_nack(&mut self, frame: &Frame<'_>, now_us: u64) -> Result<Option<Notice>, Fault> {
        let nack: Nack<'_> = parse(frame)?;
        let seq = frame.header.seq;
        if Class::of(nack.code) == Class::Fix {
            self.fixes += 1;
            if self.fixes > FIXES_MAX {
                return Err(Fault::Protocol("too many failed resends"));
            }
        }
        match Class::of(nack.code) {
            Class::RetryLater => {
                self.resume_at(nack.expected_seq)?;
                self.probe_seq = nack.expected_seq;
                let retry_after_ms = nack.retry_after_ms.clamp(1, RETRY_AFTER_MS_MAX);
                self.paused_until_us = now_us + u64::from(retry_after_ms) * 1000;
                self.progress_at_us = self.paused_until_us;
            }
            Class::Fix if nack.code == Code::SchemaConflict as u8 => {
                return Err(Fault::SchemaConflict);
            }
            Class::Fix if nack.code == Code::SchemaBound as u8 => {
                return Err(Fault::SchemaBound);
            }
            // An unsequenced frame was damaged. If it was DECLARE, it must be resent, and sending
            // it twice does no harm; the stream continues where it is.
            Class::Fix if seq == 0 => self.declare_due = true,
            Class::Fix => {
                self.declare_due |= nack.code == Code::UnknownSchema as u8;
                self.resume_at(nack.expected_seq)?;
            }
            // The ACK that covers the number deletes it.
            Class::Refused => {}
            Class::Reconnect | Class::Operator | Class::Unknown => {
                return Err(Fault::Protocol("NACK with a connection-level code class"));
            }
        }
        Ok(Some(Notice::Refused {
            seq,
            code: nack.code,
        }))
    }

    /// Continues at `expected_seq`, which may be ahead: after the device went back for a NACK, the
    /// gateway may have accepted frames that were still in flight, and expect the one after them.
    fn resume_at(&mut self, expected_seq: u64) -> Result<(), Fault> {
        if !(self.durable_seq + 1..=self.sent_seq + 1).contains(&expected_seq) {
            return Err(Fault::Protocol(
                "NACK expects a number that was never sent or is already durable",
            ));
        }
        self.next_send_seq = expected_seq;
        Ok(())
    }

    fn handle_pong(&mut self, frame: &Frame<'_>, now_us: u64) -> Result<Option<Notice>, Fault> {
        let pong: Pong<'_> = parse(frame)?;
        if self.ping_sent_at_us.take() != Some(pong.mono_us) {
            return Err(Fault::Protocol("PONG without PING"));
        }
        self.attempts = 0;
        self.pong = (pong.sent_us, now_us);
        self.time_at_us = now_us;
        Ok(Some(Notice::Time {
            utc_us: pong.sent_us,
        }))
    }
}

fn parse<'a, M: message::Message<'a>>(frame: &Frame<'a>) -> Result<M, Fault> {
    message::decode(frame.payload()).map_err(|_| Fault::Protocol("malformed message"))
}
