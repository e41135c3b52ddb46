//! The page for people: what a browser gets from the real gateway. `tests/page` uses a real browser.

use std::io::{BufRead, BufReader};

use fieldgate_protocol::frame::types;

use crate::support::database::PgDatabase;
use crate::support::gateway::Gateway;
use crate::support::http::{Answer, call, get, send};
use crate::support::messages::{gap, header, readings, sealed};
use crate::support::{PATIENCE, eventually};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

/// Starts a gateway that stores in SQLite, or in `database`.
fn start(database: Option<&PgDatabase>) -> Gateway {
    match database {
        None => Gateway::start(&HTTP),
        Some(database) => Gateway::start(&[&HTTP[..], &["--store", &database.url()]].concat()),
    }
}

/// Returns the text of a page without its tags, with single spaces.
fn text(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut text = String::new();
    for part in answer.body.split('<') {
        text.push_str(part.split_once('>').map_or(part, |(_, text)| text));
        text.push(' ');
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn pages_show_the_fleet(database: Option<&PgDatabase>) {
    let gateway = start(database);
    let addr = gateway.http_addr();
    assert!(text(&get(addr, "/")).contains("No device matches."));
    assert!(text(&get(addr, "/quarantine")).contains("No frame is in quarantine."));
    let (mut pump, _) = gateway.connect("pump-1");
    pump.send(&readings(1));
    pump.expect_ack(1);
    // Numbers 2 to 4 are lost; number 5 cannot be decoded.
    pump.send(&gap(2, 4, 0));
    pump.expect_ack(4);
    pump.send(&sealed(header(types::DATA, 5), &[1, 2, 3]));
    let (_valve, _) = gateway.connect("valve");
    eventually("all on the page", PATIENCE, || {
        let page = text(&get(addr, "/"));
        page.contains("1 online") && page.contains("1 never seen") && page.contains("1 quarantined")
    });
    let page = text(&get(addr, "/?q=PUMP"));
    assert!(
        page.contains("1 device ") && !page.contains("valve"),
        "{page}"
    );
    let row = "pump-1 online 0 s ago 3 utc 2.4.1 127.0.0.1:";
    let row_late = row.replace("0 s", "1 s");
    assert!(page.contains(row) || page.contains(&row_late), "{page}");
    assert!(text(&get(addr, "/?state=never&sort=missing")).contains("1 device "));
    let page = text(&get(addr, "/devices/pump-1"));
    for part in ["temperature", "Lost frames 3", "connected", "Frame 1"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    // The readings are of the year 2025, so no chart of the last hour has them.
    assert!(page.contains("No reading in the last hour."), "{page}");
    assert!(text(&get(addr, "/devices/valve?range=30d")).contains("no reading yet"));
    let page = text(&get(addr, "/completeness?q=pump"));
    assert!(page.contains("pump-1"), "{page}");
    let page = text(&get(addr, "/quarantine/1"));
    for part in ["magic", "a7", "pump-1", "Number 5"] {
        assert!(page.contains(part), "{part}: {page}");
    }
}

#[test]
fn pages_show_the_fleet_of_sqlite() {
    pages_show_the_fleet(None);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn pages_show_the_fleet_of_postgres() {
    pages_show_the_fleet(Some(&PgDatabase::create()));
}

#[test]
fn mistakes_in_an_address_get_a_page() {
    let gateway = start(None);
    let addr = gateway.http_addr();
    for (path, status, part) in [
        ("/absent", 404, "no such page"),
        ("/devices/absent", 404, "no such device"),
        ("/devices/%00", 404, "no such device"),
        ("/devices/%ff", 400, "not UTF-8"),
        ("/quarantine/7", 404, "no such frame"),
        ("/quarantine/x", 404, "no such frame"),
        ("/?state=lost", 400, "unknown state"),
        ("/?sort=size", 400, "invalid query"),
        ("/?page=0", 400, "page must be from 1"),
        ("/?page=9999999999", 400, "page must be from 1"),
        ("/?q=%00", 400, "q has a NUL"),
        ("/completeness?page=-1", 400, "page must be from 1"),
        ("/?colour=red", 400, "unknown field"),
    ] {
        let answer = get(addr, path);
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        assert!(answer.head.contains("text/html"), "{path}: {answer:?}");
        assert!(answer.body.contains(part), "{path}: {answer:?}");
    }
    let answer = get(addr, "/?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E");
    assert!(!answer.body.contains("<script>"), "{answer:?}");
    assert!(
        answer
            .head
            .contains("content-security-policy: default-src 'self'"),
        "{answer:?}"
    );
    assert_eq!(call(addr, "POST", "/", "", "").status, 405);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn the_page_says_that_the_store_does_not_answer() {
    let database = PgDatabase::create();
    let gateway = start(Some(&database));
    let addr = gateway.http_addr();
    assert_eq!(get(addr, "/").status, 200);
    drop(database);
    let answer = get(addr, "/");
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(
        answer.body.contains("the store does not answer"),
        "{answer:?}"
    );
}

#[test]
fn numbers_are_live() {
    let gateway = start(None);
    let addr = gateway.http_addr();
    let stream = send(addr, "GET", "/live", "", "");
    let lines = BufReader::new(stream).lines();
    let mut values = lines.filter_map(|line| {
        let line = line.expect("a line");
        let json = line.strip_prefix("data: ")?.to_owned();
        Some(serde_json::from_str::<serde_json::Value>(&json).expect("JSON"))
    });
    let first = values.next().expect("numbers");
    assert_eq!(
        (&first["online"], &first["quarantined"]),
        (&"0".into(), &"0".into())
    );
    let (mut pump, _) = gateway.connect("pump-1");
    pump.send(&readings(1));
    pump.expect_ack(1);
    assert!(values.any(|values| values["online"] == "1"));
}
