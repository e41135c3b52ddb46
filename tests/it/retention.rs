//! Retention, with the real gateway.

use fieldgate_protocol::message::Data;
use jiff::Timestamp;

use crate::http::{HTTP, metric_line};
use crate::support::client::Link;
use crate::support::gateway::{Gateway, meddle, run};
use crate::support::messages::{
    LEVEL, T0_US, TEMPERATURE, no_columns, raw, readings, with_columns,
};

#[test]
fn a_deleted_frame_is_not_stored_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=3 {
        link.send(&readings(seq));
    }
    link.expect_ack(3);
    gateway.terminate();
    gateway.wait();
    let database = dir.path().join("fieldgate.db");
    meddle(
        &database,
        "UPDATE frames SET received_at = received_at - 10 * 86400000000",
    );

    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let data_dir = dir.path().to_str().expect("text");
    let retention = |action, days| {
        let days = ["--readings-days", days, "--frames-days", days];
        let ended = run(&[&["retention", action, "--data-dir", data_dir], &days[..]].concat());
        assert!(ended.status.success(), "{}", ended.stderr);
    };
    // The readings are too new by their times, then too old.
    retention("run", "36500");
    assert_eq!(gateway.database().count("SELECT count(*) FROM readings"), 3);
    retention("show", "1");
    assert_eq!(gateway.database().count("SELECT count(*) FROM readings"), 3);
    // The gateway sorts recent readings when it starts.
    retention("run", "1");
    let newest_us = T0_US + 3 * 60_000_000;
    assert_eq!(
        gateway.database().readings("pump"),
        [(newest_us, Some(0.03))]
    );
    assert_eq!(gateway.database().frames("pump"), [(3, 17)]);

    let (mut link, _): (Link, _) = gateway.connect("pump");
    for seq in 1..=4 {
        link.send(&readings(seq));
    }
    link.expect_ack(4);
    assert_eq!(gateway.database().frames("pump"), [(3, 17), (4, 17)]);
    assert_eq!(gateway.database().count("SELECT count(*) FROM readings"), 2);
    gateway.terminate();
    gateway.wait();
}

#[test]
fn readings_that_arrive_too_old_are_counted_and_not_stored() {
    const HOUR_US: i64 = 3_600_000_000;
    let gateway = Gateway::start(&[&HTTP[..], &["--readings-days", "30"]].concat());
    let (mut link, _) = gateway.connect("pump");
    let temperatures: Vec<u8> = (1..=4i64).flat_map(i64::to_le_bytes).collect();
    let levels: Vec<u8> = { [0.5f64, 1.5, 2.5, 3.5].into_iter() }
        .flat_map(f64::to_le_bytes)
        .collect();
    let mut send = |seq, t0| {
        let data = Data {
            t0,
            step: HOUR_US as u32,
            ..no_columns(4)
        };
        let columns = [raw(TEMPERATURE, &temperatures), raw(LEVEL, &levels)];
        link.send(&with_columns(data, seq, &columns));
    };
    // Two of four rows are too old.
    let first_us = Timestamp::now().as_microsecond() - 30 * 24 * HOUR_US - 3 * HOUR_US / 2;
    send(1, first_us);
    // All rows are; the last one stays, because it may be the newest of its series.
    send(2, T0_US);
    link.expect_ack(2);
    assert_eq!(
        gateway.database().readings("pump"),
        [
            (T0_US + 3 * HOUR_US, Some(3.5)),
            (T0_US + 3 * HOUR_US, Some(0.04)),
            (first_us + 2 * HOUR_US, Some(2.5)),
            (first_us + 2 * HOUR_US, Some(0.03)),
            (first_us + 3 * HOUR_US, Some(3.5)),
            (first_us + 3 * HOUR_US, Some(0.04)),
        ]
    );
    assert_eq!(
        gateway.database().count("SELECT sum(readings) FROM frames"),
        6
    );
    let counted = |name| metric_line(&gateway, name);
    assert_eq!(counted("fieldgate_readings_too_old_total"), "10");
    assert_eq!(counted("fieldgate_readings_stored_total"), "6");
}

#[test]
fn a_ledger_that_is_shorter_than_the_readings_is_refused() {
    for flags in [
        &["--frames-days", "30"][..],
        &["--frames-days", "30", "--readings-days", "31"],
        &[
            "--frames-days",
            "30",
            "--readings-days",
            "7",
            "--retention-rule",
            "unit=Cel,days=forever",
        ],
    ] {
        let ended = run(&[&["retention"], flags].concat());
        assert_eq!(ended.status.code(), Some(2), "{flags:?}");
        assert!(
            ended.stderr.contains("frames-days (30)"),
            "{}",
            ended.stderr
        );
    }
}
