//! ACK latency at a rate that does not depend on the gateway.

use std::time::Duration;

use serde::Serialize;

use super::gateway::{Gateway, Which};
use super::load::{Load, Sending, start_us};
use super::workload::{BASE, SINGLE, Workload};
use super::{Bench, BenchError, Scope, WARM_UP, say};
use crate::plan::Profile;
use crate::report::Percentiles;

/// More than any device has in flight, so that frames are sent when they are due and not when others are
/// acknowledged. The gateway is configured with the same number.
const WINDOW_FRAMES: u16 = 1_024;
const WINDOW_FLAGS: [&str; 2] = ["--window-frames", "1024"];
/// Time for joining, and margin so that no device finishes before the end of the measurement.
const RESERVE: Duration = Duration::from_secs(3);

/// ACK latency at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    pub workload: Workload,
    /// Offered rate as a share of the rate in the burst in which each device waits for every ACK. Frames arrive as in
    /// that burst: one at a time from every device.
    pub share: f64,
    /// Frames that were due per second.
    pub offered_frames_per_s: f64,
    /// Acknowledged share of the offered frames.
    pub achieved: f64,
    /// Time from a frame's due time to its ACK.
    pub ack_ms: Percentiles,
}

/// Measures at several shares of the burst's rate for each kind of frame.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let cases: &[(Workload, &[f64])] = match scope.is_quick {
        true => &[(BASE, &[0.5])],
        false => &[(BASE, &[0.25, 0.5, 0.75, 1.0]), (SINGLE, &[0.5])],
    };
    for &(workload, shares) in cases {
        let limit = workload.with_window(1);
        let of_cell = bench.throughput.iter().find(|one| one.workload == limit);
        let Some(burst_frames_per_s) = of_cell.map(|one| one.median(|burst| burst.frames_per_s))
        else {
            continue;
        };
        for &share in shares {
            say(&format!(
                "latency at {:.0} % of the burst, {limit}",
                share * 100.0
            ));
            let latency = at(scope, workload, share, burst_frames_per_s).await?;
            bench.latency.push(latency);
        }
    }
    Ok(())
}

async fn at(
    scope: &Scope<'_>,
    workload: Workload,
    share: f64,
    burst_frames_per_s: f64,
) -> Result<Latency, BenchError> {
    let interval_us = interval_us(workload, share * burst_frames_per_s);
    let offered_frames_per_s = frames_per_s(workload, interval_us);
    let sent_s = (WARM_UP + scope.latency + RESERVE).as_secs_f64();
    let frames = offered_frames_per_s * sent_s / f64::from(workload.devices);
    let sending = Sending {
        profile: Profile::Steady,
        interval_us,
        // Every frame that is due is sent and awaited, however late: none is left out because the
        // run has ended.
        frames: Some(frames.ceil() as u64),
        start_us: start_us(),
        ..Sending::burst(Workload {
            window_frames: WINDOW_FRAMES,
            ..workload
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
        workload: sending.workload,
        share,
        offered_frames_per_s,
        achieved: window.frames / window.seconds / offered_frames_per_s,
        ack_ms: summary.ack_ms,
    })
}

/// Returns the sample interval for a fleet that sends about this many frames.
fn interval_us(workload: Workload, frames_per_s: f64) -> u64 {
    let period_us = f64::from(workload.devices) * 1e6 / frames_per_s;
    ((period_us / f64::from(workload.samples)).round() as u64).max(1)
}

fn frames_per_s(workload: Workload, interval_us: u64) -> f64 {
    f64::from(workload.devices) * 1e6 / (interval_us * u64::from(workload.samples)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_gives_the_requested_rate() {
        for (workload, rate) in [(BASE, 3_000.0), (BASE, 12_500.0), (SINGLE, 50_000.0)] {
            let offered = frames_per_s(workload, interval_us(workload, rate));
            assert!((offered / rate - 1.0).abs() < 0.001, "{offered} for {rate}");
        }
        assert_eq!(interval_us(SINGLE, 1e12), 1);
    }
}
