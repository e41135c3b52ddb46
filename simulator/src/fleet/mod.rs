//! The fleet's connections: a task for each device, around the protocol state machine that firmware also uses.
//!
//! The script determines the content of frames, and the pace determines when they are due. A device stores no queue:
//! frames to be resent are regenerated from the plan.
//!
//! This file covers the fleet as a whole; [`device`] is one device's task, [`outbox`] its queue, [`link`] its
//! connection, and [`tls`] the transport of connections that are not plain TCP.

mod device;
mod link;
mod notices;
mod outbox;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fieldgate_protocol::column::READINGS_MAX;
use fieldgate_protocol::frame::{FRAME_BYTES_MAX, NoRoom};
use fieldgate_protocol::value::Clock;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::device::DeviceTask;
pub use self::notices::Notices;
pub use self::tls::{FleetTls, TlsError};
use crate::descriptors::{self, TooFew};
use crate::encode::{DataTerms, Encoder};
use crate::faults::Faults;
use crate::journal::{Journal, JournalError};
use crate::pace::Pace;
use crate::plan::{FrameContent, Script};
use crate::readings::Readings;
use crate::report::{Report, Summary};
use crate::wire;

/// At least this number of devices, or all of a smaller fleet, must have failed before the fleet gives up.
const FAILING_DEVICES: u64 = 3;
/// Maximum wait for ACKs after the last frame.
pub const SETTLE: Duration = Duration::from_secs(30);

/// Terms of a run: everything that does not alter the content of the frames.
#[derive(Debug)]
pub struct Terms {
    /// Address of the gateway.
    pub gateway: SocketAddr,
    /// TLS settings; `None` for plain TCP.
    pub tls: Option<FleetTls>,
    /// Fleet key, from which the device keys are derived.
    pub fleet_key: [u8; 32],
    /// Time after which no new frames are generated; `None` to run until all frames of the script are acknowledged.
    pub duration: Option<Duration>,
    /// Maximum number of unacknowledged frames per device.
    pub window_frames: u64,
    /// Whether devices only connect and stay, without anything to send.
    pub is_silent: bool,
    /// Interval at which the whole fleet drops its connections, if different from the profile's.
    pub storm_every: Option<Duration>,
    /// Faults in transit.
    pub faults: Faults,
    /// Ends the run without waiting for the last ACKs when cancelled.
    pub leave: CancellationToken,
}

/// Reason why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Nothing listens at the address.
    #[error(
        "could not connect to {gateway}: {source}; check that `fieldgate serve` is running there"
    )]
    Connect {
        /// Address of the gateway.
        gateway: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
    /// The TLS handshake failed.
    #[error(
        "could not establish TLS with {gateway}: {source}; check that this is its --tls-listen address and that \
    --ca is its CA"
    )]
    NoTls {
        /// Address of the gateway.
        gateway: SocketAddr,
        /// Reason of the failure.
        source: io::Error,
    },
    /// The gateway rejects a device permanently.
    #[error("the gateway rejected device {device}: code {code} ({name}); {advice}")]
    Refused {
        /// Name of the device.
        device: String,
        /// Code of the BYE.
        code: u8,
        /// Name of the code.
        name: &'static str,
        /// Advice for the user.
        advice: &'static str,
    },
    /// The device declared a different schema under this number before.
    #[error(
        "the gateway has a conflicting schema for device {0}; \
        choose another --name-prefix"
    )]
    Schema(String),
    /// The fleet needs more sockets than the limit on open files allows.
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    /// The peer does not have the fleet key.
    #[error("{0} does not have this fleet's key; check --key-file and --gateway")]
    NotOurGateway(SocketAddr),
    /// No device could connect, and none will.
    #[error("no device could connect to {gateway}: {reason}; {advice}")]
    Hopeless {
        /// Address of the gateway.
        gateway: SocketAddr,
        /// Reason why the latest attempt failed.
        reason: String,
        /// Advice for the user.
        advice: &'static str,
    },
    /// A frame would exceed the protocol's limit.
    #[error("frames of {0} samples would be too long; lower --batch or --channels")]
    Frames(u16),
    /// The journal could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Counters that can be read during a run.
#[derive(Debug, Default)]
pub struct Counters {
    /// Acknowledged readings.
    pub readings_acked: AtomicU64,
    /// Acknowledged frames.
    pub frames_acked: AtomicU64,
    /// Frames sent, each counted once.
    pub frames_sent: AtomicU64,
    /// Devices that are connected and welcomed.
    pub devices_ready: AtomicU64,
    /// Number of WELCOMEs received.
    pub welcomes: AtomicU64,
    /// Set by the caller while ACK latencies are to be left out of the report.
    pub is_warming_up: AtomicBool,
    notices: Mutex<Notices>,
}

impl Counters {
    /// Returns due messages about what devices are waiting for.
    pub fn notices(&self, now: Instant) -> Vec<String> {
        self.noted().take(now)
    }

    fn noted(&self) -> MutexGuard<'_, Notices> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Result of a run.
#[derive(Debug)]
pub struct Played {
    /// Statistics of what was sent and acknowledged.
    pub summary: Summary,
    /// Reason why it ended early, if it did.
    pub error: Option<FleetError>,
}

type JournalFile = Journal<io::BufWriter<std::fs::File>>;

struct Fleet {
    script: Arc<Script>,
    terms: Terms,
    pace: Pace,
    started: Instant,
    /// Time of day at the start. The fleet's clock is this plus the time since, and never steps.
    started_utc_us: i64,
    /// Schema number, the same for every device.
    schema: u16,
    declare: Vec<u8>,
    report: Mutex<Report>,
    journal: Option<Mutex<JournalFile>>,
    counters: Arc<Counters>,
    /// Devices that have begun to connect.
    joined: AtomicU64,
    /// Devices of which several consecutive attempts failed for a permanent reason.
    failing: AtomicU64,
    /// No new frames are generated once this is cancelled.
    stop: CancellationToken,
}

/// Runs the script against the gateway until it is done, `stop` is cancelled, or no device can connect.
pub async fn run(
    script: Arc<Script>,
    terms: Terms,
    journal: Option<JournalFile>,
    counters: Arc<Counters>,
    stop: CancellationToken,
) -> Result<Played, FleetError> {
    check_frames(&script)?;
    descriptors::raise_for(script.plan().devices)?;
    let gateway = terms.gateway;
    // Connect once without sending anything, to report a wrong address or certificate immediately.
    let connected = link::connect(&terms, 0, script.device(0).name()).await;
    connected.map_err(|source| match (&terms.tls, source.kind()) {
        (
            Some(_),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::Other,
        ) => FleetError::NoTls { gateway, source },
        _ => FleetError::Connect { gateway, source },
    })?;
    let duration_us = terms
        .duration
        .map_or(u64::MAX, |duration| duration.as_micros() as u64);
    let schema = wire::schema_number(script.channels());
    let declare = wire::declare_frame(script.channels(), schema);
    let (started, started_utc_us) = (Instant::now(), device::utc_us());
    let mut journal = journal;
    if let Some(journal) = &mut journal {
        journal.started(started_utc_us);
    }
    let fleet = Arc::new(Fleet {
        pace: Pace::new(script.plan(), duration_us),
        report: Mutex::new(Report::new(script.plan().devices)),
        journal: journal.map(Mutex::new),
        started,
        started_utc_us,
        script,
        terms,
        schema,
        declare,
        counters,
        joined: AtomicU64::new(0),
        failing: AtomicU64::new(0),
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
    let completed = journal.map_or(Ok(()), |journal| {
        let journal = journal.into_inner().unwrap_or_else(PoisonError::into_inner);
        journal.complete(elapsed.as_micros() as u64).map(drop)
    });
    let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Played {
        summary: report.summary(elapsed),
        error: ended.and(completed.map_err(FleetError::from)).err(),
    })
}

impl Fleet {
    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Returns the instant of a time of the run.
    fn instant(&self, run_us: u64) -> tokio::time::Instant {
        // At most about a century, for times that are never reached.
        let wait = Duration::from_micros(run_us.min(3_000_000_000_000_000));
        (self.started + wait).into()
    }

    /// Returns when the fleet drops its connections for the `number`-th time, counted from 1.
    fn storm_us(&self, number: u64) -> Option<u64> {
        match self.terms.storm_every {
            Some(every) => Some(number.saturating_mul(every.as_micros() as u64)),
            None => self.pace.storm_us(number),
        }
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the journal regularly and ends the run on time.
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
                () = self.terms.leave.cancelled() => return Ok(()),
                _ = tick.tick() => {
                    self.check_failing()?;
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

    /// Fails if no device was ever welcomed and every attempt fails for a permanent reason.
    fn check_failing(&self) -> Result<(), FleetError> {
        let joined = self.joined.load(Relaxed);
        let is_failing = self.counters.welcomes.load(Relaxed) == 0
            && joined >= FAILING_DEVICES.min(self.script.plan().devices.into())
            && self.failing.load(Relaxed) >= joined;
        if !is_failing {
            return Ok(());
        }
        let reason = self.report().latest_loss.clone();
        let advice = match self.terms.tls {
            Some(_) => {
                "if the gateway requires client certificates, give --identities, signed by a CA that it trusts"
            }
            None => {
                "check that this is an FWP port without TLS; with --tls, use the gateway's --tls-listen address"
            }
        };
        Err(FleetError::Hopeless {
            gateway: self.terms.gateway,
            reason,
            advice,
        })
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

/// Fails if frames of this size cannot be sent at all. Later frames differ by a few bytes at most, for which the
/// gateway's own, smaller limit leaves enough space.
fn check_frames(script: &Arc<Script>) -> Result<(), FleetError> {
    let too_long = FleetError::Frames(script.plan().batch);
    let readings = usize::from(script.plan().batch) * script.channels().len();
    if readings > READINGS_MAX {
        return Err(too_long);
    }
    let device = script.device(0);
    let schema = wire::schema_number(script.channels());
    let mut buffer = Readings::default();
    let Some(FrameContent::Readings(readings) | FrameContent::Malformed { readings, .. }) =
        device.frame(1, &mut buffer)
    else {
        return Ok(());
    };
    let terms = DataTerms {
        schema,
        clock: Clock::Boot,
        boot: 0,
    };
    let mut out = vec![0; FRAME_BYTES_MAX];
    let made = Encoder::default().data_frame(1, terms, readings, |_| {}, &mut out);
    made.map(drop).map_err(|NoRoom| too_long)
}
