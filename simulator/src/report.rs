//! Statistics of a run: a table for people, JSON for programs.
//!
//! Each task of the fleet counts into its own [`Report`]; the reports are added at the end. The fleet does the
//! measuring.
//!
//! Invariants: the rate counts only acknowledged readings, because unacknowledged ones may be lost. The keys of
//! the JSON are part of the command-line interface. A value that was not measured is null, not 0.

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Counts of a part of the fleet.
#[derive(Clone, Debug)]
pub struct Report {
    /// Number of devices that took part.
    pub devices: u64,
    /// Frames sent, including resent ones.
    pub frames_sent: u64,
    /// Frames acknowledged by the gateway, each counted once.
    pub frames_acked: u64,
    /// Readings sent, including resent ones.
    pub readings_sent: u64,
    /// Readings acknowledged by the gateway, each counted once.
    pub readings_acked: u64,
    /// Bytes of data frames sent, including headers and resent frames.
    pub bytes_sent: u64,
    /// Connections after the first of each device.
    pub reconnects: u64,
    /// Acknowledged frames that the gateway no longer had at a later WELCOME.
    pub frames_lost: u64,
    /// Frames sent but not acknowledged.
    pub frames_unacked: u64,
    /// NACKs received, by code.
    pub nacks: BTreeMap<u8, u64>,
    /// Connections that failed or ended unintentionally, by reason.
    pub losses: BTreeMap<String, u64>,
    /// Reason of the latest of these losses.
    pub latest_loss: String,
    ack_us: Histogram<u64>,
}

/// Longest ACK latency that the histogram distinguishes: an hour.
const ACK_US_MAX: u64 = 3_600_000_000;

impl Default for Report {
    fn default() -> Self {
        Self {
            devices: 0,
            frames_sent: 0,
            frames_acked: 0,
            readings_sent: 0,
            readings_acked: 0,
            bytes_sent: 0,
            reconnects: 0,
            frames_lost: 0,
            frames_unacked: 0,
            nacks: BTreeMap::new(),
            losses: BTreeMap::new(),
            latest_loss: String::new(),
            // Two significant digits give 1% precision. A histogram then grows to about 10 KiB; with three
            // digits, to 100.
            ack_us: Histogram::new(2).expect("two digits are within the histogram's limits"),
        }
    }
}

impl Report {
    /// Creates an empty report for a fleet of this many devices.
    pub fn new(devices: u32) -> Self {
        Self {
            devices: u64::from(devices),
            ..Self::default()
        }
    }

    /// Records the ACK latency of a frame.
    pub fn waited(&mut self, wait: Duration) {
        let wait_us = u64::try_from(wait.as_micros())
            .unwrap_or(ACK_US_MAX)
            .min(ACK_US_MAX);
        self.ack_us
            .record(wait_us)
            .expect("the histogram grows as needed");
    }

    /// Counts a NACK.
    pub fn refused(&mut self, code: u8) {
        *self.nacks.entry(code).or_default() += 1;
    }

    /// Counts the loss of a connection.
    pub fn lost(&mut self, reason: String) {
        self.latest_loss.clone_from(&reason);
        *self.losses.entry(reason).or_default() += 1;
    }

    /// Adds the counts of another part of the fleet.
    pub fn add(&mut self, other: &Self) {
        self.devices += other.devices;
        self.frames_sent += other.frames_sent;
        self.frames_acked += other.frames_acked;
        self.readings_sent += other.readings_sent;
        self.readings_acked += other.readings_acked;
        self.bytes_sent += other.bytes_sent;
        self.reconnects += other.reconnects;
        self.frames_lost += other.frames_lost;
        self.frames_unacked += other.frames_unacked;
        for (&code, count) in &other.nacks {
            *self.nacks.entry(code).or_default() += count;
        }
        for (reason, count) in &other.losses {
            *self.losses.entry(reason.clone()).or_default() += count;
        }
        self.ack_us
            .add(&other.ack_us)
            .expect("the histogram grows as needed");
    }

    /// Returns the statistics of a run that took `duration`.
    pub fn summary(&self, duration: Duration) -> Summary {
        let duration_s = duration.as_secs_f64();
        let over = |count: u64, by: f64| if by > 0.0 { count as f64 / by } else { 0.0 };
        let percentile = |percent| {
            let measured = !self.ack_us.is_empty();
            measured.then(|| self.ack_us.value_at_quantile(percent / 100.0) as f64 / 1_000.0)
        };
        Summary {
            devices: self.devices,
            duration_s,
            frames_sent: self.frames_sent,
            frames_acked: self.frames_acked,
            readings_sent: self.readings_sent,
            readings_acked: self.readings_acked,
            readings_per_s: over(self.readings_acked, duration_s),
            bytes_sent: self.bytes_sent,
            bytes_per_reading: over(self.bytes_sent, self.readings_sent as f64),
            ack_ms: Percentiles {
                p50: percentile(50.0),
                p90: percentile(90.0),
                p99: percentile(99.0),
                p999: percentile(99.9),
                max: percentile(100.0),
            },
            reconnects: self.reconnects,
            frames_lost: self.frames_lost,
            frames_unacked: self.frames_unacked,
            nacks: self.nacks.clone(),
            losses: self.losses.clone(),
        }
    }
}

/// Statistics of a run. Serialized, they are the `--report`; displayed, they are a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// See [`Report::devices`].
    pub devices: u64,
    /// Duration of the run, in seconds.
    pub duration_s: f64,
    /// See [`Report::frames_sent`].
    pub frames_sent: u64,
    /// See [`Report::frames_acked`].
    pub frames_acked: u64,
    /// See [`Report::readings_sent`].
    pub readings_sent: u64,
    /// See [`Report::readings_acked`].
    pub readings_acked: u64,
    /// Acknowledged readings per second.
    pub readings_per_s: f64,
    /// See [`Report::bytes_sent`].
    pub bytes_sent: u64,
    /// Bytes sent per reading sent.
    pub bytes_per_reading: f64,
    /// ACK latency: time from sending a frame to its ACK, in milliseconds.
    pub ack_ms: Percentiles,
    /// See [`Report::reconnects`].
    pub reconnects: u64,
    /// See [`Report::frames_lost`].
    pub frames_lost: u64,
    /// See [`Report::frames_unacked`].
    pub frames_unacked: u64,
    /// See [`Report::nacks`].
    pub nacks: BTreeMap<u8, u64>,
    /// See [`Report::losses`].
    pub losses: BTreeMap<String, u64>,
}

/// Percentiles in milliseconds, with 1% precision; null if there was no ACK.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// 99.9th percentile.
    pub p999: Option<f64>,
    /// Maximum.
    pub max: Option<f64>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1} ms"));
        let ack = self.ack_ms;
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["", "sent", "acked"]);
        table.add_row([
            "frames",
            &grouped(self.frames_sent),
            &grouped(self.frames_acked),
        ]);
        table.add_row([
            "readings",
            &grouped(self.readings_sent),
            &grouped(self.readings_acked),
        ]);
        for column in [1, 2] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        writeln!(f, "{}", table.trim_fmt())?;
        writeln!(
            f,
            "{} devices for {:.1} s: {} readings/s acked",
            grouped(self.devices),
            self.duration_s,
            grouped(self.readings_per_s.round() as u64)
        )?;
        let bytes = grouped(self.bytes_sent);
        writeln!(
            f,
            "{bytes} bytes sent, {:.2} bytes per reading",
            self.bytes_per_reading
        )?;
        let (half, most, nearly_all) = (ms(ack.p50), ms(ack.p90), ms(ack.p99));
        writeln!(
            f,
            "ACK latency: p50 {half}, p90 {most}, p99 {nearly_all}, max {}",
            ms(ack.max)
        )?;
        write!(f, "reconnects: {}", grouped(self.reconnects))?;
        if !self.nacks.is_empty() {
            let nacks = self.nacks.iter();
            let nacks: Vec<_> = nacks
                .map(|(code, n)| format!("{} with code {code}", grouped(*n)))
                .collect();
            write!(f, "; NACKs: {}", nacks.join(", "))?;
        }
        if self.frames_unacked > 0 {
            let unacked = grouped(self.frames_unacked);
            write!(f, "\nnot acknowledged: {unacked} frames that were sent")?;
        }
        if self.frames_lost > 0 {
            let lost = grouped(self.frames_lost);
            write!(
                f,
                "\nLOST: {lost} acknowledged frames that the gateway no longer has"
            )?;
        }
        for (reason, count) in &self.losses {
            write!(f, "\nconnections lost: {}: {reason}", grouped(*count))?;
        }
        Ok(())
    }
}

/// Formats `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(first_ms: u64, last_ms: u64) -> Report {
        let mut report = Report {
            devices: 5,
            frames_sent: 1_100,
            frames_acked: 1_000,
            readings_sent: 66_000,
            readings_acked: 60_000,
            bytes_sent: 132_000,
            reconnects: 1,
            ..Report::default()
        };
        (first_ms..=last_ms).for_each(|ms| report.waited(Duration::from_millis(ms)));
        report.refused(22);
        report.lost("closed by the gateway".into());
        report
    }

    #[test]
    fn parts_add_up() {
        let mut whole = report(1, 50);
        let mut other = report(51, 100);
        other.refused(30);
        whole.add(&other);
        let summary = whole.summary(Duration::from_secs(4));
        assert_eq!(
            (summary.devices, summary.frames_sent, summary.reconnects),
            (10, 2_200, 2)
        );
        assert_eq!(summary.nacks, BTreeMap::from([(22, 2), (30, 1)]));
        let closed = "closed by the gateway".to_owned();
        assert_eq!(summary.losses, BTreeMap::from([(closed, 2)]));
        assert_eq!(
            (summary.readings_per_s, summary.bytes_per_reading),
            (30_000.0, 2.0)
        );
        let near = |value: Option<f64>, ms: f64| (value.unwrap() / ms - 1.0).abs() < 0.011;
        let ack = summary.ack_ms;
        assert!(
            near(ack.p50, 50.0) && near(ack.p90, 90.0) && near(ack.p99, 99.0),
            "{ack:?}"
        );
        assert!(near(ack.p999, 100.0) && near(ack.max, 100.0), "{ack:?}");
    }

    #[test]
    fn the_json_has_exactly_the_documented_keys() {
        let json = serde_json::to_value(report(1, 9).summary(Duration::from_secs(2))).unwrap();
        let keys = |value: &serde_json::Value| -> Vec<String> {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        let promised = [
            "ack_ms",
            "bytes_per_reading",
            "bytes_sent",
            "devices",
            "duration_s",
            "frames_acked",
            "frames_lost",
            "frames_sent",
            "frames_unacked",
            "losses",
            "nacks",
            "readings_acked",
            "readings_per_s",
            "readings_sent",
            "reconnects",
        ];
        assert_eq!(keys(&json), promised);
        assert_eq!(keys(&json["ack_ms"]), ["max", "p50", "p90", "p99", "p999"]);
        assert_eq!(json["nacks"], serde_json::json!({"22": 1}));
    }

    #[test]
    fn a_run_without_acks_has_no_latency_and_no_rate() {
        let json = serde_json::to_value(Report::default().summary(Duration::ZERO)).unwrap();
        assert_eq!(json["ack_ms"]["p99"], serde_json::Value::Null);
        assert_eq!(
            (&json["readings_per_s"], &json["bytes_per_reading"]),
            (&0.0.into(), &0.0.into())
        );
    }

    #[test]
    fn the_table_shows_the_statistics_in_a_few_lines() {
        let text = report(10, 10).summary(Duration::from_secs(4)).to_string();
        for figure in [
            "1,100",
            "60,000",
            "5 devices for 4.0 s: 15,000 readings/s acked",
            "2.00 bytes per reading",
            "p99 10.",
            "reconnects: 1; NACKs: 1 with code 22",
            "connections lost: 1: closed by the gateway",
        ] {
            assert!(text.contains(figure), "{figure} is not in\n{text}");
        }
        assert!(
            text.lines().count() <= 12 && text.lines().all(|line| line.len() < 200),
            "{text}"
        );
    }

    #[test]
    fn waits_beyond_an_hour_count_as_an_hour() {
        let mut report = Report::default();
        report.waited(Duration::MAX);
        let max = report.summary(Duration::from_secs(1)).ack_ms.max.unwrap();
        assert!((3_600_000.0..3_640_000.0).contains(&max), "{max}");
    }

    #[test]
    fn long_numbers_are_grouped() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
