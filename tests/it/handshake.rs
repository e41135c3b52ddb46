//! Messages of an unauthenticated peer: it learns nothing from the answers (SPEC R30 to R39, R102).

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;

use crate::malformed::{Cases, assert_only, assert_serves};
use crate::support::client::{Heard, Link, Login};
use crate::support::gateway::Gateway;
use crate::support::messages::{
    SCHEMA, bye, damaged, declare, header, payload, ping, readings, reheaded, sealed,
};

/// Disables the delay after failures, so that a hundred failures take no time.
pub const AT_ONCE: [&str; 2] = ["--failure-delay-max-ms", "0"];

#[test]
fn c04_before_welcome_all_faults_get_the_same_answer() {
    let gateway = Gateway::start(&AT_ONCE);
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
fn c04_a_peer_without_the_key_learns_nothing() {
    let gateway = Gateway::start(&AT_ONCE);
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
    // Every bit of the MAC counts; an AUTH of another connection proves nothing in this one.
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
    // A derived key is valid for its own name only.
    let mut link = Link::open(gateway.addr);
    let twin = Login {
        name: "known".into(),
        ..gateway.device("other")
    };
    let (auth, _) = twin.auth(link.challenge(&twin));
    link.send(&auth);
    link.expect_bye(Code::Authentication);
    // A correct key with faults in AUTH.
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
fn a_known_device_with_another_version_is_in_the_audit_trail() {
    let mut gateway = Gateway::start(&[]);
    gateway.connect("pump");
    for name in ["pump", "absent"] {
        let mut link = Link::open(gateway.addr);
        let mut login = gateway.device(name);
        login.versions = (2, 9);
        link.send(&login.hello());
        link.expect_bye(Code::Version);
    }
    gateway.terminate();
    gateway.wait();
    let events: Vec<(String, i64)> = gateway.database().rows(
        "SELECT d.name, e.code FROM device_events e JOIN devices d ON d.id = e.device_id
         WHERE e.kind = 'refused'",
    );
    assert_eq!(events, [("pump".to_owned(), 51)]);
}

#[test]
fn unsupported_versions_get_the_supported_range() {
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
