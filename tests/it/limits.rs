//! Limits on connections and on a device's rate: beyond them, peers are delayed or disconnected, and no other peer
//! is affected.

use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;

use crate::malformed::assert_serves;
use crate::support::client::{Heard, Link};
use crate::support::gateway::{Gateway, run};
use crate::support::messages::{T0_US, header, ping, readings, readings_at, sealed};

/// Maximum rate of 2,000 readings per second and device.
const READINGS_2000: [&str; 4] = [
    "--device-readings-per-s",
    "2000",
    "--device-readings-burst",
    "8192",
];

fn readings_406(seq: u64) -> Vec<u8> {
    readings_at(seq, T0_US + seq as i64 * 2_000_000_000, &[7; 406])
}

/// SPEC, limits: excess data of a device is read later, and nothing is rejected.
#[test]
fn c13_a_device_over_its_rate_is_delayed_and_others_are_not() {
    let gateway = Gateway::start(&READINGS_2000);
    let (mut hot, _) = gateway.connect("hot");
    let begun = Instant::now();
    // 12,180 readings: the burst, and what the rate allows in two seconds.
    let frames = 30;
    for seq in 1..=frames {
        hot.send(&readings_406(seq));
    }
    // Meanwhile another device is served as usual.
    let (mut calm, _) = gateway.connect("calm");
    for seq in 1..=50 {
        calm.send(&readings(seq));
        calm.expect_ack(seq);
    }
    let calm_took = begun.elapsed();
    hot.expect_ack(frames);
    let hot_took = begun.elapsed();
    assert!(hot_took >= Duration::from_millis(1_500), "{hot_took:?}");
    assert!(calm_took < hot_took, "{calm_took:?}, {hot_took:?}");
    assert_eq!(
        gateway.database().count("SELECT count(*) FROM readings"),
        30 * 406 + 50
    );
}

#[test]
fn c13_a_reconnect_does_not_reset_the_rate() {
    let gateway = Gateway::start(&READINGS_2000);
    let begun = Instant::now();
    // 12,180 readings: the burst, and what the rate allows in two seconds; but less than the burst on each
    // connection.
    for connection in 0..3 {
        let (mut hot, _) = gateway.connect("hot");
        let seqs = connection * 10 + 1..=connection * 10 + 10;
        for seq in seqs.clone() {
            hot.send(&readings_406(seq));
        }
        hot.expect_ack(*seqs.end());
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1_500), "{took:?}");
}

/// Frames without readings are limited as well.
#[test]
fn c13_a_device_may_not_send_requests_without_limit() {
    let rate = [
        "--device-frames-per-s",
        "200",
        "--device-frames-burst",
        "100",
    ];
    let gateway = Gateway::start(&rate);
    let (mut hot, _) = gateway.connect("hot");
    let begun = Instant::now();
    // The burst, and what the rate allows in two seconds.
    let asks = 500;
    hot.send(&ping(77, 0, 0).repeat(asks));
    let (mut calm, _) = gateway.connect("calm");
    for seq in 1..=50 {
        calm.send(&readings(seq));
        calm.expect_ack(seq);
    }
    let calm_took = begun.elapsed();
    for _ in 0..asks {
        assert!(matches!(hot.hear(), Heard::Pong { .. }));
    }
    let hot_took = begun.elapsed();
    assert!(hot_took >= Duration::from_millis(1_500), "{hot_took:?}");
    assert!(calm_took < hot_took, "{calm_took:?}, {hot_took:?}");
}

#[test]
fn c12_connections_per_address_are_limited() {
    let mut gateway = Gateway::start(&["--connections-per-address-max", "3"]);
    let (first, _) = gateway.connect("first");
    let (_second, _) = gateway.connect("second");
    let _idle = Link::open(gateway.addr);
    let mut refused = Link::open(gateway.addr);
    refused.expect_closed();
    gateway.wait_for_line("too many from this address");
    drop(first);
    // As soon as one is closed, a new one is accepted.
    let begun = Instant::now();
    loop {
        let mut link = Link::open(gateway.addr);
        link.send_in_vain(&gateway.device("fourth").hello());
        match link.try_hear() {
            Ok(Heard::Challenge(_)) => break,
            _ => assert!(begun.elapsed() < Duration::from_secs(30), "never"),
        }
    }
}

/// Unfinished handshakes are closed to accept new connections.
#[test]
fn c08_unfinished_handshakes_are_closed_for_devices() {
    let gateway = Gateway::start(&["--handshakes-max", "20", "--handshake-timeout-s", "600"]);
    let mut idle: Vec<Link> = (0..60).map(|_| Link::open(gateway.addr)).collect();
    assert_serves(&gateway, "good");
    // The oldest of them were closed.
    idle[0].expect_closed();
}

/// Unfinished handshakes are also closed at the limit on all connections.
#[test]
fn c08_unfinished_handshakes_are_closed_when_slots_run_out() {
    let gateway = Gateway::start(&["--connections-max", "20", "--handshake-timeout-s", "600"]);
    let (mut first, _) = gateway.connect("first");
    let mut idle: Vec<Link> = (0..60).map(|_| Link::open(gateway.addr)).collect();
    assert_serves(&gateway, "good");
    idle[0].expect_closed();
    first.send(&readings(1));
    first.expect_ack(1);
}

/// An unauthenticated peer may send two frames, and little else.
#[test]
fn c09_bytes_before_authentication_are_limited() {
    let gateway = Gateway::start(&["--preauth-bytes-max", "1024"]);
    let skipped = sealed(header(0x90, 0), &[0; 480]);
    let mut link = Link::open(gateway.addr);
    link.send(&skipped);
    link.send(&skipped);
    link.send_in_vain(&skipped);
    link.expect_bye(Code::Authentication);
    // After authentication there is no such limit.
    let (mut device, _) = gateway.connect("device");
    for _ in 0..10 {
        device.send(&skipped);
    }
    device.ping();
}

/// Failures are answered with increasing delays, a correct key immediately.
#[test]
fn c05_failures_are_delayed_and_a_correct_key_is_not() {
    let gateway = Gateway::start(&["--failure-delay-max-ms", "60000"]);
    let mut waiting = Vec::new();
    let first = Instant::now();
    for _ in 0..12 {
        let mut login = gateway.device("pump");
        login.key[0] ^= 1;
        let mut link = Link::open(gateway.addr);
        let transcript = link.challenge(&login);
        link.send(&login.auth(transcript).0);
        waiting.push(link);
    }
    // By now, another failure would be delayed by a minute; the device with that name is not delayed.
    let begun = Instant::now();
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    // The delays are 100 ms, 200 ms, … in the order of the failures, which may differ from the order of the links. Of
    // any five links, at least one was the fifth to fail or later. The answer itself is delayed, not only the end of
    // the connection.
    for link in &mut waiting[..5] {
        let heard = link.hear();
        assert!(matches!(heard, Heard::Bye { .. }), "{heard:?}");
    }
    assert!(
        first.elapsed() >= Duration::from_millis(1_600),
        "{:?}",
        first.elapsed()
    );
}

/// A peer that disconnects early gets no answer and occupies no slot.
#[test]
fn c05_a_peer_that_disconnects_early_occupies_no_slot() {
    let gateway = Gateway::start(&["--failure-delay-max-ms", "600000", "--connections-max", "2"]);
    for _ in 0..8 {
        let mut login = gateway.device("pump");
        login.key[0] ^= 1;
        let mut link = Link::open(gateway.addr);
        let transcript = link.challenge(&login);
        link.send(&login.auth(transcript).0);
        link.finish();
        link.expect_closed();
    }
}

/// An operator's change does not count as a failure.
#[test]
fn c05_a_replaced_key_causes_no_delay() {
    let gateway = Gateway::start(&["--failure-delay-max-ms", "600000"]);
    let data_dir = gateway.data_dir().to_str().expect("UTF-8");
    for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
        let (mut link, _) = gateway.connect(name);
        let rotated = run(&["device", "rotate-key", name, "--data-dir", data_dir]);
        assert!(rotated.status.success(), "{}", rotated.stderr);
        link.expect_bye(Code::Authentication);
    }
}

/// Delayed answers do not prevent the gateway's shutdown.
#[test]
fn delayed_answers_do_not_block_shutdown() {
    let mut gateway = Gateway::start(&[
        "--failure-delay-max-ms",
        "600000",
        "--drain-timeout-s",
        "20",
    ]);
    let mut links: Vec<Link> = (0..20).map(|_| Link::open(gateway.addr)).collect();
    for link in &mut links {
        link.send(&sealed(header(types::AUTH, 0), &[0; 34]));
    }
    for _ in &links {
        gateway.wait_for_line("connection refused");
    }
    gateway.terminate();
    let ended = gateway.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
}

#[test]
fn c05_one_address_cannot_fill_the_log() {
    let flags = [
        "--log-lines-per-address-max",
        "5",
        "--failure-delay-max-ms",
        "0",
    ];
    let mut gateway = Gateway::start(&flags);
    for _ in 0..200 {
        let mut link = Link::open(gateway.addr);
        link.send(&sealed(header(types::AUTH, 0), &[0; 34]));
        link.expect_bye(Code::Authentication);
    }
    gateway.terminate();
    let stderr = gateway.wait().stderr;
    let lines = stderr
        .lines()
        .filter(|line| line.contains("connection refused"));
    assert_eq!(lines.count(), 5, "{stderr}");
}

/// With `ulimit -n 128`.
#[test]
fn c12_few_open_files_mean_few_connections_and_nothing_fails() {
    let mut gateway = Gateway::start_with_files(128, &[]);
    gateway.wait_for_line("connection limit lowered to fit the open file limit");
    let (mut first, _) = gateway.connect("first");
    // More connections than there are slots, but few enough that the others fit into a typical backlog.
    let idle: Vec<Link> = (0..150).map(|_| Link::open(gateway.addr)).collect();
    for seq in 1..=20 {
        first.send(&readings(seq));
        first.expect_ack(seq);
    }
    assert_serves(&gateway, "good");
    drop(idle);
    assert_serves(&gateway, "better");
    assert!(gateway.is_alive());
}
