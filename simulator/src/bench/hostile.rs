//! Effect of misbehaving peers on healthy devices.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::gateway::{Gateway, Which};
use super::load::{Load, Sending};
use super::peers::{Attack, Peers};
use super::workload::Workload;
use super::{Bench, BenchError, Scope, WARM_UP, say};
use crate::plan::Profile;
use crate::report::Percentiles;

/// A tenth of the capacity of a small machine.
const HEALTHY: Workload = Workload {
    devices: 200,
    channels: 4,
    samples: 15,
    window_frames: 16,
};
/// Time between two frames of a device.
const FRAME_EVERY: Duration = Duration::from_millis(200);
/// Time from the first peer to the measurement.
const SETTLING: Duration = Duration::from_secs(4);
/// Devices that join while the hostile peers are connected.
const NEWCOMERS: Workload = Workload {
    devices: 20,
    ..HEALTHY
};
/// Interval at which the gateway's memory is sampled.
const LOOK: Duration = Duration::from_millis(200);

/// Results for healthy devices with peers of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Hostile {
    pub attack: Attack,
    /// Number of peers; a peer that is disconnected reconnects after a second.
    pub peers: u32,
    /// Average number of connected peers.
    pub open: f64,
    /// Connections closed by the gateway per second.
    pub closed_per_s: f64,
    /// ACK latency of healthy devices without the hostile peers.
    pub alone_ms: Percentiles,
    /// The same with the hostile peers.
    pub attacked_ms: Percentiles,
    /// CPU cores used by the gateway without the hostile peers.
    pub alone_cores: f64,
    /// The same with the hostile peers.
    pub attacked_cores: f64,
    /// Time until 20 devices that begin to connect are all welcomed.
    pub newcomers_s: f64,
    /// Highest resident memory of the gateway with the healthy devices alone.
    pub alone_resident_bytes: u64,
    /// The same with the hostile peers.
    pub attacked_resident_bytes: u64,
}

impl Hostile {
    /// Returns the ratio of the p99 with the peers to that without.
    pub(super) fn ratio(&self) -> f64 {
        let [alone, attacked] =
            [self.alone_ms, self.attacked_ms].map(|ms| ms.p99.unwrap_or(f64::NAN));
        attacked / alone
    }
}

struct Measured {
    ack_ms: Percentiles,
    cores: f64,
    resident_bytes: u64,
    open: f64,
    closed_per_s: f64,
    newcomers_s: f64,
}

/// Measures each attack with a separate baseline, on a separate gateway.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    for attack in Attack::ALL {
        let peers = attack.peers(scope.is_quick);
        say(&format!("{HEALTHY} alone"));
        let alone = one(scope, None).await?;
        say(&format!("with {peers} peers, {attack}"));
        let attacked = one(scope, Some((attack, peers))).await?;
        bench.hostile.push(Hostile {
            attack,
            peers,
            open: attacked.open,
            closed_per_s: attacked.closed_per_s,
            alone_ms: alone.ack_ms,
            attacked_ms: attacked.ack_ms,
            alone_cores: alone.cores,
            attacked_cores: attacked.cores,
            newcomers_s: attacked.newcomers_s,
            alone_resident_bytes: alone.resident_bytes,
            attacked_resident_bytes: attacked.resident_bytes,
        });
    }
    Ok(())
}

async fn one(scope: &Scope<'_>, attack: Option<(Attack, u32)>) -> Result<Measured, BenchError> {
    let healthy = Sending {
        profile: Profile::Steady,
        interval_us: FRAME_EVERY.as_micros() as u64 / u64::from(HEALTHY.samples),
        ..Sending::burst(HEALTHY)
    };
    let store = scope.site.new_store(Which::Fresh).await?;
    let gateway = Gateway::start(scope.binary, &store, &[]).await?;
    let mut load = Load::start(&gateway, &healthy)?;
    load.ready().await?;
    load.pass(WARM_UP).await?;
    let peers = attack.map(|(attack, peers)| Peers::send(&gateway, attack, peers));
    // Waits equally long without the peers, so that the compared stores have the same age.
    load.pass(SETTLING).await?;

    let open = || peers.as_ref().map_or(0, Peers::open);
    let closed = || peers.as_ref().map_or(0, Peers::closed);
    let (began, closed_before) = (Instant::now(), closed());
    let (mut resident_bytes, mut opens) = (0, Vec::new());
    let window = {
        let mut window = std::pin::pin!(load.measure(scope.hostile));
        loop {
            tokio::select! {
                window = &mut window => break window?,
                () = tokio::time::sleep(LOOK) => {
                    resident_bytes = gateway.resident_bytes()?.max(resident_bytes);
                    opens.push(f64::from(open()));
                }
            }
        }
    };
    let closed_per_s = (closed() - closed_before) as f64 / began.elapsed().as_secs_f64();
    let newcomers_s = newcomers(&gateway).await?;
    drop(peers);
    let summary = load.stop().await?;
    gateway.leave().await?;
    store.remove().await?;
    Ok(Measured {
        ack_ms: summary.ack_ms,
        cores: window.gateway_cpu_s / window.seconds,
        resident_bytes,
        open: opens.iter().sum::<f64>() / opens.len().max(1) as f64,
        closed_per_s,
        newcomers_s,
    })
}

/// Measures the time to connect and log in.
async fn newcomers(gateway: &Gateway) -> Result<f64, BenchError> {
    let sending = Sending {
        is_silent: true,
        name_prefix: "new-",
        ..Sending::burst(NEWCOMERS)
    };
    let began = Instant::now();
    let mut load = Load::start(gateway, &sending)?;
    load.ready().await?;
    let took = began.elapsed();
    load.stop().await?;
    Ok(took.as_secs_f64())
}
