//! The device side of the protocol as a state machine (R80 to R95), used by firmware and by the
//! simulator.
//!
//! It performs no I/O and reads no clock. The firmware owns the connection, the receive buffer and
//! the durable [`Queue`]; it calls, in any order:
//! - [`Device::connect`] when a connection is established, [`Device::disconnect`] when it is lost;
//! - [`Device::handle_frame`] for each received frame, [`Device::handle_timeout`] at
//!   [`Device::poll_deadline`];
//! - [`Device::poll_transmit`] until it returns nothing more, sending everything it returns.
//!
//! Invariant: the queue deletes only frames acknowledged by a gateway that proved the device's key
//! (R84).

use crate::auth::{KEY_BYTES, NONCE_BYTES, Transcript};
use crate::error::{Class, Code};
use crate::frame::{Frame, HEADER_BYTES, NoRoom, TRAILER_BYTES, VERSION, types};
use crate::message::{self, Ack, Auth, Bye, Challenge, Gap, Hello, Nack, Ping, Pong, Welcome};

/// Longest wait that a gateway can ask for; longer ones are reduced to it (R92). Before a key is
/// proved, any peer can send BYE, and must not silence a device for weeks.
pub const RETRY_AFTER_MS_MAX: u32 = 3_600_000;
/// Longest interval between exchanges of time with the gateway, even while the device is always
/// sending (R72).
pub const TIME_EXCHANGE_US: u64 = 600_000_000;
/// Number of class 2 NACKs without an ACK in between after which the device gives up the connection
/// (R88): if eight attempts did not fix the cause, the ninth will not either.
pub const FIXES_MAX: u32 = 8;

/// Settings that are constant while a device runs.
#[derive(Clone)]
pub struct Config<'a> {
    /// The device's name.
    pub name: &'a str,
    /// The device's key; see [`crate::auth::derive_device_key`].
    pub key: [u8; KEY_BYTES],
    /// Firmware version, informational.
    pub firmware: &'a str,
    /// Number of the queue, random below 2^63, chosen when the queue was created.
    pub stream: u64,
    /// Boot counter, or a random number for each boot.
    pub boot: u32,
    /// Schema number used for new frames.
    pub schema: u16,
    /// Hash of that schema; see [`crate::auth::schema_hash`].
    pub schema_hash: [u8; 8],
    /// Longest frame that fits the receive buffer, in bytes.
    pub rx_bytes_max: u16,
    /// Maximum number of unacknowledged frames, at least 1; the gateway's limit also applies.
    pub window_frames: u64,
    /// Delay before the first attempt to reconnect; doubles with each further one.
    pub reconnect_min_ms: u32,
    /// Longest delay between attempts.
    pub reconnect_max_ms: u32,
    /// How long the gateway may take to reply in the handshake.
    pub handshake_timeout_ms: u32,
}

/// The device's durable outgoing queue.
pub trait Queue {
    /// Returns the oldest number still in the queue; [`Queue::next_seq`] if the queue is empty.
    fn oldest_seq(&self) -> u64;

    /// Returns the number of the next new frame; 1 in a new queue.
    fn next_seq(&self) -> u64;

    /// Writes the complete frame with this number, with the same bytes each time; returns its
    /// length.
    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom>;

    /// Writes the DECLARE of the schema that the queued frame `seq` uses; returns its length. If
    /// the frame uses no schema, any of the device's schemas will do.
    fn write_declare(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom>;

    /// Deletes frames through this number, which the gateway has stored.
    fn delete_through(&mut self, seq: u64);
}

/// What the firmware may want to know about a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The gateway has authenticated; sending begins.
    Welcomed {
        /// The gateway's UTC in microseconds.
        utc_us: i64,
    },
    /// Frames through this number are durable.
    Acked {
        /// Highest durable number.
        through_seq: u64,
    },
    /// The gateway refused a frame; the state machine reacts as its [`Class`] demands.
    Refused {
        /// Sequence number of the frame; 0 if unsequenced.
        seq: u64,
        /// The NACK code.
        code: u8,
    },
    /// The gateway answered a PING.
    Time {
        /// The gateway's UTC when it answered, in microseconds.
        utc_us: i64,
    },
}

/// Reason to give up the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The gateway sent BYE.
    Bye {
        /// The BYE code.
        code: u8,
        /// Earliest time to reconnect, in milliseconds from now.
        retry_after_ms: u32,
    },
    /// The peer does not hold the device's key: it is not the device's gateway.
    NotOurGateway,
    /// The gateway violated the protocol; a short description.
    Protocol(&'static str),
    /// No reply or no progress in time.
    Timeout,
    /// The schema number is used for different content: the firmware must use another number.
    SchemaConflict,
    /// The gateway's series or schema limit is reached: an operator must act.
    SchemaBound,
    /// The next frame is longer than this gateway's limit or the given buffer (R9).
    FrameTooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Offline,
    SendHello {
        nonce: [u8; NONCE_BYTES],
        utc_us: i64,
    },
    ExpectChallenge,
    SendAuth,
    ExpectWelcome,
    Ready,
}

/// The device state machine; see the module documentation.
pub struct Device<'a> {
    config: Config<'a>,
    channel_binding: [u8; KEY_BYTES],
    state: State,
    transcript: Transcript,
    handshake_deadline_us: u64,
    /// Number of attempts since the last useful connection.
    attempts: u32,
    /// Longest frame that the gateway receives.
    tx_bytes_max: usize,
    /// Whether the next frame is longer than that.
    is_stuck: bool,

    durable_seq: u64,
    limit_seq: u64,
    next_send_seq: u64,
    /// The highest number sent on this connection or durable, whichever is greater.
    sent_seq: u64,
    /// Number of class 2 NACKs since the latest progress.
    fixes: u32,
    /// Whether the schema of the next frame must be declared first.
    declare_due: bool,
    /// Class 1: no sequenced frames before this time.
    paused_until_us: u64,
    /// Class 1: no frames above this number until an ACK covers it.
    probe_seq: u64,
    /// Latest time at which the set of unacknowledged frames changed.
    progress_at_us: u64,

    keepalive_us: u64,
    ack_timeout_us: u64,
    sent_at_us: u64,
    /// Time at which the gateway's time was last received.
    time_at_us: u64,
    ping_sent_at_us: Option<u64>,
    /// `sent_us` of the latest PONG, and its arrival time.
    pong: (i64, u64),
}

impl<'a> Device<'a> {
    /// Creates a disconnected device.
    pub fn new(config: Config<'a>) -> Self {
        Device {
            config,
            channel_binding: crate::auth::NO_CHANNEL_BINDING,
            state: State::Offline,
            transcript: Transcript::default(),
            handshake_deadline_us: 0,
            attempts: 0,
            tx_bytes_max: 0,
            is_stuck: false,
            durable_seq: 0,
            limit_seq: 0,
            next_send_seq: 1,
            sent_seq: 0,
            fixes: 0,
            declare_due: false,
            paused_until_us: 0,
            probe_seq: u64::MAX,
            progress_at_us: 0,
            keepalive_us: 0,
            ack_timeout_us: 0,
            sent_at_us: 0,
            time_at_us: 0,
            ping_sent_at_us: None,
            pong: (0, 0),
        }
    }

    /// Handles a new connection. `nonce` is random; `utc_us` is 0 if the device does not know UTC.
    ///
    /// `channel_binding` is [`crate::auth::NO_CHANNEL_BINDING`] on plain TCP.
    pub fn connect(
        &mut self,
        nonce: [u8; NONCE_BYTES],
        channel_binding: [u8; KEY_BYTES],
        now_us: u64,
        utc_us: i64,
    ) {
        self.state = State::SendHello { nonce, utc_us };
        self.channel_binding = channel_binding;
        self.transcript = Transcript::default();
        self.handshake_deadline_us = now_us + u64::from(self.config.handshake_timeout_ms) * 1000;
        self.declare_due = false;
        self.fixes = 0;
        self.paused_until_us = 0;
        self.probe_seq = u64::MAX;
        self.ping_sent_at_us = None;
        self.pong = (0, 0);
    }

    /// Handles a lost or failed connection; returns when to try again (R91).
    ///
    /// `random` must be uniformly distributed.
    pub fn disconnect(&mut self, fault: Option<Fault>, now_us: u64, random: u32) -> u64 {
        self.state = State::Offline;
        self.is_stuck = false;
        let min_ms = u64::from(self.config.reconnect_min_ms);
        let max_ms = u64::from(self.config.reconnect_max_ms);
        let (asked_ms, ceiling_ms) = match fault {
            Some(Fault::Bye {
                code,
                retry_after_ms,
            }) => {
                // A device that is taken over while connected has a twin. If both reconnected
                // quickly, they would take over from each other indefinitely.
                let longest = Class::of(code) == Class::Operator || code == Code::TakenOver as u8;
                let ceiling_ms = if longest {
                    max_ms
                } else {
                    self.backoff_ms(min_ms, max_ms)
                };
                (
                    u64::from(retry_after_ms.min(RETRY_AFTER_MS_MAX)),
                    ceiling_ms,
                )
            }
            Some(
                Fault::NotOurGateway
                | Fault::SchemaConflict
                | Fault::SchemaBound
                | Fault::FrameTooLong,
            ) => (0, max_ms),
            Some(Fault::Protocol(_) | Fault::Timeout) | None => {
                (0, self.backoff_ms(min_ms, max_ms))
            }
        };
        self.attempts = self.attempts.saturating_add(1);
        // Uniform over the upper half of the delay, so that a fleet does not reconnect all at the
        // same time.
        let jitter_ms = (ceiling_ms / 2) * u64::from(random) / u64::from(u32::MAX);
        now_us + (asked_ms + ceiling_ms.div_ceil(2) + jitter_ms) * 1000
    }

    fn backoff_ms(&self, min_ms: u64, max_ms: u64) -> u64 {
        min_ms
            .saturating_mul(1 << self.attempts.min(20))
            .min(max_ms)
    }

    /// Returns whether the gateway has sent WELCOME on this connection.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Returns the number of frames sent on this connection and not yet acknowledged.
    pub fn in_flight(&self) -> u64 {
        if self.is_ready() {
            self.next_send_seq - 1 - self.durable_seq
        } else {
            0
        }
    }

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

    fn ping_due_us(&self) -> u64 {
        (self.sent_at_us + self.keepalive_us).min(self.time_at_us + TIME_EXCHANGE_US)
    }

    /// Returns the deadline for the next [`Device::handle_timeout`] call.
    pub fn poll_deadline(&self) -> Option<u64> {
        match self.state {
            State::Offline => None,
            State::Ready if self.is_stuck => Some(0),
            State::Ready => {
                let paused = Some(self.paused_until_us).filter(|until_us| *until_us > 0);
                let keepalive = match self.ping_sent_at_us {
                    Some(sent_at_us) => sent_at_us + self.ack_timeout_us,
                    None => self.ping_due_us(),
                };
                [self.ack_deadline_us(), paused, Some(keepalive)]
                    .into_iter()
                    .flatten()
                    .min()
            }
            _ => Some(self.handshake_deadline_us),
        }
    }

    fn ack_deadline_us(&self) -> Option<u64> {
        (self.in_flight() > 0).then(|| self.progress_at_us + self.ack_timeout_us)
    }

    /// Handles the passing of time: returns an error if a timeout has expired. Otherwise
    /// [`Device::poll_transmit`] may have something to send.
    pub fn handle_timeout(&mut self, now_us: u64) -> Result<(), Fault> {
        if self.is_stuck {
            return Err(Fault::FrameTooLong);
        }
        let is_over = match self.state {
            State::Offline => false,
            State::Ready => {
                if now_us >= self.paused_until_us {
                    self.paused_until_us = 0;
                }
                let pong_over = self
                    .ping_sent_at_us
                    .is_some_and(|sent_at_us| now_us >= sent_at_us + self.ack_timeout_us);
                let ack_over = self
                    .ack_deadline_us()
                    .is_some_and(|deadline| now_us >= deadline);
                pong_over || ack_over
            }
            _ => now_us >= self.handshake_deadline_us,
        };
        if is_over { Err(Fault::Timeout) } else { Ok(()) }
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
