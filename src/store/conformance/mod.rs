//! The conformance suite: tests that run over every store.

use std::future::Future;

use super::rows::LEFT_OPEN;
use super::*;
use crate::time::{
    BootClock, ClockStep, Origin, Quality, ResolvedTime, UNMEASURED, UTC_MAX_US, UTC_MIN_US,
};

mod devices;
mod quarantine;
mod schemas;

pub(super) use self::devices::*;
pub(super) use self::quarantine::*;
pub(super) use self::schemas::*;

/// A store under test, with access to its content.
pub(super) trait Harness: Sized + Send {
    type Store: Store;
    /// Creates a new, empty store.
    fn create() -> impl Future<Output = Self>;
    fn store(&mut self) -> &mut Self::Store;
    /// Closes the store and opens it again.
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
    /// Device, time, kind, code, detail.
    pub(super) events: Vec<(String, i64, String, u16, String)>,
    /// Device, boot, offset, delay.
    pub(super) clocks: Vec<(String, u32, i64, u64)>,
    /// Peer, claimed name, code, count, first and last time.
    pub(super) refusals: Vec<(String, String, u8, u64, i64, i64)>,
    /// Addresses of open sessions.
    pub(super) open_sessions: Vec<String>,
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

pub(super) async fn duplicates_are_stored_once<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let first = entries(vec![
        peer.readings(1, &[(10, 1.0)]),
        peer.readings(1, &[(10, 1.0)]),
        peer.readings(2, &[(11, 2.0), (12, 3.0)]),
    ]);
    assert_eq!(durable(h.store(), &first).await, [2]);
    assert_eq!(durable(h.store(), &first).await, [2]);
    assert_eq!(
        durable(h.store(), &entries(vec![peer.readings(1, &[])])).await,
        [2]
    );
    let dump = h.dump().await;
    assert_eq!(seqs(&dump), [1, 2]);
    assert_eq!(dump.readings.len(), 3);
    assert_eq!(dump.frames[0], ("a".into(), 1, 1, 0x11, Some(1), Some(77)));
}

pub(super) async fn entries_that_do_not_continue_the_stream_wait<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![
        peer.readings(2, &[(2, 2.0)]),
        peer.readings(1, &[(1, 1.0)]),
    ]);
    assert_eq!(durable(h.store(), &batch).await, [1]);
    assert_eq!(
        durable(h.store(), &entries(vec![peer.gap(3, 9)])).await,
        [1]
    );
    assert_eq!(seqs(&h.dump().await), [1]);
}

pub(super) async fn a_gap_is_stored_from_the_first_number_that_is_not_durable<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![peer.gap(1, 4), peer.gap(3, 9), peer.gap(2, 9)]);
    assert_eq!(durable(h.store(), &batch).await, [9]);
    let dump = h.dump().await;
    assert_eq!(dump.gaps, [(1, 1, 4, 3), (1, 5, 9, 3)]);
    assert_eq!(seqs(&dump), [4, 9]);
    // The longest gap that can be stored, and one that cannot.
    let batch = entries(vec![peer.gap(10, u64::MAX), peer.gap(10, ledger::SEQ_MAX)]);
    assert_eq!(durable(h.store(), &batch).await, [ledger::SEQ_MAX]);
}

pub(super) async fn values_keep_their_bits<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let values = [
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -0.0,
        21.57,
        3.0,
        -1.0,
        9_007_199_254_740_993.0,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
        1e18,
        -9_223_372_036_854_775_808.0,
    ];
    let mut rows: Vec<(i64, f64)> = (0..).zip(values).collect();
    rows.push((1000, f64::NAN));
    rows.push((i64::MAX, 1.0));
    durable(h.store(), &entries(vec![peer.readings(1, &rows)])).await;
    let stored: Vec<_> = h
        .dump()
        .await
        .readings
        .into_iter()
        .map(|r| (r.3, r.5))
        .collect();
    let sent = |(ts, value): &(i64, f64)| (*ts, (!value.is_nan()).then_some(value.to_bits()));
    assert_eq!(stored, rows.iter().map(sent).collect::<Vec<_>>());
}

pub(super) async fn readings_with_equal_times_are_both_stored<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![
        peer.readings(1, &[(10, 1.0), (20, 2.0)]),
        peer.readings(2, &[(10, 1.0)]),
    ]);
    durable(h.store(), &batch).await;
    let stored: Vec<_> = h
        .dump()
        .await
        .readings
        .into_iter()
        .map(|r| (r.3, r.4))
        .collect();
    assert_eq!(stored, [(10, 1), (10, 2), (20, 1)]);
}

pub(super) async fn a_login_sees_the_entries_before_it<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = Batch {
        logins: vec![
            login("a", 1, 2),
            login("a", 1, 3),
            login("a", 2, 1),
            login("a", 2, 1),
        ],
        entries: vec![peer.readings(1, &[]), peer.readings(2, &[])],
        ..Batch::default()
    };
    let committed = h.store().commit(&batch).await.unwrap();
    assert!(matches!(committed.logins[0], LoginOutcome::StreamConflict));
    let receipt = |outcome: &LoginOutcome| match outcome {
        LoginOutcome::Admitted(admission) => admission.receipt,
        other => panic!("{other:?}"),
    };
    assert_eq!(receipt(&committed.logins[1]).durable_seq(), 2);
    assert_eq!(receipt(&committed.logins[1]).stream(), peer.stream);
    assert_eq!(receipt(&committed.logins[2]).durable_seq(), 0);
    assert_ne!(receipt(&committed.logins[2]).stream(), peer.stream);
    assert_eq!(receipt(&committed.logins[2]), receipt(&committed.logins[3]));
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

pub(super) async fn watermarks_survive_a_restart<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    durable(h.store(), &entries(vec![peer.readings(1, &[(1, 1.0)])])).await;
    let before = h.dump().await;
    let mut h = h.reopen().await;
    assert_eq!(h.dump().await, before);
    assert_eq!(
        admitted(h.store(), login("a", 1, 2))
            .await
            .receipt
            .durable_seq(),
        1
    );
    let again = entries(vec![
        peer.readings(1, &[(1, 1.0)]),
        peer.readings(2, &[(2, 1.0)]),
    ]);
    assert_eq!(durable(h.store(), &again).await, [2]);
    assert_eq!(seqs(&h.dump().await), [1, 2]);
}

pub(super) async fn receipts_are_sorted_by_stream<H: Harness>() {
    let mut h = H::create().await;
    let mut peers = Vec::new();
    for n in 0..23 {
        peers.push(peer(h.store(), &format!("d{n}")).await);
    }
    let batch = entries(
        peers
            .iter()
            .rev()
            .map(|peer| peer.readings(1, &[(1, 1.0)]))
            .collect(),
    );
    let receipts = h.store().commit(&batch).await.unwrap().receipts;
    let streams: Vec<StreamId> = receipts.iter().map(Receipt::stream).collect();
    assert_eq!(
        streams,
        peers.iter().map(|peer| peer.stream).collect::<Vec<_>>()
    );
    assert!(receipts.iter().all(|receipt| receipt.durable_seq() == 1));
}

pub(super) async fn after_a_transient_error_the_same_batch_commits_once<H: Harness>() {
    let mut h = H::create().await;
    let one = peer(h.store(), "a").await;
    durable(h.store(), &entries(vec![one.readings(1, &[(1, 1.0)])])).await;
    let rows: Vec<(i64, f64)> = (0..20_000).map(|ts| (ts, ts as f64)).collect();
    let batch = Batch {
        logins: vec![login("b", 1, 1)],
        declares: vec![declare(one.device, 2, 2, &["new"])],
        entries: vec![one.readings(2, &rows), one.gap(3, 5)],
        clocks: vec![(one.device, clock(9, AT_US))],
        ..Batch::default()
    };
    let before = h.dump().await;
    h.fill_disk().await;
    let failed = h.store().commit(&batch).await;
    assert!(
        matches!(failed, Err(StoreError::Transient(_))),
        "{failed:?}"
    );
    h.free_disk().await;
    assert_eq!(h.dump().await, before);
    let committed = h.store().commit(&batch).await.unwrap();
    assert_eq!(committed.receipts[0].durable_seq(), 5);
    assert!(matches!(committed.logins[0], LoginOutcome::Admitted(_)));
    assert_eq!(
        durable(h.store(), &entries(vec![one.readings(6, &[(6, 6.0)])])).await,
        [6]
    );
    let dump = h.dump().await;
    assert_eq!(seqs(&dump), [1, 2, 5, 6]);
    assert_eq!(dump.readings.len(), 20_002);
}

pub(super) async fn a_login_returns_the_clocks_of_the_latest_boots<H: Harness>() {
    let mut h = H::create().await;
    for boot in 1..=9_u32 {
        let mut login = login("a", 1, 1);
        login.clock = clock(boot, AT_US + i64::from(boot));
        admitted(h.store(), login).await;
    }
    // The device lost its boot count. Its latest boot is number 1 again, measured less precisely than the
    // stored clock of that number, but years later.
    let mut again = login("a", 1, 1);
    again.clock = BootClock {
        offset_us: 6,
        delay_us: 2000,
        ..clock(1, AT_US + 1_000_000_000_000)
    };
    let admission = admitted(h.store(), again.clone()).await;
    let boots: Vec<u32> = admission.clocks.iter().map(|clock| clock.boot).collect();
    assert_eq!(boots, [1, 9, 8, 7, 6, 5, 4, 3]);
    assert_eq!(admission.clocks[0], again.clock);
    // A worse measurement soon after it is not stored, but a clock that a session chose is.
    let mut worse = again.clone();
    worse.clock.delay_us = 50_000;
    assert_eq!(
        admitted(h.store(), worse.clone()).await.clocks[0],
        again.clock
    );
    let batch = Batch {
        clocks: vec![(admission.device, worse.clock)],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
    assert!(h.dump().await.clocks.contains(&("a".into(), 1, 6, 50_000)));
}

/// The gateway's clock was a day ahead for nine boots of a device, and was corrected while the gateway was
/// stopped.
pub(super) async fn clocks_from_a_wrong_future_do_not_displace_the_right_one<H: Harness>() {
    let mut h = H::create().await;
    admitted(h.store(), login("a", 1, 1)).await;
    for boot in 2..=10_u32 {
        let mut login = login("a", 1, 1);
        login.at_us = AT_US + DAY_US + i64::from(boot);
        login.clock = clock(boot, login.at_us);
        admitted(h.store(), login).await;
    }
    let mut right = login("a", 1, 1);
    right.at_us = AT_US + 3_600_000_000;
    right.clock = clock(11, right.at_us);
    let admission = admitted(h.store(), right.clone()).await;
    let boots: Vec<u32> = admission.clocks.iter().map(|clock| clock.boot).collect();
    assert_eq!(boots, [11, 1, 10, 9, 8, 7, 6, 5]);
    // A clock that contradicts the stored clock of the same boot replaces it, however precise the stored one
    // is.
    right.clock = BootClock {
        offset_us: 5 - DAY_US,
        delay_us: 900_000,
        ..clock(10, right.at_us)
    };
    assert_eq!(
        admitted(h.store(), right.clone()).await.clocks[0],
        right.clock
    );
}

/// A step corrects earlier measurements on its timeline and nothing else; it is recorded once.
pub(super) async fn a_clock_step_corrects_earlier_measurements<H: Harness>() {
    let mut h = H::create().await;
    let before = Origin {
        timeline: 7,
        at_us: DAY_US,
    };
    let after = Origin {
        timeline: 7,
        at_us: 0,
    };
    let at = |boot, origin: Origin| {
        let mut login = login("a", 1, 1);
        login.at_us += origin.at_us;
        login.clock = BootClock {
            offset_us: 5 + origin.at_us,
            origin,
            ..clock(boot, login.at_us)
        };
        login
    };
    admitted(h.store(), at(1, before)).await;
    let elsewhere = Origin {
        timeline: 8,
        ..before
    };
    admitted(h.store(), at(2, elsewhere)).await;
    let step = ClockStep {
        origin: after,
        since_us: AT_US,
        before_us: AT_US + DAY_US,
        after_us: AT_US,
    };
    for _ in 0..2 {
        // Repeat the batch, as after a COMMIT with unknown outcome.
        let batch = Batch {
            steps: vec![step],
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
    }
    let admission = admitted(h.store(), at(3, after)).await;
    let offsets = admission.clocks.iter();
    let offsets: Vec<(u32, i64)> = offsets.map(|clock| (clock.boot, clock.offset_us)).collect();
    assert_eq!(offsets, [(3, 5), (1, 5), (2, 5 + DAY_US)]);
    // The first boot again: its measurement agrees with the stored clock.
    let again = admitted(h.store(), at(1, after)).await;
    assert_eq!(again.clocks[0], at(1, after).clock);
}

/// The session did not receive the clock of that boot, because there were too many.
pub(super) async fn a_chosen_clock_never_replaces_a_measured_one<H: Harness>() {
    let mut h = H::create().await;
    let peer = admitted(h.store(), login("a", 1, 1)).await;
    let chosen = BootClock {
        offset_us: 77,
        delay_us: UNMEASURED,
        ..clock(1, AT_US)
    };
    let batch = Batch {
        clocks: vec![
            (peer.device, chosen),
            (peer.device, BootClock { boot: 4, ..chosen }),
        ],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
    let chosen = ("a".into(), 4, 77, UNMEASURED);
    assert_eq!(h.dump().await.clocks, [("a".into(), 1, 5, 1000), chosen]);
    // A login receives it like any other clock, and a measurement replaces it.
    let mut measured = login("a", 1, 1);
    measured.clock = clock(4, AT_US);
    let admission = admitted(h.store(), measured.clone()).await;
    assert_eq!(admission.clocks[0], measured.clock);
}

pub(super) async fn events_are_kept<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let content = Content::Event {
        time: ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        },
        at_us: 5,
        level: 4,
        code: 65_535,
        text: "pump's dry".to_owned(),
    };
    let event = |kind, at_us, code| DeviceEvent {
        device: peer.device,
        session: None,
        at_us,
        kind,
        code,
        detail: "192.0.2.1:9".to_owned(),
    };
    let batch = Batch {
        entries: vec![
            peer.entry(1, 1, 0x14, content.clone()),
            peer.entry(1, 1, 0x14, content),
        ],
        events: vec![
            event(DeviceEventKind::Connected, 1, 0),
            event(DeviceEventKind::Disconnected, 9, 42),
        ],
        ..Batch::default()
    };
    assert_eq!(durable(h.store(), &batch).await, [1]);
    let line = |at, kind: &str, code, detail: &str| {
        ("a".to_owned(), at, kind.to_owned(), code, detail.to_owned())
    };
    assert_eq!(
        h.dump().await.events,
        [
            line(1, "connected", 0, "192.0.2.1:9"),
            line(5, "event", 65_535, "pump's dry"),
            line(9, "disconnected", 42, "192.0.2.1:9"),
        ]
    );
}

/// A session that was taken over, in this gateway or another, ends after its successor has begun. The next run
/// of a gateway closes sessions that the last run left open.
pub(super) async fn a_device_is_connected_while_a_session_is_open<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let event = |session, kind, at_us| DeviceEvent {
        device: peer.device,
        session: Some(SessionId(session)),
        at_us,
        kind,
        code: 0,
        detail: format!("192.0.2.1:{session}"),
    };
    let (begins, ends) = (DeviceEventKind::Connected, DeviceEventKind::Disconnected);
    // The clock steps back in between, so events are not in time order.
    for (events, open) in [
        (vec![event(1, begins, 900)], vec!["192.0.2.1:1"]),
        (
            vec![event(2, begins, 100)],
            vec!["192.0.2.1:1", "192.0.2.1:2"],
        ),
        (vec![event(1, ends, 950)], vec!["192.0.2.1:2"]),
        (
            vec![event(3, begins, 101), event(2, ends, 101)],
            vec!["192.0.2.1:3"],
        ),
        (
            vec![event(4, begins, 7), event(4, ends, 7)],
            vec!["192.0.2.1:3"],
        ),
        // Repeat the batch, as after a COMMIT with unknown outcome.
        (vec![event(3, begins, 101)], vec!["192.0.2.1:3"]),
    ] {
        let batch = Batch {
            events,
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
        assert_eq!(h.dump().await.open_sessions, open);
    }
    let mut h = h.reopen().await;
    let dump = h.dump().await;
    assert_eq!(dump.open_sessions, Vec::<String>::new());
    let closed = { dump.events.iter() }.filter(|(.., detail)| detail == LEFT_OPEN);
    assert_eq!(closed.count(), 1);
}

/// The gateway's clock at either end of its valid range, and device times up to 285 years (R50) beyond it.
pub(super) async fn times_at_the_edges_are_kept<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let boot_us = 1 << 53;
    let times = [
        UTC_MIN_US - boot_us,
        UTC_MIN_US,
        UTC_MAX_US,
        UTC_MAX_US + boot_us,
    ];
    for (seq, received_at_us) in [(1, UTC_MIN_US), (2, UTC_MAX_US)] {
        let rows = times.map(|us| (us, 1.0));
        let mut entry = peer.readings(seq, &rows);
        entry.received_at_us = received_at_us;
        let mut login = login("a", 1, seq + 1);
        login.at_us = received_at_us;
        login.clock = clock(seq as u32, received_at_us);
        let batch = Batch {
            entries: vec![entry],
            logins: vec![login],
            ..Batch::default()
        };
        let committed = h.store().commit(&batch).await.unwrap();
        assert!(matches!(committed.logins[0], LoginOutcome::Admitted(_)));
    }
    let dump = h.dump().await;
    let mut found: Vec<i64> = dump.readings.iter().map(|row| row.3).collect();
    found.dedup();
    assert_eq!(found, times);
}

pub(super) async fn an_empty_batch_commits<H: Harness>() {
    let mut h = H::create().await;
    let committed = h.store().commit(&Batch::default()).await.unwrap();
    assert!(committed.receipts.is_empty() && committed.logins.is_empty());
}

/// For example, the stream of a device that was removed while its frames waited for an unavailable store.
pub(super) async fn a_missing_stream_ends_sessions_but_not_the_store<H: Harness>() {
    let mut h = H::create().await;
    let good = peer(h.store(), "a").await;
    let mut gone = peer(h.store(), "b").await;
    gone.stream = StreamId(4711);
    let batch = entries(vec![good.readings(1, &[]), gone.readings(1, &[])]);
    let failed = h.store().commit(&batch).await;
    assert!(matches!(failed, Err(StoreError::Replaced(_))), "{failed:?}");
    let batch = entries(vec![good.readings(1, &[])]);
    let committed = h.store().commit(&batch).await.unwrap();
    assert_eq!(committed.receipts[0].durable_seq(), 1);
}

/// For example, when two sessions of copies of one device sent it at the same time.
pub(super) async fn a_number_reused_with_different_content_is_recorded<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let frame = |seq, crc| Entry {
        crc: Some(crc),
        ..peer.readings(seq, &[(seq.cast_signed(), 1.0)])
    };
    // Duplicates within one batch and across two.
    for batch in [
        vec![frame(1, 10), frame(1, 10)],
        vec![frame(2, 20), frame(1, 10)],
    ] {
        h.store().commit(&entries(batch)).await.unwrap();
    }
    assert!(h.dump().await.events.is_empty());
    h.store()
        .commit(&entries(vec![frame(3, 30), frame(3, 31)]))
        .await
        .unwrap();
    let events = h.dump().await.events;
    let kinds: Vec<_> = events
        .iter()
        .map(|event| (&event.2[..], &event.4[..]))
        .collect();
    assert_eq!(
        kinds,
        [(
            "number_reused",
            "number 3 was reused with different content"
        )]
    );
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
