//! The conformance suite: tests that run over every store.

use std::collections::BTreeMap;
use std::future::Future;

use tokio::time::{sleep, timeout};

use super::rows::LEFT_OPEN;
use super::*;
use crate::time::{
    BootClock, ClockStep, Origin, Quality, ResolvedTime, UNMEASURED, UTC_MAX_US, UTC_MIN_US,
};

mod clocks;
mod devices;
mod events;
mod quarantine;
mod schemas;
mod streams;

pub(super) use self::clocks::*;
pub(super) use self::devices::*;
pub(super) use self::events::*;
pub(super) use self::quarantine::*;
pub(super) use self::schemas::*;
pub(super) use self::streams::*;

/// A store under test, with access to its content.
pub(super) trait Harness: Sized + Send {
    type Store: Store;
    fn create() -> impl Future<Output = Self>;
    fn store(&mut self) -> &mut Self::Store;
    fn reopen(self) -> impl Future<Output = Self>;
    /// Enables or disables a device, and optionally replaces its key, like an operator. Returns the number of
    /// the change.
    fn change(
        &mut self,
        device: &str,
        is_enabled: bool,
        replaces_key: bool,
    ) -> impl Future<Output = i64>;
    /// Makes the next commit fail as on a full disk, half way if the store supports that.
    fn fill_disk(&mut self) -> impl Future<Output = ()>;
    fn free_disk(&mut self) -> impl Future<Output = ()>;
    fn dump(&mut self) -> impl Future<Output = Dump>;
}

type FrameRow = (String, i64, u64, u8, Option<u8>, Option<i64>);
type ReadingRow = (String, String, String, i64, u64, Option<u64>);

/// All stored data, sorted, in a form that every store shares.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Dump {
    /// Device, stream, seq, type, quality, offset.
    pub(super) frames: Vec<FrameRow>,
    /// Device, channel, unit, time, seq, the value's bits.
    pub(super) readings: Vec<ReadingRow>,
    /// Stream, first number, last number, reason.
    pub(super) gaps: Vec<(i64, u64, u64, u8)>,
    /// Stream, seq, code, detail, bytes.
    pub(super) quarantine: Vec<(i64, u64, u8, String, Vec<u8>)>,
    /// Bytes in quarantine, by device.
    pub(super) quarantine_usage: BTreeMap<String, u64>,
    /// Device, time, kind, code, detail.
    pub(super) events: Vec<(String, i64, String, u16, String)>,
    /// Device, boot, offset, delay.
    pub(super) clocks: Vec<(String, u32, i64, u64)>,
    /// Peer, claimed name, code, count, first and last time.
    pub(super) refusals: Vec<(String, String, u8, u64, i64, i64)>,
    /// Addresses of open sessions.
    pub(super) open_sessions: Vec<String>,
}

/// Waits until something has happened, checking it at an interval.
pub(super) async fn eventually(what: &str, mut has_happened: impl AsyncFnMut() -> bool) {
    const INTERVAL: Duration = Duration::from_millis(10);
    /// Far longer than anything takes on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(60);
    let happened = async {
        while !has_happened().await {
            sleep(INTERVAL).await;
        }
    };
    let happened = timeout(PATIENCE, happened).await;
    assert!(happened.is_ok(), "not within {PATIENCE:?}: {what}");
}

const AT_US: i64 = 1_700_000_000_000_000;
const DAY_US: i64 = 86_400_000_000;

pub(super) fn login(device: &str, stream: u64, next_seq: u64) -> Login {
    Login {
        device: device.to_owned(),
        stream,
        oldest_seq: 1,
        next_seq,
        firmware: "1.0".to_owned(),
        schema: None,
        clock: clock(1, AT_US),
        key_revision: 0,
        may_register: true,
        at_us: AT_US,
    }
}

fn clock(boot: u32, measured_at_us: i64) -> BootClock {
    BootClock {
        boot,
        offset_us: 5,
        delay_us: 1000,
        measured_at_us,
        origin: Origin::NONE,
        valid_from_us: 0,
    }
}

fn channel(id: u8, name: &str) -> DeclaredChannel {
    DeclaredChannel {
        id,
        name: name.to_owned(),
        unit: "Cel".to_owned(),
        kind: Kind::F64,
        exp10: -2,
    }
}

fn declare(device: DeviceId, schema: u16, hash: u8, names: &[&str]) -> Declare {
    let channels = (0..)
        .zip(names)
        .map(|(id, name)| channel(id, name))
        .collect();
    Declare {
        device,
        schema,
        hash: [hash; 8],
        channels,
    }
}

/// An admitted device with a schema of one channel.
pub(super) struct Peer {
    pub(super) device: DeviceId,
    pub(super) stream: StreamId,
    pub(super) series: SeriesId,
}

pub(super) async fn admitted(store: &mut impl Store, login: Login) -> Box<Admission> {
    let batch = Batch {
        logins: vec![login],
        ..Batch::default()
    };
    match store.commit(&batch).await.unwrap().logins.remove(0) {
        LoginOutcome::Admitted(admission) => admission,
        other => panic!("{other:?}"),
    }
}

async fn declared(store: &mut impl Store, declare: Declare) -> DeclareOutcome {
    let batch = Batch {
        declares: vec![declare],
        ..Batch::default()
    };
    store.commit(&batch).await.unwrap().declares.remove(0)
}

async fn accepted(store: &mut impl Store, declare: Declare) -> Arc<Schema> {
    match declared(store, declare).await {
        DeclareOutcome::Accepted(schema) => schema,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn peer(store: &mut impl Store, name: &str) -> Peer {
    let admission = admitted(store, login(name, 1, 1)).await;
    let schema = accepted(store, declare(admission.device, 1, 1, &["temperature"])).await;
    let stream = admission.receipt.stream();
    Peer {
        device: admission.device,
        stream,
        series: schema.channels[0].series,
    }
}

impl Peer {
    fn entry(&self, first_seq: u64, seq: u64, frame_type: u8, content: Content) -> Entry {
        let (device, stream) = (self.device, self.stream);
        Entry {
            device,
            stream,
            first_seq,
            seq,
            frame_type,
            crc: None,
            received_at_us: AT_US,
            content,
            clock: None,
        }
    }

    pub(super) fn readings(&self, seq: u64, rows: &[(i64, f64)]) -> Entry {
        let readings = Readings {
            time: ResolvedTime {
                offset_us: 77,
                quality: Quality::Anchored,
            },
            times_us: rows.iter().map(|(ts, _)| *ts).collect(),
            series: vec![self.series],
            values: rows.iter().map(|(_, value)| *value).collect(),
            too_old: 0,
        };
        self.entry(seq, seq, 0x11, Content::Readings(readings))
    }

    pub(super) fn gap(&self, first_seq: u64, seq: u64) -> Entry {
        self.entry(first_seq, seq, 0x12, Content::Gap { reason: 3 })
    }
}

fn entries(entries: Vec<Entry>) -> Batch {
    Batch {
        entries,
        ..Batch::default()
    }
}

async fn durable(store: &mut impl Store, batch: &Batch) -> Vec<u64> {
    let committed = store.commit(batch).await.unwrap();
    committed
        .receipts
        .iter()
        .map(Receipt::durable_seq)
        .collect()
}

fn seqs(dump: &Dump) -> Vec<u64> {
    dump.frames.iter().map(|frame| frame.2).collect()
}

pub(super) async fn a_schema_never_changes<H: Harness>() {
    let mut h = H::create().await;
    let device = admitted(h.store(), login("a", 1, 1)).await.device;
    let batch = Batch {
        declares: vec![
            declare(device, 1, 1, &["x", "y"]),
            declare(device, 1, 2, &["z"]),
            declare(device, 1, 1, &["x", "y"]),
            declare(device, 2, 3, &["y", "z"]),
        ],
        ..Batch::default()
    };
    let declares = h.store().commit(&batch).await.unwrap().declares;
    let [
        DeclareOutcome::Accepted(one),
        DeclareOutcome::Conflict,
        again,
        two,
    ] = &declares[..]
    else {
        panic!("{declares:?}");
    };
    let (DeclareOutcome::Accepted(again), DeclareOutcome::Accepted(two)) = (again, two) else {
        panic!("{declares:?}");
    };
    assert_eq!(one, again);
    assert_eq!(
        one.channels[1].series, two.channels[0].series,
        "a series outlives its schema"
    );
    assert_ne!(one.channels[0].series, two.channels[1].series);

    let mut h = h.reopen().await;
    let mut known = login("a", 1, 1);
    known.schema = Some((1, [1; 8]));
    assert_eq!(
        admitted(h.store(), known.clone()).await.schema.as_ref(),
        Some(one)
    );
    known.schema = Some((1, [9; 8]));
    assert_eq!(admitted(h.store(), known.clone()).await.schema, None);
    known.schema = Some((7, [1; 8]));
    assert_eq!(admitted(h.store(), known).await.schema, None);
    let other = declared(h.store(), declare(device, 1, 2, &["z"])).await;
    assert!(matches!(other, DeclareOutcome::Conflict));
}

pub(super) async fn hostile_names_are_stored_unchanged<H: Harness>() {
    let mut h = H::create().await;
    // Without U+0000, which a frame cannot contain (R23).
    let names = [
        "'; DROP TABLE readings; --",
        "\"q\\u0041%_?1$1",
        "Zähler 🌡 \u{202e}",
        "a\u{1}\u{7f}\\",
        "",
    ];
    for name in names {
        let device = admitted(h.store(), login(name, 1, 1)).await.device;
        let mut declare = declare(device, 1, 1, &[name]);
        declare.channels[0].unit = name.to_owned();
        accepted(h.store(), declare).await;
    }
    let mut h = h.reopen().await;
    for name in names {
        let mut login = login(name, 1, 1);
        login.schema = Some((1, [1; 8]));
        let admission = admitted(h.store(), login).await;
        let schema = admission.schema.expect("a stored schema");
        let peer = Peer {
            device: admission.device,
            stream: admission.receipt.stream(),
            series: schema.channels[0].series,
        };
        durable(h.store(), &entries(vec![peer.readings(1, &[(1, 1.0)])])).await;
    }
    let mut stored: Vec<_> = h
        .dump()
        .await
        .readings
        .into_iter()
        .map(|r| (r.0, r.1, r.2))
        .collect();
    stored.sort();
    let mut sent: Vec<_> = names
        .map(|n| (n.to_owned(), n.to_owned(), n.to_owned()))
        .into();
    sent.sort();
    assert_eq!(stored, sent);
}

/// Runs the suite over one store.
macro_rules! conformance {
    ($(#[$attribute:meta])* $harness:ty) => {
        $crate::store::conformance::conformance!(
            @each [$(#[$attribute])*] $harness:
            duplicates_are_stored_once,
            entries_that_do_not_continue_the_stream_wait,
            a_gap_is_stored_from_the_first_number_that_is_not_durable,
            quarantine_moves_the_watermark,
            quarantine_usage_is_the_sum_of_its_frames,
            a_quarantined_gap_covers_its_numbers,
            values_keep_their_bits,
            readings_with_equal_times_are_both_stored,
            a_login_sees_the_entries_before_it,
            a_disabled_device_is_refused,
            a_replaced_key_is_refused,
            unknown_devices_are_refused_when_registration_is_closed,
            refusals_are_recorded,
            the_latest_refusals_are_kept,
            a_schema_never_changes,
            a_schema_is_found_among_very_many,
            a_device_cannot_exceed_its_limits,
            hostile_names_are_stored_unchanged,
            watermarks_survive_a_restart,
            receipts_are_sorted_by_stream,
            after_a_transient_error_the_same_batch_commits_once,
            a_login_returns_the_clocks_of_the_latest_boots,
            clocks_from_a_wrong_future_do_not_displace_the_right_one,
            a_clock_step_corrects_earlier_measurements,
            a_chosen_clock_never_replaces_a_measured_one,
            events_are_kept,
            times_at_the_edges_are_kept,
            a_device_is_connected_while_a_session_is_open,
            an_empty_batch_commits,
            a_missing_stream_ends_sessions_but_not_the_store,
        );
    };
    (@each $attributes:tt $harness:ty: $($test:ident,)*) => {
        $(
            $crate::store::conformance::conformance!(@one $attributes $harness: $test);
        )*
    };
    (@one [$(#[$attribute:meta])*] $harness:ty: $test:ident) => {
            #[tokio::test]
            $(#[$attribute])*
            async fn $test() {
                $crate::store::conformance::$test::<$harness>().await;
            }
    };
}
pub(super) use conformance;
