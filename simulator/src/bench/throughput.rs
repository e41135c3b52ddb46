//! Readings per second, of the baseline and through the gateway.

use serde::Serialize;

use super::baseline::{Job, Until};
use super::gateway::{Gateway, Store, Which};
use super::load::{self, Load, Sending};
use super::workload::Workload;
use super::{Bench, BenchError, Scope, WARM_UP, median, say};

/// Results of the gateway in a burst.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Burst {
    /// Acknowledged readings per second.
    pub readings_per_s: f64,
    /// Acknowledged frames per second.
    pub frames_per_s: f64,
    /// p99 of the time from sending a frame to its ACK. All windows are always full, so the mean is the number in
    /// flight divided by the rate, whatever the gateway does.
    pub ack_p99_ms: f64,
    /// CPU time of the gateway per million readings.
    pub gateway_cpu_s_per_million: f64,
    /// CPU time of the simulator per million readings; on a small machine, this time is not available to the gateway.
    pub fleet_cpu_s_per_million: f64,
    /// Bytes of data frames per reading.
    pub wire_bytes_per_reading: f64,
    /// Bytes in the store per reading, including the ledger and the indexes.
    pub disk_bytes_per_reading: f64,
}

/// Bursts under two conditions, one after the other in each round.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Median of the ratio of the second's readings per second to the first's.
    pub ratio: f64,
    pub rounds: Vec<(Burst, Burst)>,
}

impl Compared {
    pub(super) fn of(rounds: Vec<(Burst, Burst)>) -> Compared {
        let ratio = |(first, second): &(Burst, Burst)| second.readings_per_s / first.readings_per_s;
        Compared {
            ratio: median(rounds.iter().map(ratio)),
            rounds,
        }
    }

    /// Returns the medians of a value under the first and the second condition.
    pub(super) fn medians(&self, figure: impl Fn(&Burst) -> f64) -> [f64; 2] {
        [
            median(self.rounds.iter().map(|(first, _)| figure(first))),
            median(self.rounds.iter().map(|(_, second)| figure(second))),
        ]
    }
}

/// One round of a workload.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pair {
    pub baseline_readings_per_s: f64,
    /// Results of the gateway, measured directly afterwards.
    pub gateway: Burst,
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.gateway.readings_per_s / self.baseline_readings_per_s
    }
}

/// A workload with its results in each round.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    pub workload: Workload,
    /// Median of the ratio of gateway to baseline.
    pub ratio: f64,
    pub rounds: Vec<Pair>,
}

impl Throughput {
    /// Returns the median of a value of the gateway.
    pub(super) fn median(&self, figure: impl Fn(&Burst) -> f64) -> f64 {
        median(self.rounds.iter().map(|pair| figure(&pair.gateway)))
    }

    /// Returns the median of the baseline, in readings per second.
    pub(super) fn baseline_readings_per_s(&self) -> f64 {
        median(self.rounds.iter().map(|pair| pair.baseline_readings_per_s))
    }
}

/// Measures all workloads in all rounds. In a round the two measurements of a pair follow each other, so that
/// any other change on the machine affects both.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let workloads = scope.workloads.clone();
    let mut pairs = vec![Vec::new(); workloads.len()];
    for round in 1..=scope.rounds {
        for (workload, pairs) in workloads.iter().zip(&mut pairs) {
            let of = format!("round {round} of {}, {workload}", scope.rounds);
            say(&format!("{of}: baseline"));
            let baseline_readings_per_s = baseline(scope, *workload).await?;
            say(&format!("{of}: gateway"));
            let gateway = burst_into_new(scope, Sending::burst(*workload)).await?;
            pairs.push(Pair {
                baseline_readings_per_s,
                gateway,
            });
        }
    }
    let of_cell = workloads.into_iter().zip(pairs);
    bench.throughput = of_cell
        .map(|(workload, rounds)| Throughput {
            workload,
            ratio: median(rounds.iter().map(Pair::ratio)),
            rounds,
        })
        .collect();
    Ok(())
}

async fn baseline(scope: &Scope<'_>, workload: Workload) -> Result<f64, BenchError> {
    let store = scope.site.new_store(Which::Fresh).await?;
    let job = Job {
        workload,
        until: Until::Passed(scope.burst),
        start_us: load::start_us(),
        registry: None,
    };
    let rate = store.baseline(&job).await?;
    store.remove().await?;
    Ok(rate)
}

/// Measures a burst into a new store.
pub(super) async fn burst_into_new(
    scope: &Scope<'_>,
    sending: Sending,
) -> Result<Burst, BenchError> {
    let store = scope.site.new_store(Which::Fresh).await?;
    let measured = burst(scope, &store, sending).await?;
    store.remove().await?;
    Ok(measured)
}

/// Measures a burst into a store while all devices are connected: the result excludes ten thousand handshakes
/// and the last ACKs.
pub(super) async fn burst(
    scope: &Scope<'_>,
    store: &Store,
    sending: Sending,
) -> Result<Burst, BenchError> {
    let gateway = Gateway::start(scope.binary, store, &[]).await?;
    let mut load = Load::start(&gateway, &sending)?;
    load.ready().await?;
    load.pass(WARM_UP).await?;
    let window = load.measure(scope.burst).await?;
    let summary = load.stop().await?;
    gateway.leave().await?;
    let per_million = |seconds: f64| seconds / window.readings * 1e6;
    Ok(Burst {
        readings_per_s: window.readings / window.seconds,
        frames_per_s: window.frames / window.seconds,
        ack_p99_ms: summary.ack_ms.p99.unwrap_or(f64::NAN),
        gateway_cpu_s_per_million: per_million(window.gateway_cpu_s),
        fleet_cpu_s_per_million: per_million(window.fleet_cpu_s),
        wire_bytes_per_reading: summary.bytes_per_reading,
        disk_bytes_per_reading: store.disk_bytes().await? as f64 / summary.readings_acked as f64,
    })
}
