//! What healthy devices feel of peers that misbehave.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::cell::Cell;
use super::gateway::{Gateway, Which};
use super::load::{Load, Sending};
use super::peers::{Misdeed, Peers};
use super::{Bench, BenchError, Scope, WARM_UP, say};
use crate::plan::Profile;
use crate::report::Percentiles;

/// A tenth of what a small machine takes.
const HEALTHY: Cell = Cell {
    devices: 200,
    channels: 4,
    samples: 15,
    window_frames: 16,
};
/// From frame to frame of a device.
const FRAME_EVERY: Duration = Duration::from_millis(200);
/// From the first peer until they are measured.
const SETTLING: Duration = Duration::from_secs(4);
/// Devices that join while the peers are there.
const NEWCOMERS: Cell = Cell {
    devices: 20,
    ..HEALTHY
};
/// From one look at the gateway's memory to the next.
const LOOK: Duration = Duration::from_millis(200);

/// Healthy devices beside peers of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Hostile {
    /// What the peers do.
    pub misdeed: Misdeed,
    /// How many they are; who is closed is back after a second.
    pub peers: u32,
    /// Of them, those that had a connection, on average.
    pub open: f64,
    /// Connections that the gateway ended in a second.
    pub closed_per_s: f64,
    /// What frames of healthy devices wait without them.
    pub alone_ms: Percentiles,
    /// And beside them.
    pub beside_ms: Percentiles,
    /// What the gateway takes of the cores without them.
    pub alone_cores: f64,
    /// And beside them.
    pub beside_cores: f64,
    /// How long it takes until 20 devices that begin to connect are all in.
    pub newcomers_s: f64,
    /// The gateway's memory with the healthy devices alone, as much as it ever was.
    pub alone_resident_bytes: u64,
    /// And beside the peers.
    pub beside_resident_bytes: u64,
}

impl Hostile {
    /// Of the p99 beside them to that without.
    pub(super) fn ratio(&self) -> f64 {
        let [alone, beside] = [self.alone_ms, self.beside_ms].map(|ms| ms.p99.unwrap_or(f64::NAN));
        beside / alone
    }
}

/// What was measured of a gateway.
struct Measured {
    ack_ms: Percentiles,
    cores: f64,
    resident_bytes: u64,
    open: f64,
    closed_per_s: f64,
    newcomers_s: f64,
}

/// Each beside a baseline of its own, on a gateway of its own.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    for misdeed in Misdeed::ALL {
        let peers = misdeed.peers(scope.is_quick);
        say(&format!("{HEALTHY} alone"));
        let alone = one(scope, None).await?;
        say(&format!("beside {peers} peers, {misdeed}"));
        let beside = one(scope, Some((misdeed, peers))).await?;
        bench.hostile.push(Hostile {
            misdeed,
            peers,
            open: beside.open,
            closed_per_s: beside.closed_per_s,
            alone_ms: alone.ack_ms,
            beside_ms: beside.ack_ms,
            alone_cores: alone.cores,
            beside_cores: beside.cores,
            newcomers_s: beside.newcomers_s,
            alone_resident_bytes: alone.resident_bytes,
            beside_resident_bytes: beside.resident_bytes,
        });
    }
    Ok(())
}

async fn one(scope: &Scope<'_>, misdeed: Option<(Misdeed, u32)>) -> Result<Measured, BenchError> {
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
    let peers = misdeed.map(|(misdeed, peers)| Peers::send(&gateway, misdeed, peers));
    // As long without them: a store of the same age is compared.
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

/// How long it takes to get in.
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
