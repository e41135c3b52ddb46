//! Every row of the table of malformed input (SPEC, section 12) against the real gateway: what it
//! answers, whether the connection goes on, what is kept, and that a good device is served afterwards.

use fieldgate_protocol::column::encoding;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{HEADER_BYTES, types};
use fieldgate_protocol::message::{Ack, Channel, Column, CommandResult, Data, Event, Gap};

use crate::client::{
    FLOW, Heard, LEVEL, Link, Login, OPEN, SCHEMA, T0_US, TEMPERATURE, bye, damaged, declare,
    declare_channels, event, frame, gap, header, no_columns, payload, ping, raw, readings,
    readings_at, reheaded, sealed, with_columns,
};
use crate::gateway::Gateway;

/// Cases of one session, each as what it is called and what is sent.
type Cases = Vec<(&'static str, Vec<u8>)>;

/// A new device logs in, and a reading of it is stored.
fn assert_serves(gateway: &Gateway, name: &str) {
    let (mut link, _) = gateway.connect(name);
    link.send(&readings(1));
    link.expect_ack(1);
    assert_eq!(gateway.database().readings(name).len(), 1);
}

/// No device but the `known` ones left anything at all.
fn assert_only(gateway: &Gateway, known: i64) {
    let mut database = gateway.database();
    assert_eq!(database.count("SELECT count(*) FROM devices"), known);
    assert_eq!(database.count("SELECT count(*) FROM quarantine"), 0);
}

#[test]
fn another_protocol_is_closed_without_a_word() {
    let gateway = Gateway::start(&[]);
    let strangers: [(&str, &[u8]); 6] = [
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
    for (what, bytes) in strangers {
        let mut link = Link::open(gateway.addr);
        link.send(bytes);
        assert_eq!(link.hear(), Heard::Closed, "{what}");
    }
    // The same within a session: nothing is said, what came before is kept.
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
fn a_frame_over_the_limit_is_refused_by_its_header_alone() {
    let gateway = Gateway::start(&[]);
    let header_of = |payload_bytes: usize| {
        let mut whole = sealed(header(types::DATA, 1), &vec![0; payload_bytes]);
        whole.truncate(HEADER_BYTES);
        whole
    };
    // 512 bytes are within the limit of the handshake, though not the frame that is awaited.
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
    // A frame that is just not too long is read whole: its number is used up.
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
fn a_stall_or_silence_ends_the_connection() {
    let gateway = Gateway::start(&[
        "--handshake-timeout-s",
        "1",
        "--frame-timeout-s",
        "1",
        "--idle-timeout-s",
        "3",
        "--keepalive-s",
        "1",
    ]);
    let pump = gateway.device("pump");
    // All at once, for each takes its time.
    let mut mute = Link::open(gateway.addr);
    let mut slow = Link::open(gateway.addr);
    slow.send(&pump.hello()[..20]);
    let mut shy = Link::open(gateway.addr);
    shy.challenge(&pump);
    let mut skipper = Link::open(gateway.addr);
    skipper.send(&sealed(header(0x90, 0), &[]));
    let (mut stalled, _) = gateway.connect("stalled");
    stalled.send(&readings(1));
    stalled.expect_ack(1);
    let begun = std::time::Instant::now();
    stalled.send(&readings(2)[..30]);
    let (mut silent, _) = gateway.connect("silent");
    for link in [&mut mute, &mut slow, &mut shy, &mut skipper] {
        link.expect_bye(Code::Idle);
    }
    stalled.expect_bye(Code::Idle);
    assert!(begun.elapsed().as_millis() >= 900, "{:?}", begun.elapsed());
    silent.expect_bye(Code::Idle);
    assert!(begun.elapsed().as_millis() >= 2900, "{:?}", begun.elapsed());
    let mut database = gateway.database();
    assert_eq!(database.frames("stalled"), [(1, 17)]);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 3);
}

#[test]
fn before_welcome_all_faults_look_alike() {
    let gateway = Gateway::start(&[]);
    let pump = gateway.device("pump");
    let hello = pump.hello();
    let changed = |change: fn(&mut Login)| {
        let mut login = pump.clone();
        change(&mut login);
        login.hello()
    };
    let cut = |count: usize| sealed(header(types::HELLO, 0), &payload(&hello)[..count]);
    let mut trailing = payload(&hello).to_vec();
    trailing.push(0);
    // The version as a byte, then the name's length as a varint of two bytes.
    let mut overlong = payload(&hello).to_vec();
    overlong.splice(2..3, [0x84, 0x00]);
    let mut not_utf8 = payload(&hello).to_vec();
    not_utf8[3] = 0xFF;
    let mut bad_ext = payload(&hello).to_vec();
    bad_ext.splice(bad_ext.len() - 1.., [1, 1]);
    let mut even_tag = payload(&hello).to_vec();
    even_tag.splice(even_tag.len() - 1.., [2, 2, 0]);
    let of_hello = |payload: &[u8]| sealed(header(types::HELLO, 0), payload);
    let cases: Cases = vec![
        ("AUTH first", sealed(header(types::AUTH, 0), &[0; 34])),
        ("CHALLENGE", sealed(header(types::CHALLENGE, 0), &[])),
        ("WELCOME", sealed(header(types::WELCOME, 0), &[])),
        ("DATA", readings(1)),
        ("DECLARE", declare(SCHEMA)),
        ("PING", ping(1, 0, 0)),
        ("BYE", bye()),
        ("unknown", sealed(header(0x7E, 0), &[])),
        ("seq", reheaded(&hello, |header| header.seq = 1)),
        ("flag", reheaded(&hello, |header| header.flags = 1)),
        ("damaged", damaged(hello.clone())),
        (
            "damaged, may be skipped",
            damaged(sealed(header(0x80, 0), &[1])),
        ),
        ("empty", of_hello(&[])),
        ("cut short", cut(10)),
        ("trailing byte", of_hello(&trailing)),
        ("overlong varint", of_hello(&overlong)),
        ("not UTF-8", of_hello(&not_utf8)),
        ("bad ext", of_hello(&bad_ext)),
        ("even tag", of_hello(&even_tag)),
        ("no name", changed(|login| login.name.clear())),
        (
            "name with a space",
            changed(|login| login.name = "a b".into()),
        ),
        (
            "name too long",
            changed(|login| login.name = "n".repeat(33)),
        ),
        (
            "firmware too long",
            changed(|login| login.firmware = "f".repeat(33)),
        ),
        ("stream", changed(|login| login.stream = 1 << 63)),
        (
            "next 0",
            changed(|login| (login.oldest_seq, login.next_seq) = (0, 0)),
        ),
        ("next 2^63", changed(|login| login.next_seq = 1 << 63)),
        (
            "oldest above next",
            changed(|login| login.oldest_seq = 1_000_001),
        ),
        (
            "versions reversed",
            changed(|login| login.versions = (2, 1)),
        ),
        (
            "time since boot",
            changed(|login| login.mono_us = (1 << 53) + 1),
        ),
    ];
    for (what, bytes) in &cases {
        eprintln!("as the first frame: {what}");
        let mut link = Link::open(gateway.addr);
        link.send(bytes);
        link.expect_bye(Code::Authentication);
    }
    for (what, bytes) in &cases[1..] {
        eprintln!("after CHALLENGE: {what}");
        let mut link = Link::open(gateway.addr);
        link.challenge(&pump);
        link.send(bytes);
        link.expect_bye(Code::Authentication);
    }
    let mut link = Link::open(gateway.addr);
    link.challenge(&pump);
    link.send(&hello);
    link.expect_bye(Code::Authentication);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 1);
}

#[test]
fn whoever_cannot_prove_the_key_learns_nothing() {
    let gateway = Gateway::start(&[]);
    assert_serves(&gateway, "known");
    let mut answers = Vec::new();
    for name in ["known", "unknown"] {
        let mut login = gateway.device(name);
        login.key[0] ^= 1;
        let mut link = Link::open(gateway.addr);
        let (auth, _) = login.auth(link.challenge(&login));
        link.send(&auth);
        answers.push(link.hear());
        link.expect_closed();
    }
    assert!(
        matches!(answers[0], Heard::Bye { code: 50, .. }),
        "{answers:?}"
    );
    assert_eq!(answers[0], answers[1]);
    let known = gateway.device("known");
    // Every bit of the MAC counts; an AUTH of another connection is no proof in this one.
    for bit in [0, 100, 255] {
        let mut link = Link::open(gateway.addr);
        let (auth, _) = known.auth(link.challenge(&known));
        let mut payload = payload(&auth).to_vec();
        let mac_at = payload.len() - 32;
        payload[mac_at + bit / 8] ^= 1 << (bit % 8);
        link.send(&sealed(header(types::AUTH, 0), &payload));
        link.expect_bye(Code::Authentication);
    }
    let mut link = Link::open(gateway.addr);
    let (auth, _) = known.auth(link.challenge(&known));
    let mut replaying = Link::open(gateway.addr);
    replaying.challenge(&known);
    replaying.send(&auth);
    replaying.expect_bye(Code::Authentication);
    // A derived key is good for its own name only.
    let mut link = Link::open(gateway.addr);
    let twin = Login {
        name: "known".into(),
        ..gateway.device("other")
    };
    let (auth, _) = twin.auth(link.challenge(&twin));
    link.send(&auth);
    link.expect_bye(Code::Authentication);
    // A right key with faults in AUTH.
    let faults: [fn(&mut Vec<u8>); 3] = [
        |auth| *auth = damaged(auth.clone()),
        |auth| *auth = reheaded(auth, |header| header.flags = 1),
        |auth| *auth = reheaded(auth, |header| header.seq = 1),
    ];
    for fault in faults {
        let mut link = Link::open(gateway.addr);
        let (mut auth, _) = known.auth(link.challenge(&known));
        fault(&mut auth);
        link.send(&auth);
        link.expect_bye(Code::Authentication);
    }
    assert_serves(&gateway, "good");
    assert_only(&gateway, 2);
}

#[test]
fn versions_that_nobody_agreed_on_are_told_the_range() {
    let gateway = Gateway::start(&[]);
    for versions in [(2, 2), (2, 9), (0, 0), (255, 255)] {
        let mut link = Link::open(gateway.addr);
        let mut login = gateway.device("pump");
        login.versions = versions;
        link.send(&login.hello());
        link.expect_bye(Code::Version);
    }
    for version in [0, 2, 255] {
        let hello = reheaded(&gateway.device("pump").hello(), |header| {
            header.version = version;
        });
        let mut link = Link::open(gateway.addr);
        link.send(&hello);
        link.expect_bye(Code::Version);
        for good in [readings(1), ping(1, 0, 0)] {
            let (mut link, _) = gateway.connect("frames");
            link.send(&reheaded(&good, |header| header.version = version));
            link.expect_bye(Code::Version);
        }
    }
    let mut wide = gateway.device("wide");
    wide.versions = (0, 255);
    Link::login(gateway.addr, &wide);
    assert_eq!(gateway.database().frames("frames"), []);
    assert_serves(&gateway, "good");
    assert_only(&gateway, 3);
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

/// An unsequenced frame under number 1.
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
    let channel = |name: &'static str, unit: &'static str, kind: u8, exp10: i8| Channel {
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
            declare_channels(2, &[channel("a", "", 0, 0), channel("b", "", 0, 0)]),
        ),
        (
            "DECLARE, one name twice",
            declare_channels(
                2,
                &[
                    channel("a", "", 0, 0),
                    Channel {
                        id: 2,
                        ..channel("a", "", 0, 0)
                    },
                ],
            ),
        ),
        ("DECLARE, no name", one(channel("", "", 0, 0))),
        ("DECLARE, U+0000", one(channel("a\0b", "", 0, 0))),
        ("DECLARE, kind", one(channel("a", "", 4, 0))),
        ("DECLARE, exponent 23", one(channel("a", "", 0, 23))),
        ("DECLARE, exponent -23", one(channel("a", "", 0, -23))),
        ("DECLARE, exponent of a float", one(channel("a", "", 2, 1))),
        (
            "DECLARE, long name",
            one(Channel {
                name: &long_name,
                ..channel("", "", 0, 0)
            }),
        ),
        (
            "DECLARE, long unit",
            one(Channel {
                unit: &long_unit,
                ..channel("a", "", 0, 0)
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
        // Not known whether it is one of a version that this gateway has not heard of.
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
fn a_damaged_payload_is_asked_for_once_and_quarantined_the_second_time() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("mended");
    link.send(&damaged(readings(1)));
    link.expect_nack(1, Code::PayloadCrc, 1);
    // Behind it, frames are dropped without an answer.
    link.send(&readings(2));
    link.send(&damaged(readings(3)));
    link.ping();
    for seq in 1..=3 {
        link.send(&readings(seq));
    }
    link.expect_ack(3);
    let mut database = gateway.database();
    assert_eq!(database.frames("mended"), [(1, 17), (2, 17), (3, 17)]);
    assert_eq!(database.quarantine("mended"), []);

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

    // A number damaged once on each of two connections is not the queue's fault.
    for _ in 0..2 {
        let (mut link, _) = gateway.connect("unlucky");
        link.send(&damaged(readings(1)));
        link.expect_nack(1, Code::PayloadCrc, 1);
    }
    assert_eq!(database.quarantine("unlucky"), []);
    assert_serves(&gateway, "good");
}

#[test]
fn a_number_damaged_twice_is_quarantined_whatever_came_between() {
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
fn beyond_the_limit_ends_the_connection() {
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
    // A GAP counts by its first number.
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
fn missing_numbers_are_asked_for_once() {
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
fn a_schema_that_is_not_known_is_asked_for() {
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
    // The same again changes nothing; other content under this number is refused.
    link.send(&declare(SCHEMA));
    let other = Channel {
        id: TEMPERATURE,
        name: "other",
        unit: "K",
        kind: 2,
        exp10: 0,
    };
    link.send(&declare_channels(SCHEMA, &[other]));
    link.expect_nack(0, Code::SchemaConflict, 2);
    link.send(&readings(2));
    link.expect_ack(2);
    drop(link);
    // Stored, but neither named in HELLO nor declared: not known in this session.
    let (mut link, _) = Link::login(gateway.addr, &pump);
    link.send(&readings(3));
    link.expect_nack(3, Code::UnknownSchema, 3);
    drop(link);
    pump.schema = SCHEMA;
    pump.schema_hash = [9; 8];
    let (_, welcomed) = Link::login(gateway.addr, &pump);
    assert!(!welcomed.schema_known);
    pump.schema_hash = crate::client::declared_hash(SCHEMA);
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

/// Frames of number 2 that are refused for good with `code`: each is put into quarantine whole and
/// leaves no other trace, and its stream goes on.
fn assert_quarantined(code: Code, cases: Cases) {
    let gateway = Gateway::start(&[]);
    for (i, (what, bytes)) in cases.iter().enumerate() {
        eprintln!("{what}");
        let name = format!("device-{i}");
        let (mut link, _) = gateway.connect(&name);
        link.send(&readings(1));
        link.expect_ack(1);
        link.send(bytes);
        link.expect_nack(2, code, 3);
        link.expect_ack(2);
        link.send(&readings(3));
        link.expect_ack(3);
        let mut database = gateway.database();
        let kept = (2, code as i64, bytes.clone());
        assert_eq!(database.quarantine(&name), [kept], "{what}");
        let numbers: Vec<i64> = database.frames(&name).iter().map(|frame| frame.0).collect();
        assert_eq!(numbers, [1, 2, 3], "{what}");
        let values: Vec<_> = database.readings(&name).iter().map(|row| row.1).collect();
        assert_eq!(values, [Some(0.01), Some(0.03)], "{what}");
    }
    let mut database = gateway.database();
    let events = "SELECT count(*) FROM device_events WHERE kind = 'event'";
    assert_eq!(database.count(events), 0);
    assert_eq!(database.count("SELECT count(*) FROM gaps"), 0);
    assert_eq!(
        database.count("SELECT count(*) FROM schemas"),
        cases.len() as i64
    );
    assert_serves(&gateway, "good");
}

fn data_of(payload: &[u8]) -> Vec<u8> {
    sealed(header(types::DATA, 2), payload)
}

#[test]
fn content_that_does_not_decode_is_quarantined() {
    let good = readings(2);
    let good = payload(&good);
    let mut trailing = good.to_vec();
    trailing.push(0);
    // The schema, 1, as a varint of two bytes.
    let mut overlong = good.to_vec();
    overlong.splice(0..1, [0x81, 0x00]);
    let mut too_wide = good.to_vec();
    too_wide.splice(0..1, [0xFF, 0xFF, 0x07]);
    let mut bad_ext = good.to_vec();
    bad_ext.splice(good.len() - 1.., [2, 1, 5]);
    let good_event = event(2, 1, 1, "ab");
    let mut not_utf8 = payload(&good_event).to_vec();
    let text_at = not_utf8.len() - 3;
    not_utf8[text_at] = 0xFF;
    let mut columns = vec![SCHEMA as u8, 1, 0, 7, 0, 1, 0, 0, 33];
    columns.extend((0..33).flat_map(|channel| [channel, 0, 0, 0]));
    columns.push(0);
    let cases: Cases = vec![
        ("empty", data_of(&[])),
        ("cut short", data_of(&good[..good.len() - 3])),
        ("trailing byte", data_of(&trailing)),
        ("overlong varint", data_of(&overlong)),
        ("number too wide", data_of(&too_wide)),
        ("bad ext", data_of(&bad_ext)),
        ("33 columns", data_of(&columns)),
        (
            "length beyond the payload",
            data_of(&[1, 1, 0, 7, 0, 1, 0, 0xFF, 0x7F]),
        ),
        ("not UTF-8", sealed(header(types::EVENT, 2), &not_utf8)),
        ("U+0000", event(2, 1, 1, "a\0b")),
        ("GAP of nothing", sealed(header(types::GAP, 2), &[])),
    ];
    assert_quarantined(Code::Malformed, cases);
}

#[test]
fn numbers_out_of_range_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let column = [raw(TEMPERATURE, &value)];
    let with = |data: Data<'_>| with_columns(data, 2, &column);
    let good = no_columns(1);
    let open = [0; 8192];
    let packed = Column {
        channel: TEMPERATURE,
        encoding: encoding::DELTA_PACKED,
        nulls: &[],
        data: &[2, 0],
    };
    let columns = [
        packed,
        Column {
            channel: OPEN,
            ..packed
        },
        Column {
            channel: 9,
            ..packed
        },
    ];
    let long_text = "x".repeat(129);
    let last_us = 253_402_300_799_999_999;
    let event_at = |clock, time_us| {
        frame(
            &Event {
                clock,
                boot: 7,
                time_us,
                level: 1,
                code: 1,
                text: "",
                ext: &[],
            },
            2,
        )
    };
    let cases: Cases = vec![
        (
            "clock 2",
            with(Data {
                clock: 2,
                ..good.clone()
            }),
        ),
        (
            "time unit 3",
            with(Data {
                time_unit: 3,
                ..good.clone()
            }),
        ),
        (
            "no rows",
            with(Data {
                rows: 0,
                ..good.clone()
            }),
        ),
        ("4097 rows", with_columns(no_columns(4097), 2, &[packed])),
        ("65535 rows", with_columns(no_columns(65535), 2, &[packed])),
        ("8193 readings", with_columns(no_columns(2731), 2, &columns)),
        ("no rows, and a column that has some", {
            with_columns(no_columns(0), 2, &[raw(OPEN, &open[..9])])
        }),
        (
            "year 10000",
            with(Data {
                t0: last_us + 1,
                ..good.clone()
            }),
        ),
        (
            "year 0",
            with(Data {
                t0: -62_135_596_800_000_001,
                ..good.clone()
            }),
        ),
        (
            "year 0, seconds",
            with(Data {
                t0: -62_135_596_801,
                time_unit: 2,
                ..good.clone()
            }),
        ),
        (
            "overflow",
            with(Data {
                t0: i64::MAX,
                time_unit: 2,
                ..good.clone()
            }),
        ),
        (
            "before boot",
            with(Data {
                clock: 0,
                t0: -1,
                ..good.clone()
            }),
        ),
        (
            "long after boot",
            with(Data {
                clock: 0,
                t0: (1 << 53) + 1,
                ..good.clone()
            }),
        ),
        ("second row in year 10000", {
            with_columns(
                Data {
                    t0: last_us,
                    ..no_columns(2)
                },
                2,
                &[packed],
            )
        }),
        ("level 5", event(2, 5, 1, "")),
        ("text of 129 bytes", event(2, 1, 1, &long_text)),
        ("event in year 10000", event_at(1, last_us + 1)),
        ("event before boot", event_at(0, -1)),
        ("event of clock 2", event_at(2, 0)),
        ("GAP from 0", gap(0, 2, 0)),
        ("GAP from behind itself", gap(3, 2, 0)),
    ];
    assert_quarantined(Code::Limit, cases);
}

#[test]
fn times_and_columns_that_do_not_decode_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let two = [0; 16];
    let rows = |count: u16| no_columns(count);
    let of = |encoding: u8, data: &'static [u8]| Column {
        channel: TEMPERATURE,
        encoding,
        nulls: &[],
        data,
    };
    let one = |column: Column<'_>| with_columns(rows(1), 2, &[column]);
    let dt = |dt: &'static [u8]| {
        let data = Data {
            step: 0,
            dt,
            ..rows(2)
        };
        with_columns(data, 2, &[raw(TEMPERATURE, &two)])
    };
    let temperature = raw(TEMPERATURE, &value);
    let nulls = |nulls: &'static [u8]| Column {
        nulls,
        ..temperature
    };
    let cases: Cases = vec![
        ("no columns", with_columns(rows(1), 2, &[])),
        (
            "channel unknown",
            one(Column {
                channel: 99,
                ..temperature
            }),
        ),
        (
            "channel twice",
            with_columns(rows(1), 2, &[temperature, temperature]),
        ),
        ("encoding 3", one(of(3, &[0]))),
        ("encoding 255", one(of(255, &[0]))),
        (
            "delta of a float",
            one(Column {
                channel: LEVEL,
                ..of(1, &[0])
            }),
        ),
        (
            "packed delta of a float",
            one(Column {
                channel: FLOW,
                ..of(2, &[0, 0])
            }),
        ),
        ("raw, too short", one(raw(TEMPERATURE, &value[..7]))),
        ("raw, too long", one(raw(TEMPERATURE, &two))),
        ("binary32 of 8 bytes", one(raw(FLOW, &value))),
        ("bool 2", one(raw(OPEN, &[2]))),
        (
            "bool 2 by delta",
            one(Column {
                channel: OPEN,
                ..of(1, &[4])
            }),
        ),
        ("delta, no value", one(of(1, &[]))),
        ("delta, two values", one(of(1, &[0, 0]))),
        ("delta, overlong", one(of(1, &[0x80, 0x00]))),
        (
            "delta, 65 bits",
            one(of(
                1,
                &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 3],
            )),
        ),
        ("packed, no width", one(of(2, &[0]))),
        (
            "packed, width 65",
            with_columns(rows(2), 2, &[of(2, &[0, 65, 0, 0, 0, 0, 0, 0, 0, 0, 0])]),
        ),
        (
            "packed, spare bits",
            with_columns(rows(2), 2, &[of(2, &[0, 2, 0xFD])]),
        ),
        (
            "packed, too short",
            with_columns(rows(2), 2, &[of(2, &[0, 9, 1])]),
        ),
        ("nulls too long", one(nulls(&[0, 0]))),
        ("nulls, spare bits", one(nulls(&[2]))),
        ("a value for a null", one(nulls(&[1]))),
        ("times not increasing", dt(&[0])),
        ("dt missing", dt(&[])),
        ("dt too long", dt(&[1, 1])),
        ("dt overlong", dt(&[0x81, 0x00])),
        (
            "dt and step",
            with_columns(
                Data {
                    dt: &[1],
                    ..rows(2)
                },
                2,
                &[raw(TEMPERATURE, &two)],
            ),
        ),
    ];
    assert_quarantined(Code::Column, cases);
}

#[test]
fn sequenced_types_not_known_or_not_carried_out_are_quarantined() {
    let result = CommandResult {
        id: 1,
        status: 0,
        body: b"done",
        ext: &[],
    };
    let cases: Cases = vec![
        ("10", sealed(header(0x10, 2), &[])),
        ("15", sealed(header(0x15, 2), b"unheard of")),
        ("1F", sealed(header(0x1F, 2), &[0; 100])),
        ("RESULT", frame(&result, 2)),
        (
            "RESULT that does not decode",
            sealed(header(types::RESULT, 2), &[]),
        ),
    ];
    assert_quarantined(Code::UnknownType, cases);
}

#[test]
fn flags_and_critical_tags_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let column = [raw(TEMPERATURE, &value)];
    let with_ext = |ext: &'static [u8]| {
        with_columns(
            Data {
                ext,
                ..no_columns(1)
            },
            2,
            &column,
        )
    };
    let gap = Gap {
        from_seq: 2,
        reason: 0,
        ext: &[4, 0],
    };
    let cases: Cases = vec![
        (
            "flag on DATA",
            reheaded(&readings(2), |header| header.flags = 1),
        ),
        (
            "flag on EVENT",
            reheaded(&event(2, 1, 1, ""), |header| header.flags = 0x80),
        ),
        (
            "flag before type",
            reheaded(&sealed(header(0x1B, 2), &[]), |h| h.flags = 2),
        ),
        (
            "flag before content",
            reheaded(&data_of(&[]), |header| header.flags = 2),
        ),
        ("even tag", with_ext(&[2, 0])),
        (
            "even tag after an odd one",
            with_ext(&[1, 2, 7, 7, 0, 1, 9]),
        ),
        ("even tag on GAP", frame(&gap, 2)),
    ];
    assert_quarantined(Code::Critical, cases);
}

#[test]
fn odd_tags_are_passed_over() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    let value = 5i64.to_le_bytes();
    let data = Data {
        ext: &[1, 2, 7, 7, 255, 0],
        ..no_columns(1)
    };
    link.send(&with_columns(data, 1, &[raw(TEMPERATURE, &value)]));
    link.expect_ack(1);
    assert_eq!(gateway.database().readings("pump"), [(T0_US, Some(0.05))]);
    assert_only(&gateway, 1);
}

#[test]
fn the_ninth_refusal_in_a_minute_ends_the_connection() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=8 {
        link.send(&sealed(header(0x1E, seq), &[]));
        link.expect_nack(seq, Code::UnknownType, seq + 1);
        link.expect_ack(seq);
    }
    // Good frames do not count.
    link.send(&readings(9));
    link.expect_ack(9);
    link.send(&sealed(header(0x1E, 10), &[]));
    link.expect_bye_after(Code::Protocol, 60_000);
    let mut database = gateway.database();
    assert_eq!(database.quarantine("pump").len(), 8);
    assert_eq!(database.durable_seq("pump"), 9);
    // The ninth was not taken: it can come again.
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 9);
    link.send(&readings(10));
    link.expect_ack(10);
    assert_serves(&gateway, "good");
}
