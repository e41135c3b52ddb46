//! Retention, with the real gateway.

use crate::http::{HTTP, metric_line};
use crate::support::client::Link;
use crate::support::gateway::{Gateway, meddle, run};
use crate::support::messages::{T0_US, readings, readings_at};

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

/// The machine may not have set its clock yet.
#[test]
fn soon_after_the_start_old_readings_are_stored() {
    let gateway = Gateway::start(&[&HTTP[..], &["--readings-days", "30"]].concat());
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings_at(1, T0_US, &[1, 2, 3]));
    link.expect_ack(1);
    assert_eq!(gateway.database().count("SELECT count(*) FROM readings"), 3);
    let counted = |name| metric_line(&gateway, name);
    assert_eq!(counted("fieldgate_readings_too_old_total"), "0");
    assert_eq!(counted("fieldgate_readings_stored_total"), "3");
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
