//! Presence of devices, and twins, as the real gateway finds them.

use crate::http::metric_line;
use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::{Gateway, command};
use crate::support::messages::{bye, readings};
use crate::support::{PATIENCE, eventually};

/// Returns the output of `fieldgate device` about the store of a gateway.
fn device(gateway: &Gateway, args: &[&str]) -> String {
    let args = [&["device"], args].concat();
    let output = command(&args)
        .arg("--data-dir")
        .arg(gateway.data_dir())
        .output();
    let output = output.expect("runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn devices(gateway: &Gateway, state: &str) -> String {
    metric_line(gateway, &format!("fieldgate_devices{{state=\"{state}\"}}"))
}

#[test]
fn a_device_goes_late_and_comes_back() {
    let gateway = Gateway::start(&["--http", "127.0.0.1:0"]);
    for state in ["online", "late", "silent", "never", "disabled"] {
        assert_eq!(devices(&gateway, state), "0");
    }
    device(&gateway, &["add", "valve"]);
    let (mut link, _) = gateway.connect("pump");
    let set = device(&gateway, &["set", "pump", "--interval", "1s"]);
    assert_eq!(set, "pump is expected every 1 s\n");
    link.send(&readings(1));
    link.expect_ack(1);
    eventually("pump is online", PATIENCE, || {
        devices(&gateway, "online") == "1"
    });
    assert_eq!(devices(&gateway, "never"), "1");
    link.send(&bye());
    link.expect_closed();
    eventually("pump is late", PATIENCE, || {
        devices(&gateway, "late") == "1"
    });
    let late = device(&gateway, &["list", "--state", "late", "--format", "csv"]);
    assert!(
        late.contains("\npump,") && !late.contains("valve"),
        "{late}"
    );
    let shown = device(&gateway, &["show", "pump"]);
    for line in ["late", "1 s, set by an operator", "from online to late"] {
        assert!(shown.contains(line), "{shown}");
    }
    let (_link, _) = gateway.connect("pump");
    device(&gateway, &["disable", "valve"]);
    eventually("pump is back", PATIENCE, || {
        devices(&gateway, "online") == "1" && devices(&gateway, "disabled") == "1"
    });
    let mut database = gateway.database();
    let events = "SELECT detail FROM device_events WHERE kind = 'presence' ORDER BY device_id, id";
    let events: Vec<(String,)> = database.rows(events);
    let events: Vec<&str> = events.iter().map(|row| row.0.as_str()).collect();
    assert_eq!(
        events,
        [
            "from never to disabled",
            "from never to online",
            "from online to late",
            "from late to online"
        ]
    );
    assert_eq!(
        device(&gateway, &["set", "pump", "--interval", "learned"]),
        "the interval of pump is learned\n"
    );
}

#[test]
fn twins_are_found() {
    let gateway = Gateway::start(&["--http", "127.0.0.1:0"]);
    let mut links: Vec<_> = (0..11).map(|_| gateway.connect("pump").0).collect();
    let last = links.pop();
    eventually("an event", PATIENCE, || {
        metric_line(&gateway, "fieldgate_twin_devices") == "1"
    });
    let mut database = gateway.database();
    let events = "SELECT count(*) FROM events WHERE device = 'pump' AND kind = 'twin'";
    assert_eq!(database.count(events), 1);
    drop(last);
}

/// Several gateways find each change, and one of them records it.
#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn two_gateways_record_a_change_once() {
    let database = PgDatabase::create();
    let mut session = Session::open(&database.url());
    let pair = crate::gateways::Pair::start(&database);
    let (mut link, _) = pair.gateways[0].connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    session.wait_for("SELECT count(*) = 1 FROM events WHERE text = 'from never to online'");
    session.wait_for(
        "WITH set AS (UPDATE presence SET set_s = 1 RETURNING 1) SELECT count(*) = 1 FROM set",
    );
    drop(link);
    session.wait_for("SELECT count(*) = 1 FROM events WHERE text = 'from online to late'");
    let (_link, _) = pair.gateways[1].connect("pump");
    session.wait_for("SELECT count(*) = 1 FROM events WHERE text = 'from late to online'");
    let events: Vec<(i64,)> = session.rows("SELECT count(*) FROM events WHERE kind = 'presence'");
    assert_eq!(events, [(3,)]);
}
