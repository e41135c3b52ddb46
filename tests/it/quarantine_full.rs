//! Quarantine has a limit (SPEC R60, code 12): frames beyond it stay on their device, only that device
//! waits, and it continues when an operator has made space.

use std::path::Path;
use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;

use tempfile::TempDir;

use crate::support::client::{Heard, Link};
use crate::support::database::PgDatabase;
use crate::support::gateway::{Ended, Gateway, run};
use crate::support::messages::{header, readings, sealed};

/// Eight of these fill the share of a device, 1 MiB / 8.
const FRAME_BYTES: usize = 16_384;
const FLAGS: [&str; 4] = [
    "--quarantine-bytes-max",
    "1048576",
    "--frame-bytes-max",
    "16384",
];
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns a frame that no gateway understands yet.
fn unheard_of(seq: u64) -> Vec<u8> {
    sealed(header(0x1E, seq), &vec![0; FRAME_BYTES - 20])
}

/// Fills the share of a device with frames 1 to 8.
fn fill(gateway: &Gateway, name: &str) -> Link {
    let (mut link, _) = gateway.connect(name);
    for seq in 1..=8 {
        link.send(&unheard_of(seq));
        link.expect_nack(seq, Code::UnknownType, seq + 1);
        link.expect_ack(seq);
    }
    // Another connection, because one may cause only eight rejections a minute.
    let (link, welcomed) = gateway.connect(name);
    assert_eq!(welcomed.durable_seq, 8);
    link
}

fn expect_full(link: &mut Link, seq: u64) {
    match link.hear() {
        Heard::Nack {
            seq: refused,
            code: 12,
            expected_seq,
            retry_after_ms,
        } => {
            assert_eq!((refused, expected_seq), (seq, seq));
            assert!((1..=10_000).contains(&retry_after_ms), "{retry_after_ms}");
        }
        other => panic!("{other:?} instead of NACK 12 of {seq}"),
    }
}

/// Resends a frame until it is quarantined, like a device that has to wait, but at a higher rate.
fn insist(link: &mut Link, seq: u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        link.send(&unheard_of(seq));
        match link.hear() {
            Heard::Nack { code: 12, .. } => assert!(Instant::now() < deadline, "never quarantined"),
            Heard::Nack { code: 32, .. } => return link.expect_ack(seq),
            other => panic!("{other:?} instead of NACK"),
        }
    }
}

fn quarantine(data_dir: &Path, args: &[&str]) -> Ended {
    let data_dir = data_dir.to_str().expect("UTF-8");
    let args = [&["quarantine"], args, &["--data-dir", data_dir]].concat();
    run(&args)
}

#[test]
fn only_the_device_with_a_full_share_waits() {
    let gateway = Gateway::start(&FLAGS);
    let mut full = fill(&gateway, "full");
    full.send(&unheard_of(9));
    expect_full(&mut full, 9);
    // Its frame and those after it are not stored; a valid frame under its number is.
    full.send(&readings(10));
    full.ping();
    let mut database = gateway.database();
    assert_eq!(database.durable_seq("full"), 8);
    assert_eq!(database.quarantine("full").len(), 8);
    // Other devices continue, and can still use quarantine.
    let (mut other, _) = gateway.connect("other");
    other.send(&unheard_of(1));
    other.expect_nack(1, Code::UnknownType, 2);
    other.expect_ack(1);
    // Each attempt is answered; small frames do not fit either.
    full.send(&unheard_of(9));
    expect_full(&mut full, 9);
    full.send(&sealed(header(0x1E, 9), &[]));
    expect_full(&mut full, 9);
    let purged = quarantine(gateway.data_dir(), &["purge", "--device", "full"]);
    assert!(purged.status.success(), "{}", purged.stderr);
    insist(&mut full, 9);
    full.send(&readings(10));
    full.expect_ack(10);
    let numbers: Vec<i64> = database
        .quarantine("full")
        .iter()
        .map(|row| row.0)
        .collect();
    assert_eq!(numbers, [9]);
    // The ledger has all of them.
    assert_eq!(database.frames("full").len(), 10);
    assert_eq!(database.quarantine("other").len(), 1);
}

#[test]
fn a_full_quarantine_is_still_full_after_a_restart() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &FLAGS);
    for device in 0..8 {
        fill(&gateway, &format!("device-{device}"));
    }
    let (mut late, _) = gateway.connect("late");
    late.send(&unheard_of(1));
    expect_full(&mut late, 1);
    late.send(&readings(1));
    late.expect_ack(1);
    let log = gateway.kill().stderr;
    assert_eq!(
        log.matches("quarantine full, devices are waiting").count(),
        1,
        "{log}"
    );
    let mut gateway = Gateway::start_in(dir.path(), &FLAGS);
    let (mut late, _) = gateway.connect("late");
    late.send(&unheard_of(2));
    expect_full(&mut late, 2);
    let purged = quarantine(
        gateway.data_dir(),
        &["purge", "--before", "2100-01-01T00:00:00Z"],
    );
    assert!(purged.status.success(), "{}", purged.stderr);
    insist(&mut late, 2);
    gateway.terminate();
    let log = gateway.wait().stderr;
    assert!(log.contains("quarantine has space again"), "{log}");
}

#[test]
fn purge_requires_a_selection() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&sealed(header(0x1E, 1), &[]));
    link.expect_nack(1, Code::UnknownType, 2);
    let refused = quarantine(gateway.data_dir(), &["purge"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("--all"), "{}", refused.stderr);
    let refused = quarantine(gateway.data_dir(), &["purge", "--device", "pmup"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused.stderr.contains("did you mean pump"),
        "{}",
        refused.stderr
    );
    assert_eq!(gateway.database().quarantine("pump").len(), 1);
    let refused = quarantine(gateway.data_dir(), &["purge", "1", "2"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("no frame 2"), "{}", refused.stderr);
    assert_eq!(gateway.database().quarantine("pump").len(), 1);
    for (args, left) in [(["purge", "1"], 0), (["purge", "--all"], 0)] {
        let purged = quarantine(gateway.data_dir(), &args);
        assert!(purged.status.success(), "{}", purged.stderr);
        assert_eq!(
            gateway.database().quarantine("pump").len(),
            left,
            "{args:?}"
        );
    }
    assert_eq!(gateway.database().frames("pump"), [(1, 0x1E)]);
}

/// With and without a spool, in which frames have separate ids.
#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_share_counts_in_postgres_and_in_a_spool_before_it() {
    for spool in [&[][..], &["--spool"]] {
        let mut database = PgDatabase::create();
        let url = database.url();
        // Ids of devices differ between spool and database.
        let dirs = [(); 2].map(|()| TempDir::new().expect("a directory"));
        let flags = [&FLAGS[..], &["--store", &url]].concat();
        let others = Gateway::start_in(dirs[0].path(), &flags);
        drop(others.connect("first"));
        drop(fill(&others, "other"));
        others.terminate();
        let mut others = others;
        assert!(others.wait().status.success());
        let key = |dir: &TempDir| dir.path().join("fleet.key");
        std::fs::copy(key(&dirs[0]), key(&dirs[1])).expect("copies");
        let gateway = Gateway::start_in(dirs[1].path(), &[&flags[..], spool].concat());
        let mut full = fill(&gateway, "full");
        full.send(&unheard_of(9));
        expect_full(&mut full, 9);
        // Frames from another gateway also count.
        let (mut other, _) = gateway.connect("other");
        other.send(&unheard_of(9));
        expect_full(&mut other, 9);
        database
            .session()
            .wait_for("SELECT count(*) = 16 FROM quarantine");
        full.send(&unheard_of(9));
        expect_full(&mut full, 9);
        let purged = run(&["quarantine", "purge", "--store", &url, "--device", "full"]);
        assert!(purged.status.success(), "{}", purged.stderr);
        insist(&mut full, 9);
        other.send(&unheard_of(9));
        expect_full(&mut other, 9);
    }
}
