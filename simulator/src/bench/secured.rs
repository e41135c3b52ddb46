//! What TLS costs a burst.

use serde::Serialize;

use super::cell::{BASE, Cell, SINGLE};
use super::load::Sending;
use super::throughput::{Compared, burst_into_new};
use super::{Bench, BenchError, Scope, say};

/// A burst in plain text, and one through TLS.
#[derive(Clone, Debug, Serialize)]
pub struct Secured {
    /// The fleet.
    pub cell: Cell,
    /// Plain text first.
    #[serde(flatten)]
    pub compared: Compared,
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
            let plain = burst_into_new(scope, Sending::burst(cell)).await?;
            let secured = Sending {
                through_tls: true,
                ..Sending::burst(cell)
            };
            rounds.push((plain, burst_into_new(scope, secured).await?));
        }
        bench.secured.push(Secured {
            cell,
            compared: Compared::of(rounds),
        });
    }
    Ok(())
}
