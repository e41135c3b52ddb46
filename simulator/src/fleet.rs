//! The fleet on the wire: a task for each device, around the state machine that firmware links.
//!
//! What frames hold is the script's business, when they are due the pace's. A device keeps no queue:
//! frames that must be sent again are made again from the plan.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use fieldgate::codec::FrameCodec;
use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, NONCE_BYTES, derive_device_key, schema_hash};
use fieldgate_protocol::column::READINGS_MAX;
use fieldgate_protocol::device::{Config, Device, Fault, Notice, Queue};
use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX, HEADER_BYTES, NoRoom, TRAILER_BYTES, types,
};
use fieldgate_protocol::message;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep_until, timeout};
use tokio_util::codec::Decoder;
use tokio_util::sync::CancellationToken;

use crate::encode::{DataTerms, Encoder};
use crate::faults::{Faults, Strikes};
use crate::journal::{Journal, JournalError};
use crate::pace::Pace;
use crate::plan::{Clock, DeviceScript, FrameContent, Script};
use crate::readings::Readings;
use crate::report::{Report, Summary};

/// The schema's number, of every device.
const SCHEMA: u16 = 1;
const RECONNECT_MIN_MS: u32 = 50;
const RECONNECT_MAX_MS: u32 = 2_000;
const HANDSHAKE_TIMEOUT_MS: u32 = 10_000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that a device has abandoned and still holds open.
const ABANDONED_MAX: usize = 8;
/// What is written to the socket at once.
const WRITE_BYTES: usize = 16 * 1024;
/// How long after the last frame the ACKs may take.
const SETTLE: Duration = Duration::from_secs(30);

/// How the fleet meets the gateway: all that does not alter what the frames hold.
#[derive(Debug)]
pub struct Terms {
    /// Where the gateway listens.
    pub gateway: SocketAddr,
    /// Device keys derive from it.
    pub fleet_key: [u8; 32],
    /// After this no new frames are made; `None`: when all frames of the script are acked.
    pub duration: Option<Duration>,
    /// Most frames of a device sent and not yet acked.
    pub window_frames: u64,
    /// What goes wrong on the way.
    pub faults: Faults,
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Nobody listens.
    #[error("cannot connect to {gateway}: {source}; is `fieldgate serve` running there?")]
    Connect {
        /// Where.
        gateway: SocketAddr,
        /// The system's word.
        source: io::Error,
    },
    /// The gateway refuses a device for good.
    #[error("the gateway refuses device {device}: code {code} ({name}); {advice}")]
    Refused {
        /// Which device.
        device: String,
        /// The BYE's code.
        code: u8,
        /// What it stands for.
        name: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The peer does not hold the fleet key.
    #[error("{0} is not this fleet's gateway: it does not hold the fleet key; check --key-file")]
    NotOurGateway(SocketAddr),
    /// A frame would be longer than the protocol allows.
    #[error("frames of {0} samples would be too long: lower --batch or --channels")]
    Frames(u16),
    /// The journal cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Counters that the progress bar reads.
#[derive(Debug, Default)]
pub struct Counters {
    /// Readings acked.
    pub readings_acked: AtomicU64,
    /// Frames acked.
    pub frames_acked: AtomicU64,
    /// Devices that are connected and welcomed.
    pub devices_ready: AtomicU64,
}

/// The file a journal goes to.
type JournalFile = Journal<io::BufWriter<std::fs::File>>;

/// A run under way.
struct Fleet {
    script: Arc<Script>,
    terms: Terms,
    pace: Pace,
    started: Instant,
    declare: Vec<u8>,
    report: Mutex<Report>,
    journal: Option<Mutex<JournalFile>>,
    counters: Arc<Counters>,
    /// No new frames are made once this is cancelled.
    stop: CancellationToken,
}

/// Plays the script against the gateway until it is done, `stop` is cancelled, or nothing can work.
pub async fn run(
    script: Arc<Script>,
    terms: Terms,
    journal: Option<JournalFile>,
    counters: Arc<Counters>,
    stop: CancellationToken,
) -> Result<Summary, FleetError> {
    check_frames(&script)?;
    let gateway = terms.gateway;
    // One connection that says nothing, so that a wrong address is told at once.
    TcpStream::connect(gateway)
        .await
        .map_err(|source| FleetError::Connect { gateway, source })?;
    let duration_us = terms
        .duration
        .map_or(u64::MAX, |duration| duration.as_micros() as u64);
    let declare = declare_frame(&script);
    let fleet = Arc::new(Fleet {
        pace: Pace::new(script.plan(), duration_us),
        report: Mutex::new(Report::new(script.plan().devices)),
        journal: journal.map(Mutex::new),
        started: Instant::now(),
        script,
        terms,
        declare,
        counters,
        stop,
    });
    let mut devices = JoinSet::new();
    for index in 0..fleet.script.plan().devices {
        devices.spawn(DeviceTask::new(Arc::clone(&fleet), index).run());
    }
    let ended = fleet.watch(&mut devices).await;
    devices.shutdown().await;
    let elapsed = fleet.started.elapsed();
    let Fleet {
        report, journal, ..
    } = Arc::into_inner(fleet).expect("every device has ended");
    if let Some(journal) = journal {
        let journal = journal.into_inner().unwrap_or_else(PoisonError::into_inner);
        journal.complete(elapsed.as_micros() as u64)?;
    }
    ended?;
    let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(report.summary(elapsed))
}

impl Fleet {
    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// The instant at which a time of the run is reached.
    fn instant(&self, run_us: u64) -> tokio::time::Instant {
        // A century, where nothing is awaited.
        let wait = Duration::from_micros(run_us.min(3_000_000_000_000_000));
        (self.started + wait).into()
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ticks the journal and ends the run in time.
    async fn watch(&self, devices: &mut JoinSet<Result<(), FleetError>>) -> Result<(), FleetError> {
        let mut tick = tokio::time::interval(Duration::from_millis(250));
        let mut settle_until = None;
        loop {
            tokio::select! {
                ended = devices.join_next() => match ended {
                    None => return Ok(()),
                    Some(Ok(ended)) => ended?,
                    Some(Err(panicked)) => std::panic::resume_unwind(panicked.into_panic()),
                },
                _ = tick.tick() => {
                    self.with_journal(|journal| journal.tick(self.now_us()).map(drop))?;
                    let is_over = self.terms.duration
                        .is_some_and(|duration| self.started.elapsed() >= duration);
                    if is_over {
                        self.stop.cancel();
                    }
                    if self.stop.is_cancelled() {
                        let until = *settle_until.get_or_insert(Instant::now() + SETTLE);
                        if Instant::now() >= until {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    fn with_journal(
        &self,
        write: impl FnOnce(&mut JournalFile) -> Result<(), JournalError>,
    ) -> Result<(), FleetError> {
        match &self.journal {
            Some(journal) => {
                let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(write(&mut journal)?)
            }
            None => Ok(()),
        }
    }
}

/// Whether frames of this size can be sent at all. Later frames differ by a few bytes at most, which
/// the gateway's own, smaller limit leaves room for.
fn check_frames(script: &Arc<Script>) -> Result<(), FleetError> {
    let too_long = FleetError::Frames(script.plan().batch);
    let readings = usize::from(script.plan().batch) * script.channels().len();
    if readings > READINGS_MAX {
        return Err(too_long);
    }
    let device = script.device(0);
    let mut buffer = Readings::default();
    let Some(FrameContent::Readings(readings) | FrameContent::Malformed { readings, .. }) =
        device.frame(1, &mut buffer)
    else {
        return Ok(());
    };
    let terms = DataTerms {
        schema: SCHEMA,
        clock: 0,
        boot: 0,
    };
    let mut out = vec![0; FRAME_BYTES_MAX];
    let made = Encoder::default().data_frame(1, terms, readings, None, &mut out);
    made.map(drop).map_err(|NoRoom| too_long)
}

/// The DECLARE that every device of the fleet sends.
fn declare_frame(script: &Script) -> Vec<u8> {
    let channels = script
        .channels()
        .iter()
        .enumerate()
        .map(|(i, channel)| message::Channel {
            id: i as u8 + 1,
            name: &channel.name,
            unit: &channel.unit,
            kind: channel.kind as u8,
            exp10: channel.exp10,
        });
    let declare = message::Declare {
        schema: SCHEMA,
        channels: channels.collect(),
        ext: &[],
    };
    let mut frame = vec![0; DEFAULT_FRAME_BYTES_MAX];
    let frame_bytes = message::encode(&declare, 0, &mut frame)
        .expect("32 channels with names and units of at most 48 bytes fit a frame");
    frame.truncate(frame_bytes);
    frame
}

thread_local! {
    /// Buffers for making a frame; a device needs them only for that long.
    static WORKBENCH: std::cell::RefCell<(Encoder, Readings)> = std::cell::RefCell::default();
}

/// A device's queue, made again from the script whenever it is looked at.
struct Outbox {
    fleet: Arc<Fleet>,
    script: DeviceScript,
    durable_seq: u64,
    /// The last frame that is due.
    due_seq: u64,
    /// The last frame that was sent, on any connection.
    sent_seq: u64,
    /// For each frame sent and not yet acked: its number, since when it is waited for, its readings.
    in_flight: VecDeque<(u64, u64, u64)>,
}

impl Outbox {
    /// Moves `due_seq` on; returns when the next frame will be due.
    fn advance(&mut self, now_us: u64) -> Option<u64> {
        let last = self.fleet.script.frames().unwrap_or(u64::MAX);
        // A device in a burst always has more than its window lets out.
        let ahead = self.sent_seq + self.fleet.terms.window_frames + 1;
        while self.due_seq < last.min(ahead) && !self.fleet.stop.is_cancelled() {
            let due_us = self
                .fleet
                .pace
                .due_us(self.script.index(), self.due_seq + 1);
            if due_us > now_us {
                return Some(due_us);
            }
            self.due_seq += 1;
        }
        None
    }

    /// Whether all that will ever be due is acked.
    fn is_done(&self) -> bool {
        let last = self.fleet.script.frames().unwrap_or(u64::MAX);
        let end = if self.fleet.stop.is_cancelled() {
            self.sent_seq
        } else {
            last
        };
        self.durable_seq >= end
    }

    fn terms(&self) -> DataTerms {
        let clock = match self.fleet.script.plan().clock {
            Clock::Boot => 0,
            Clock::Utc => 1,
        };
        DataTerms {
            schema: SCHEMA,
            clock,
            boot: self.script.boot(),
        }
    }

    /// Writes frame `seq`; returns its length and how many readings are to be stored of it.
    fn make(&self, seq: u64, out: &mut [u8]) -> Result<(usize, u64), NoRoom> {
        WORKBENCH.with_borrow_mut(|(encoder, readings)| {
            let content = self.script.frame(seq, readings).ok_or(NoRoom)?;
            let (readings, malformed) = match content {
                FrameContent::Readings(readings) => (readings, None),
                FrameContent::Malformed { variant, readings } => (readings, Some(variant)),
            };
            let count = if malformed.is_some() {
                0
            } else {
                readings.count()
            };
            let bytes = encoder.data_frame(seq, self.terms(), readings, malformed, out)?;
            Ok((bytes, count))
        })
    }
}

impl Queue for Outbox {
    fn oldest_seq(&self) -> u64 {
        self.durable_seq + 1
    }

    fn next_seq(&self) -> u64 {
        self.due_seq + 1
    }

    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let (bytes, readings) = self.make(seq, out)?;
        if seq > self.sent_seq {
            self.sent_seq = seq;
            let now_us = self.fleet.now_us();
            // A frame waits from when it was due, not from when the device got round to it; in a burst
            // everything is due from the start, and what counts is how long the gateway takes.
            let due_us = self.fleet.pace.due_us(self.script.index(), seq);
            let since_us = if self.fleet.pace.is_open_loop() {
                due_us
            } else {
                now_us
            };
            self.in_flight
                .push_back((seq, since_us.min(now_us), readings));
        }
        let mut report = self.fleet.report();
        report.frames_sent += 1;
        report.readings_sent += readings;
        report.bytes_sent += bytes as u64;
        Ok(bytes)
    }

    fn write_declare(&mut self, _seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let declare = &self.fleet.declare;
        out.get_mut(..declare.len())
            .ok_or(NoRoom)?
            .copy_from_slice(declare);
        self.fleet.report().bytes_sent += declare.len() as u64;
        Ok(declare.len())
    }

    fn delete_through(&mut self, seq: u64) {
        self.durable_seq = seq;
        let now_us = self.fleet.now_us();
        let (mut frames, mut acked) = (0, 0);
        let mut report = self.fleet.report();
        while let Some((_, since_us, readings)) = self
            .in_flight
            .pop_front_if(|(in_flight, ..)| *in_flight <= seq)
        {
            report.waited(Duration::from_micros(now_us.saturating_sub(since_us)));
            frames += 1;
            acked += readings;
        }
        report.frames_acked += frames;
        report.readings_acked += acked;
        drop(report);
        self.fleet.counters.frames_acked.fetch_add(frames, Relaxed);
        self.fleet.counters.readings_acked.fetch_add(acked, Relaxed);
    }
}

/// How a connection ended.
enum Ended {
    /// All is acked.
    Done,
    /// Something went wrong: connect again after a while.
    Lost(Option<Fault>),
    /// The device dropped the connection on purpose: connect again at once.
    Dropped,
    /// The device leaves the connection open and never speaks on it again: connect again at once.
    Abandoned,
}

struct DeviceTask {
    fleet: Arc<Fleet>,
    outbox: Outbox,
    /// The device's own clock when the run began.
    uptime_at_start_us: u64,
    /// Frames sent, for the faults to be drawn anew.
    attempts: u32,
    abandoned: VecDeque<TcpStream>,
    storms: u64,
    was_welcomed: bool,
    /// Whether the end of the run has been noticed.
    is_stopping: bool,
}

impl DeviceTask {
    fn new(fleet: Arc<Fleet>, index: u32) -> DeviceTask {
        let script = fleet.script.device(index);
        let uptime_at_start_us = script.uptime_us(utc_us()).max(0) as u64;
        let outbox = Outbox {
            script,
            fleet: Arc::clone(&fleet),
            durable_seq: 0,
            due_seq: 0,
            sent_seq: 0,
            in_flight: VecDeque::new(),
        };
        DeviceTask {
            fleet,
            outbox,
            uptime_at_start_us,
            attempts: 0,
            abandoned: VecDeque::new(),
            storms: 0,
            was_welcomed: false,
            is_stopping: false,
        }
    }

    async fn run(mut self) -> Result<(), FleetError> {
        let fleet = Arc::clone(&self.fleet);
        let name = self.outbox.script.name().to_owned();
        let declare = &fleet.declare;
        let mut device = Device::new(Config {
            name: &name,
            key: derive_device_key(&fleet.terms.fleet_key, &name),
            firmware: concat!("fieldgate-sim ", env!("CARGO_PKG_VERSION")),
            stream: self.outbox.script.stream(),
            boot: self.outbox.script.boot(),
            schema: SCHEMA,
            schema_hash: schema_hash(&declare[HEADER_BYTES..declare.len() - TRAILER_BYTES]),
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
        let mut is_again = false;
        while !self.outbox.is_done() {
            let fault = match self.connect_and_serve(&mut device, is_again).await? {
                Ended::Done => break,
                Ended::Dropped | Ended::Abandoned => {
                    device.disconnect(None, self.uptime_us(), 0);
                    is_again = true;
                    continue;
                }
                Ended::Lost(fault) => fault,
            };
            self.check_refusal(fault)?;
            let again_us = device.disconnect(fault, self.uptime_us(), random());
            sleep_until(fleet.instant(again_us - self.uptime_at_start_us)).await;
            is_again = true;
        }
        Ok(())
    }

    /// A refusal that waiting cannot mend ends the run, if the device never got in.
    fn check_refusal(&self, fault: Option<Fault>) -> Result<(), FleetError> {
        let code = match fault {
            Some(Fault::NotOurGateway) => {
                return Err(FleetError::NotOurGateway(self.fleet.terms.gateway));
            }
            Some(Fault::FrameTooLong) => Code::TooLarge as u8,
            Some(Fault::Bye { code, .. }) => code,
            _ => return Ok(()),
        };
        let advice = match Code::from_wire(code) {
            Some(Code::TooLarge) => {
                "its frames are longer than the gateway takes: lower --batch or --channels"
            }
            Some(Code::Authentication) => "is --key-file the gateway's fleet key?",
            _ => "see the gateway's log",
        };
        let is_final = code == Code::TooLarge as u8 || Class::of(code) == Class::Operator;
        if self.was_welcomed && code != Code::TooLarge as u8 || !is_final {
            return Ok(());
        }
        Err(FleetError::Refused {
            device: self.outbox.script.name().to_owned(),
            code,
            name: Code::from_wire(code).map_or("unknown", Code::name),
            advice,
        })
    }

    /// The device's own clock: microseconds since its boot.
    fn uptime_us(&self) -> u64 {
        self.uptime_at_start_us + self.fleet.now_us()
    }

    async fn connect_and_serve(
        &mut self,
        device: &mut Device<'_>,
        is_again: bool,
    ) -> Result<Ended, FleetError> {
        let connecting = timeout(
            CONNECT_TIMEOUT,
            TcpStream::connect(self.fleet.terms.gateway),
        );
        let Ok(Ok(socket)) = connecting.await else {
            return Ok(Ended::Lost(None));
        };
        if is_again {
            self.fleet.report().reconnects += 1;
        }
        // Fails only where the connection is gone already, which the first read tells.
        let _ = socket.set_nodelay(true);
        self.outbox.advance(self.fleet.now_us());
        let utc_us = match self.fleet.script.plan().clock {
            Clock::Utc => utc_us(),
            Clock::Boot => 0,
        };
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).expect("the system has random numbers");
        device.connect(nonce, NO_CHANNEL_BINDING, self.uptime_us(), utc_us);
        let mut link = Link {
            socket,
            input: BytesMut::new(),
            output: BytesMut::new(),
        };
        let ended = self.serve(device, &mut link).await;
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
            match self.transmit(device, link).await? {
                Transmitted::All => {}
                Transmitted::Ended(ended) => return Ok(ended),
            }
            if device.is_ready() && self.outbox.is_done() {
                link.leave().await;
                return Ok(Ended::Done);
            }
            let storm_us = fleet.pace.storm_us(self.storms + 1);
            let deadline_us = device
                .poll_deadline()
                .map(|deadline_us| deadline_us.saturating_sub(self.uptime_at_start_us));
            let wake_us = [next_due_us, deadline_us, storm_us]
                .into_iter()
                .flatten()
                .min();
            link.rest();
            tokio::select! {
                ready = link.socket.readable() => {
                    if ready.is_err() || !link.read() {
                        return Ok(Ended::Lost(None));
                    }
                    if let Err(fault) = self.receive(device, link)? {
                        return Ok(Ended::Lost(Some(fault)));
                    }
                }
                () = sleep_until(fleet.instant(wake_us.unwrap_or(u64::MAX))) => {
                    if storm_us.is_some_and(|storm_us| fleet.now_us() >= storm_us) {
                        self.storms += 1;
                        return Ok(Ended::Dropped);
                    }
                    if let Err(fault) = device.handle_timeout(self.uptime_us()) {
                        return Ok(Ended::Lost(Some(fault)));
                    }
                }
                () = fleet.stop.cancelled(), if !self.is_stopping => self.is_stopping = true,
            }
        }
    }

    /// Sends what the device has to send, with the faults that strike.
    async fn transmit(
        &mut self,
        device: &mut Device<'_>,
        link: &mut Link,
    ) -> Result<Transmitted, FleetError> {
        const LOST: Transmitted = Transmitted::Ended(Ended::Lost(None));
        loop {
            let start = link.output.len();
            link.output.resize(start + FRAME_BYTES_MAX, 0);
            let (uptime_us, room) = (self.uptime_us(), &mut link.output[start..]);
            let written = device.poll_transmit(&mut self.outbox, uptime_us, room);
            link.output.truncate(start + written.unwrap_or(0));
            let Some(_) = written else {
                break;
            };
            if link.output[start + 2] == types::DATA
                && let Some(strikes) = self.note_data(&link.output[start..])?
            {
                let frame = link.output.split_off(start);
                match self.send_struck(link, frame, strikes).await {
                    Ok(None) => {}
                    Ok(Some(ended)) => return Ok(Transmitted::Ended(ended)),
                    Err(_) => return Ok(LOST),
                }
            }
            if link.output.len() >= WRITE_BYTES && link.flush().await.is_err() {
                return Ok(LOST);
            }
        }
        Ok(if link.flush().await.is_ok() {
            Transmitted::All
        } else {
            LOST
        })
    }

    /// Notes a DATA frame before it leaves, for its ACK may follow at once; tells the faults that
    /// strike it.
    fn note_data(&mut self, frame: &[u8]) -> Result<Option<Strikes>, FleetError> {
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
        Ok(strikes.any().then_some(strikes))
    }

    async fn send_struck(
        &mut self,
        link: &mut Link,
        mut frame: BytesMut,
        strikes: Strikes,
    ) -> io::Result<Option<Ended>> {
        if strikes.corrupt {
            let payload_bits = (frame.len() - HEADER_BYTES - TRAILER_BYTES) * 8;
            let bit = strikes.bits as usize % payload_bits;
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
            // A frame that was acked, sent again.
            let start = link.output.len();
            link.output.resize(start + FRAME_BYTES_MAX, 0);
            let made = self
                .outbox
                .make(self.outbox.durable_seq, &mut link.output[start..]);
            let frame_bytes = made.map_or(0, |(frame_bytes, _)| frame_bytes);
            link.output.truncate(start + frame_bytes);
            self.fleet.report().bytes_sent += frame_bytes as u64;
        }
        link.flush().await?;
        Ok(strikes.disconnect.then_some(Ended::Dropped))
    }

    /// Takes in what the gateway said.
    fn receive(
        &mut self,
        device: &mut Device<'_>,
        link: &mut Link,
    ) -> Result<Result<(), Fault>, FleetError> {
        let index = self.outbox.script.index();
        let mut codec = FrameCodec {
            frame_bytes_max: DEFAULT_FRAME_BYTES_MAX,
        };
        loop {
            let frame = match codec.decode(&mut link.input) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Ok(())),
                Err(_) => return Ok(Err(Fault::Protocol("not a frame"))),
            };
            let uptime_us = self.uptime_us();
            let notice = match device.handle_frame(&frame.frame(), &mut self.outbox, uptime_us) {
                Ok(notice) => notice,
                Err(fault) => return Ok(Err(fault)),
            };
            match notice {
                Some(Notice::Acked { through_seq }) => {
                    self.fleet
                        .with_journal(|journal| journal.acked(index, through_seq))?;
                }
                Some(Notice::Welcomed { .. }) => {
                    self.was_welcomed = true;
                    self.fleet.counters.devices_ready.fetch_add(1, Relaxed);
                    let durable_seq = self.outbox.durable_seq;
                    self.fleet
                        .with_journal(|journal| journal.acked(index, durable_seq))?;
                }
                Some(Notice::Refused { seq, code }) => {
                    self.fleet.report().refused(code);
                    if Class::of(code) == Class::Refused {
                        self.fleet
                            .with_journal(|journal| journal.quarantined(index, seq, code))?;
                    }
                }
                Some(Notice::Time { .. }) | None => {}
            }
        }
    }
}

enum Transmitted {
    All,
    Ended(Ended),
}

/// A connection's socket and what is on its way in and out.
struct Link {
    socket: TcpStream,
    input: BytesMut,
    output: BytesMut,
}

impl Link {
    async fn flush(&mut self) -> io::Result<()> {
        if !self.output.is_empty() {
            self.socket.write_all(&self.output).await?;
            self.output.clear();
        }
        Ok(())
    }

    /// Reads what is there; tells whether the connection still stands.
    fn read(&mut self) -> bool {
        self.input.reserve(1024);
        match self.socket.try_read_buf(&mut self.input) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Gives memory back before a wait: a fleet is large, and most of it is idle.
    fn rest(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        self.output = BytesMut::new();
    }

    /// Says goodbye.
    async fn leave(&mut self) {
        let bye = message::Bye {
            code: 0,
            retry_after_ms: 0,
            min_version: 0,
            max_version: 0,
            detail: "done",
            ext: &[],
        };
        let mut frame = [0; 64];
        if let Ok(frame_bytes) = message::encode(&bye, 0, &mut frame) {
            // The gateway may be gone by now, and all is acked.
            let _ = self.socket.write_all(&frame[..frame_bytes]).await;
        }
        let _ = self.socket.shutdown().await;
    }
}

fn utc_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}

fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}
