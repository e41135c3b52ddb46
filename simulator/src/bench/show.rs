//! Tables for people.

use std::fmt::{self, Display, Formatter};

use comfy_table::{CellAlignment, Table, presets};

use super::peers::Attack;
use super::workload::Workload;
use super::{Bench, Connections, Hostile, Latency, Secured, Stored, Throughput};
use crate::report::grouped;

impl Display for Workload {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let devices = grouped(self.devices.into());
        let (channels, samples, window) = (self.channels, self.samples, self.window_frames);
        write!(f, "{devices} x {channels} x {samples}, window {window}")
    }
}

impl Display for Bench {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let rounds = match self.rounds {
            1 => "each measured once".to_owned(),
            // Repeating the other measurements as well would take too long.
            rounds => {
                format!("bursts are medians of {rounds} rounds, other values were measured once")
            }
        };
        writeln!(
            f,
            "{}, synced commits, {rounds}; fleets are devices x channels x samples in a frame",
            self.store
        )?;
        if !self.throughput.is_empty() {
            writeln!(
                f,
                "\nThroughput: gateway compared with the baseline, in a burst"
            )?;
            writeln!(f, "{}", throughput(&self.throughput))?;
        }
        if !self.latency.is_empty() {
            writeln!(f, "\nLatency: time from a frame's due time to its ACK")?;
            writeln!(f, "{}", latency(&self.latency))?;
        }
        if !self.secured.is_empty() {
            writeln!(f, "\nTLS: the same burst over TLS and over plain TCP")?;
            writeln!(f, "{}", secured(&self.secured))?;
        }
        if let Some(connections) = &self.connections {
            writeln!(
                f,
                "\nConnections: memory of the gateway, including the store's cache"
            )?;
            write_connections(f, connections)?;
        }
        if !self.hostile.is_empty() {
            writeln!(
                f,
                "\nHostile peers: effect on healthy devices; target: at most twice their p99"
            )?;
            writeln!(f, "{}", hostile(&self.hostile))?;
        }
        if let Some(stored) = &self.stored {
            let readings = grouped(stored.readings);
            writeln!(f, "\nBurst into a store with {readings} readings")?;
            writeln!(f, "{}", full(stored))?;
        }
        write!(f, "\n{}", self.machine)
    }
}

/// Creates a table of numbers with text in its first column.
fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(header);
    table.add_rows(rows);
    for number in 1..N {
        if let Some(column) = table.column_mut(number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn whole(number: f64) -> String {
    grouped(number.round() as u64)
}

fn throughput(workloads: &[Throughput]) -> impl Display {
    let header = [
        "fleet",
        "ratio",
        "readings/s",
        "baseline/s",
        "frames/s",
        "ack p99",
        "gateway",
        "fleet",
        "wire",
        "disk",
    ];
    let rows = workloads.iter().map(|one| {
        [
            one.workload.to_string(),
            format!("{:.2}", one.ratio),
            whole(one.median(|burst| burst.readings_per_s)),
            whole(one.baseline_readings_per_s()),
            whole(one.median(|burst| burst.frames_per_s)),
            format!("{:.0} ms", one.median(|burst| burst.ack_p99_ms)),
            format!(
                "{:.2} s/M",
                one.median(|burst| burst.gateway_cpu_s_per_million)
            ),
            format!(
                "{:.2} s/M",
                one.median(|burst| burst.fleet_cpu_s_per_million)
            ),
            format!("{:.2} B", one.median(|burst| burst.wire_bytes_per_reading)),
            format!("{:.1} B", one.median(|burst| burst.disk_bytes_per_reading)),
        ]
    });
    let note = "gateway, fleet: CPU time per million readings; wire, disk: bytes per reading";
    format!("{}\n{note}", table(header, rows).trim_fmt())
}

fn latency(cases: &[Latency]) -> impl Display {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
    let header = [
        "fleet", "of burst", "achieved", "p50", "p99", "p99.9", "max", "frames/s",
    ];
    let rows = cases.iter().map(|case| {
        let ack = case.ack_ms;
        [
            case.workload.to_string(),
            format!("{:.0} %", case.share * 100.0),
            format!("{:.1} %", case.achieved * 100.0),
            ms(ack.p50),
            ms(ack.p99),
            ms(ack.p999),
            ms(ack.max),
            whole(case.offered_frames_per_s),
        ]
    });
    table(header, rows).trim_fmt()
}

fn secured(workloads: &[Secured]) -> impl Display {
    let header = ["fleet", "ratio", "TLS/s", "plain/s", "gateway", "plain"];
    let rows = workloads.iter().map(|one| {
        let [plain, tls] = one.compared.medians(|burst| burst.readings_per_s);
        let [plain_s, tls_s] = one
            .compared
            .medians(|burst| burst.gateway_cpu_s_per_million);
        [
            one.workload.to_string(),
            format!("{:.2}", one.compared.ratio),
            whole(tls),
            whole(plain),
            format!("{tls_s:.2} s/M"),
            format!("{plain_s:.2} s/M"),
        ]
    });
    table(header, rows).trim_fmt()
}

impl Display for Attack {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attack::HalfTls => "unfinished TLS handshake",
            Attack::Silence => "silent",
            Attack::Slowness => "a byte every 10 s",
            Attack::NeverReads => "requests, never reads",
        })
    }
}

fn hostile(cases: &[Hostile]) -> impl Display {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
    let header = [
        "peers",
        "open",
        "closed/s",
        "p99 ratio",
        "p99",
        "alone",
        "p50",
        "alone",
        "cores",
        "alone",
        "memory",
        "alone",
        "20 more connected",
    ];
    let rows = cases.iter().map(|case| {
        [
            format!("{} {}", grouped(case.peers.into()), case.attack),
            whole(case.open),
            whole(case.closed_per_s),
            format!("{:.2}", case.ratio()),
            ms(case.attacked_ms.p99),
            ms(case.alone_ms.p99),
            ms(case.attacked_ms.p50),
            ms(case.alone_ms.p50),
            format!("{:.2}", case.attacked_cores),
            format!("{:.2}", case.alone_cores),
            mib(case.attacked_resident_bytes),
            mib(case.alone_resident_bytes),
            format!("{:.2} s", case.newcomers_s),
        ]
    });
    table(header, rows).trim_fmt()
}

fn write_connections(f: &mut Formatter<'_>, all: &Connections) -> fmt::Result {
    let count = grouped(all.connections.into());
    let slow = format!("{count} sending 60 readings every {:.0} s", all.period_s);
    let (connections, tls) = (all.connections, all.connections_tls);
    let states = [
        ("none".to_owned(), all.resident_bytes_before, connections),
        (
            format!("{count} idle"),
            all.resident_bytes_idle,
            connections,
        ),
        (
            format!("{} idle, over TLS", grouped(tls.into())),
            all.resident_bytes_tls,
            tls,
        ),
        (
            format!("{count} after one frame each"),
            all.resident_bytes_after_frame,
            connections,
        ),
        (slow, all.resident_bytes_slow, connections),
    ];
    let rows = states.into_iter().map(|(state, bytes, connections)| {
        let each = all.bytes_each(bytes, connections);
        let mib = bytes as f64 / f64::from(1 << 20);
        [state, whole(each), format!("{mib:.1} MiB")]
    });
    let header = ["connections", "bytes each", "total"];
    writeln!(f, "{}", table(header, rows).trim_fmt())?;
    writeln!(
        f,
        "sending: {:.3} cores, ACK p99 {:.1} ms; after dropping all: reconnected in {:.2} s",
        all.gateway_cores, all.ack_p99_ms, all.storm_s
    )
}

fn full(stored: &Stored) -> impl Display {
    let [empty, full] = stored.compared.medians(|burst| burst.readings_per_s);
    let [empty_ms, full_ms] = stored.compared.medians(|burst| burst.ack_p99_ms);
    let bytes = stored.bytes as f64 / stored.readings as f64;
    let header = [
        "ratio to empty",
        "full/s",
        "empty/s",
        "ack p99",
        "empty",
        "disk",
    ];
    let row = [
        format!("{:.2}", stored.compared.ratio),
        whole(full),
        whole(empty),
        format!("{full_ms:.0} ms"),
        format!("{empty_ms:.0} ms"),
        format!("{bytes:.1} B"),
    ];
    table(header, std::iter::once(row)).trim_fmt()
}
