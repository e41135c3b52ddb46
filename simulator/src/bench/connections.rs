//! Cost of connections with little traffic, and the time to reconnect after all are lost simultaneously.

use std::time::Duration;

use serde::Serialize;

use super::gateway::{Gateway, Which};
use super::load::{Load, Sending};
use super::workload::Workload;
use super::{Bench, BenchError, Scope, say};
use crate::plan::Profile;

/// Time for busy devices to become idle.
const REST: Duration = Duration::from_secs(1);
/// Time between the measurement and the storm.
const RESERVE: Duration = Duration::from_secs(4);
/// Devices that join per second.
const JOINS_PER_S: u32 = 1_000;

#[derive(Clone, Debug, Serialize)]
pub struct Connections {
    pub connections: u32,
    /// Resident memory of a gateway without connections.
    pub resident_bytes_before: u64,
    /// Resident memory with all connections open and nothing sent.
    pub resident_bytes_idle: u64,
    pub connections_tls: u32,
    /// Resident memory with the TLS connections open and nothing sent.
    pub resident_bytes_tls: u64,
    /// Resident memory after each device has sent a frame, including the store's caches.
    pub resident_bytes_after_frame: u64,
    /// Resident memory while each device sends a frame periodically, including the store's caches.
    pub resident_bytes_slow: u64,
    /// Time between two frames of a device.
    pub period_s: f64,
    /// CPU cores used by the gateway meanwhile.
    pub gateway_cores: f64,
    /// p99 of the time from a frame's due time to its ACK.
    pub ack_p99_ms: f64,
    /// Time from dropping all connections until all devices are welcomed again.
    pub storm_s: f64,
}

impl Connections {
    /// Returns the additional memory per connection, for this many connections.
    pub(super) fn bytes_each(&self, resident_bytes: u64, connections: u32) -> f64 {
        let more = resident_bytes as f64 - self.resident_bytes_before as f64;
        more / f64::from(connections)
    }
}

/// Measures each state with a separate gateway, because memory used in one would count in the next.
pub(super) async fn measure(scope: &Scope<'_>, bench: &mut Bench) -> Result<(), BenchError> {
    let devices = scope.connections;
    say(&format!("{devices} idle connections"));
    let is_silent = true;
    let workload = cell_of(devices);
    let (resident_bytes_before, resident_bytes_idle) =
        idle(scope, workload, is_silent, false).await?;
    let connections_tls = scope.connections_tls;
    say(&format!("{connections_tls} idle TLS connections"));
    let secured = cell_of(connections_tls);
    let (_, resident_bytes_tls) = idle(scope, secured, is_silent, true).await?;
    say(&format!("{devices} connections that have sent a frame"));
    let (_, resident_bytes_after_frame) = idle(scope, workload, !is_silent, false).await?;
    say(&format!(
        "{devices} connections that send periodically, then a reconnect storm"
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

/// Returns a workload whose frames hold a minute of one sensor.
fn cell_of(devices: u32) -> Workload {
    Workload {
        devices,
        channels: 1,
        samples: 60,
        window_frames: 16,
    }
}

fn flag(scope: &Scope<'_>) -> [String; 2] {
    // One more for the fleet's own initial connection.
    let connections = (scope.connections + 1).max(16_384);
    ["--connections-max".into(), connections.to_string()]
}

/// Measures the memory before any connection and with all of them, with or without a frame from each.
async fn idle(
    scope: &Scope<'_>,
    workload: Workload,
    is_silent: bool,
    through_tls: bool,
) -> Result<(u64, u64), BenchError> {
    let joining = Duration::from_secs((workload.devices / JOINS_PER_S).max(3).into());
    let sending = Sending {
        profile: Profile::Ramp,
        // Half of it is for joining. No second frame is due before it ends.
        duration: Some((2 * joining).min(Duration::from_secs(60))),
        is_silent,
        through_tls,
        ..Sending::burst(workload)
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
        load.acked(workload.devices.into()).await?;
    }
    load.pass(REST).await?;
    let after = gateway.resident_bytes()?;
    load.stop().await?;
    gateway.leave().await?;
    store.remove().await?;
    Ok((before, after))
}

async fn slow(scope: &Scope<'_>) -> Result<Connections, BenchError> {
    let workload = cell_of(scope.connections);
    let period = scope.slow_period;
    let sending = Sending {
        profile: Profile::Steady,
        interval_us: period.as_micros() as u64 / u64::from(workload.samples),
        // They join within the first period.
        storm_every: Some(period + REST + scope.slow + RESERVE),
        ..Sending::burst(workload)
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
