//! Commands while a gateway runs: they do not block it, and do not wait for a gateway that has gone.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Instant;

use crate::support::client::{Heard, Link};
use crate::support::gateway::{Gateway, command};
use crate::support::messages::readings_at;
use crate::support::{PATIENCE, eventually};

/// A query that reads indefinitely, without a row to write.
const ENDLESS: &str =
    "WITH RECURSIVE c(n) AS (SELECT count(*) FROM frames UNION ALL SELECT n + 1 FROM c)
    SELECT max(n) FROM c";

/// Sends frame `seq` until it is acknowledged, or `child` has exited; returns whether it was acknowledged.
fn is_stored(link: &mut Link, seq: u64, child: &mut Child) -> bool {
    let deadline = Instant::now() + PATIENCE;
    // Far apart, so that each one touches separate pages.
    let frame = readings_at(seq, (seq as i64 * 7919 % 5000) * 86_400_000_000, &[1; 300]);
    loop {
        assert!(Instant::now() < deadline, "the gateway stores nothing");
        link.send(&frame);
        match link.hear() {
            Heard::Ack { seq: heard, .. } if heard == seq => return true,
            Heard::Nack { .. } if child.try_wait().expect("waits").is_some() => return false,
            Heard::Ack { .. } | Heard::Nack { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Small machines are advised to keep the log short.
#[test]
fn a_query_ends_before_it_stops_a_gateway_with_a_short_log() {
    let gateway = Gateway::start(&["--wal-bytes-max", "16MiB"]);
    let (mut link, _) = gateway.connect("pump");
    let dir = gateway.data_dir().to_str().expect("UTF-8");
    let query = command(&["query", ENDLESS, "--data-dir", dir])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut query = query.expect("runs");
    let mut seq = 0;
    while query.try_wait().expect("waits").is_none() {
        seq += u64::from(is_stored(&mut link, seq + 1, &mut query));
    }
    while !is_stored(&mut link, seq + 1, &mut query) {}
    let ended = query.wait_with_output().expect("ends");
    let says = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{says}");
    assert!(says.contains("write-ahead log"), "{says}");
    // Further queries are unaffected once the log is short again.
    let query = command(&["query", "SELECT count(*) FROM devices", "--data-dir", dir]).output();
    assert!(query.expect("runs").status.success());
}

/// Only the gateway compacts recent readings, so its end must be detected.
#[test]
fn a_removal_does_not_wait_for_a_gateway_that_was_killed() {
    let dir = tempfile::tempdir().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings_at(1, 0, &[1]));
    link.expect_ack(1);
    let data = dir.path().to_str().expect("UTF-8");
    let remove = command(&["device", "remove", "pump", "--yes", "--data-dir", data])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut remove = remove.expect("runs");
    let lines = BufReader::new(remove.stderr.take().expect("piped")).lines();
    let says = lines.map_while(Result::ok).next().unwrap_or_default();
    assert!(says.contains("waiting up to two minutes"), "{says}");
    let _ = gateway.kill();
    eventually("the command ends", PATIENCE, || {
        remove.try_wait().expect("a child").is_some()
    });
    assert!(remove.wait().expect("ends").success());
}
