//! Whether the gateway is as fast when there is much in its store already.

use serde::Serialize;

use super::bare::{self, Job, Until};
use super::cell::BASE;
use super::gateway::Which;
use super::load::{Sending, start_us};
use super::throughput::{Burst, burst};
use super::{Bench, BenchError, Scope, median, say};

const DAY_US: i64 = 86_400_000_000;

/// A burst into a full store, against one into an empty one.
#[derive(Clone, Debug, Serialize)]
pub struct Stored {
    /// What the full one held.
    pub readings: u64,
    /// What it took on the disk.
    pub bytes: u64,
    /// Median of full to empty.
    pub ratio: f64,
    /// Each round: empty, full.
    pub rounds: Vec<(Burst, Burst)>,
}

impl Stored {
    /// Of a figure of the empty store and of the full one.
    pub(super) fn medians(&self, figure: impl Fn(&Burst) -> f64) -> [f64; 2] {
        [
            median(self.rounds.iter().map(|(empty, _)| figure(empty))),
            median(self.rounds.iter().map(|(_, full)| figure(full))),
        ]
    }
}

/// Fills a store with what the burst's own devices measured before, and compares.
pub(super) async fn measure(
    scope: &Scope<'_>,
    readings: u64,
    bench: &mut Bench,
) -> Result<(), BenchError> {
    say(&format!("filling a store with {readings} readings"));
    let created_at = match scope.site.is_postgres() {
        true => "now()",
        false => "0",
    };
    let mut job = Job {
        cell: BASE,
        until: Until::Stored(readings),
        start_us: start_us(),
        registry: Some(bare::registry(BASE, created_at)),
    };
    // It ends before the burst begins.
    job.start_us -= job.span_us();
    let full = scope.site.new_store(Which::Stored).await?;
    full.bare(&job).await?;
    let bytes = full.disk_bytes().await?;
    let mut rounds = Vec::new();
    for round in 1..=scope.rounds {
        say(&format!("round {round} of {}: empty store", scope.rounds));
        let empty = scope.site.new_store(Which::Fresh).await?;
        let into_empty = burst(scope, &empty, Sending::burst(BASE)).await?;
        empty.remove().await?;
        say(&format!("round {round} of {}: full store", scope.rounds));
        let sending = Sending {
            // Nothing is measured twice at the same time.
            start_us: start_us() + i64::from(round) * DAY_US,
            ..Sending::burst(BASE)
        };
        rounds.push((into_empty, burst(scope, &full, sending).await?));
    }
    full.remove().await?;
    let ratio = |(empty, full): &(Burst, Burst)| full.readings_per_s / empty.readings_per_s;
    bench.stored = Some(Stored {
        readings,
        bytes,
        ratio: median(rounds.iter().map(ratio)),
        rounds,
    });
    Ok(())
}
