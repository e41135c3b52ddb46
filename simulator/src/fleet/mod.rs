//! The fleet on the wire: a task for each device, around the state machine that firmware links.
//!
//! What frames hold is the script's business, when they are due the pace's. A device keeps no queue:
//! frames that must be sent again are made again from the plan.
//!
//! Here is the fleet as a whole; [`device`] is one device's task, [`outbox`] its queue, [`link`] its
//! connection, [`tls`] what that goes through if it is not plain.

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
const HOPELESS_DEVICES: u64 = 3;
/// How long after the last frame the ACKs may take.
pub const SETTLE: Duration = Duration::from_secs(30);

/// How the fleet meets the gateway: all that does not alter what the frames hold.
#[derive(Debug)]
pub struct Terms {
    /// Where the gateway listens.
    pub gateway: SocketAddr,
    /// What devices go through to it; `None` for plain TCP.
    pub tls: Option<FleetTls>,
    /// Device keys derive from it.
    pub fleet_key: [u8; 32],
    /// After this no new frames are made; `None`: when all frames of the script are acked.
    pub duration: Option<Duration>,
    /// Most frames of a device sent and not yet acked.
    pub window_frames: u64,
    /// Devices connect and stay, and have nothing to send.
    pub is_silent: bool,
    /// How often the whole fleet drops its connections, where not as the profile says.
    pub storm_every: Option<Duration>,
    /// What goes wrong on the way.
    pub faults: Faults,
    /// Cancelled, it ends the run without waiting for the last ACKs.
    pub leave: CancellationToken,
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
    /// It listens, and TLS comes to nothing.
    #[error(
        "no TLS with {gateway}: {source}; is that its --tls-listen, and --ca what its certificate leads to?"
    )]
    NoTls {
        /// Where.
        gateway: SocketAddr,
        /// What is wrong.
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
    /// The device has sent something else under this schema's number.
    #[error(
        "the gateway knows other channels of device {0} under this schema's number; \
         give another --name-prefix"
    )]
    Schema(String),
    /// Too many sockets.
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    /// The peer does not hold the fleet key.
    #[error("{0} is not this fleet's gateway: it does not hold the fleet key; check --key-file")]
    NotOurGateway(SocketAddr),
    /// No device gets anywhere, and none will.
    #[error("no device gets through to {gateway}: {reason}; {advice}")]
    Hopeless {
        /// Where.
        gateway: SocketAddr,
        /// What ended the latest attempt.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// A frame would be longer than the protocol allows.
    #[error("frames of {0} samples would be too long: lower --batch or --channels")]
    Frames(u16),
    /// The journal cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Counters that can be read during a run.
#[derive(Debug, Default)]
pub struct Counters {
    /// Readings acked.
    pub readings_acked: AtomicU64,
    /// Frames acked.
    pub frames_acked: AtomicU64,
    /// Frames sent, each counted once.
    pub frames_sent: AtomicU64,
    /// Devices that are connected and welcomed.
    pub devices_ready: AtomicU64,
    /// Times that a device was welcomed.
    pub welcomes: AtomicU64,
    /// Set from outside while what frames wait for their ACKs is not to be in the report.
    pub is_warming_up: AtomicBool,
    notices: Mutex<Notices>,
}

impl Counters {
    /// Returns lines that say what devices wait for, if any are due.
    pub fn notices(&self, now: Instant) -> Vec<String> {
        self.noted().take(now)
    }

    fn noted(&self) -> MutexGuard<'_, Notices> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Played {
    /// What was sent and acked.
    pub summary: Summary,
    /// Why it ended early, if it did.
    pub error: Option<FleetError>,
}

/// The file a journal goes to.
type JournalFile = Journal<io::BufWriter<std::fs::File>>;

/// A run under way.
struct Fleet {
    script: Arc<Script>,
    terms: Terms,
    pace: Pace,
    started: Instant,
    /// The time of day then: the fleet's clock, which never steps, is this and the time since.
    started_utc_us: i64,
    /// The schema's number, the same for every device.
    schema: u16,
    declare: Vec<u8>,
    report: Mutex<Report>,
    journal: Option<Mutex<JournalFile>>,
    counters: Arc<Counters>,
    /// Devices that have begun to connect.
    joined: AtomicU64,
    /// Devices of which several attempts in a row failed for a reason that does not pass.
    hopeless: AtomicU64,
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
) -> Result<Played, FleetError> {
    check_frames(&script)?;
    descriptors::raise_for(script.plan().devices)?;
    let gateway = terms.gateway;
    // One connection that says nothing, so that a wrong address or certificate is told at once.
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
        hopeless: AtomicU64::new(0),
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

    /// The instant at which a time of the run is reached.
    fn instant(&self, run_us: u64) -> tokio::time::Instant {
        // A century, where nothing is awaited.
        let wait = Duration::from_micros(run_us.min(3_000_000_000_000_000));
        (self.started + wait).into()
    }

    /// When the fleet drops its connections at once for the `number`-th time, counted from 1.
    fn storm_us(&self, number: u64) -> Option<u64> {
        match self.terms.storm_every {
            Some(every) => Some(number.saturating_mul(every.as_micros() as u64)),
            None => self.pace.storm_us(number),
        }
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
                () = self.terms.leave.cancelled() => return Ok(()),
                _ = tick.tick() => {
                    self.check_hope()?;
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

    /// Fails if no device was ever let in, and all that tried fail for a reason that does not pass.
    fn check_hope(&self) -> Result<(), FleetError> {
        let joined = self.joined.load(Relaxed);
        let is_lost = self.counters.welcomes.load(Relaxed) == 0
            && joined >= HOPELESS_DEVICES.min(self.script.plan().devices.into())
            && self.hopeless.load(Relaxed) >= joined;
        if !is_lost {
            return Ok(());
        }
        let reason = self.report().latest_loss.clone();
        let advice = match self.terms.tls {
            Some(_) => {
                "does the gateway ask for certificates (--identities), and know who signed them?"
            }
            None => "does it speak FWP, and without TLS? With --tls, --gateway is its --tls-listen",
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

/// Whether frames of this size can be sent at all. Later frames differ by a few bytes at most, which
/// the gateway's own, smaller limit leaves room for.
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
        clock: 0,
        boot: 0,
    };
    let mut out = vec![0; FRAME_BYTES_MAX];
    let made = Encoder::default().data_frame(1, terms, readings, |_| {}, &mut out);
    made.map(drop).map_err(|NoRoom| too_long)
}
