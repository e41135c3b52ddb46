//! The device side of the protocol as a state machine (R80 to R95), used by firmware and by the
//! simulator.
//!
//! It performs no I/O and reads no clock. The firmware owns the connection, the receive buffer and
//! the durable [`Queue`]; it calls, in any order:
//! - [`Device::connect`] when a connection is established, [`Device::disconnect`] when it is lost;
//! - [`Device::handle_input`] for received bytes, [`Device::handle_timeout`] at
//!   [`Device::poll_deadline`];
//! - [`Device::poll_transmit`] until it returns nothing more, sending everything it returns.
//!
//! Invariant: the queue deletes only frames acknowledged by a gateway that proved the device's key
//! (R84).

mod receive;
mod transmit;

use crate::auth::{KEY_BYTES, NONCE_BYTES, Transcript};
use crate::error::{Class, Code};
use crate::frame::{HANDSHAKE_FRAME_BYTES_MAX, NoRoom};
use crate::message::Declare;

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
    /// Hash of that schema; see [`Declare::hash`].
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

impl<'a> Config<'a> {
    /// Returns settings for small buffers and slow networks: frames to the device of up to 512 bytes, 8 frames in
    /// flight, 1 s to 5 min between attempts to connect, and 10 s for a reply in the handshake.
    pub fn new(
        name: &'a str,
        key: [u8; KEY_BYTES],
        stream: u64,
        boot: u32,
        schema: &Declare<'_>,
    ) -> Self {
        Config {
            name,
            key,
            firmware: "",
            stream,
            boot,
            schema: schema.schema,
            schema_hash: schema.hash(),
            rx_bytes_max: HANDSHAKE_FRAME_BYTES_MAX as u16,
            window_frames: 8,
            reconnect_min_ms: 1_000,
            reconnect_max_ms: 300_000,
            handshake_timeout_ms: 10_000,
        }
    }
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

impl core::fmt::Display for Fault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Fault::Bye { code, .. } => match Code::from_wire(*code) {
                Some(code) => write!(f, "the gateway closed the connection: {}", code.name()),
                None => write!(f, "the gateway closed the connection: code {code}"),
            },
            Fault::NotOurGateway => f.write_str("the gateway does not have this device's key"),
            Fault::Protocol(what) => write!(f, "the gateway violated the protocol: {what}"),
            Fault::Timeout => f.write_str("no reply in time"),
            Fault::SchemaConflict => f.write_str("the schema number is used for other channels"),
            Fault::SchemaBound => {
                f.write_str("the gateway's limit of schemas or series is reached")
            }
            Fault::FrameTooLong => f.write_str("the next frame is too long for this gateway"),
        }
    }
}

impl core::error::Error for Fault {}

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

    fn ping_due_us(&self) -> u64 {
        (self.sent_at_us + self.keepalive_us).min(self.time_at_us + TIME_EXCHANGE_US)
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
}
