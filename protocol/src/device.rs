//! The device's side of the protocol as a state machine (R80 to R95): what firmware links, and what
//! the simulator drives.
//!
//! It performs no I/O and reads no clock. The firmware owns the connection, the receive buffer and the
//! durable [`Queue`]; it calls, in any order:
//! - [`Device::connect`] when a connection is up, [`Device::disconnect`] when it is gone;
//! - [`Device::handle_frame`] for each frame received, [`Device::handle_timeout`] at
//!   [`Device::poll_deadline`];
//! - [`Device::poll_transmit`] until it gives nothing more, and sends what it gives.
//!
//! Invariant: the queue is told to delete only what a gateway that proved the device's key has
//! acknowledged (R84).

use crate::auth::{KEY_BYTES, NONCE_BYTES, Transcript};
use crate::error::{Class, Code};
use crate::frame::{Frame, HEADER_BYTES, NoRoom, TRAILER_BYTES, VERSION, types};
use crate::message::{self, Ack, Auth, Bye, Challenge, Gap, Hello, Nack, Ping, Pong, Welcome};

/// Longest wait that a gateway can ask for; more is taken as this (R92). BYE may come from whoever
/// answers before a key is proved, and must not silence a device for weeks.
pub const RETRY_AFTER_MS_MAX: u32 = 3_600_000;
/// The clock is compared with the gateway's at least this often, however much is being sent (R72).
pub const TIME_EXCHANGE_US: u64 = 600_000_000;
/// Refusals of class 2 without an ACK in between before the connection is given up (R88): what eight
/// attempts did not mend, the ninth will not.
pub const MENDS_MAX: u32 = 8;

/// What does not change while a device runs.
#[derive(Clone)]
pub struct Config<'a> {
    /// The device's name.
    pub name: &'a str,
    /// The device's key; see [`crate::auth::derive_device_key`].
    pub key: [u8; KEY_BYTES],
    /// Firmware version, for people.
    pub firmware: &'a str,
    /// Number of the queue, random below 2^63, chosen when the queue was created.
    pub stream: u64,
    /// Counts boots, or is random for each.
    pub boot: u32,
    /// Schema that new frames are made with.
    pub schema: u16,
    /// Its hash; see [`crate::auth::schema_hash`].
    pub schema_hash: [u8; 8],
    /// Longest frame the receive buffer holds.
    pub rx_bytes_max: u16,
    /// Most frames sent and not yet acknowledged, 1 or more; the gateway's limit holds as well.
    pub window_frames: u64,
    /// Wait before the first attempt to connect again; doubles with each further one.
    pub reconnect_min_ms: u32,
    /// Longest wait between attempts.
    pub reconnect_max_ms: u32,
    /// How long the gateway may take to answer in the handshake.
    pub handshake_timeout_ms: u32,
}

/// The device's durable outgoing queue.
pub trait Queue {
    /// Oldest number it still holds; [`Queue::next_seq`] where it is empty.
    fn oldest_seq(&self) -> u64;

    /// The number the next new frame will get; 1 in a new queue.
    fn next_seq(&self) -> u64;

    /// Writes the whole frame with this number, the same bytes each time; returns its length.
    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom>;

    /// Writes the DECLARE of the schema that frame `seq` uses, which the queue holds; returns its
    /// length. For a frame that uses none, any of the device's schemas will do.
    fn write_declare(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom>;

    /// Frames through this number are stored by the gateway and may be forgotten.
    fn delete_through(&mut self, seq: u64);
}

/// What the firmware may want to know of a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The gateway proved itself; sending begins. Carries its UTC in microseconds.
    Welcomed {
        /// The gateway's clock.
        utc_us: i64,
    },
    /// Frames through this number are durable.
    Acked {
        /// The number.
        through_seq: u64,
    },
    /// A frame was refused; what its [`Class`] obliges to is done by the state machine.
    Refused {
        /// Its number; 0 for one without.
        seq: u64,
        /// The NACK code.
        code: u8,
    },
    /// Answer to a PING: the gateway's UTC in microseconds.
    Time {
        /// The gateway's clock when it answered.
        utc_us: i64,
    },
}

/// Why the connection must be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The gateway said BYE.
    Bye {
        /// Its code.
        code: u8,
        /// Connect again no sooner than this.
        retry_after_ms: u32,
    },
    /// The peer does not hold the device's key: it is not its gateway.
    NotOurGateway,
    /// The gateway sent what it must not, told in a few words.
    Protocol(&'static str),
    /// No answer, or no progress, in time.
    Timeout,
    /// The schema's number is taken by other content: firmware must choose another number.
    SchemaConflict,
    /// The gateway takes no more schemas or series of this device: an operator must act.
    SchemaBound,
    /// The next frame does not fit what this gateway receives, or the buffer given (R9).
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

/// The state machine; see the module's documentation.
pub struct Device<'a> {
    config: Config<'a>,
    channel_binding: [u8; KEY_BYTES],
    state: State,
    transcript: Transcript,
    handshake_deadline_us: u64,
    /// Attempts since a connection last proved useful.
    attempts: u32,
    /// Longest frame the gateway receives.
    tx_bytes_max: usize,
    /// The next frame is longer than that.
    is_stuck: bool,

    durable_seq: u64,
    limit_seq: u64,
    next_send_seq: u64,
    /// The highest number sent on this connection, or durable, whichever is more.
    sent_seq: u64,
    /// Refusals of class 2 since the latest progress.
    mends: u32,
    /// The schema of the next frame must be declared before it is sent.
    declare_due: bool,
    /// Class 1: nothing sequenced before this moment.
    paused_until_us: u64,
    /// Class 1: nothing beyond this number before an ACK covers it.
    probe_seq: u64,
    /// Latest moment something unacknowledged moved on.
    progress_at_us: u64,

    keepalive_us: u64,
    ack_timeout_us: u64,
    sent_at_us: u64,
    /// When the gateway's time was last heard.
    time_at_us: u64,
    ping_sent_at_us: Option<u64>,
    /// `sent_us` of the latest PONG, and when it arrived.
    pong: (i64, u64),
}

impl<'a> Device<'a> {
    /// A device that is not connected.
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
            mends: 0,
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

    /// A connection is up. `nonce` is random; `utc_us` is 0 where the device does not know UTC.
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
        self.mends = 0;
        self.paused_until_us = 0;
        self.probe_seq = u64::MAX;
        self.ping_sent_at_us = None;
        self.pong = (0, 0);
    }

    /// The connection is gone, or was never made; returns when to try again (R91).
    ///
    /// `random` is drawn evenly from all its values.
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
                // Whoever is taken over on the connection it uses has a twin: both hurrying back would
                // take over from each other for ever.
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
        // Anywhere in the upper half of the wait, so that a fleet does not come back as one.
        let jitter_ms = (ceiling_ms / 2) * u64::from(random) / u64::from(u32::MAX);
        now_us + (asked_ms + ceiling_ms.div_ceil(2) + jitter_ms) * 1000
    }

    fn backoff_ms(&self, min_ms: u64, max_ms: u64) -> u64 {
        min_ms
            .saturating_mul(1 << self.attempts.min(20))
            .min(max_ms)
    }

    /// Whether the gateway has welcomed this connection.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Frames sent on this connection and not yet acknowledged.
    pub fn in_flight(&self) -> u64 {
        if self.is_ready() {
            self.next_send_seq - 1 - self.durable_seq
        } else {
            0
        }
    }

    /// Writes the next frame to send into `out`, which holds the gateway's longest frame, and returns
    /// its length; `None` where there is nothing to send now.
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
        // A device that always has something to send must not lose count of the time over it.
        if !may_send || now_us >= self.time_at_us + TIME_EXCHANGE_US {
            let ping = self.write_ping_if_due(now_us, out);
            if ping.is_some() || !may_send {
                return ping;
            }
        }
        let room = out.len().min(self.tx_bytes_max);
        match self.write_sequenced(queue, now_us, &mut out[..room]) {
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

    /// When [`Device::handle_timeout`] wants to be called, if nothing else happens before.
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

    /// Time has passed: tells whether it ran out, else that [`Device::poll_transmit`] may have
    /// something.
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

    /// Takes in a frame from the gateway.
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
            return Err(Fault::Protocol("durable beyond what was sent"));
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
            return Err(Fault::Protocol("ACK beyond what was sent"));
        }
        self.limit_seq = self.limit_seq.max(ack.limit_seq);
        if self.paused_until_us > now_us {
            // What was in the way is gone.
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
        self.mends = 0;
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
        if Class::of(nack.code) == Class::Mend {
            self.mends += 1;
            if self.mends > MENDS_MAX {
                return Err(Fault::Protocol("mended in vain"));
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
            Class::Mend if nack.code == Code::SchemaConflict as u8 => {
                return Err(Fault::SchemaConflict);
            }
            Class::Mend if nack.code == Code::SchemaBound as u8 => {
                return Err(Fault::SchemaBound);
            }
            // An unsequenced frame was damaged. If it was DECLARE it must be sent again, and saying it
            // twice does no harm; the stream goes on where it is.
            Class::Mend if seq == 0 => self.declare_due = true,
            Class::Mend => {
                self.declare_due |= nack.code == Code::UnknownSchema as u8;
                self.resume_at(nack.expected_seq)?;
            }
            // The ACK that covers the number deletes it.
            Class::Refused => {}
            Class::Reconnect | Class::Operator | Class::Unknown => {
                return Err(Fault::Protocol("NACK of a class that ends connections"));
            }
        }
        Ok(Some(Notice::Refused {
            seq,
            code: nack.code,
        }))
    }

    /// Sending may jump ahead here: after it went back for a NACK, the gateway may have taken frames that
    /// were still on their way, and ask for the one after them.
    fn resume_at(&mut self, expected_seq: u64) -> Result<(), Fault> {
        if !(self.durable_seq + 1..=self.sent_seq + 1).contains(&expected_seq) {
            return Err(Fault::Protocol(
                "NACK expects what was never sent or is durable",
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
