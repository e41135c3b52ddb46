//! How long frames wait for their ACKs at a rate that does not depend on the gateway.

use std::time::Duration;

use serde::Serialize;

use super::cell::{BASE, Cell, SINGLE};
use super::gateway::{Gateway, Which};
use super::load::{Load, Sending, start_us};
use super::{Bench, BenchError, Scope, WARM_UP, say};
use crate::plan::Profile;
use crate::report::Percentiles;

/// More than any device has in flight, so that frames leave when they are due and not when others are
/// acked. The gateway is told the same.
const WINDOW_FRAMES: u16 = 1_024;
const WINDOW_FLAGS: [&str; 2] = ["--window-frames", "1024"];
/// For joining, and so that nobody is done before the end of what is measured.
const RESERVE: Duration = Duration::from_secs(3);

/// ACKs at a rate.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// The fleet.
    pub cell: Cell,
    /// What was offered, as a share of what the gateway takes from devices that wait for each ACK: the
    /// burst in which frames come as they do here, one by one from every device.
    pub share: f64,
    /// Frames that fell due in a second.
    pub offered_frames_per_s: f64,
    /// What was acked, as a share of what was offered.
    pub achieved: f64,
    /// From when a frame was due to its ACK.
    pub ack_ms: Percentiles,
}

/// The shares of the burst's rate for each kind of frame.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let cases: &[(Cell, &[f64])] = match scope.is_quick {
        true => &[(BASE, &[0.5])],
        false => &[(BASE, &[0.25, 0.5, 0.75, 1.0]), (SINGLE, &[0.5])],
    };
    for &(cell, shares) in cases {
        let limit = cell.with_window(1);
        let of_cell = bench.throughput.iter().find(|one| one.cell == limit);
        let Some(burst_frames_per_s) = of_cell.map(|one| one.median(|burst| burst.frames_per_s))
        else {
            continue;
        };
        for &share in shares {
            say(&format!(
                "latency at {:.0} % of the burst, {limit}",
                share * 100.0
            ));
            let latency = at(scope, cell, share, burst_frames_per_s).await?;
            bench.latency.push(latency);
        }
    }
    Ok(())
}

async fn at(
    scope: &Scope<'_>,
    cell: Cell,
    share: f64,
    burst_frames_per_s: f64,
) -> Result<Latency, BenchError> {
    let interval_us = interval_us(cell, share * burst_frames_per_s);
    let offered_frames_per_s = frames_per_s(cell, interval_us);
    let sent_s = (WARM_UP + scope.latency + RESERVE).as_secs_f64();
    let frames = offered_frames_per_s * sent_s / f64::from(cell.devices);
    let sending = Sending {
        profile: Profile::Steady,
        interval_us,
        // Every frame that falls due is sent and awaited, however late: none is left out because the
        // run was over.
        frames: Some(frames.ceil() as u64),
        start_us: start_us(),
        ..Sending::burst(Cell {
            window_frames: WINDOW_FRAMES,
            ..cell
        })
    };
    let store = scope.site.new_store(Which::Fresh).await?;
    let gateway = Gateway::start(scope.binary, &store, &WINDOW_FLAGS).await?;
    let mut load = Load::start(&gateway, &sending)?;
    load.ready().await?;
    load.pass(WARM_UP).await?;
    let window = load.measure(scope.latency).await?;
    let summary = load.finish().await?;
    gateway.leave().await?;
    store.remove().await?;
    Ok(Latency {
        cell: sending.cell,
        share,
        offered_frames_per_s,
        achieved: window.frames / window.seconds / offered_frames_per_s,
        ack_ms: summary.ack_ms,
    })
}

/// From sample to sample, for a fleet that sends about so many frames.
fn interval_us(cell: Cell, frames_per_s: f64) -> u64 {
    let period_us = f64::from(cell.devices) * 1e6 / frames_per_s;
    ((period_us / f64::from(cell.samples)).round() as u64).max(1)
}

fn frames_per_s(cell: Cell, interval_us: u64) -> f64 {
    f64::from(cell.devices) * 1e6 / (interval_us * u64::from(cell.samples)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_gives_the_rate_that_was_asked_for() {
        for (cell, rate) in [(BASE, 3_000.0), (BASE, 12_500.0), (SINGLE, 50_000.0)] {
            let offered = frames_per_s(cell, interval_us(cell, rate));
            assert!((offered / rate - 1.0).abs() < 0.001, "{offered} for {rate}");
        }
        assert_eq!(interval_us(SINGLE, 1e12), 1);
    }
}
