//! Disks with too little free space: devices wait, and continue when there is space again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::http::{HTTP, get, metric_line};
use crate::store_down::{expect_store_down, resend_until_acked};
use crate::support::client::Link;
use crate::support::gateway::Gateway;
use crate::support::messages::readings;
use crate::support::{PATIENCE, eventually};

const DISK_MIB: u32 = 64;
const NOT_READY: &str = "a disk has too little free space to store readings";

/// A file that takes space away from the gateway.
struct Ballast(PathBuf);

impl Ballast {
    /// Leaves at most `free_bytes` on the disk of `dir`.
    fn fill(dir: &Path, free_bytes: u64) -> Ballast {
        let path = dir.join("ballast");
        let file = File::create(&path).expect("a file");
        let disk = rustix::fs::statvfs(dir).expect("a disk");
        let bytes = (disk.f_bavail * disk.f_frsize).saturating_sub(free_bytes);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
            .expect("allocates");
        Ballast(path)
    }

    fn remove(self) {
        fs::remove_file(self.0).expect("removes");
    }
}

/// Returns the single value that a query finds.
fn value(gateway: &Gateway, sql: &str) -> i64 {
    let found = gateway.beside(&["query", sql, "--format", "csv"]).output();
    let found = found.expect("runs");
    let text = String::from_utf8(found.stdout).expect("text");
    let value = text.lines().nth(1).and_then(|line| line.parse().ok());
    value.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&found.stderr)))
}

fn is_ready(gateway: &Gateway) -> bool {
    get(gateway, "/readyz").status == 200
}

#[test]
fn below_the_stop_level_devices_wait_until_there_is_space() {
    let dir = TempDir::new().expect("a directory");
    let Some(mut gateway) = Gateway::start_on_small_disk(dir.path(), DISK_MIB, &HTTP) else {
        return;
    };
    let (mut early, _) = gateway.connect("early");
    early.send(&readings(1));
    early.expect_ack(1);
    assert!(is_ready(&gateway));

    let low = Ballast::fill(gateway.data_dir(), (u64::from(DISK_MIB) << 20) / 10);
    gateway.wait_for_line("disk space low");
    low.remove();
    gateway.wait_for_line("disk has enough space again");
    let ballast = Ballast::fill(gateway.data_dir(), 1 << 20);
    gateway.wait_for_line("disk full, storing no readings");
    let answer = get(&gateway, "/readyz");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains(NOT_READY), "{}", answer.body);
    assert_eq!(metric_line(&gateway, "fieldgate_disk_stopped"), "1");
    assert_eq!(
        metric_line(&gateway, "fieldgate_disk_low{place=\"store\"}"),
        "1"
    );

    early.send(&readings(2));
    expect_store_down(&mut early, 1);
    // A device can log in meanwhile, and learns the same.
    let (mut late, _): (Link, _) = gateway.connect("late");
    late.send(&readings(1));
    expect_store_down(&mut late, 0);
    assert_eq!(value(&gateway, "SELECT count(*) AS n FROM readings"), 1);

    ballast.remove();
    gateway.wait_for_line("disk has space again, storing readings");
    // An ACK ends the wait of a device.
    early.expect_ack(1);
    resend_until_acked(&mut early, &readings(2), 2, PATIENCE);
    resend_until_acked(&mut late, &readings(1), 1, PATIENCE);
    assert_eq!(value(&gateway, "SELECT count(*) AS n FROM readings"), 3);
    eventually("ready", PATIENCE, || is_ready(&gateway));
    assert_eq!(metric_line(&gateway, "fieldgate_disk_stopped"), "0");
}
