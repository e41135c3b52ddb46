//! A running fleet, and what can be observed of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::baseline::NAME_PREFIX;
use super::gateway::Gateway;
use super::workload::Workload;
use super::{BenchError, machine};
use crate::faults::Faults;
use crate::fleet::{self, Counters, FleetError, Terms};
use crate::plan::{self, Clock, Plan, Profile};
use crate::report::Summary;

/// Age of the first readings of a burst, as after a long outage.
const BACKLOG_US: i64 = 30 * 86_400_000_000;
/// Maximum time to wait for any condition.
const PATIENCE: Duration = Duration::from_secs(90);
/// Interval at which the fleet's counters are read.
const LOOK: Duration = Duration::from_millis(2);

/// Returns the time of the first sample of a fleet that starts now.
pub(super) fn start_us() -> i64 {
    jiff::Timestamp::now().as_microsecond() - BACKLOG_US
}

pub(super) struct Sending {
    pub(super) workload: Workload,
    pub(super) profile: Profile,
    /// Time between two samples of a channel.
    pub(super) interval_us: u64,
    /// Number of frames per device; `None` for as many as time allows.
    pub(super) frames: Option<u64>,
    pub(super) start_us: i64,
    /// Duration, of which the first half is for joining, in [`Profile::Ramp`].
    pub(super) duration: Option<Duration>,
    pub(super) is_silent: bool,
    pub(super) through_tls: bool,
    pub(super) storm_every: Option<Duration>,
    pub(super) name_prefix: &'static str,
}

impl Sending {
    pub(super) fn burst(workload: Workload) -> Sending {
        Sending {
            workload,
            profile: Profile::Burst,
            interval_us: 1_000_000,
            frames: None,
            start_us: start_us(),
            duration: None,
            is_silent: false,
            through_tls: false,
            storm_every: None,
            name_prefix: NAME_PREFIX,
        }
    }

    fn plan(&self) -> Plan {
        Plan {
            format: plan::FORMAT,
            seed: 1,
            nonce: jiff::Timestamp::now().as_microsecond().unsigned_abs(),
            name_prefix: self.name_prefix.into(),
            devices: self.workload.devices,
            channels: self.workload.channels,
            interval_us: self.interval_us,
            batch: self.workload.samples,
            frames: self.frames,
            clock: Clock::Utc,
            start_us: self.start_us,
            profile: self.profile,
            malformed_billionths: 0,
            replay: None,
        }
    }
}

/// A running fleet, which is stopped on drop.
pub(super) struct Load<'g> {
    gateway: &'g Gateway,
    devices: u64,
    counters: Arc<Counters>,
    stop: CancellationToken,
    fleet: AbortOnDropHandle<Result<Summary, FleetError>>,
}

/// Counters at a moment.
#[derive(Clone, Copy)]
struct Count {
    at: Instant,
    readings: u64,
    frames: u64,
    gateway_cpu_s: f64,
    fleet_cpu_s: f64,
}

/// Results of a measurement under full load, without joining and settling.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) seconds: f64,
    pub(super) readings: f64,
    pub(super) frames: f64,
    pub(super) gateway_cpu_s: f64,
    pub(super) fleet_cpu_s: f64,
}

impl<'g> Load<'g> {
    /// Starts the fleet. ACK latencies are recorded only from [`Load::measure`] on.
    pub(super) fn start(gateway: &'g Gateway, sending: &Sending) -> Result<Load<'g>, BenchError> {
        let (address, tls) = match sending.through_tls {
            true => (gateway.tls_address, Some(gateway.fleet_tls()?)),
            false => (gateway.address, None),
        };
        let terms = Terms {
            gateway: address,
            tls,
            fleet_key: gateway.fleet_key,
            duration: sending.duration,
            window_frames: sending.workload.window_frames.into(),
            is_silent: sending.is_silent,
            storm_every: sending.storm_every,
            faults: Faults::default(),
            leave: CancellationToken::new(),
        };
        let script = Arc::new(sending.plan().open()?);
        let counters = Arc::new(Counters::default());
        counters.is_warming_up.store(true, Relaxed);
        let stop = CancellationToken::new();
        let fleet = fleet::run(script, terms, None, Arc::clone(&counters), stop.clone());
        let fleet = async {
            let played = fleet.await?;
            played.error.map_or(Ok(played.summary), Err)
        };
        Ok(Load {
            gateway,
            devices: sending.workload.devices.into(),
            counters,
            stop,
            fleet: AbortOnDropHandle::new(tokio::spawn(fleet)),
        })
    }

    async fn until(
        &mut self,
        what: &'static str,
        is_so: impl Fn(&Counters) -> bool,
    ) -> Result<(), BenchError> {
        let started = Instant::now();
        while !is_so(&self.counters) {
            if started.elapsed() > PATIENCE {
                return Err(BenchError::TooLong(what));
            }
            self.pass(LOOK).await?;
        }
        Ok(())
    }

    /// Waits until all devices are connected and welcomed.
    pub(super) async fn ready(&mut self) -> Result<(), BenchError> {
        let devices = self.devices;
        let is_ready = move |counters: &Counters| counters.devices_ready.load(Relaxed) == devices;
        self.until("all devices to connect", is_ready).await
    }

    /// Waits until the fleet has sent this many frames and they are acknowledged.
    pub(super) async fn acked(&mut self, frames: u64) -> Result<(), BenchError> {
        let is_acked = move |counters: &Counters| counters.frames_acked.load(Relaxed) >= frames;
        self.until("all frames to be acknowledged", is_acked).await
    }

    /// Waits for the next storm; returns how long it took until all devices were welcomed again.
    pub(super) async fn storm(&mut self) -> Result<Duration, BenchError> {
        self.counters.is_warming_up.store(true, Relaxed);
        let (devices, before) = (self.devices, self.counters.welcomes.load(Relaxed));
        let has_begun = move |counters: &Counters| counters.devices_ready.load(Relaxed) < devices;
        self.until("the storm", has_begun).await?;
        let began = Instant::now();
        let is_over = move |counters: &Counters| {
            let welcomes = counters.welcomes.load(Relaxed) - before;
            welcomes >= devices && counters.devices_ready.load(Relaxed) == devices
        };
        self.until("the end of the storm", is_over).await?;
        Ok(began.elapsed())
    }

    /// Lets time pass, unless the fleet ends.
    pub(super) async fn pass(&mut self, duration: Duration) -> Result<(), BenchError> {
        tokio::select! {
            biased;
            ended = &mut self.fleet => match ended {
                Ok(Err(error)) => Err(error.into()),
                Ok(Ok(_)) => Err(BenchError::TooShort),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            },
            () = sleep(duration) => Ok(()),
        }
    }

    /// Counts for this time and starts to record ACK latencies.
    pub(super) async fn measure(&mut self, duration: Duration) -> Result<Window, BenchError> {
        self.counters.is_warming_up.store(false, Relaxed);
        let before = self.count()?;
        self.pass(duration).await?;
        let after = self.count()?;
        Ok(Window {
            seconds: (after.at - before.at).as_secs_f64(),
            readings: (after.readings - before.readings) as f64,
            frames: (after.frames - before.frames) as f64,
            gateway_cpu_s: after.gateway_cpu_s - before.gateway_cpu_s,
            fleet_cpu_s: after.fleet_cpu_s - before.fleet_cpu_s,
        })
    }

    fn count(&self) -> Result<Count, BenchError> {
        Ok(Count {
            at: Instant::now(),
            readings: self.counters.readings_acked.load(Relaxed),
            frames: self.counters.frames_acked.load(Relaxed),
            gateway_cpu_s: self.gateway.cpu_s()?,
            fleet_cpu_s: machine::cpu_s(std::process::id())?,
        })
    }

    /// Stops sending and waits for the last ACKs.
    pub(super) async fn stop(self) -> Result<Summary, BenchError> {
        self.stop.cancel();
        self.finish().await
    }

    /// Waits until everything to be sent is acknowledged.
    pub(super) async fn finish(self) -> Result<Summary, BenchError> {
        let Ok(ended) = tokio::time::timeout(PATIENCE, self.fleet).await else {
            return Err(BenchError::TooLong("the last ACKs"));
        };
        match ended {
            Ok(summary) => Ok(summary?),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}
