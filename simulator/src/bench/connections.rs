//! What connections cost that do little, and how soon they are back when all are lost at once.

use std::time::Duration;

use serde::Serialize;

use super::cell::Cell;
use super::gateway::{Gateway, Which};
use super::load::{Load, Sending};
use super::{Bench, BenchError, Scope, say};
use crate::plan::Profile;

/// For what was busy to become idle.
const REST: Duration = Duration::from_secs(1);
/// Between what is measured and the storm.
const RESERVE: Duration = Duration::from_secs(4);
/// Devices that join in a second.
const JOINS_PER_S: u32 = 1_000;

/// Many connections.
#[derive(Clone, Debug, Serialize)]
pub struct Connections {
    /// How many.
    pub connections: u32,
    /// Memory of a gateway to which nobody is connected.
    pub resident_bytes_before: u64,
    /// With all of them connected, and nothing sent.
    pub resident_bytes_idle: u64,
    /// How many of them through TLS.
    pub connections_tls: u32,
    /// With those connected, and nothing sent.
    pub resident_bytes_tls: u64,
    /// After each has sent a frame; what the store keeps in memory is in it.
    pub resident_bytes_after_frame: u64,
    /// While each sends a frame now and then; also with the store's.
    pub resident_bytes_slow: u64,
    /// From frame to frame of a device.
    pub period_s: f64,
    /// Cores that the gateway takes while they do so.
    pub gateway_cores: f64,
    /// From when a frame was due to its ACK.
    pub ack_p99_ms: f64,
    /// From the moment when all connections are dropped until all devices are welcomed again.
    pub storm_s: f64,
}

impl Connections {
    /// More memory than without connections, for each of so many.
    pub(super) fn bytes_each(&self, resident_bytes: u64, connections: u32) -> f64 {
        let more = resident_bytes as f64 - self.resident_bytes_before as f64;
        more / f64::from(connections)
    }
}

/// Each with a gateway of its own: memory that one had used would be counted for the next.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let devices = scope.connections;
    say(&format!("{devices} idle connections"));
    let is_silent = true;
    let cell = cell_of(devices);
    let (resident_bytes_before, resident_bytes_idle) = idle(scope, cell, is_silent, false).await?;
    let connections_tls = scope.connections_tls;
    say(&format!("{connections_tls} idle connections through TLS"));
    let secured = cell_of(connections_tls);
    let (_, resident_bytes_tls) = idle(scope, secured, is_silent, true).await?;
    say(&format!("{devices} connections that have sent a frame"));
    let (_, resident_bytes_after_frame) = idle(scope, cell, !is_silent, false).await?;
    say(&format!(
        "{devices} connections that send now and then, and a storm"
    ));
    let slow = slow(scope).await?;
    bench.connections = Some(Connections {
        resident_bytes_before,
        resident_bytes_idle,
        connections_tls,
        resident_bytes_tls,
        resident_bytes_after_frame,
        ..slow
    });
    Ok(())
}

/// A minute of one sensor in a frame.
fn cell_of(devices: u32) -> Cell {
    Cell {
        devices,
        channels: 1,
        samples: 60,
        window_frames: 16,
    }
}

fn flag(scope: &Scope<'_>) -> [String; 2] {
    // One more for the fleet's own, which says nothing.
    let connections = (scope.connections + 1).max(16_384);
    ["--connections-max".into(), connections.to_string()]
}

/// Memory before anybody connects, and with all connections, after a frame from each or without.
async fn idle(
    scope: &Scope<'_>,
    cell: Cell,
    is_silent: bool,
    through_tls: bool,
) -> Result<(u64, u64), BenchError> {
    let joining = Duration::from_secs((cell.devices / JOINS_PER_S).max(3).into());
    let sending = Sending {
        profile: Profile::Ramp,
        // Half of it is for joining. Nobody's second frame is due before it is over.
        duration: Some((2 * joining).min(Duration::from_secs(60))),
        is_silent,
        through_tls,
        ..Sending::burst(cell)
    };
    let store = scope.site.new_store(Which::Fresh).await?;
    let flag = flag(scope);
    let gateway =
        Gateway::start(scope.binary, &store, &flag.each_ref().map(String::as_str)).await?;
    tokio::time::sleep(REST).await;
    let before = gateway.resident_bytes()?;
    let mut load = Load::start(&gateway, &sending)?;
    load.ready().await?;
    if !is_silent {
        load.acked(cell.devices.into()).await?;
    }
    load.pass(REST).await?;
    let after = gateway.resident_bytes()?;
    load.stop().await?;
    gateway.leave().await?;
    store.remove().await?;
    Ok((before, after))
}

async fn slow(scope: &Scope<'_>) -> Result<Connections, BenchError> {
    let cell = cell_of(scope.connections);
    let period = scope.slow_period;
    let sending = Sending {
        profile: Profile::Steady,
        interval_us: period.as_micros() as u64 / u64::from(cell.samples),
        // They join within the first period.
        storm_every: Some(period + REST + scope.slow + RESERVE),
        ..Sending::burst(cell)
    };
    let store = scope.site.new_store(Which::Fresh).await?;
    let flag = flag(scope);
    let gateway =
        Gateway::start(scope.binary, &store, &flag.each_ref().map(String::as_str)).await?;
    let mut load = Load::start(&gateway, &sending)?;
    load.ready().await?;
    load.pass(REST).await?;
    let window = load.measure(scope.slow).await?;
    let resident_bytes_slow = gateway.resident_bytes()?;
    let storm = load.storm().await?;
    let summary = load.stop().await?;
    gateway.leave().await?;
    store.remove().await?;
    Ok(Connections {
        connections: scope.connections,
        resident_bytes_before: 0,
        resident_bytes_idle: 0,
        connections_tls: 0,
        resident_bytes_tls: 0,
        resident_bytes_after_frame: 0,
        resident_bytes_slow,
        period_s: period.as_secs_f64(),
        gateway_cores: window.gateway_cpu_s / window.seconds,
        ack_p99_ms: summary.ack_ms.p99.unwrap_or(f64::NAN),
        storm_s: storm.as_secs_f64(),
    })
}
