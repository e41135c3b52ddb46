//! `quarantine replay`: frames that an older gateway could not decode are stored once, as if decoded
//! on receipt, while a gateway runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;
use fieldgate_protocol::message::{Data, Event, Gap};
use fieldgate_protocol::value::Clock;

use crate::support::client::Link;
use crate::support::database::PgDatabase;
use crate::support::gateway::{Database, Ended, Gateway, command, meddle, run};
use crate::support::logs::keep_of;
use crate::support::messages::{
    T0_US, TEMPERATURE, damaged, event, frame, gap, header, no_columns, raw, readings, readings_at,
    reheaded, sealed, with_columns,
};

/// Gets decodable `bytes` into quarantine as number `seq`: sends a frame of an unknown type under this
/// number, and replaces its quarantined bytes.
fn quarantined(link: &mut Link, seq: u64, bytes: &[u8], meddle: impl FnOnce(&str)) {
    link.send(&sealed(header(0x1E, seq), &[]));
    link.expect_nack(seq, Code::UnknownType, seq + 1);
    link.expect_ack(seq);
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    meddle(&digits);
}

fn in_sqlite(data_dir: &Path, device: &str, seq: u64) -> impl FnOnce(&str) {
    let (path, device) = (data_dir.join("fieldgate.db"), device.to_owned());
    move |digits: &str| {
        let sql = format!(
            "UPDATE quarantine SET bytes = x'{digits}' WHERE seq = {seq}
             AND device_id = (SELECT id FROM devices WHERE name = '{device}')"
        );
        meddle(&path, &sql);
    }
}

fn replay(store: &str, args: &[&str]) -> Ended {
    run(&[&["quarantine", "replay", "--store", store], args].concat())
}

fn since_boot(seq: u64, boot: u32, t0: i64) -> Vec<u8> {
    let data = Data {
        clock: Clock::Boot,
        boot,
        t0,
        ..no_columns(2)
    };
    with_columns(data, seq, &[raw(TEMPERATURE, &[5; 16])])
}

/// A stored frame, without the columns that differ between the two stores.
type Row = (i64, i64, i64, Option<i64>, Option<i64>);

/// Times and values; first and last numbers and reasons.
type Readings = Vec<(i64, Option<f64>)>;
type Gaps = Vec<(i64, i64, i64)>;

/// Returns numbers, types, counts, qualities and offsets of a device, and its readings, events and gaps.
fn all_of(database: &mut Database, device: &str) -> (Vec<Row>, Readings, Gaps) {
    let of_device = format!(
        "JOIN streams s ON s.id = f.stream_id JOIN devices d ON d.id = s.device_id
        WHERE d.name = '{device}'"
    );
    let frames = database.rows(&format!(
        "SELECT f.seq, f.type, f.readings, f.quality, f.clock_offset_us FROM frames f {of_device} ORDER BY 1"
    ));
    let gaps = database.rows(&format!(
        "SELECT f.from_seq, f.to_seq, f.reason FROM gaps f {of_device} ORDER BY 1"
    ));
    (frames, database.readings(device), gaps)
}

/// A rejected GAP covers its numbers although it is not decoded: no other frame is stored under them (R45).
#[test]
fn a_rejected_gap_counts_and_replay_adds_its_reason() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let critical = Gap {
        from_seq: 2,
        reason: 1,
        ext: &[4, 0],
    };
    link.send(&frame(&critical, 5));
    link.expect_nack(5, Code::Critical, 6);
    link.expect_ack(5);
    link.send(&readings(6));
    link.expect_ack(6);
    let mut database = gateway.database();
    let mut missing = || -> Vec<(i64, i64, String)> {
        database.rows("SELECT from_seq, to_seq, reason FROM missing_frames")
    };
    assert_eq!(
        missing(),
        [(2, 5, "reported by a refused frame".to_owned())]
    );
    // As if the tag were known by now.
    let digits: String = gap(2, 5, 1)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    in_sqlite(gateway.data_dir(), "pump", 5)(&digits);
    let path = gateway.data_dir().join("fieldgate.db");
    let done = replay(&format!("sqlite://{}", path.display()), &[]);
    assert!(done.status.success(), "{}", done.stderr);
    assert_eq!(missing(), [(2, 5, "queue damaged".to_owned())]);
}

/// One device's frames are stored directly, another's by way of quarantine, with the same result.
#[test]
fn replayed_frames_equal_directly_stored_ones() {
    let gateway = Gateway::start(&[]);
    let store = format!(
        "sqlite://{}",
        gateway.data_dir().join("fieldgate.db").display()
    );
    let at_boot = Event {
        clock: Clock::Boot,
        boot: 7,
        time_us: 500_000,
        level: 2,
        code: 9,
        text: "ok",
        ext: &[],
    };
    let frames = [
        readings(1),
        readings_at(2, T0_US + 5, &[2157, -1, i64::MAX]),
        gap(3, 3, 2),
        event(4, 3, 77, "valve stuck"),
        frame(&at_boot, 5),
        // Before 2020, which is implausible.
        readings_at(6, 1_500_000_000_000_000, &[7]),
        since_boot(7, 7, 400_000),
        with_columns(no_columns(1), 8, &[raw(TEMPERATURE, &5i64.to_le_bytes())]),
    ];
    let (mut straight, _) = gateway.connect("straight");
    for bytes in &frames {
        straight.send(bytes);
    }
    straight.expect_ack(8);
    for (bytes, seq) in frames.iter().zip(1..) {
        // A new connection each time, because one may cause only eight rejections a minute.
        let (mut link, _) = gateway.connect("detour");
        quarantined(
            &mut link,
            seq,
            bytes,
            in_sqlite(gateway.data_dir(), "detour", seq),
        );
    }
    // The measured offset of a boot differs per device.
    meddle(
        &gateway.data_dir().join("fieldgate.db"),
        "UPDATE clocks SET offset_us = (SELECT f.clock_offset_us FROM frames f JOIN streams s ON s.id = f.stream_id
         JOIN devices d ON d.id = s.device_id WHERE d.name = 'straight' AND f.seq = 7)",
    );
    let mut database = gateway.database();
    let ledger = "SELECT stream_id, seq, received_at FROM frames ORDER BY stream_id, seq";
    let received: Vec<(i64, i64, i64)> = database.rows(ledger);
    let newest_id = database.count("SELECT max(id) FROM frames");
    assert_eq!(database.readings("detour"), []);
    let done = replay(&store, &["--device", "detour"]);
    assert!(done.status.success(), "{}", done.stderr);
    assert_eq!(database.quarantine("detour"), []);
    let straight = all_of(&mut database, "straight");
    assert_eq!(straight.0.len(), 8);
    assert_eq!(all_of(&mut database, "detour"), straight);
    assert_eq!(database.rows::<(i64, i64, i64)>(ledger), received);
    // New ids, so that the feed sends them.
    let renewed = format!("SELECT count(*) FROM frames WHERE id > {newest_id}");
    assert_eq!(database.count(&renewed), 8);
    let totals: Vec<(i64, i64)> =
        database.rows("SELECT DISTINCT frames, readings FROM device_status");
    assert_eq!(totals.len(), 1, "{totals:?}");
    let events = "SELECT count(*) FROM (SELECT DISTINCT at, level, code, detail FROM device_events
                  WHERE kind = 'event')";
    assert_eq!(database.count(events), 2);
    // Another boot has no measurement: its newest row is dated to its receipt, not to the replay.
    let (mut link, _) = gateway.connect("detour");
    let kept = in_sqlite(gateway.data_dir(), "detour", 9);
    quarantined(&mut link, 9, &since_boot(9, 6, 9_000_000), kept);
    assert!(replay(&store, &["--device", "detour"]).status.success());
    let late = "SELECT f.received_at - max(r.ts) FROM frames f JOIN readings r ON r.frame_id = f.id
                WHERE f.seq = 9 AND f.quality = 2";
    assert_eq!(database.count(late), 0);
    let straight = all_of(&mut database, "detour");
    // Another replay, with any selection, finds and changes nothing.
    for args in [&[][..], &["--device", "detour"]] {
        let done = replay(&store, args);
        assert!(done.status.success(), "{}", done.stderr);
    }
    let gone = replay(&store, &["1", "2"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(gone.stderr.contains("no frame 1"), "{}", gone.stderr);
    assert_eq!(all_of(&mut database, "detour"), straight);
}

#[test]
fn frames_that_still_do_not_decode_stay() {
    let gateway = Gateway::start(&[]);
    let store = format!(
        "sqlite://{}",
        gateway.data_dir().join("fieldgate.db").display()
    );
    let (mut link, _) = gateway.connect("pump");
    link.send(&sealed(header(0x1D, 1), b"of the future"));
    link.expect_nack(1, Code::UnknownType, 2);
    let keep = |seq| in_sqlite(gateway.data_dir(), "pump", seq);
    link.expect_ack(1);
    quarantined(&mut link, 2, &damaged(readings(2)), keep(2));
    let undeclared = with_columns(
        Data {
            schema: 9,
            ..no_columns(1)
        },
        3,
        &[raw(TEMPERATURE, &5i64.to_le_bytes())],
    );
    quarantined(&mut link, 3, &undeclared, keep(3));
    quarantined(
        &mut link,
        4,
        &reheaded(&readings(4), |header| header.flags = 1),
        keep(4),
    );
    quarantined(&mut link, 5, &readings(5), keep(5));
    quarantined(&mut link, 6, &readings(6), keep(6));
    let done = replay(&store, &["5"]);
    assert!(done.status.success(), "{}", done.stderr);
    let done = replay(&store, &[]);
    assert_eq!(done.status.code(), Some(1));
    assert!(
        done.stderr.contains("4 frames could not be decoded"),
        "{}",
        done.stderr
    );
    let mut database = gateway.database();
    let left: Vec<i64> = database
        .quarantine("pump")
        .iter()
        .map(|row| row.0)
        .collect();
    assert_eq!(left, [1, 2, 3, 4]);
    let expected = [(1, 0x1D), (2, 0x1E), (3, 0x1E), (4, 0x1E), (5, 17), (6, 17)];
    assert_eq!(database.frames("pump"), expected);
    assert_eq!(database.readings("pump").len(), 2);
}

/// Runs several replays simultaneously, while a gateway stores frames as fast as it can.
fn replay_under_load(gateway: &Gateway, store: &str, meddle: impl Fn(u64, &str)) -> u64 {
    const KEPT: u64 = 24;
    for seq in 1..=KEPT {
        let (mut link, _) = gateway.connect("kept");
        quarantined(&mut link, seq, &readings(seq), |digits| meddle(seq, digits));
    }
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut link, welcomed) = gateway.connect("busy");
            let mut sent = welcomed.durable_seq;
            while !is_done.load(Ordering::Relaxed) {
                for seq in sent + 1..=sent + 32 {
                    link.send(&readings(seq));
                }
                sent += 32;
                link.expect_ack(sent);
            }
            sent
        });
        let replays: Vec<_> = (0..3).map(|_| scope.spawn(|| replay(store, &[]))).collect();
        let ended: Vec<Ended> = replays
            .into_iter()
            .map(|one| one.join().expect("runs"))
            .collect();
        is_done.store(true, Ordering::Relaxed);
        for ended in ended {
            assert!(ended.status.success(), "{}", ended.stderr);
        }
        load.join().expect("is served")
    })
}

/// Asserts that each number has its one value, once.
fn assert_once(stored: &[(i64, Option<f64>)], last: u64) {
    let mut values: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, value) in stored {
        *values.entry(value.expect("a value").to_bits()).or_default() += 1;
    }
    let expected = (1..=last).map(|seq| ((seq as f64 / 100.0).to_bits(), 1));
    assert_eq!(values, expected.collect());
}

#[test]
fn concurrent_replays_and_a_busy_gateway_store_each_frame_once() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let store = format!("sqlite://{}", dir.path().join("fieldgate.db").display());
    let sent = replay_under_load(&gateway, &store, |seq, digits| {
        in_sqlite(dir.path(), "kept", seq)(digits);
    });
    for _ in 0..2 {
        let mut database = gateway.database();
        assert_eq!(database.quarantine("kept"), []);
        assert_once(&database.readings("kept"), 24);
        assert_once(&database.readings("busy"), sent);
        assert_eq!(
            database.frames("kept"),
            (1..=24).map(|seq| (seq, 17)).collect::<Vec<_>>()
        );
        // The same holds after all recent readings are compacted.
        gateway.terminate();
        assert!(gateway.wait().status.success());
        gateway = Gateway::start_in(dir.path(), &[]);
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn replays_in_postgres_store_each_frame_once() {
    let mut database = PgDatabase::create();
    let url = database.url();
    let gateway = Gateway::start(&["--store", &url]);
    let sent = replay_under_load(&gateway, &url, |seq, digits| {
        crate::support::database::Session::open(&url).execute(&format!(
            "UPDATE quarantine SET bytes = '\\x{digits}' WHERE seq = {seq}"
        ));
    });
    assert_eq!(database.quarantine("kept"), []);
    assert_once(&database.readings("kept"), 24);
    assert_once(&database.readings("busy"), sent);
    let numbers: Vec<_> = (1..=24).map(|seq| (seq, i16::from(types::DATA))).collect();
    assert_eq!(database.frames("kept"), numbers);
    let session = database.session();
    let received = "SELECT count(*) FROM frames f JOIN readings r ON r.frame_id = f.id
        WHERE f.quality = 0 AND f.clock_offset_us = 0 AND f.readings = 1";
    assert_eq!(session.count(received), 24 + sent as i64);
    // Readings of long ago are in the default partition, as on first receipt; events and gaps are included.
    let (mut link, _) = gateway.connect("other");
    for (seq, bytes) in [
        (1, event(1, 1, 5, "ok")),
        (2, gap(2, 2, 1)),
        (3, since_boot(3, 7, 400_000)),
    ] {
        quarantined(&mut link, seq, &bytes, |digits| {
            session.execute(&format!(
                "UPDATE quarantine SET bytes = '\\x{digits}' WHERE seq = {seq}"
            ));
        });
    }
    let purged = run(&[
        "quarantine",
        "purge",
        "--store",
        &url,
        "--before",
        "2020-01-01T00:00:00Z",
    ]);
    assert!(purged.status.success(), "{}", purged.stderr);
    let done = replay(&url, &["--device", "other"]);
    assert!(done.status.success(), "{}", done.stderr);
    let kinds: Vec<(i64, i16, Option<i16>)> = session.rows(
        "SELECT f.seq, f.type, f.quality FROM frames f JOIN streams s ON s.id = f.stream_id
         JOIN devices d ON d.id = s.device_id WHERE d.name = 'other' ORDER BY 1",
    );
    assert_eq!(kinds, [(1, 20, Some(0)), (2, 18, None), (3, 17, Some(1))]);
    assert_eq!(
        session.count("SELECT count(*) FROM gaps WHERE from_seq = 2 AND to_seq = 2"),
        1
    );
    assert_eq!(
        session.count("SELECT count(*) FROM device_events WHERE kind = 'event'"),
        1
    );
}

fn show(gateway: &Gateway, id: u64) -> String {
    let mut show = command(&["quarantine", "show", &id.to_string(), "--data-dir"]);
    let done = keep_of(show.arg(gateway.data_dir()).output().expect("runs"));
    assert!(done.status.success(), "{done:?}");
    String::from_utf8(done.stdout).expect("UTF-8")
}

#[test]
fn show_marks_the_byte_that_breaks_a_rule() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    let nine_bytes = raw(TEMPERATURE, &[0; 9]);
    let rotten = damaged(readings(5));
    let cases = [
        (
            event(1, 5, 1, "hot"),
            "level  5",
            "level out of range (R24)",
        ),
        (
            with_columns(no_columns(1), 2, &[nine_bytes]),
            "columns[0].data  9 bytes",
            "(R55)",
        ),
        (
            reheaded(&readings(3), |header| header.flags = 4),
            "flags  4",
            "(R11)",
        ),
        (sealed(header(0x1D, 4), b"later"), "type  unknown", "(R14)"),
        (rotten, "checksum  wrong", "payload checksum wrong (R6)"),
    ];
    for ((bytes, part, rule), id) in cases.iter().zip(1..) {
        link.send(bytes);
        if id == 5 {
            link.expect_nack(5, Code::PayloadCrc, 5);
            link.send(bytes);
        }
        while !matches!(link.hear(), crate::support::client::Heard::Ack { seq, .. } if seq == id) {}
        let shown = show(&gateway, id);
        let mark = shown
            .lines()
            .position(|line| line.contains("^^"))
            .expect(&shown);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[mark].contains(rule), "{shown}");
        let at = lines[mark].find("^^").unwrap_or_default();
        let marked = u8::from_str_radix(&lines[mark - 1][at..at + 2], 16).expect(&shown);
        let number = lines[mark]
            .split_whitespace()
            .nth(2)
            .and_then(|n| n.strip_suffix(':'));
        let number: usize = number.and_then(|n| n.parse().ok()).expect(&shown);
        assert_eq!(marked, bytes[number], "{shown}");
        assert!(
            lines[..mark].iter().any(|line| line.contains(part)),
            "{part}: {shown}"
        );
        assert!(
            lines[0].contains("frame") && shown.contains("refused as"),
            "{shown}"
        );
    }
    let done = run(&[
        "quarantine",
        "show",
        "77",
        "--data-dir",
        gateway.data_dir().to_str().expect("UTF-8"),
    ]);
    assert!(done.stderr.contains("no frame 77"), "{}", done.stderr);
}
