//! The gateway's speed with a store that already holds many readings.

use serde::Serialize;

use super::baseline::{self, Job, Until};
use super::gateway::Which;
use super::load::{Sending, start_us};
use super::throughput::{Compared, burst, burst_into_new};
use super::workload::BASE;
use super::{Bench, BenchError, Scope, say};

const DAY_US: i64 = 86_400_000_000;

/// A burst into an empty store and one into a full store.
#[derive(Clone, Debug, Serialize)]
pub struct Stored {
    /// Number of readings in the full store.
    pub readings: u64,
    /// Size of the full store on disk, in bytes.
    pub bytes: u64,
    /// Results, first of the empty store.
    #[serde(flatten)]
    pub compared: Compared,
}

/// Fills a store with earlier readings of the burst's devices and compares it with an empty one.
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
        workload: BASE,
        until: Until::Stored(readings),
        start_us: start_us(),
        registry: Some(baseline::registry(BASE, created_at)),
    };
    // These readings end before the burst begins.
    job.start_us -= job.span_us();
    let full = scope.site.new_store(Which::Stored).await?;
    full.baseline(&job).await?;
    let bytes = full.disk_bytes().await?;
    let mut rounds = Vec::new();
    for round in 1..=scope.rounds {
        say(&format!("round {round} of {}: empty store", scope.rounds));
        let into_empty = burst_into_new(scope, Sending::burst(BASE)).await?;
        say(&format!("round {round} of {}: full store", scope.rounds));
        let sending = Sending {
            // No two measurements store readings with the same times.
            start_us: start_us() + i64::from(round) * DAY_US,
            ..Sending::burst(BASE)
        };
        rounds.push((into_empty, burst(scope, &full, sending).await?));
    }
    full.remove().await?;
    bench.stored = Some(Stored {
        readings,
        bytes,
        compared: Compared::of(rounds),
    });
    Ok(())
}
