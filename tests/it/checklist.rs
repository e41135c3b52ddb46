//! Tests of the security checklist, line by line; a test's name begins with the number of its line.
//!
//! | line | tests |
//! |---|---|
//! | 1 no default credential | here |
//! | 2 individual keys and certificates for devices; revocation | `lifecycle`, `tls` |
//! | 3 secrets are in private files, and not in logs | `start`, `session`, and the last step of `tests/run` |
//! | 4 an unknown device and a wrong key are indistinguishable | `handshake` |
//! | 5 replies to failures are delayed increasingly | `limits` |
//! | 6 TLS 1.2 or later; plain TCP beyond loopback only on request | `tls`, `start` |
//! | 7 certificates are reloaded | `tls`, `tls_reload` |
//! | 8 unfinished handshakes are dropped first | `limits`; figures from `fieldgate-sim bench --only hostile` |
//! | 9 lengths are checked first; unauthenticated peers use little memory | here, `malformed`, `limits`, `tls` |
//! | 10 deadlines for the first byte, a frame and silence | `malformed` |
//! | 11 a peer that does not read is disconnected | here |
//! | 12 limits on connections, also with few file descriptors | `limits` |
//! | 13 a device's rate | `limits` |
//! | 14 replayed bytes change nothing | here, `session`, `tls` |
//! | 15 a device writes only as itself | here |
//! | 16 hostile names and texts | `stored`, `stored_in_postgres` |
//! | 20 dependencies | `tests/audit` |

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;

use crate::handshake::AT_ONCE;
use crate::malformed::assert_serves;
use crate::support::client::{Heard, Link, Login};
use crate::support::gateway::{Gateway, command};
use crate::support::logs::keep_of;
use crate::support::messages::{
    SCHEMA, T0_US, bye, damaged, declare, event, gap, header, ping, readings, readings_at, sealed,
};

/// Tries common credentials on a new gateway: none of them is a key.
#[test]
fn c01_no_default_credential() {
    let gateway = Gateway::start(&AT_ONCE);
    let device = gateway.device("pump");
    let name = |text: &[u8]| {
        let mut key = [0; 32];
        key[..text.len()].copy_from_slice(text);
        key
    };
    let other = gateway.device("valve").key;
    for key in [
        [0; 32],
        [0xff; 32],
        [0x20; 32],
        std::array::from_fn(|i| i as u8),
        name(b"pump"),
        name(b"fieldgate"),
        name(b"admin"),
        name(b"password"),
        gateway.fleet_key(),
        other,
    ] {
        let login = Login {
            key,
            ..device.clone()
        };
        let mut link = Link::open(gateway.addr);
        let (auth, _) = login.auth(link.challenge(&login));
        link.send(&auth);
        link.expect_bye(Code::Authentication);
    }
    let another = Gateway::start(&[]);
    assert_ne!(another.fleet_key(), gateway.fleet_key());
    assert_ne!(gateway.fleet_key(), [0; 32]);
    assert_eq!(gateway.database().count("SELECT count(*) FROM devices"), 0);
}

/// The gateway keeps a kilobyte of an unauthenticated peer's data, and the state of its connection.
#[test]
fn c09_unauthenticated_peers_use_little_memory() {
    let gateway = Gateway::start(&["--handshake-timeout-s", "600"]);
    assert_serves(&gateway, "good");
    let before = gateway.memory_bytes();
    let peers = 1_000;
    let hello = gateway.device("pump").hello();
    let unfinished = sealed(header(0x90, 0), &[0; 480]);
    let mut links: Vec<Link> = (0..peers)
        .map(|_| {
            let mut link = Link::open(gateway.addr);
            link.send(&hello);
            link.send(&unfinished[..500]);
            link
        })
        .collect();
    // CHALLENGE shows that the gateway has read the peer's data.
    for link in &mut links {
        assert!(matches!(link.hear(), Heard::Challenge(_)));
    }
    let each = (gateway.memory_bytes().saturating_sub(before)) / peers;
    assert!(
        each < 8 * 1024,
        "{each} bytes for each unauthenticated peer"
    );
    assert_serves(&gateway, "too");
}

/// A device sends requests and never reads the answers, until they fill the buffers of the system and the gateway.
/// All others are served.
#[test]
fn c11_a_peer_that_does_not_read_is_disconnected() {
    let mut gateway = Gateway::start(&[]);
    let never_reads = gateway.device("never-reads");
    let (mut link, _) = Link::login(gateway.addr, &never_reads);
    let before = gateway.memory_bytes();
    let asks = ping(2_000_000, 0, 0).repeat(100);
    let mut asked = 0;
    let error = loop {
        match link.try_send(&asks) {
            Ok(()) => asked += 100,
            Err(error) => break error,
        }
        if asked % 10_000 == 0 {
            assert_serves(&gateway, &format!("good-{asked}"));
            assert!(asked < 50_000, "{asked} requests, and not disconnected");
        }
    };
    let kinds = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
    assert!(kinds.contains(&error.kind()), "{error}");
    let grown = gateway.memory_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes after {asked} requests");
    assert_serves(&gateway, "good");
    assert!(gateway.is_alive());
    // It may reconnect.
    let (mut link, _) = Link::login(gateway.addr, &never_reads);
    link.ping();
}

/// Returns the content of the store, except events about rejected connections and presence.
fn stored(gateway: &Gateway) -> Vec<String> {
    let tables = [
        "devices",
        "device_revision",
        "streams",
        "schemas",
        "series",
        "frames",
        "readings",
        "gaps",
        "quarantine",
        "clocks",
        "device_events WHERE kind NOT IN ('refused', 'presence')",
    ];
    let dump = |table: &&str| {
        let sql = format!("SELECT * FROM {table}");
        let mut query = command(&["query", &sql, "--format", "json"]);
        let output = query.arg("--data-dir").arg(gateway.data_dir()).output();
        let output = keep_of(output.expect("runs"));
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).expect("text");
        let mut rows: Vec<&str> = text.lines().collect();
        rows.sort_unstable();
        format!("{table}: {}", rows.join("\n"))
    };
    tables.iter().map(dump).collect()
}

/// Runs a session with all kinds of frames, ended by the device; returns the bytes that the device sent.
fn session(mut link: Link, login: &Login) -> Vec<u8> {
    let transcript = link.challenge(login);
    link.authenticate(login, transcript);
    link.send(&declare(SCHEMA));
    link.send(&readings(1));
    link.send(&readings_at(2, T0_US, &[5, 6, 7]));
    link.send(&gap(3, 5, 0));
    link.send(&event(6, 2, 7, "door open"));
    // The gateway does not understand it the first time, nor the second.
    let unknown = sealed(header(0x1f, 7), &[9; 40]);
    link.send(&unknown);
    link.send(&damaged(readings(8)));
    link.send(&readings(8));
    link.send(&ping(3_000_000, 0, 0));
    while !matches!(link.hear(), Heard::Ack { seq: 8, .. }) {}
    link.send(&bye());
    link.expect_closed();
    std::mem::take(&mut link.sent)
}

/// Sends recorded bytes on a new connection, and waits until the gateway closes it.
fn replay(mut link: Link, recorded: &[u8]) {
    link.send_in_vain(recorded);
    link.finish();
    while !matches!(link.try_hear(), Ok(Heard::Closed) | Err(_)) {}
}

/// Waits until the session's own last event is written, so that nothing is pending.
fn settled(gateway: &Gateway) -> Vec<String> {
    let begun = Instant::now();
    let sql = "SELECT (SELECT count(*) FROM device_events WHERE kind = 'connected')
        - (SELECT count(*) FROM device_events WHERE kind = 'disconnected')";
    while gateway.database().count(sql) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "never over");
    }
    stored(gateway)
}

#[test]
fn c14_a_session_replayed_byte_for_byte_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &AT_ONCE);
    let pump = gateway.device("pump");
    let recorded = session(Link::open(gateway.addr), &pump);
    // Wait for another session, so that its end cannot be mistaken for the end of the recorded one.
    assert_serves(&gateway, "other");
    let before = settled(&gateway);
    assert!(before.iter().any(|table| table.contains("door open")));
    let after_handshake = recorded.len() - without_handshake(&recorded).len();
    for part in [
        &recorded[..],
        // HELLO and AUTH only; all but them; everything from the middle of a frame.
        &recorded[..after_handshake],
        &recorded[after_handshake..],
        &recorded[recorded.len() / 2..],
    ] {
        replay(Link::open(gateway.addr), part);
        assert_eq!(stored(&gateway), before);
    }
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let gateway = Gateway::start_in(dir.path(), &AT_ONCE);
    replay(Link::open(gateway.addr), &recorded);
    assert_eq!(stored(&gateway), before);
    // The device itself continues where it was.
    let (_, welcomed) = Link::login(gateway.addr, &pump);
    assert_eq!(welcomed.durable_seq, 8);
}

fn without_handshake(recorded: &[u8]) -> &[u8] {
    let mut rest = recorded;
    for _ in ["HELLO", "AUTH"] {
        let frame = fieldgate_protocol::frame::decode(rest, 4096).expect("a frame");
        rest = &rest[frame.expect("whole").bytes.len()..];
    }
    rest
}

/// Two devices with the same stream number, and the same numbers and times in it, stay separate.
#[test]
fn c15_a_device_writes_only_as_itself() {
    let gateway = Gateway::start(&AT_ONCE);
    let (mut a, _) = gateway.connect("a");
    let (mut b, _) = gateway.connect("b");
    for seq in 1..=3 {
        a.send(&readings_at(seq, T0_US + seq as i64, &[100 + seq as i64]));
        b.send(&readings_at(seq, T0_US + seq as i64, &[200 + seq as i64]));
    }
    a.expect_ack(3);
    b.expect_ack(3);
    let values = |name| -> Vec<Option<f64>> {
        let rows = gateway.database().readings(name);
        rows.into_iter().map(|(_, value)| value).collect()
    };
    let expected = |base: i64| -> Vec<Option<f64>> {
        (1..=3)
            .map(|seq| Some((base + seq) as f64 / 100.0))
            .collect()
    };
    assert_eq!((values("a"), values("b")), (expected(100), expected(200)));
    let series = "SELECT count(*) FROM readings AS r JOIN series AS s ON s.id = r.series_id
        JOIN frames AS f ON f.id = r.frame_id JOIN streams AS st ON st.id = f.stream_id
        WHERE st.device_id <> s.device_id";
    assert_eq!(gateway.database().count(series), 0);
    // A key of `a` opens no session as `b` either.
    let twin = Login {
        key: gateway.device("a").key,
        ..gateway.device("b")
    };
    let mut link = Link::open(gateway.addr);
    let (auth, _) = twin.auth(link.challenge(&twin));
    link.send(&auth);
    link.expect_bye(Code::Authentication);
    b.ping();
}
