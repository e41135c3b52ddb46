//! One device of the fleet: it connects, sends the frames that are due, with the selected faults, and reconnects
//! after every loss.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BytesMut};
use fieldgate::net::socket::Socket;
use fieldgate_protocol::auth::{NONCE_BYTES, derive_device_key};
use fieldgate_protocol::device::{Config, Device, Fault, Notice};
use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{
    self, DEFAULT_FRAME_BYTES_MAX, HEADER_BYTES, NoRoom, TRAILER_BYTES, types,
};
use tokio::io::Interest;
use tokio::task::yield_now;
use tokio::time::{sleep_until, timeout};

use super::link::{Connected, Handshake, Link, connect};
use super::outbox::Outbox;
use super::{Fleet, FleetError};
use crate::encode::declare;
use crate::faults::Strikes;
use crate::journal::Login;
use crate::plan::Clock;

const RECONNECT_MIN_MS: u32 = 50;
const RECONNECT_MAX_MS: u32 = 2_000;
const HANDSHAKE_TIMEOUT_MS: u32 = 10_000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of abandoned connections that a device keeps open.
const ABANDONED_MAX: usize = 8;
/// Score from which a device counts as failing.
const FAILURE_SCORE_MAX: u32 = 10;
const WRITE_BYTES: usize = 16 * 1024;

enum Ended {
    /// Everything is acknowledged.
    Done,
    /// The connection failed: reconnect after a delay.
    Lost(Loss),
    /// The device closed the connection on purpose: reconnect immediately.
    Dropped,
    /// The device leaves the connection open but never uses it again: reconnect immediately.
    Abandoned,
}

enum Loss {
    /// The connection broke or could not be opened.
    Connection(io::Error),
    /// The connection is open but unusable.
    Fault(Fault),
}

impl Loss {
    /// Returns how much this attempt adds to the failure score, if the gateway sent nothing.
    fn failure_score(&self) -> u32 {
        match self {
            // TLS or the device's own certificate fails.
            Loss::Connection(error) => match error.kind() {
                io::ErrorKind::InvalidData | io::ErrorKind::Other => 2,
                // A gateway that is starting or full also does this.
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => 1,
                _ => 0,
            },
            Loss::Fault(Fault::Protocol(_)) => 2,
            Loss::Fault(_) => 0,
        }
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Ended {
        Ended::Lost(Loss::Connection(error))
    }
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Ended {
        Ended::Lost(Loss::Fault(fault))
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Connection(error) => write!(f, "{error}"),
            Loss::Fault(Fault::Bye { code, .. }) => write!(f, "BYE {code} ({})", name_of(*code)),
            Loss::Fault(Fault::NotOurGateway) => {
                f.write_str("the gateway has a different key for this device")
            }
            Loss::Fault(Fault::Protocol(what)) => write!(f, "protocol violation: {what}"),
            Loss::Fault(Fault::Timeout) => f.write_str("timed out waiting for the gateway"),
            Loss::Fault(Fault::SchemaConflict) => {
                f.write_str("the gateway has a conflicting schema under this number")
            }
            Loss::Fault(Fault::SchemaBound) => {
                f.write_str("too many schemas or series for the gateway's limits")
            }
            Loss::Fault(Fault::FrameTooLong) => {
                f.write_str("the next frame exceeds the gateway's frame limit")
            }
        }
    }
}

fn name_of(code: u8) -> &'static str {
    Code::from_wire(code).map_or("unknown", Code::name)
}

pub(super) struct DeviceTask {
    fleet: Arc<Fleet>,
    outbox: Outbox,
    /// The device's own clock at the start of the run.
    uptime_at_start_us: u64,
    /// Number of frames sent, which selects the faults.
    attempts: u32,
    abandoned: VecDeque<Socket>,
    storms: u64,
    was_welcomed: bool,
    /// Failure score: rises with each failed attempt since the last successful one.
    failure_score: u32,
    /// Whether the gateway sent anything on the latest connection.
    was_heard: bool,
    /// Whether the device has noticed the end of the run.
    is_stopping: bool,
}

impl DeviceTask {
    pub(super) fn new(fleet: Arc<Fleet>, index: u32) -> DeviceTask {
        let script = fleet.script.device(index);
        let uptime_at_start_us = script.uptime_us(fleet.started_utc_us).max(0) as u64;
        let outbox = Outbox::new(Arc::clone(&fleet), script);
        DeviceTask {
            fleet,
            outbox,
            uptime_at_start_us,
            attempts: 0,
            abandoned: VecDeque::new(),
            storms: 0,
            was_welcomed: false,
            failure_score: 0,
            was_heard: false,
            is_stopping: false,
        }
    }

    pub(super) async fn run(mut self) -> Result<(), FleetError> {
        let fleet = Arc::clone(&self.fleet);
        let name = self.outbox.script.name().to_owned();
        let mut device = Device::new(Config {
            name: &name,
            key: derive_device_key(&fleet.terms.fleet_key, &name, 0),
            firmware: concat!("fieldgate-sim ", env!("CARGO_PKG_VERSION")),
            stream: self.outbox.script.stream(),
            boot: self.outbox.script.boot(),
            schema: fleet.schema,
            schema_hash: declare(fleet.script.channels(), fleet.schema).hash(),
            rx_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
            window_frames: fleet.terms.window_frames,
            reconnect_min_ms: RECONNECT_MIN_MS,
            reconnect_max_ms: RECONNECT_MAX_MS,
            handshake_timeout_ms: HANDSHAKE_TIMEOUT_MS,
        });
        let join_us = fleet.pace.due_us(self.outbox.script.index(), 1);
        tokio::select! {
            () = sleep_until(fleet.instant(join_us)) => {}
            () = fleet.stop.cancelled() => return Ok(()),
        }
        fleet.joined.fetch_add(1, Relaxed);
        let mut is_again = false;
        while !self.outbox.is_done() {
            let loss = match self.connect_and_serve(&mut device, is_again).await? {
                Ended::Done => break,
                Ended::Dropped | Ended::Abandoned => {
                    device.disconnect(None, self.uptime_us(), 0);
                    is_again = true;
                    continue;
                }
                Ended::Lost(loss) => loss,
            };
            let reason = loss.to_string();
            fleet.report().lost(reason.clone());
            self.count_failure(&loss);
            let fault = match loss {
                Loss::Connection(_) => None,
                Loss::Fault(fault) => Some(fault),
            };
            self.check_refusal(fault)?;
            let again_us = device.disconnect(fault, self.uptime_us(), random());
            let wait_s = again_us.saturating_sub(self.uptime_us()) as f64 / 1e6;
            fleet.counters.noted().note(
                &format!("waiting: {reason}"),
                format!("{name} reconnects in {wait_s:.1} s"),
            );
            let again = sleep_until(fleet.instant(again_us - self.uptime_at_start_us));
            tokio::select! {
                () = again => {}
                // Nothing is in flight.
                () = fleet.stop.cancelled(), if self.outbox.is_empty() => break,
            }
            is_again = true;
        }
        Ok(())
    }

    /// Counts attempts that failed for a permanent reason.
    fn count_failure(&mut self, loss: &Loss) {
        let was_failing = self.failure_score >= FAILURE_SCORE_MAX;
        self.failure_score = match loss.failure_score() {
            0 => 0,
            _ if self.was_heard => 0,
            score => self.failure_score.saturating_add(score),
        };
        let is_failing = self.failure_score >= FAILURE_SCORE_MAX;
        match (was_failing, is_failing) {
            (false, true) => _ = self.fleet.failing.fetch_add(1, Relaxed),
            (true, false) => _ = self.fleet.failing.fetch_sub(1, Relaxed),
            _ => {}
        }
    }

    /// Ends the run on a permanent rejection, if the device was never welcomed.
    fn check_refusal(&self, fault: Option<Fault>) -> Result<(), FleetError> {
        let code = match fault {
            Some(Fault::NotOurGateway) => {
                return Err(FleetError::NotOurGateway(self.fleet.terms.gateway));
            }
            Some(Fault::SchemaConflict) => {
                return Err(FleetError::Schema(self.outbox.script.name().to_owned()));
            }
            Some(Fault::FrameTooLong) => Code::TooLarge as u8,
            Some(Fault::SchemaBound) => Code::SchemaBound as u8,
            Some(Fault::Bye { code, .. }) => code,
            _ => return Ok(()),
        };
        let advice = match Code::from_wire(code) {
            Some(Code::TooLarge) => {
                "frames exceed the gateway's limit; lower --batch or --channels"
            }
            Some(Code::SchemaBound) => {
                "raise --device-series-max and --device-schemas-max of the gateway"
            }
            Some(Code::Authentication) => "check that --key-file is the gateway's fleet key",
            _ => "see the gateway's log",
        };
        let lasts = [Code::TooLarge as u8, Code::SchemaBound as u8].contains(&code);
        let is_final = lasts || Class::of(code) == Class::Operator;
        if self.was_welcomed && !lasts || !is_final {
            return Ok(());
        }
        Err(FleetError::Refused {
            device: self.outbox.script.name().to_owned(),
            code,
            name: name_of(code),
            advice,
        })
    }

    /// Returns the least and the most by which the gateway's clock is ahead of the fleet's. The gateway's clock
    /// showed `utc_us` at some time between the device's request and now.
    fn ahead_us(&self, utc_us: i64, asked_us: Option<u64>) -> (i64, i64) {
        let ahead_us = |run_us: u64| utc_us - self.fleet.started_utc_us - run_us as i64;
        let least_us = ahead_us(self.fleet.now_us());
        (least_us, asked_us.map_or(least_us, ahead_us))
    }

    /// Records a WELCOME: the login, the durable number, and the gateway's clock. `known_seq` is the durable number
    /// that the gateway reported before.
    fn note_welcome(
        &mut self,
        link: &mut Link,
        utc_us: i64,
        known_seq: u64,
    ) -> Result<(), FleetError> {
        let fleet = Arc::clone(&self.fleet);
        self.was_welcomed = true;
        fleet.counters.devices_ready.fetch_add(1, Relaxed);
        fleet.counters.welcomes.fetch_add(1, Relaxed);
        link.handshake.is_welcomed = true;
        self.note_login(&link.handshake)?;
        let (least_us, most_us) = self.ahead_us(utc_us, link.handshake.auth_us);
        let index = self.outbox.script.index();
        let (durable_seq, deleted_seq) = (self.outbox.durable_seq, self.outbox.deleted_seq);
        let is_failing = durable_seq < known_seq;
        fleet.with_journal(|journal| {
            journal.clock(least_us, most_us);
            if is_failing {
                journal.lost(index, durable_seq + 1, known_seq)?;
            }
            journal.acked(index, deleted_seq)
        })?;
        if is_failing {
            fleet.report().frames_lost += known_seq - durable_seq;
            let name = self.outbox.script.name();
            fleet.counters.noted().note(
                "LOST: the gateway lost frames that it had acknowledged",
                format!("{name}: frames {} to {known_seq}", durable_seq + 1),
            );
        }
        Ok(())
    }

    /// Returns the device's own clock: microseconds since its boot.
    fn uptime_us(&self) -> u64 {
        self.uptime_at_start_us + self.fleet.now_us()
    }

    async fn connect_and_serve(
        &mut self,
        device: &mut Device<'_>,
        is_again: bool,
    ) -> Result<Ended, FleetError> {
        self.was_heard = false;
        let index = self.outbox.script.index();
        let connecting = connect(&self.fleet.terms, index, self.outbox.script.name());
        let connected = timeout(CONNECT_TIMEOUT, connecting).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let Connected {
            socket,
            binding,
            from,
        } = match connected {
            Ok(connected) => connected,
            Err(error) => return Ok(error.into()),
        };
        if is_again {
            self.fleet.report().reconnects += 1;
        }
        self.outbox.advance(self.fleet.now_us());
        let utc_us = match self.fleet.script.plan().clock {
            Clock::Utc => utc_us(),
            Clock::Boot => 0,
        };
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).expect("the system has random numbers");
        device.connect(nonce, binding, self.uptime_us(), utc_us);
        let mut link = Link::new(socket, from, self.fleet.now_us());
        let ended = self.serve(device, &mut link).await;
        if !link.handshake.is_welcomed {
            self.note_login(&link.handshake)?;
        }
        if device.is_ready() {
            self.fleet.counters.devices_ready.fetch_sub(1, Relaxed);
        }
        if let Ok(Ended::Abandoned) = ended {
            self.abandoned.push_back(link.socket);
            if self.abandoned.len() > ABANDONED_MAX {
                self.abandoned.pop_front();
            }
        }
        ended
    }

    async fn serve(
        &mut self,
        device: &mut Device<'_>,
        link: &mut Link,
    ) -> Result<Ended, FleetError> {
        let fleet = Arc::clone(&self.fleet);
        loop {
            let next_due_us = self.outbox.advance(fleet.now_us());
            if let Some(ended) = self.transmit(device, link).await? {
                return Ok(ended);
            }
            if device.is_ready() && self.outbox.is_done() {
                link.leave().await;
                return Ok(Ended::Done);
            }
            let storm_us = fleet.storm_us(self.storms + 1);
            let deadline_us = device
                .poll_deadline()
                .map(|deadline_us| deadline_us.saturating_sub(self.uptime_at_start_us));
            let wake_us = [next_due_us, deadline_us, storm_us]
                .into_iter()
                .flatten()
                .min();
            link.rest();
            tokio::select! {
                ready = link.socket.ready(Interest::READABLE) => {
                    if let Err(error) = ready.and_then(|_| link.read()) {
                        return Ok(error.into());
                    }
                    if let Err(fault) = self.receive(device, link)? {
                        return Ok(fault.into());
                    }
                }
                () = sleep_until(fleet.instant(wake_us.unwrap_or(u64::MAX))) => {
                    if storm_us.is_some_and(|storm_us| fleet.now_us() >= storm_us) {
                        self.storms += 1;
                        return Ok(Ended::Dropped);
                    }
                    if let Err(fault) = device.handle_timeout(self.uptime_us()) {
                        return Ok(fault.into());
                    }
                }
                () = fleet.stop.cancelled(), if !self.is_stopping => self.is_stopping = true,
            }
        }
    }

    /// Sends the pending output with the selected faults; returns whether a fault ended the
    /// connection.
    async fn transmit(
        &mut self,
        device: &mut Device<'_>,
        link: &mut Link,
    ) -> Result<Option<Ended>, FleetError> {
        loop {
            let start = link.output.len();
            let uptime_us = self.uptime_us();
            let written = link.append(|buffer| {
                device
                    .poll_transmit(&mut self.outbox, uptime_us, buffer)
                    .ok_or(NoRoom)
            });
            if written.is_err() {
                break;
            }
            match link.output[start + 2] {
                types::AUTH => link.handshake.auth_us = Some(self.fleet.now_us()),
                types::PING => link.ping_us = Some(self.fleet.now_us()),
                _ => {}
            }
            // Malformed frames may have other types.
            if types::is_sequenced(link.output[start + 2])
                && let Some(strikes) = self.note_sent(&link.output[start..])?
            {
                let frame = link.output.split_off(start);
                match self.send_struck(link, frame, strikes).await {
                    Ok(None) => {}
                    Ok(Some(ended)) => return Ok(Some(ended)),
                    Err(error) => return Ok(Some(error.into())),
                }
            }
            if link.output.len() >= WRITE_BYTES
                && let Err(error) = link.flush().await
            {
                return Ok(Some(error.into()));
            }
        }
        Ok(link.flush().await.err().map(Ended::from))
    }

    /// Records a sequenced frame before it is sent, because its ACK may follow immediately; returns
    /// its faults.
    fn note_sent(&mut self, frame: &[u8]) -> Result<Option<Strikes>, FleetError> {
        let seq = u64::from_le_bytes(frame[6..14].try_into().expect("8 bytes"));
        let index = self.outbox.script.index();
        self.fleet
            .with_journal(|journal| journal.sent(index, seq))?;
        let seed = self.fleet.script.plan().seed;
        let strikes = self
            .fleet
            .terms
            .faults
            .on_attempt(seed, index, seq, self.attempts);
        self.attempts = self.attempts.wrapping_add(1);
        if strikes.corrupt {
            let bit = damaged_bit(frame, strikes) as u32;
            self.fleet
                .with_journal(|journal| journal.damaged(index, seq, bit))?;
        }
        Ok(strikes.any().then_some(strikes))
    }

    /// Records a connection on which the gateway may have accepted the login.
    fn note_login(&self, handshake: &Handshake) -> Result<(), FleetError> {
        if handshake.auth_us.is_none() {
            return Ok(());
        }
        let login = Login {
            took_us: self.fleet.now_us() - handshake.hello_us,
            from: handshake.from,
            welcomed: handshake.is_welcomed,
        };
        let index = self.outbox.script.index();
        self.fleet
            .with_journal(|journal| journal.login(index, login))
    }

    async fn send_struck(
        &mut self,
        link: &mut Link,
        mut frame: BytesMut,
        strikes: Strikes,
    ) -> io::Result<Option<Ended>> {
        if strikes.corrupt {
            let bit = damaged_bit(&frame, strikes);
            frame[HEADER_BYTES + bit / 8] ^= 1 << (bit % 8);
        }
        link.flush().await?;
        if strikes.abandon {
            let cut = 1 + strikes.bits as usize % (frame.len() - 1);
            link.socket.write_all(&frame[..cut]).await?;
            return Ok(Some(Ended::Abandoned));
        }
        if strikes.slow {
            for byte in frame.iter() {
                link.socket.write_all(std::slice::from_ref(byte)).await?;
                yield_now().await;
            }
        } else {
            link.output.extend_from_slice(&frame);
        }
        if strikes.duplicate && self.outbox.durable_seq > 0 {
            // Resend a frame that was acknowledged.
            let again = |buffer: &mut [u8]| self.outbox.make(self.outbox.durable_seq, buffer);
            let made = link.append(|buffer| again(buffer).map(|(frame_bytes, _)| frame_bytes));
            self.outbox.note_bytes(made.unwrap_or(0));
        }
        link.flush().await?;
        Ok(strikes.disconnect.then_some(Ended::Dropped))
    }

    /// Processes the received frames.
    fn receive(
        &mut self,
        device: &mut Device<'_>,
        link: &mut Link,
    ) -> Result<Result<(), Fault>, FleetError> {
        let index = self.outbox.script.index();
        loop {
            let frame = match frame::decode(&link.input, DEFAULT_FRAME_BYTES_MAX) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Ok(())),
                Err(_) => {
                    return Ok(Err(Fault::Protocol(
                        "not an FWP frame; is this a TLS port?",
                    )));
                }
            };
            self.was_heard = true;
            let uptime_us = self.uptime_us();
            let known_seq = self.outbox.durable_seq;
            let frame_bytes = frame.bytes.len();
            let notice = match device.handle_frame(&frame, &mut self.outbox, uptime_us) {
                Ok(notice) => notice,
                Err(fault) => return Ok(Err(fault)),
            };
            link.input.advance(frame_bytes);
            match notice {
                Some(Notice::Acked { .. }) => {
                    let deleted_seq = self.outbox.deleted_seq;
                    self.fleet
                        .with_journal(|journal| journal.acked(index, deleted_seq))?;
                }
                Some(Notice::Welcomed { utc_us }) => self.note_welcome(link, utc_us, known_seq)?,
                Some(Notice::Refused { seq, code }) => {
                    self.fleet.report().refused(code);
                    if Class::of(code) == Class::RetryLater {
                        let reason = format!("waiting: NACK {code} ({})", name_of(code));
                        let name = self.outbox.script.name();
                        let detail = format!("{name} resends when the gateway asks for it");
                        self.fleet.counters.noted().note(&reason, detail);
                    }
                    if Class::of(code) == Class::Refused {
                        self.fleet
                            .with_journal(|journal| journal.quarantined(index, seq, code))?;
                    }
                }
                Some(Notice::Time { utc_us }) => {
                    let (least_us, most_us) = self.ahead_us(utc_us, link.ping_us);
                    self.fleet.with_journal(|journal| {
                        journal.clock(least_us, most_us);
                        Ok(())
                    })?;
                }
                None => {}
            }
        }
    }
}

/// Returns the bit of a frame's payload that is flipped in transit.
fn damaged_bit(frame: &[u8], strikes: Strikes) -> usize {
    let payload_bits = (frame.len() - HEADER_BYTES - TRAILER_BYTES) * 8;
    strikes.bits as usize % payload_bits
}

pub(super) fn utc_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}

fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}
