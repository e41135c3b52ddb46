//! Disks with too little free space: devices wait, and continue when there is space again.

use fieldgate_protocol::error::Code;

use crate::http::{HTTP, get, metric_line};
use crate::store_down::{expect_store_down, resend_until_acked};
use crate::support::client::{Heard, Link};
use crate::support::gateway::Gateway;
use crate::support::messages::{T0_US, readings, readings_at};
use crate::support::small_disk::SmallDisk;
use crate::support::{PATIENCE, eventually};

const NOT_READY: &str = "a disk has too little free space to store readings";
const MIB: u64 = 1 << 20;
/// Readings of a frame of [`full_frame`], which are a second apart.
const ROWS: i64 = 450;
const HOUR_US: i64 = 3_600_000_000;
/// Without it, the log could fill the whole disk.
const SMALL_LOG: [&str; 2] = ["--wal-bytes-max", "16MiB"];
const RETENTION: [&str; 4] = ["--readings-days", "1", SMALL_LOG[0], SMALL_LOG[1]];

fn is_ready(gateway: &Gateway) -> bool {
    get(gateway, "/readyz").status == 200
}

/// Returns frame `seq`, whose readings are older than a day and begin an hour after those of the frame before.
fn full_frame(seq: u64) -> Vec<u8> {
    let values: Vec<i64> = (0..ROWS).map(|row| row * 7919 % 100_003).collect();
    readings_at(seq, T0_US + seq as i64 * HOUR_US, &values)
}

/// Sends `frame` until it is acknowledged; returns how often the device had to wait.
fn store(link: &mut Link, frame: &[u8], seq: u64) -> u32 {
    let mut waits = 0;
    link.send(frame);
    loop {
        match link.hear() {
            Heard::Ack { seq: acked, .. } if acked == seq => return waits,
            // The end of a wait.
            Heard::Ack { .. } => link.send(frame),
            Heard::Nack { code, .. } if code == Code::StoreDown as u8 => waits += 1,
            other => panic!("{other:?} instead of an ACK"),
        }
    }
}

/// Expects that all acknowledged readings were stored, and that only the oldest are deleted.
fn expect_only_the_oldest_deleted(disk: &SmallDisk, frames: u64) -> i64 {
    let sql = "SELECT count(*) AS n, min(ts) AS oldest,
        (SELECT count(*) FROM frames) AS frames, (SELECT sum(readings) FROM streams) AS total FROM readings";
    let [left, oldest_us, ledger, total] = disk.query(sql)[..] else {
        panic!("four columns");
    };
    assert_eq!((ledger, total), (frames as i64, frames as i64 * ROWS));
    let (hours, rest_us) = ((oldest_us - T0_US) / HOUR_US, (oldest_us - T0_US) % HOUR_US);
    let deleted = (hours - 1) * ROWS + rest_us / 1_000_000;
    assert_eq!(left, total - deleted);
    deleted
}

#[test]
fn below_the_stop_level_devices_wait_until_there_is_space() {
    let Some(disk) = SmallDisk::mount(64) else {
        return;
    };
    let mut gateway = disk.start(&HTTP);
    let (mut early, _) = gateway.connect("early");
    early.send(&readings(1));
    early.expect_ack(1);
    assert!(is_ready(&gateway));

    let low = disk.leave(6 * MIB);
    gateway.wait_for_line("disk space low");
    assert!(is_ready(&gateway));
    drop(low);
    gateway.wait_for_line("disk has enough space again");
    let full = disk.leave(MIB);
    gateway.wait_for_line("disk full, storing no readings");
    let answer = get(&gateway, "/readyz");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains(NOT_READY), "{}", answer.body);
    for (metric, expected) in [("stopped", "1"), ("low{place=\"store\"}", "1")] {
        let metric = format!("fieldgate_disk_{metric}");
        assert_eq!(metric_line(&gateway, &metric), expected, "{metric}");
    }

    early.send(&readings(2));
    expect_store_down(&mut early, 1);
    // A device can log in meanwhile, and learns the same.
    let (mut late, _): (Link, _) = gateway.connect("late");
    late.send(&readings(1));
    expect_store_down(&mut late, 0);
    assert_eq!(disk.query("SELECT count(*) AS n FROM readings"), [1]);

    drop(full);
    gateway.wait_for_line("disk has space again, storing readings");
    // An ACK ends the wait of a device.
    early.expect_ack(1);
    resend_until_acked(&mut early, &readings(2), 2, PATIENCE);
    resend_until_acked(&mut late, &readings(1), 1, PATIENCE);
    assert_eq!(disk.query("SELECT count(*) AS n FROM readings"), [3]);
    eventually("ready", PATIENCE, || is_ready(&gateway));
    assert_eq!(metric_line(&gateway, "fieldgate_disk_stopped"), "0");
}

/// Readings fill the disk, and retention makes space, twice.
#[test]
fn a_gateway_with_retention_continues_by_itself() {
    let Some(disk) = SmallDisk::mount(32) else {
        return;
    };
    let gateway = disk.start(&RETENTION);
    let (mut link, _) = gateway.connect("pump");
    let (mut seq, mut waits) = (0, 0);
    while waits < 2 {
        seq += 1;
        waits += store(&mut link, &full_frame(seq), seq);
    }
    assert!(expect_only_the_oldest_deleted(&disk, seq) > 0);
}

/// Another program takes all space, when the write-ahead log is short.
#[test]
fn retention_deletes_on_a_disk_without_any_space() {
    let Some(disk) = SmallDisk::mount(64) else {
        return;
    };
    let mut gateway = disk.start(&SMALL_LOG);
    let (mut link, _) = gateway.connect("pump");
    let frames = 1000;
    for seq in 1..=frames {
        store(&mut link, &full_frame(seq), seq);
    }
    gateway.terminate();
    gateway.wait();
    let mut gateway = disk.start(&RETENTION);
    eventually("a reserve", PATIENCE, || {
        let reserve = disk.files().join("fieldgate.db.reserve").metadata();
        reserve.is_ok_and(|reserve| reserve.len() == 4 * MIB)
    });
    let _full = disk.leave(0);
    assert_eq!(disk.free_bytes(), 0);
    // Without a commit of the gateway.
    gateway.wait_for_line("disk has space again, storing readings");
    let (mut link, _) = gateway.connect("pump");
    store(&mut link, &full_frame(frames + 1), frames + 1);
    assert!(expect_only_the_oldest_deleted(&disk, frames + 1) > 0);
}
