//! The rows of the table of malformed input (SPEC, section 12) that end a connection or are fixed by resending,
//! against the real gateway: the answer, whether the connection continues, the stored data, and that a
//! well-behaved device is served afterwards.

use std::time::Instant;

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{HEADER_BYTES, types};
use fieldgate_protocol::message::{Ack, Channel};
use fieldgate_protocol::value::Kind;

use crate::support::client::{Heard, Link};
use crate::support::gateway::Gateway;
use crate::support::messages::{
    SCHEMA, T0_US, TEMPERATURE, bye, damaged, declare, declare_channels, event, frame, gap, header,
    ping, readings, readings_at, reheaded, sealed, with_byte,
};

/// Cases of one session: name and frame of each.
pub type Cases = Vec<(&'static str, Vec<u8>)>;

/// Logs in as a new device and stores a reading.
pub fn assert_serves(gateway: &Gateway, name: &str) {
    let (mut link, _) = gateway.connect(name);
    link.send(&readings(1));
    link.expect_ack(1);
    assert_eq!(gateway.database().readings(name).len(), 1);
}

/// Asserts that only the `known` devices left data.
pub fn assert_only(gateway: &Gateway, known: i64) {
    let mut database = gateway.database();
    assert_eq!(database.count("SELECT count(*) FROM devices"), known);
    assert_eq!(database.count("SELECT count(*) FROM quarantine"), 0);
}

#[test]
fn another_protocol_is_closed_without_an_answer() {
    let gateway = Gateway::start(&[]);
    let cases: [(&str, &[u8]); 6] = [
        ("one wrong byte", b"\x00"),
        (
            "TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x01\x02\x03\x04",
        ),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n"),
        ("PROXY 1", b"PROXY TCP4 192.0.2.1 192.0.2.2 40000 7300\r\n"),
        (
            "PROXY 2",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x9c\x40\x1c\x84",
        ),
        ("SSH", b"SSH-2.0-OpenSSH_9.7\r\n"),
    ];
    for (what, bytes) in cases {
        let mut link = Link::open(gateway.addr);
        link.send(bytes);
        assert_eq!(link.hear(), Heard::Closed, "{what}");
    }
    // The same within a session: no answer, and earlier frames are stored.
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    link.send(b"GET / HTTP/1.1\r\n\r\n");
    link.expect_closed();
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn a_wrong_header_checksum_ends_the_connection() {
    let gateway = Gateway::start(&[]);
    let broken = |mut frame: Vec<u8>| {
        frame[HEADER_BYTES - 1] ^= 1;
        frame
    };
    let pump = gateway.device("pump");
    let mut link = Link::open(gateway.addr);
    link.send(&broken(pump.hello()));
    link.expect_bye(Code::Header);

    let mut link = Link::open(gateway.addr);
    let (auth, _) = pump.auth(link.challenge(&pump));
    link.send(&broken(auth));
    link.expect_bye(Code::Header);

    let (mut link, _) = gateway.connect("pump");
    link.send(&broken(readings(1)));
    link.expect_bye(Code::Header);
    assert_eq!(gateway.database().frames("pump"), []);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn c09_a_frame_over_the_limit_is_refused_by_its_header_alone() {
    let gateway = Gateway::start(&[]);
    let header_of = |payload_bytes: usize| {
        let mut whole = sealed(header(types::DATA, 1), &vec![0; payload_bytes]);
        whole.truncate(HEADER_BYTES);
        whole
    };
    // 512 bytes are within the limit of the handshake, although this is not the expected frame.
    let mut link = Link::open(gateway.addr);
    link.send(&sealed(header(types::DATA, 1), &[0; 512 - 20]));
    link.expect_bye(Code::Authentication);
    for payload_bytes in [513 - 20, 4096 - 20, 65535] {
        let mut link = Link::open(gateway.addr);
        link.send(&header_of(payload_bytes));
        link.expect_bye(Code::TooLarge);
        let mut link = Link::open(gateway.addr);
        link.challenge(&gateway.device("pump"));
        link.send(&header_of(payload_bytes));
        link.expect_bye(Code::TooLarge);
    }
    for payload_bytes in [4097 - 20, 16384 - 20, 65535] {
        let (mut link, _) = gateway.connect("pump");
        link.send(&header_of(payload_bytes));
        link.expect_bye(Code::TooLarge);
    }
    // A frame of exactly the maximum length is read completely: its number is used up.
    let (mut link, _) = gateway.connect("full");
    let full = sealed(header(0x1F, 1), &[0xEE; 4096 - 20]);
    link.send(&full);
    link.expect_nack(1, Code::UnknownType, 2);
    link.expect_ack(1);
    assert_eq!(gateway.database().quarantine("full")[0].2, full);
    assert_eq!(gateway.database().frames("pump"), []);
    assert_serves(&gateway, "good");
}

#[test]
fn c10_a_stall_ends_the_connection() {
    let gateway = Gateway::start(&["--handshake-timeout-s", "2", "--frame-timeout-s", "1"]);
    let pump = gateway.device("pump");
    // In parallel, because each timeout takes time.
    let mut mute = Link::open(gateway.addr);
    let mut slow = Link::open(gateway.addr);
    slow.send(&pump.hello()[..20]);
    let mut shy = Link::open(gateway.addr);
    shy.challenge(&pump);
    // Skippable frames do not prolong the handshake.
    let mut skipper = Link::open(gateway.addr);
    skipper.send(&sealed(header(0x90, 0), &[]));
    let (mut stalled, _) = gateway.connect("stalled");
    stalled.send(&readings(1));
    stalled.expect_ack(1);
    let begun = Instant::now();
    stalled.send(&readings(2)[..30]);
    stalled.expect_bye(Code::Idle);
    assert!(begun.elapsed().as_millis() >= 900, "{:?}", begun.elapsed());
    for link in [&mut mute, &mut slow, &mut shy, &mut skipper] {
        link.expect_bye(Code::Idle);
    }
    assert_eq!(gateway.database().frames("stalled"), [(1, 17)]);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn c10_silence_ends_the_connection() {
    let gateway = Gateway::start(&["--idle-timeout-s", "2", "--keepalive-s", "1"]);
    let (mut silent, welcomed) = gateway.connect("silent");
    assert_eq!(welcomed.keepalive_s, 1);
    silent.send(&readings(1));
    silent.expect_ack(1);
    let begun = Instant::now();
    silent.ping();
    silent.expect_bye(Code::Idle);
    assert!(begun.elapsed().as_millis() >= 1900, "{:?}", begun.elapsed());
    assert_eq!(gateway.database().frames("silent"), [(1, 17)]);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn numbers_that_no_frame_can_have_end_the_connection() {
    let gateway = Gateway::start(&[]);
    let mut cases: Cases = vec![
        ("DATA 0", readings_at(0, T0_US, &[1])),
        ("EVENT 0", event(0, 1, 1, "")),
        ("unknown 0", sealed(header(0x1A, 0), &[])),
        ("2^63", sealed(header(types::DATA, 1 << 63), &[])),
        ("2^64 - 1", sealed(header(types::DATA, u64::MAX), &[])),
        ("damaged", damaged(readings_at(0, T0_US, &[1]))),
    ];
    for (what, unsequenced) in [
        ("PING", ping(1, 0, 0)),
        ("DECLARE", declare(2)),
        ("BYE", bye()),
        ("damaged PING", damaged(ping(1, 0, 0))),
    ] {
        cases.push((
            what,
            reheaded_damage(&unsequenced, what.starts_with("damaged")),
        ));
    }
    for (what, bytes) in cases {
        eprintln!("{what}");
        let (mut link, _) = gateway.connect("pump");
        link.send(&bytes);
        link.expect_bye(Code::Protocol);
    }
    assert_eq!(gateway.database().frames("pump"), []);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

/// Returns an unsequenced frame with number 1.
fn reheaded_damage(frame: &[u8], is_damaged: bool) -> Vec<u8> {
    let numbered = reheaded(frame, |header| header.seq = 1);
    if is_damaged {
        damaged(numbered)
    } else {
        numbered
    }
}

#[test]
fn unsequenced_frames_that_are_not_allowed_end_the_connection() {
    let gateway = Gateway::start(&[]);
    let pump = gateway.device("pump");
    let of_type = |frame_type: u8, payload: &[u8]| sealed(header(frame_type, 0), payload);
    let channel = |name: &'static str, unit: &'static str, kind: Kind, exp10: i8| Channel {
        id: 1,
        name,
        unit,
        kind,
        exp10,
    };
    let one = |channel: Channel<'_>| declare_channels(2, &[channel]);
    let long_name = "n".repeat(33);
    let long_unit = "u".repeat(17);
    let ack = Ack {
        limit_seq: 9,
        ext: &[],
    };
    let cases: Cases = vec![
        ("unknown 05", of_type(0x05, &[])),
        ("unknown 0F", of_type(0x0F, &[])),
        ("unknown 22", of_type(0x22, &[])),
        ("unknown 7E", of_type(0x7E, &[1, 2, 3])),
        ("HELLO", pump.hello()),
        ("AUTH", of_type(types::AUTH, &[0; 34])),
        ("CHALLENGE", of_type(types::CHALLENGE, &[])),
        ("WELCOME", of_type(types::WELCOME, &[])),
        ("ACK", frame(&ack, 0)),
        ("NACK", of_type(types::NACK, &[])),
        ("COMMAND", of_type(types::COMMAND, &[])),
        ("PONG", of_type(types::PONG, &[1, 0, 0, 0])),
        (
            "PING with a flag",
            reheaded(&ping(1, 0, 0), |header| header.flags = 0x80),
        ),
        (
            "DECLARE with a flag",
            reheaded(&declare(2), |header| header.flags = 1),
        ),
        ("PING cut short", of_type(types::PING, &[1, 0])),
        ("PING and more", of_type(types::PING, &[1, 0, 0, 0, 0])),
        (
            "PING, overlong varint",
            of_type(types::PING, &[0x81, 0x00, 0, 0, 0]),
        ),
        ("PING, time since boot", ping((1 << 53) + 1, 0, 0)),
        ("PING, PONG of the future", ping(5, 1, 6)),
        ("PING, even tag", of_type(types::PING, &[1, 0, 0, 2, 2, 0])),
        ("PING, bad ext", of_type(types::PING, &[1, 0, 0, 1, 1])),
        ("DECLARE 0", declare(0)),
        ("DECLARE of nothing", declare_channels(2, &[])),
        ("DECLARE of 33", of_type(types::DECLARE, &[2, 33])),
        (
            "DECLARE, one id twice",
            declare_channels(
                2,
                &[
                    channel("a", "", Kind::Integer, 0),
                    channel("b", "", Kind::Integer, 0),
                ],
            ),
        ),
        (
            "DECLARE, one name twice",
            declare_channels(
                2,
                &[
                    channel("a", "", Kind::Integer, 0),
                    Channel {
                        id: 2,
                        ..channel("a", "", Kind::Integer, 0)
                    },
                ],
            ),
        ),
        ("DECLARE, no name", one(channel("", "", Kind::Integer, 0))),
        (
            "DECLARE, U+0000",
            one(channel("a\0b", "", Kind::Integer, 0)),
        ),
        (
            "DECLARE, kind",
            with_byte(&one(channel("a", "", Kind::Integer, 0)), 6, 4),
        ),
        (
            "DECLARE, exponent 23",
            one(channel("a", "", Kind::Integer, 23)),
        ),
        (
            "DECLARE, exponent -23",
            one(channel("a", "", Kind::Integer, -23)),
        ),
        (
            "DECLARE, exponent of a float",
            one(channel("a", "", Kind::F64, 1)),
        ),
        (
            "DECLARE, long name",
            one(Channel {
                name: &long_name,
                ..channel("", "", Kind::Integer, 0)
            }),
        ),
        (
            "DECLARE, long unit",
            one(Channel {
                unit: &long_unit,
                ..channel("a", "", Kind::Integer, 0)
            }),
        ),
        ("BYE cut short", of_type(types::BYE, &[0])),
    ];
    for (what, bytes) in cases {
        eprintln!("{what}");
        let (mut link, _) = gateway.connect("pump");
        link.send(&bytes);
        link.expect_bye(Code::Protocol);
    }
    let mut database = gateway.database();
    assert_eq!(database.frames("pump"), []);
    assert_eq!(
        database.count("SELECT count(*) FROM schemas WHERE schema <> 1"),
        0
    );
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn a_damaged_unsequenced_frame_is_refused_and_nothing_else_changes() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    for damaged in [
        damaged(ping(1, 0, 0)),
        damaged(declare(2)),
        damaged(bye()),
        damaged(sealed(header(0x33, 0), &[1])),
        damaged(sealed(header(0x80, 0), &[1])),
        // It may belong to a version that this gateway does not know.
        damaged(reheaded(&ping(1, 0, 0), |header| header.flags = 1)),
    ] {
        link.send(&damaged);
        link.expect_nack(0, Code::PayloadCrc, 2);
    }
    link.ping();
    link.send(&readings(2));
    link.expect_ack(2);
    assert_eq!(gateway.database().readings("pump").len(), 2);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn a_damaged_frame_that_may_be_skipped_is_refused_whatever_its_header_says() {
    let gateway = Gateway::start(&[]);
    for change in [
        |header: &mut fieldgate_protocol::frame::Header| header.version = 9,
        |header: &mut fieldgate_protocol::frame::Header| header.seq = 9,
        |header: &mut fieldgate_protocol::frame::Header| header.flags = 9,
    ] {
        let (mut link, _) = gateway.connect("pump");
        let skipped = reheaded(&sealed(header(0x80, 0), &[1]), change);
        link.send(&damaged(skipped));
        link.expect_nack(0, Code::PayloadCrc, 1);
        link.ping();
    }
}

#[test]
fn types_that_may_be_skipped_are_skipped() {
    let gateway = Gateway::start(&[]);
    let strange = |frame_type: u8| {
        reheaded(&sealed(header(frame_type, 0), b"to be"), |header| {
            (header.version, header.flags, header.seq) = (9, 0xFF, u64::MAX);
        })
    };
    let pump = gateway.device("pump");
    let mut link = Link::open(gateway.addr);
    link.send(&strange(0x80));
    let transcript = link.challenge(&pump);
    link.send(&strange(0xFF));
    link.authenticate(&pump, transcript);
    link.send(&declare(SCHEMA));
    for seq in 1..=3 {
        link.send(&strange(0x7F + seq as u8));
        link.send(&strange(0xFF));
        link.send(&readings(seq));
    }
    link.expect_ack(3);
    assert_eq!(gateway.database().readings("pump").len(), 3);
    assert_only(&gateway, 1);
}

#[test]
fn a_damaged_payload_is_requested_once_and_quarantined_the_second_time() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("resent");
    link.send(&damaged(readings(1)));
    link.expect_nack(1, Code::PayloadCrc, 1);
    // Frames after it are dropped without an answer.
    link.send(&readings(2));
    link.send(&damaged(readings(3)));
    link.ping();
    for seq in 1..=3 {
        link.send(&readings(seq));
    }
    link.expect_ack(3);
    let mut database = gateway.database();
    assert_eq!(database.frames("resent"), [(1, 17), (2, 17), (3, 17)]);
    assert_eq!(database.quarantine("resent"), []);

    let (mut link, _) = gateway.connect("rotten");
    let rotten = damaged(readings(1));
    link.send(&rotten);
    link.expect_nack(1, Code::PayloadCrc, 1);
    link.send(&rotten);
    link.expect_nack(1, Code::PayloadCrcTwice, 2);
    link.expect_ack(1);
    link.send(&readings(2));
    link.expect_ack(2);
    assert_eq!(database.quarantine("rotten"), [(1, 35, rotten)]);
    assert_eq!(database.readings("rotten").len(), 1);

    // A number damaged once on each of two connections is not quarantined.
    for _ in 0..2 {
        let (mut link, _) = gateway.connect("unlucky");
        link.send(&damaged(readings(1)));
        link.expect_nack(1, Code::PayloadCrc, 1);
    }
    assert_eq!(database.quarantine("unlucky"), []);
    assert_serves(&gateway, "good");
}

#[test]
fn a_number_damaged_twice_is_quarantined_whatever_arrives_in_between() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = Link::login(gateway.addr, &gateway.device("pump"));
    let rotten = damaged(readings(1));
    link.send(&rotten);
    link.expect_nack(1, Code::PayloadCrc, 1);
    link.send(&readings(1));
    link.expect_nack(1, Code::UnknownSchema, 1);
    link.send(&rotten);
    link.expect_nack(1, Code::PayloadCrcTwice, 2);
    link.expect_ack(1);
    assert_eq!(gateway.database().quarantine("pump"), [(1, 35, rotten)]);
}

#[test]
fn a_number_beyond_the_limit_ends_the_connection() {
    let gateway = Gateway::start(&["--window-frames", "4"]);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!((welcomed.durable_seq, welcomed.limit_seq), (0, 4));
    link.send(&readings(5));
    link.expect_bye(Code::Credit);
    // Damaged or not, in order or not.
    let (mut link, _) = gateway.connect("pump");
    link.send(&damaged(readings(5)));
    link.expect_bye(Code::Credit);
    let (mut link, _) = gateway.connect("pump");
    link.send(&gap(5, 9, 0));
    link.expect_bye(Code::Credit);
    // The first number of a GAP counts.
    let (mut link, _) = gateway.connect("gap");
    link.send(&gap(1, 9, 0));
    match link.hear() {
        Heard::Ack { seq, limit_seq } => assert_eq!((seq, limit_seq), (9, 13)),
        other => panic!("{other:?}"),
    }
    link.send(&readings(14));
    link.expect_bye(Code::Credit);
    assert_eq!(gateway.database().frames("pump"), []);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 3);
}

#[test]
fn missing_numbers_are_requested_once() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(3));
    link.expect_nack(3, Code::SeqGap, 1);
    link.send(&readings(4));
    link.send(&readings(2));
    link.ping();
    for seq in 1..=4 {
        link.send(&readings(seq));
    }
    link.expect_ack(4);
    let mut database = gateway.database();
    assert_eq!(
        database.frames("pump"),
        [(1, 17), (2, 17), (3, 17), (4, 17)]
    );
    // A damaged GAP covers only its own number.
    link.send(&damaged(gap(5, 8, 0)));
    link.expect_nack(8, Code::SeqGap, 5);
    link.send(&gap(5, 8, 0));
    link.expect_ack(8);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn an_unknown_schema_is_requested() {
    let gateway = Gateway::start(&[]);
    let mut pump = gateway.device("pump");
    let (mut link, welcomed) = Link::login(gateway.addr, &pump);
    assert!(!welcomed.schema_known);
    link.send(&readings(1));
    link.expect_nack(1, Code::UnknownSchema, 1);
    link.send(&readings(2));
    link.ping();
    link.send(&declare(SCHEMA));
    link.send(&readings(1));
    link.expect_ack(1);
    // The same DECLARE again changes nothing; other content under this number is rejected.
    link.send(&declare(SCHEMA));
    let other = Channel {
        id: TEMPERATURE,
        name: "other",
        unit: "K",
        kind: Kind::F64,
        exp10: 0,
    };
    for _ in 0..2 {
        link.send(&declare_channels(SCHEMA, std::slice::from_ref(&other)));
        link.expect_nack(0, Code::SchemaConflict, 2);
    }
    link.send(&readings(2));
    link.expect_ack(2);
    drop(link);
    // The device cannot fix that by itself, so operators get an event, once.
    let refusals = "SELECT count(*) FROM device_events WHERE kind = 'refused' AND code = 23";
    assert_eq!(gateway.database().count(refusals), 1);
    // Stored, but neither named in HELLO nor declared: unknown in this session.
    let (mut link, _) = Link::login(gateway.addr, &pump);
    link.send(&readings(3));
    link.expect_nack(3, Code::UnknownSchema, 3);
    drop(link);
    pump.schema = SCHEMA;
    pump.schema_hash = [9; 8];
    let (_, welcomed) = Link::login(gateway.addr, &pump);
    assert!(!welcomed.schema_known);
    pump.schema_hash = crate::support::messages::declared_hash(SCHEMA);
    let (mut link, welcomed) = Link::login(gateway.addr, &pump);
    assert!(welcomed.schema_known);
    link.send(&readings(3));
    link.expect_ack(3);
    let mut database = gateway.database();
    let channels = "SELECT count(*) FROM telemetry WHERE channel <> 'temperature'";
    assert_eq!(database.count(channels), 0);
    assert_eq!(database.readings("pump").len(), 3);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}
