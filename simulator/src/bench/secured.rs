//! What TLS costs a burst.

use serde::Serialize;

use super::cell::{BASE, Cell, SINGLE};
use super::gateway::Which;
use super::load::Sending;
use super::throughput::{Burst, burst};
use super::{Bench, BenchError, Scope, median, say};

/// A burst through TLS, against one in plain text.
#[derive(Clone, Debug, Serialize)]
pub struct Secured {
    /// The fleet.
    pub cell: Cell,
    /// Median of TLS to plain text.
    pub ratio: f64,
    /// Each round: plain, through TLS.
    pub rounds: Vec<(Burst, Burst)>,
}

impl Secured {
    /// Of a figure in plain text and through TLS.
    pub(super) fn medians(&self, figure: impl Fn(&Burst) -> f64) -> [f64; 2] {
        [
            median(self.rounds.iter().map(|(plain, _)| figure(plain))),
            median(self.rounds.iter().map(|(_, secured)| figure(secured))),
        ]
    }
}

/// Each round takes both, one after the other.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    for cell in [BASE, SINGLE] {
        let mut rounds = Vec::new();
        for round in 1..=scope.rounds {
            say(&format!(
                "round {round} of {}, {cell}: plain, and through TLS",
                scope.rounds
            ));
            let plain = one(scope, Sending::burst(cell)).await?;
            let secured = Sending {
                through_tls: true,
                ..Sending::burst(cell)
            };
            rounds.push((plain, one(scope, secured).await?));
        }
        let ratio =
            |(plain, secured): &(Burst, Burst)| secured.readings_per_s / plain.readings_per_s;
        bench.secured.push(Secured {
            cell,
            ratio: median(rounds.iter().map(ratio)),
            rounds,
        });
    }
    Ok(())
}

async fn one(scope: &Scope<'_>, sending: Sending) -> Result<Burst, BenchError> {
    let store = scope.site.new_store(Which::Fresh).await?;
    let measured = burst(scope, &store, sending).await?;
    store.remove().await?;
    Ok(measured)
}
