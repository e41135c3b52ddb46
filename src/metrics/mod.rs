//! Counters, gauges and histograms of the gateway, in the text format of Prometheus.
//!
//! Every metric of the gateway starts with `fieldgate_` and uses base units. Labels have a fixed set of values, which
//! are all present from the start: an alert cannot see the increase of a counter that appears with the first error. Labels
//! of disks appear with the first measurement. No metric has a device as its label.

mod delays;
mod labels;
mod process;
mod stored;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fieldgate_protocol::error::{Class, Code};
use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

pub use self::delays::ACK_DELAYS;
use self::delays::Delays;
use self::labels::{
    ByAge, ByCode, ByContent, ByPlace, ByQuality, ByReason, ByResult, ByState, by_code,
};
use self::process::Process;
pub use self::stored::{AGES, QUALITIES, Stored};
use crate::sys::disk::{Place, Space};

/// Media type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// Reasons of gaps that have a name: those of the specification (GAP) and those of the gateway.
const GAP_REASONS: [(u8, &str); 5] = [
    (0, "overwritten"),
    (1, "queue_damaged"),
    (2, "erased"),
    (253, "refused"),
    (254, "lost_by_store"),
];
/// What retention deletes.
const DELETED_CONTENT: [&str; 6] = [
    "readings",
    "partitions",
    "frames",
    "gaps",
    "quarantined",
    "events",
];
/// Label of a reason that the device defines.
const OTHER: &str = "other";

/// Every metric of the gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    readings: Counter,
    readings_too_old: Counter,
    frames: Counter,
    duplicate_frames: Counter,
    gap_frames: Family<ByReason, Counter>,
    quarantined_frames: Family<ByCode, Counter>,
    nacks: Family<ByCode, Counter>,
    byes: Family<ByCode, Counter>,
    logins: Family<ByResult, Counter>,
    readings_by_quality: Family<ByQuality, Counter>,
    readings_by_age: Family<ByAge, Counter>,
    handshake: Histogram,
    ack_delay: Histogram,
    ack_delays: Delays,
    commit: Histogram,
    /// Time of receipt of the oldest frame of each running commit, in microseconds since 1970, by shard.
    committing: Mutex<BTreeMap<usize, i64>>,
    unstored_oldest: Gauge<f64, AtomicU64>,
    commit_readings: Histogram,
    store_errors: Counter,
    store_up: Gauge,
    connections: Family<ByState, Gauge>,
    accepted: Counter,
    devices: Family<ByState, Gauge>,
    /// Devices whose name two devices used within the last hour.
    pub twin_devices: Gauge,
    /// Readings that are queued for the store.
    pub queue_readings: Gauge,
    /// Memory of the queue for the store, in bytes.
    pub queue_bytes: Gauge,
    /// Bytes of frames in quarantine, and on the way to it.
    pub quarantine_bytes: Gauge,
    /// Maximum size of quarantine, in bytes.
    pub quarantine_bytes_max: Gauge,
    /// Size of the database, in bytes.
    pub store_bytes: Gauge,
    /// Size of SQLite's write-ahead log, in bytes.
    pub wal_bytes: Gauge,
    /// Size of the spool, in bytes; 0 without one.
    pub spool_bytes: Gauge,
    /// Frames that wait in the spool.
    pub spool_frames: Gauge,
    /// Time of receipt of the oldest frame in the spool in seconds since 1970; 0 if there is none.
    pub spool_oldest: Gauge,
    deleted: Family<ByContent, Counter>,
    /// Start of the last complete round of retention in seconds since 1970; 0 before the first one.
    pub retention_round: Gauge,
    /// Time of receipt of the oldest frame in the store in seconds since 1970; 0 if there is none.
    pub frame_oldest: Gauge,
    /// Estimate of the readings in the default partition of Postgres.
    pub default_partition_readings: Gauge,
    disk_free_bytes: Family<ByPlace, Gauge>,
    disk_bytes: Family<ByPlace, Gauge>,
    disk_low: Family<ByPlace, Gauge>,
    disk_stopped: Gauge,
    /// Expiry of the certificate in seconds since 1970, or 0 without TLS.
    pub certificate_expiry: Gauge,
}

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The peer has not proved a key.
    Handshake,
    /// A device's session.
    Session,
}

impl Phase {
    fn label(self) -> ByState {
        let state = match self {
            Phase::Handshake => "handshake",
            Phase::Session => "session",
        };
        ByState { state }
    }
}

/// Results of logins.
const LOGIN_RESULTS: [&str; 6] = [
    "admitted",
    "disabled",
    "unregistered",
    "key_replaced",
    "stream_conflict",
    "stream_bound",
];

/// States of devices.
const DEVICE_STATES: [&str; 5] = ["online", "late", "silent", "never", "disabled"];

/// Registers metrics.
struct Registrar<'r>(&'r mut Registry);

impl Registrar<'_> {
    fn add<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add_metric(name, help, M::default())
    }

    fn add_metric<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn add_seconds(&mut self, name: &str, help: &str) -> Histogram {
        // From 1 ms to 65 s.
        self.add_metric(
            name,
            help,
            Histogram::new(exponential_buckets(0.001, 2.0, 17)),
        )
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let mut new = Registrar(registry.sub_registry_with_prefix("fieldgate"));
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        new.0
            .register("build", "Version of the gateway", Info::new(version));
        let metrics = Metrics {
            readings: new.add(
                "readings_stored",
                "Readings stored and acknowledged by this process",
            ),
            readings_too_old: new.add(
                "readings_too_old",
                "Readings acknowledged by this process, but not stored, because they are older than their retention",
            ),
            frames: new.add(
                "frames_stored",
                "Frames stored and acknowledged by this process",
            ),
            duplicate_frames: new.add(
                "frames_duplicate",
                "Frames acknowledged again because they were stored before",
            ),
            gap_frames: new.add("gap_frames", "Frames that a device or the store lost"),
            quarantined_frames: new.add("frames_quarantined", "Frames put into quarantine"),
            nacks: new.add("nacks_sent", "NACK frames sent"),
            byes: new.add(
                "byes_sent",
                "Connections that the gateway ended with a BYE frame",
            ),
            logins: new.add("logins", "Logins of peers that proved a key"),
            readings_by_quality: new.add(
                "readings_by_time_quality",
                "Readings stored by this process, by the quality of their times",
            ),
            readings_by_age: new.add(
                "readings_by_age",
                "Readings stored by this process, by the time between sampling and arrival",
            ),
            handshake: new.add_seconds(
                "handshake_seconds",
                "Time from the acceptance of a connection to the proof of its key",
            ),
            committing: Mutex::default(),
            unstored_oldest: new.add(
                "unstored_oldest_timestamp_seconds",
                "Time of receipt of the oldest frame that is being committed, or 0",
            ),
            ack_delay: new.add_seconds(
                "ack_delay_seconds",
                "Time from the arrival of a frame to the end of its commit",
            ),
            ack_delays: Delays::default(),
            commit: new.add_seconds(
                "commit_seconds",
                "Duration of a commit, including its retries",
            ),
            commit_readings: new.add_metric(
                "commit_readings",
                "Readings in a commit",
                Histogram::new(exponential_buckets(1.0, 4.0, 10)),
            ),
            store_errors: new.add("store_errors", "Commits that failed and were retried"),
            store_up: new.add("store_up", "Whether the store accepts commits"),
            connections: new.add("connections", "Open connections of devices"),
            accepted: new.add("connections_accepted", "Connections accepted"),
            devices: new.add("devices", "Devices in the store, by presence"),
            twin_devices: new.add(
                "twin_devices",
                "Devices in the store whose name two devices used within the last hour",
            ),
            queue_readings: new.add("queue_readings", "Readings that are queued for the store"),
            queue_bytes: new.add("queue_bytes", "Memory of the queue for the store"),
            quarantine_bytes: new.add("quarantine_bytes", "Bytes of quarantined frames"),
            quarantine_bytes_max: new.add(
                "quarantine_bytes_max",
                "Maximum size of quarantined frames",
            ),
            store_bytes: new.add("store_bytes", "Size of the database"),
            wal_bytes: new.add("store_wal_bytes", "Size of the write-ahead log of SQLite"),
            spool_bytes: new.add("spool_bytes", "Size of the spool without the free pages of its file, or 0 without a spool"),
            spool_frames: new.add("spool_frames", "Frames that wait in the spool"),
            spool_oldest: new.add(
                "spool_oldest_timestamp_seconds",
                "Time of receipt of the oldest frame in the spool, or 0",
            ),
            deleted: new.add(
                "retention_deleted",
                "Rows that retention deleted, and dropped partitions of readings",
            ),
            retention_round: new.add(
                "retention_round_timestamp_seconds",
                "Start of the last complete round of retention, or 0",
            ),
            frame_oldest: new.add(
                "frame_oldest_timestamp_seconds",
                "Time of receipt of the oldest frame in the store, or 0",
            ),
            default_partition_readings: new.add(
                "default_partition_readings",
                "Estimated number of readings in the default partition of Postgres, which should be empty",
            ),
            disk_free_bytes: new.add(
                "disk_free_bytes",
                "Free space on each disk that the gateway writes to",
            ),
            disk_bytes: new.add(
                "disk_bytes",
                "Used and free space on each disk that the gateway writes to",
            ),
            disk_low: new.add(
                "disk_low",
                "Whether less than disk-warn-percent of the disk is free",
            ),
            disk_stopped: new.add(
                "disk_stopped",
                "Whether no readings are stored because less than disk-stop-percent of a disk is free",
            ),
            certificate_expiry: new.add(
                "certificate_expiry_timestamp_seconds",
                "Time when the certificate expires, or 0 without TLS",
            ),
            registry,
        };
        metrics.store_up.set(1);
        metrics.create_labels();
        metrics
    }
}

impl Metrics {
    /// Creates the metrics for all values of their labels.
    fn create_labels(&self) {
        for code in Code::ALL {
            let label = by_code(code as u8);
            match code.class() {
                Class::RetryLater | Class::Fix => drop(self.nacks.get_or_create(&label)),
                Class::Refused => {
                    drop(self.nacks.get_or_create(&label));
                    drop(self.quarantined_frames.get_or_create(&label));
                }
                _ => drop(self.byes.get_or_create(&label)),
            }
        }
        for reason in GAP_REASONS
            .map(|(_, reason)| reason)
            .into_iter()
            .chain([OTHER])
        {
            drop(self.gap_frames.get_or_create(&ByReason { reason }));
        }
        for result in LOGIN_RESULTS {
            drop(self.logins.get_or_create(&ByResult { result }));
        }
        for quality in QUALITIES {
            drop(
                self.readings_by_quality
                    .get_or_create(&ByQuality { quality }),
            );
        }
        for (age, _) in AGES {
            drop(self.readings_by_age.get_or_create(&ByAge { age }));
        }
        self.deleted(&DELETED_CONTENT.map(|content| (content, 0)));
        for state in DEVICE_STATES {
            drop(self.devices.get_or_create(&ByState { state }));
        }
        for phase in [Phase::Handshake, Phase::Session] {
            drop(self.connections.get_or_create(&phase.label()));
        }
    }

    /// Exports the limit of a gauge, once.
    pub fn set_limit(&mut self, name: &str, help: &str, limit: u64) {
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(limit).unwrap_or(i64::MAX));
        let registry = self.registry.sub_registry_with_prefix("fieldgate");
        registry.register(name, help, gauge);
    }

    /// Returns all metrics in the text format of Prometheus, version 0.0.4.
    pub fn text(&self) -> String {
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry).expect("a String takes everything");
        text
    }

    /// Counts a commit.
    pub fn committed(&self, stored: &Stored, took: Duration) {
        self.commit.observe(took.as_secs_f64());
        self.commit_readings.observe(stored.readings as f64);
        self.readings.inc_by(stored.readings);
        self.readings_too_old.inc_by(stored.too_old);
        self.frames.inc_by(stored.frames);
        self.duplicate_frames.inc_by(stored.duplicates);
        for (quality, readings) in QUALITIES.into_iter().zip(*stored.by_quality) {
            let counter = self
                .readings_by_quality
                .get_or_create(&ByQuality { quality });
            counter.inc_by(readings);
        }
        for ((age, _), readings) in AGES.into_iter().zip(*stored.by_age) {
            let counter = self.readings_by_age.get_or_create(&ByAge { age });
            counter.inc_by(readings);
        }
        for (reason, frames) in &stored.gaps {
            let name = GAP_REASONS.iter().find(|(code, _)| code == reason);
            let reason = name.map_or(OTHER, |(_, name)| name);
            self.gap_frames
                .get_or_create(&ByReason { reason })
                .inc_by(*frames);
        }
        for code in &stored.quarantined {
            self.quarantined_frames.get_or_create(&by_code(*code)).inc();
        }
    }

    /// Records that a shard commits frames, the oldest of which was received at this time; `None` at the end.
    pub fn set_committing(&self, shard: usize, oldest_us: Option<i64>) {
        let mut committing = self
            .committing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match oldest_us {
            Some(oldest_us) => committing.insert(shard, oldest_us),
            None => committing.remove(&shard),
        };
        let oldest_us = committing.values().min().copied();
        self.unstored_oldest
            .set(oldest_us.unwrap_or(0) as f64 / 1e6);
    }

    /// Observes the delay of a frame that is acknowledged now.
    pub fn acknowledged(&self, delay: Duration) {
        self.ack_delay.observe(delay.as_secs_f64());
        self.ack_delays.observe(delay);
    }

    /// Returns the number of acknowledged frames by delay, in intervals with rising limits.
    pub fn ack_delays(&self) -> [u64; ACK_DELAYS] {
        self.ack_delays.counts()
    }

    /// Returns the upper limit of an interval of [`Metrics::ack_delays`] in seconds; the last one has none.
    pub fn ack_delay_limit_s(interval: usize) -> f64 {
        delays::limit_s(interval)
    }

    /// Returns the number of readings stored by this process.
    pub fn readings_stored(&self) -> u64 {
        self.readings.get()
    }

    /// Returns the time of receipt of the oldest frame that is being committed, in microseconds since 1970.
    pub fn unstored_oldest_us(&self) -> Option<i64> {
        let committing = self.committing.lock();
        let committing = committing.unwrap_or_else(PoisonError::into_inner);
        committing.values().min().copied()
    }

    /// Counts a failed commit.
    pub fn store_failed(&self) {
        self.store_errors.inc();
    }

    /// Records whether the store accepts commits.
    pub fn set_store_up(&self, is_up: bool) {
        self.store_up.set(is_up.into());
    }

    /// Returns whether the store accepts commits.
    pub fn is_store_up(&self) -> bool {
        self.store_up.get() == 1
    }

    /// Counts what retention deleted, by the content of the rows.
    pub fn deleted(&self, counts: &[(&'static str, u64)]) {
        for (content, count) in counts {
            let counter = self.deleted.get_or_create(&ByContent { content });
            counter.inc_by(*count);
        }
    }

    /// Records the space of the disk of a place, and whether it is low.
    pub fn set_disk(&self, place: Place, space: Space, is_low: bool) {
        let place = ByPlace::from(place);
        let bytes = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        let free = self.disk_free_bytes.get_or_create(&place);
        free.set(bytes(space.free_bytes));
        let total = self.disk_bytes.get_or_create(&place);
        total.set(bytes(space.total_bytes));
        self.disk_low.get_or_create(&place).set(is_low.into());
    }

    /// Returns the free space of the disk that has the least, in bytes; `None` before the first one was measured.
    pub fn disk_free_bytes(&self) -> Option<i64> {
        let free = |place: Place| Some(self.disk_free_bytes.get(&ByPlace::from(place))?.get());
        { Place::ALL.into_iter() }.filter_map(free).min()
    }

    /// Records whether a full disk keeps readings from being stored.
    pub fn set_disk_stopped(&self, is_stopped: bool) {
        self.disk_stopped.set(is_stopped.into());
    }

    /// Returns whether a full disk keeps readings from being stored.
    pub fn is_disk_stopped(&self) -> bool {
        self.disk_stopped.get() == 1
    }

    /// Counts a NACK.
    pub fn nack(&self, code: Code) {
        self.nacks.get_or_create(&by_code(code as u8)).inc();
    }

    /// Counts a BYE.
    pub fn bye(&self, code: Code) {
        self.byes.get_or_create(&by_code(code as u8)).inc();
    }

    /// Counts a login with one of the results `admitted`, `disabled`, `unregistered`, `key_replaced`,
    /// `stream_conflict`, `stream_bound`.
    pub fn login(&self, result: &'static str) {
        self.logins.get_or_create(&ByResult { result }).inc();
    }

    /// Returns a one-line summary for operators: connected devices, stored readings, and whether the store is
    /// available.
    pub fn summary(&self) -> String {
        let sessions = self
            .connections
            .get_or_create(&Phase::Session.label())
            .get();
        let stored = self.readings.get();
        match (self.is_store_up(), self.is_disk_stopped()) {
            (false, _) => format!("store unavailable, devices connected: {sessions}"),
            (_, true) => format!("disk full, devices connected: {sessions}"),
            _ => format!("devices connected: {sessions}, readings stored: {stored}"),
        }
    }

    /// Sets the number of devices in one of the states `online`, `late`, `silent`, `never`, `disabled`.
    pub fn set_devices(&self, state: &'static str, devices: i64) {
        self.devices.get_or_create(&ByState { state }).set(devices);
    }

    /// Counts an accepted connection.
    pub fn accepted(&self) {
        self.accepted.inc();
        self.connections
            .get_or_create(&Phase::Handshake.label())
            .inc();
    }

    /// Moves a connection from its handshake, which took this long if it is known, to a session.
    pub fn proved(&self, took: Option<Duration>) {
        if let Some(took) = took {
            self.handshake.observe(took.as_secs_f64());
        }
        self.connections
            .get_or_create(&Phase::Handshake.label())
            .dec();
        self.connections
            .get_or_create(&Phase::Session.label())
            .inc();
    }

    /// Counts the end of a connection.
    pub fn disconnected(&self, phase: Phase) {
        self.connections.get_or_create(&phase.label()).dec();
    }
}
