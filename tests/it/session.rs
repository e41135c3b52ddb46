//! Guarantees of a session: each frame is stored once, in order, and acknowledged only when it is durable, despite
//! resends, lost ACKs, take-overs and ends of every kind.

use fieldgate_protocol::error::Code;
use fieldgate_protocol::message::Data;
use tempfile::TempDir;

use crate::support::client::{Heard, Link};
use crate::support::gateway::{Gateway, meddle};
use crate::support::messages::{
    SCHEMA, T0_US, bye, declare, declared_hash, event, gap, no_columns, raw, readings, readings_at,
    with_columns,
};

/// Delays a commit until the frames of a test have arrived together: they are in flight.
const SLOW_COMMITS: [&str; 2] = ["--commit-interval-min-ms", "400"];

/// Asserts that a stream's numbers are 1 to `last`, each stored once, each with its one reading.
fn assert_stored_once(gateway: &Gateway, name: &str, last: i64) {
    let mut database = gateway.database();
    let numbers: Vec<_> = (1..=last).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames(name), numbers);
    let values: Vec<_> = (1..=last).map(|seq| Some(seq as f64 / 100.0)).collect();
    let stored: Vec<_> = database.readings(name).iter().map(|row| row.1).collect();
    assert_eq!(stored, values);
    assert_eq!(database.durable_seq(name), last);
    let totals = "SELECT frames, readings FROM device_status WHERE device = '";
    let totals: Vec<(i64, i64)> = database.rows(&format!("{totals}{name}'"));
    assert_eq!(totals, [(last, last)]);
}

#[test]
fn a_reading_is_visible_to_others_before_its_ack() {
    let gateway = Gateway::start(&[]);
    let mut database = gateway.database();
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!((welcomed.durable_seq, welcomed.limit_seq), (0, 64));
    assert_eq!((welcomed.keepalive_s, welcomed.ack_timeout_s), (40, 30));
    for seq in 1..=50 {
        link.send(&readings(seq));
        match link.hear() {
            Heard::Ack {
                seq: acked,
                limit_seq,
            } => assert_eq!((acked, limit_seq), (seq, seq + 64)),
            other => panic!("{other:?}"),
        }
        assert_eq!(database.durable_seq("pump"), seq as i64);
        assert_eq!(database.readings("pump").len(), seq as usize);
    }
    assert_stored_once(&gateway, "pump", 50);
}

#[test]
fn acknowledged_frames_survive_kill_9() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=20 {
        link.send(&readings(seq));
    }
    link.expect_ack(20);
    gateway.kill();
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 20);
    link.send(&readings(20));
    link.send(&readings(21));
    link.expect_ack(21);
    assert_stored_once(&gateway, "pump", 21);
}

#[test]
fn one_ack_covers_all_frames_of_a_commit() {
    let gateway = Gateway::start(&SLOW_COMMITS);
    let (mut link, _) = gateway.connect("pump");
    let burst: Vec<u8> = (1..=30).flat_map(readings).collect();
    link.send(&burst);
    let mut acks = 0;
    loop {
        match link.hear() {
            Heard::Ack { seq, .. } => {
                acks += 1;
                if seq == 30 {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(acks <= 3, "{acks} ACKs");
    // No further message follows the last one.
    link.ping();
    assert_stored_once(&gateway, "pump", 30);
}

#[test]
fn c14_resent_frames_are_stored_once() {
    let gateway = Gateway::start(&SLOW_COMMITS);
    let (mut link, _) = gateway.connect("pump");
    // In flight: the current commit will acknowledge the copies.
    for seq in [1, 2, 3, 1, 2, 3, 2, 4] {
        link.send(&readings(seq));
    }
    link.expect_ack(4);
    // Acknowledged: each copy is answered immediately, whatever its content.
    for copy in [
        readings(1),
        readings(4),
        readings_at(2, 0, &[7, 8, 9]),
        event(3, 1, 1, "no"),
    ] {
        link.send(&copy);
        match link.hear() {
            Heard::Ack { seq, limit_seq } => assert_eq!((seq, limit_seq), (4, 68)),
            other => panic!("{other:?}"),
        }
    }
    link.send(&readings(5));
    link.expect_ack(5);
    assert_stored_once(&gateway, "pump", 5);
}

#[test]
fn the_next_welcome_replaces_a_lost_ack() {
    let gateway = Gateway::start(&SLOW_COMMITS);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=3 {
        link.send(&readings(seq));
    }
    // Accepted, and disconnected before an ACK could arrive.
    link.take_in();
    drop(link);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!((welcomed.durable_seq, welcomed.limit_seq), (3, 67));
    for seq in 1..=5 {
        link.send(&readings(seq));
    }
    link.expect_ack(5);
    assert_stored_once(&gateway, "pump", 5);
}

#[test]
fn the_newer_of_two_sessions_takes_over() {
    let gateway = Gateway::start(&SLOW_COMMITS);
    let (mut older, _) = gateway.connect("pump");
    for seq in 1..=3 {
        older.send(&readings(seq));
    }
    older.take_in();
    let (mut newer, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 3);
    // Further frames of the older session are ignored.
    older.send_in_vain(&readings_at(4, T0_US, &[999]));
    for seq in 2..=6 {
        newer.send(&readings(seq));
    }
    loop {
        match older.hear() {
            Heard::Ack { seq, .. } => assert!(seq <= 3, "{seq}"),
            Heard::Bye { code: 41, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    older.expect_closed();
    newer.expect_ack(6);
    assert_stored_once(&gateway, "pump", 6);
    // Devices with other names are unaffected, and the slot is free again.
    let (mut other, _) = gateway.connect("other");
    newer.ping();
    other.ping();
    newer.send(&bye());
    newer.expect_closed();
    let (mut again, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 6);
    again.ping();
}

#[test]
fn twins_that_send_the_same_frames_store_each_once() {
    let gateway = Gateway::start(&[]);
    let (mut links, count) = (Vec::new(), 40);
    for _ in 0..6 {
        let (mut link, welcomed) = gateway.connect("pump");
        let begun = welcomed.durable_seq + 1;
        for seq in begun..=(begun + 9).min(count) {
            link.send_in_vain(&readings(seq));
        }
        links.push(link);
    }
    let (mut link, welcomed) = gateway.connect("pump");
    for seq in welcomed.durable_seq + 1..=count {
        link.send(&readings(seq));
    }
    if welcomed.durable_seq < count {
        link.expect_ack(count);
    }
    assert_stored_once(&gateway, "pump", count as i64);
}

#[test]
fn a_gap_is_recorded_and_covers_only_missing_frames() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.send(&readings(2));
    link.expect_ack(2);
    link.send(&gap(1, 5, 1));
    link.expect_ack(5);
    link.send(&gap(6, 6, 0));
    link.send(&gap(7, 1_000_000_000, 9));
    link.expect_ack(1_000_000_000);
    // Repeating a gap, or reporting a part of it, changes nothing.
    link.send(&gap(1, 5, 2));
    link.send(&gap(4, 7, 2));
    link.send(&readings(1_000_000_001));
    link.expect_ack(1_000_000_001);
    let mut database = gateway.database();
    let missing: Vec<(i64, i64, i64, String)> = database
        .rows("SELECT from_seq, to_seq, frames, reason FROM missing_frames ORDER BY from_seq");
    let expected = [
        (3, 5, 3, "queue damaged".to_owned()),
        (6, 6, 1, "overwritten".to_owned()),
        (7, 1_000_000_000, 999_999_994, "reason 9".to_owned()),
    ];
    assert_eq!(missing, expected);
    assert_eq!(database.readings("pump").len(), 3);
}

#[test]
fn a_stream_that_lost_its_numbers_must_be_replaced() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.send(&readings(2));
    link.expect_ack(2);
    drop(link);
    let mut pump = gateway.device("pump");
    for next_seq in [1, 2] {
        (pump.oldest_seq, pump.next_seq) = (1, next_seq);
        let mut link = Link::open(gateway.addr);
        let (auth, _) = pump.auth(link.challenge(&pump));
        link.send(&auth);
        link.expect_bye(Code::StreamConflict);
    }
    // Not reported to a peer without the key.
    let mut twin = pump.clone();
    twin.key[5] ^= 1;
    let mut link = Link::open(gateway.addr);
    let (auth, _) = twin.auth(link.challenge(&twin));
    link.send(&auth);
    link.expect_bye(Code::Authentication);
    pump.next_seq = 3;
    let (_, welcomed) = Link::login(gateway.addr, &pump);
    assert_eq!(welcomed.durable_seq, 2);
    (pump.stream, pump.next_seq) = ((1 << 63) - 1, 1);
    let (mut link, welcomed) = Link::login(gateway.addr, &pump);
    assert_eq!(welcomed.durable_seq, 0);
    link.send(&declare(SCHEMA));
    link.send(&readings(1));
    link.expect_ack(1);
    let streams: Vec<(i64, i64)> = gateway
        .database()
        .rows("SELECT stream, durable_seq FROM streams ORDER BY stream");
    assert_eq!(streams, [(0x1122_3344_5566_7788, 2), (i64::MAX, 1)]);
}

#[test]
fn a_disabled_device_gets_the_reason_if_it_has_the_key() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    link.send(&bye());
    link.expect_closed();
    let path = gateway.data_dir().join("fieldgate.db");
    meddle(&path, "UPDATE devices SET enabled = 0 WHERE name = 'pump'");
    let pump = gateway.device("pump");
    let mut twin = pump.clone();
    twin.key[31] ^= 1;
    for (login, code) in [(&pump, Code::Disabled), (&twin, Code::Authentication)] {
        let mut link = Link::open(gateway.addr);
        let (auth, _) = login.auth(link.challenge(login));
        link.send(&auth);
        link.expect_bye(code);
    }
    let (mut other, _) = gateway.connect("other");
    other.ping();
    meddle(&path, "UPDATE devices SET enabled = 1 WHERE name = 'pump'");
    let (_, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 1);
}

#[test]
fn frames_sent_before_a_half_close_are_stored_and_acknowledged() {
    let gateway = Gateway::start(&SLOW_COMMITS);
    let pump = gateway.device("pump");
    let (mut link, _) = Link::login(gateway.addr, &pump);
    // With a DECLARE that is not answered yet at the end.
    let mut burst = declare(SCHEMA);
    burst.extend((1..=20).flat_map(readings));
    burst.extend(&readings(21)[..30]);
    link.send(&burst);
    link.finish();
    link.expect_ack(20);
    link.expect_closed();
    assert_stored_once(&gateway, "pump", 20);
}

#[test]
fn frames_may_be_split_at_any_byte() {
    let gateway = Gateway::start(&[]);
    let pump = gateway.device("pump");
    let mut link = Link::open(gateway.addr);
    let (hello, transcript) = (pump.hello(), link.challenge(&pump));
    assert!(!hello.is_empty());
    link.authenticate(&pump, transcript);
    let mut bytes = declare(SCHEMA);
    bytes.extend((1..=3).flat_map(readings));
    for byte in bytes {
        link.send(&[byte]);
    }
    link.expect_ack(3);
    assert_stored_once(&gateway, "pump", 3);
}

#[test]
fn a_session_keeps_the_latest_eight_schemas() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = Link::login(gateway.addr, &gateway.device("pump"));
    let of_schema = |schema: u16, seq: u64| {
        let value = (seq as i64).to_le_bytes();
        let data = Data {
            schema,
            t0: T0_US + seq as i64,
            ..no_columns(1)
        };
        with_columns(data, seq, &[raw(1, &value)])
    };
    for schema in 1..=8 {
        link.send(&declare(schema));
    }
    for schema in 1..=8 {
        link.send(&of_schema(schema, u64::from(schema)));
    }
    link.expect_ack(8);
    // A schema that HELLO names and the gateway has needs no DECLARE.
    let mut pump = gateway.device("pump");
    (pump.schema, pump.schema_hash) = (3, declared_hash(3));
    let (mut link, welcomed) = Link::login(gateway.addr, &pump);
    assert!(welcomed.schema_known);
    link.send(&of_schema(3, 9));
    link.expect_ack(9);
    // All have the same channels: one series.
    assert_eq!(
        gateway
            .database()
            .count("SELECT count(DISTINCT series_id) FROM readings"),
        1
    );
    assert_stored_once(&gateway, "pump", 9);
}

#[test]
fn sigterm_acknowledges_accepted_frames_and_exits_normally() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &SLOW_COMMITS);
    let (mut link, _) = gateway.connect("pump");
    let (mut idle, _) = gateway.connect("idle");
    let mut peer = Link::open(gateway.addr);
    peer.challenge(&gateway.device("unknown"));
    for seq in 1..=10 {
        link.send(&readings(seq));
    }
    let acked = link.take_in();
    gateway.terminate();
    if acked < 10 {
        link.expect_ack(10);
    }
    link.expect_bye(Code::Shutdown);
    idle.expect_bye(Code::Shutdown);
    peer.expect_bye(Code::Shutdown);
    let ended = gateway.wait();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert_stored_once(&gateway, "pump", 10);
    // Nothing is left for the next start.
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (_, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 10);
}

#[test]
fn c03_logs_hold_no_key_and_no_names() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, _) = gateway.connect("secretive-pump");
    link.send(&readings_at(1, T0_US, &[1234567]));
    link.send(&event(2, 4, 1, "private text"));
    link.send(&gap(9, 3, 0));
    link.expect_nack(3, Code::Limit, 4);
    link.expect_ack(3);
    link.send(b"not FWP");
    gateway.terminate();
    let ended = gateway.wait();
    let key = std::fs::read_to_string(dir.path().join("fleet.key")).expect("a key");
    for secret in ["secretive-pump", "private text", "12345.67", key.trim()] {
        assert!(!ended.stderr.contains(secret), "{secret}: {}", ended.stderr);
    }
}
