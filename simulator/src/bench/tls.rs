//! Cost of TLS in a burst.

use serde::Serialize;

use super::load::Sending;
use super::throughput::{Compared, burst_into_new};
use super::workload::{BASE, SINGLE, Workload};
use super::{Bench, BenchError, Scope, say};

/// A burst over plain TCP and one over TLS.
#[derive(Clone, Debug, Serialize)]
pub struct Secured {
    pub workload: Workload,
    /// Results, first of plain TCP.
    #[serde(flatten)]
    pub compared: Compared,
}

/// Measures both in each round, one after the other.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    for workload in [BASE, SINGLE] {
        let mut rounds = Vec::new();
        for round in 1..=scope.rounds {
            say(&format!(
                "round {round} of {}, {workload}: plain, then TLS",
                scope.rounds
            ));
            let plain = burst_into_new(scope, Sending::burst(workload)).await?;
            let secured = Sending {
                through_tls: true,
                ..Sending::burst(workload)
            };
            rounds.push((plain, burst_into_new(scope, secured).await?));
        }
        bench.secured.push(Secured {
            workload,
            compared: Compared::of(rounds),
        });
    }
    Ok(())
}
