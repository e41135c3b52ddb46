//! Bounds on who connects and how much a device sends: what is over them waits or is closed, and nobody else
//! notices.

use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;

use crate::client::{Heard, Link, T0_US, header, ping, readings, readings_at, sealed};
use crate::gateway::{Gateway, run};
use crate::malformed::assert_serves;

/// So many readings of a device in a second.
const READINGS_2000: [&str; 4] = [
    "--device-readings-per-s",
    "2000",
    "--device-readings-burst",
    "8192",
];

/// A frame with so many.
fn readings_406(seq: u64) -> Vec<u8> {
    readings_at(seq, T0_US + seq as i64 * 2_000_000_000, &[7; 406])
}

/// SPEC, limits: more of a device is read later, and nothing is refused.
#[test]
fn c13_a_device_over_its_rate_waits_and_the_others_do_not() {
    let gateway = Gateway::start(&READINGS_2000);
    let (mut hot, _) = gateway.connect("hot");
    let begun = Instant::now();
    // 12,180 readings: the burst, and two seconds' more.
    let frames = 30;
    for seq in 1..=frames {
        hot.send(&readings_406(seq));
    }
    // Meanwhile another device is served as ever.
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

/// Whoever connects again does not begin anew.
#[test]
fn c13_a_device_cannot_leave_its_rate_behind() {
    let gateway = Gateway::start(&READINGS_2000);
    let begun = Instant::now();
    // 12,180 readings: the burst, and two seconds' more; but less than the burst on each connection.
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

/// What brings no readings takes time, too.
#[test]
fn c13_a_device_may_not_ask_without_end() {
    let rate = [
        "--device-frames-per-s",
        "200",
        "--device-frames-burst",
        "100",
    ];
    let gateway = Gateway::start(&rate);
    let (mut hot, _) = gateway.connect("hot");
    let begun = Instant::now();
    // The burst, and two seconds' more.
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
fn c12_an_address_has_so_many_connections_and_no_more() {
    let mut gateway = Gateway::start(&["--connections-per-address-max", "3"]);
    let (first, _) = gateway.connect("first");
    let (_second, _) = gateway.connect("second");
    let _idle = Link::open(gateway.addr);
    let mut refused = Link::open(gateway.addr);
    refused.expect_closed();
    gateway.wait_for_line("too many from its address");
    drop(first);
    // As soon as one is gone there is room again.
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

/// Whoever begins a handshake and does not end it gives way.
#[test]
fn c08_half_a_handshake_gives_way_to_devices() {
    let gateway = Gateway::start(&["--handshakes-max", "20", "--handshake-timeout-s", "600"]);
    let mut idle: Vec<Link> = (0..60).map(|_| Link::open(gateway.addr)).collect();
    assert_serves(&gateway, "good");
    // The oldest of them were told to go.
    idle[0].expect_closed();
}

/// So it is when not handshakes run out, but places.
#[test]
fn c08_half_a_handshake_gives_way_when_places_run_out() {
    let gateway = Gateway::start(&["--connections-max", "20", "--handshake-timeout-s", "600"]);
    let (mut first, _) = gateway.connect("first");
    let mut idle: Vec<Link> = (0..60).map(|_| Link::open(gateway.addr)).collect();
    assert_serves(&gateway, "good");
    idle[0].expect_closed();
    first.send(&readings(1));
    first.expect_ack(1);
}

/// Two frames, and little else.
#[test]
fn c09_a_stranger_may_not_send_for_ever() {
    let gateway = Gateway::start(&["--stranger-bytes-max", "1024"]);
    let skipped = sealed(header(0x90, 0), &[0; 480]);
    let mut link = Link::open(gateway.addr);
    link.send(&skipped);
    link.send(&skipped);
    link.send_in_vain(&skipped);
    link.expect_bye(Code::Authentication);
    // Once it is a device it may.
    let (mut device, _) = gateway.connect("device");
    for _ in 0..10 {
        device.send(&skipped);
    }
    device.ping();
}

/// Failures are answered later and later, a right key at once.
#[test]
fn c05_failures_wait_and_a_right_key_does_not() {
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
    // The last ones would wait for a minute by now; the device of that name does not.
    let begun = Instant::now();
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    // 100 ms, 200 ms, … in the order in which they failed, which is not quite that of the links: of any
    // five, one has waited for the fifth time at least. It is the answer that waits, not only the end.
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

/// Whoever leaves before has no answer, and keeps no place.
#[test]
fn c05_who_does_not_wait_for_the_answer_has_none() {
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

/// What an operator does is nobody's failure.
#[test]
fn c05_a_replaced_key_delays_nobody() {
    let gateway = Gateway::start(&["--failure-delay-max-ms", "600000"]);
    let data_dir = gateway.data_dir().to_str().expect("UTF-8");
    for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
        let (mut link, _) = gateway.connect(name);
        let rotated = run(&["device", "rotate-key", name, "--data-dir", data_dir]);
        assert!(rotated.status.success(), "{}", rotated.stderr);
        link.expect_bye(Code::Authentication);
    }
}

/// The end of the gateway waits for nobody who failed.
#[test]
fn failures_do_not_keep_the_gateway_from_leaving() {
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
    gateway.wait_for_line("because of the limit of open files");
    let (mut first, _) = gateway.connect("first");
    // More than there are places, and fewer than wait in a usual backlog besides.
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
