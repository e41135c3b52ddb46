//! Connected devices and the time they were last seen, even after a gateway was killed.

use tempfile::TempDir;

use crate::gateways::Pair;
use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::{Gateway, command};
use crate::support::messages::{bye, readings};
use crate::support::{PATIENCE, eventually};

/// Returns the output of `fieldgate` about the devices in `data_dir`, or in the store that `flags` select.
fn list(data_dir: &std::path::Path, flags: &[&str]) -> String {
    let args = [&["device", "list"], flags].concat();
    let output = command(&args).arg("--data-dir").arg(data_dir).output();
    let output = output.expect("runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_start_closes_sessions_of_a_killed_gateway() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let listed = list(dir.path(), &["--format", "csv"]);
    assert!(listed.contains("\npump,yes,connected,"), "{listed}");
    gateway.kill();
    assert!(list(dir.path(), &[]).contains("connected"));

    let gateway = Gateway::start_in(dir.path(), &[]);
    let mut database = gateway.database();
    let state = "SELECT count(*) FROM device_status WHERE state = 'disconnected'";
    assert_eq!(database.count(state), 1);
    let closed = "SELECT count(*) FROM device_events WHERE kind = 'disconnected'";
    assert_eq!(database.count(closed), 1);
    assert!(list(dir.path(), &["--format", "json"]).contains("\"state\":\"disconnected\""));
    assert_eq!(
        list(dir.path(), &["--silent", "1h"]),
        "no device is silent\n"
    );
    assert!(list(dir.path(), &["--silent", "0"]).contains("pump"));
}

/// The newest session ends the previous one, whose last event then follows the newer one's first.
#[test]
fn a_device_with_a_replaced_session_is_still_connected() {
    let gateway = Gateway::start(&[]);
    let mut database = gateway.database();
    let (mut older, _) = gateway.connect("pump");
    let (mut newer, _) = gateway.connect("pump");
    older.expect_bye(fieldgate_protocol::error::Code::TakenOver);
    older.expect_closed();
    drop(older);
    let ended = "SELECT count(*) FROM device_events WHERE kind = 'disconnected'";
    while database.count(ended) == 0 {
        newer.ping();
    }
    let connected = "SELECT count(*) FROM device_status WHERE state = 'connected'";
    assert_eq!(database.count(connected), 1);
    newer.send(&bye());
    newer.expect_closed();
    eventually("the device is disconnected", PATIENCE, || {
        database.count(connected) == 0
    });
}

#[test]
fn last_seen_follows_frames() {
    let gateway = Gateway::start(&[]);
    let mut database = gateway.database();
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let seen = "SELECT count(*) FROM device_status AS s JOIN devices AS d ON d.name = s.device
        WHERE s.last_seen_at = s.last_frame_at AND s.last_frame_at > d.last_seen_at";
    assert_eq!(database.count(seen), 1);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_start_leaves_sessions_of_another_gateway_open() {
    let database = PgDatabase::create();
    let url = database.url();
    let mut session = Session::open(&url);
    let dir = TempDir::new().expect("a directory");
    let mut pair = Pair::start(&database);
    let (mut stays, _) = pair.gateways[0].connect("stays");
    let key = pair.gateways[0].data_dir().join("fleet.key");
    std::fs::copy(key, dir.path().join("fleet.key")).expect("copies");
    let killed = Gateway::start_in(dir.path(), &["--store", &url]);
    let (_link, _) = killed.connect("goes");
    let open = "SELECT count(*) = 2 FROM sessions";
    session.wait_for(open);
    killed.kill();
    let _again = Gateway::start_in(dir.path(), &["--store", &url]);
    let states = "SELECT device, state FROM device_status ORDER BY device";
    let states: Vec<(String, String)> = session.rows(states);
    let row = |device: &str, state: &str| (device.to_owned(), state.to_owned());
    assert_eq!(
        states,
        [row("goes", "disconnected"), row("stays", "connected")]
    );
    stays.send(&readings(1));
    stays.expect_ack(1);
    assert!(pair.gateways.iter_mut().all(Gateway::is_alive));
}

/// A spool copies the ends of its gateway's sessions to the database.
#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_killed_gateway_with_a_spool_closes_its_sessions_in_the_database() {
    let database = PgDatabase::create();
    let url = database.url();
    let mut session = Session::open(&url);
    let dir = TempDir::new().expect("a directory");
    let flags = ["--store", url.as_str(), "--spool"];
    let gateway = Gateway::start_in(dir.path(), &flags);
    let (_link, _) = gateway.connect("pump");
    session.wait_for("SELECT count(*) = 1 FROM device_status WHERE state = 'connected'");
    gateway.kill();
    let _again = Gateway::start_in(dir.path(), &flags);
    session.wait_for("SELECT count(*) = 1 FROM device_status WHERE state = 'disconnected'");
}
