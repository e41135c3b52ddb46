//! How many readings a second, bare and through the gateway.

use serde::Serialize;

use super::bare::{Job, Until};
use super::cell::Cell;
use super::gateway::{Gateway, Store, Which};
use super::load::{self, Load, Sending};
use super::{Bench, BenchError, Scope, WARM_UP, median, say};

/// What the gateway did with a burst.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Burst {
    /// Readings acked in a second.
    pub readings_per_s: f64,
    /// Frames acked in a second.
    pub frames_per_s: f64,
    /// From sending a frame to its ACK. All windows are full all the time, so the mean is what is in
    /// flight divided by the rate, whatever the gateway does.
    pub ack_p99_ms: f64,
    /// CPU time of the gateway for a million readings.
    pub gateway_cpu_s_per_million: f64,
    /// CPU time of the simulator for a million readings, which it takes from the gateway on a small
    /// machine.
    pub fleet_cpu_s_per_million: f64,
    /// Bytes of data frames for each reading.
    pub wire_bytes_per_reading: f64,
    /// Bytes in the store for each reading, with the ledger and the indexes.
    pub disk_bytes_per_reading: f64,
}

/// Bursts under two conditions, one after the other in each round.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Median of the second's readings a second to the first's.
    pub ratio: f64,
    /// All rounds.
    pub rounds: Vec<(Burst, Burst)>,
}

impl Compared {
    /// Of these rounds.
    pub(super) fn of(rounds: Vec<(Burst, Burst)>) -> Compared {
        let ratio = |(first, second): &(Burst, Burst)| second.readings_per_s / first.readings_per_s;
        Compared {
            ratio: median(rounds.iter().map(ratio)),
            rounds,
        }
    }

    /// Of a figure under the first condition and under the second.
    pub(super) fn medians(&self, figure: impl Fn(&Burst) -> f64) -> [f64; 2] {
        [
            median(self.rounds.iter().map(|(first, _)| figure(first))),
            median(self.rounds.iter().map(|(_, second)| figure(second))),
        ]
    }
}

/// One round of a cell.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pair {
    /// Readings that the bare loop stored in a second.
    pub bare_readings_per_s: f64,
    /// Straight afterwards.
    pub gateway: Burst,
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.gateway.readings_per_s / self.bare_readings_per_s
    }
}

/// A cell, and what came of it in each round.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// The fleet.
    pub cell: Cell,
    /// Median of gateway to bare loop.
    pub ratio: f64,
    /// All rounds.
    pub rounds: Vec<Pair>,
}

impl Throughput {
    /// Of a figure of the gateway.
    pub(super) fn median(&self, figure: impl Fn(&Burst) -> f64) -> f64 {
        median(self.rounds.iter().map(|pair| figure(&pair.gateway)))
    }

    /// Of the bare loop.
    pub(super) fn bare_readings_per_s(&self) -> f64 {
        median(self.rounds.iter().map(|pair| pair.bare_readings_per_s))
    }
}

/// All cells, as many rounds as there are to be. In a round the two of a pair follow each other, so that
/// whatever else changes on the machine changes for both.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let cells = scope.cells.clone();
    let mut pairs = vec![Vec::new(); cells.len()];
    for round in 1..=scope.rounds {
        for (cell, pairs) in cells.iter().zip(&mut pairs) {
            let of = format!("round {round} of {}, {cell}", scope.rounds);
            say(&format!("{of}: bare loop"));
            let bare_readings_per_s = bare(scope, *cell).await?;
            say(&format!("{of}: gateway"));
            let gateway = burst_into_new(scope, Sending::burst(*cell)).await?;
            pairs.push(Pair {
                bare_readings_per_s,
                gateway,
            });
        }
    }
    let of_cell = cells.into_iter().zip(pairs);
    bench.throughput = of_cell
        .map(|(cell, rounds)| Throughput {
            cell,
            ratio: median(rounds.iter().map(Pair::ratio)),
            rounds,
        })
        .collect();
    Ok(())
}

async fn bare(scope: &Scope<'_>, cell: Cell) -> Result<f64, BenchError> {
    let store = scope.site.new_store(Which::Fresh).await?;
    let job = Job {
        cell,
        until: Until::Passed(scope.burst),
        start_us: load::start_us(),
        registry: None,
    };
    let rate = store.bare(&job).await?;
    store.remove().await?;
    Ok(rate)
}

/// A burst into a store of its own.
pub(super) async fn burst_into_new(
    scope: &Scope<'_>,
    sending: Sending,
) -> Result<Burst, BenchError> {
    let store = scope.site.new_store(Which::Fresh).await?;
    let measured = burst(scope, &store, sending).await?;
    store.remove().await?;
    Ok(measured)
}

/// A burst into a store, measured while all devices are there: ten thousand handshakes are no part of it,
/// nor are the last ACKs.
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
