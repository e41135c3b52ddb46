//! The feed of committed readings, against the real gateway.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::database::PgDatabase;
use crate::support::fleet::simulator;
use crate::support::gateway::{Database, Gateway, command};
use crate::support::messages::readings;
use crate::support::{PATIENCE, eventually};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];
/// Number of times that a reader reconnects.
const RECONNECTS: u32 = 50;

/// A reading: frame, device, channel, time, bits of the value.
type Row = (i64, String, String, i64, Option<u64>);

/// A connection to the feed.
struct Reader {
    lines: BufReader<TcpStream>,
    /// Id of the last event or keepalive.
    cursor: i64,
}

impl Reader {
    /// Connects; `None` if there is no gateway.
    fn open(addr: SocketAddr, query: &str, cursor: Option<i64>) -> Option<Reader> {
        let mut socket = TcpStream::connect(addr).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let cursor_line = cursor.map(|cursor| format!("Last-Event-ID: {cursor}\r\n"));
        let cursor_line = cursor_line.unwrap_or_default();
        let request = format!("GET /v1/feed{query} HTTP/1.1\r\nHost: {addr}\r\n{cursor_line}\r\n");
        socket.write_all(request.as_bytes()).ok()?;
        let mut lines = BufReader::new(socket);
        let mut status = String::new();
        lines.read_line(&mut status).ok()?;
        if status.is_empty() {
            return None;
        }
        assert!(status.contains(" 200 "), "{status}");
        Some(Reader {
            lines,
            cursor: cursor.unwrap_or(-1),
        })
    }

    /// Returns the next event; `None` at the end of the connection. With `is_brief`, also if there is none soon.
    fn next(&mut self, is_brief: bool) -> Option<Value> {
        let patience = if is_brief {
            Duration::from_secs(1)
        } else {
            PATIENCE
        };
        let socket = self.lines.get_ref();
        socket.set_read_timeout(Some(patience)).expect("a timeout");
        let mut id = None;
        loop {
            let mut line = String::new();
            match self.lines.read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && !is_brief => {
                    panic!("no event within {patience:?}")
                }
                Err(_) => return None,
            }
            if let Some(found) = line.strip_prefix("id: ") {
                id = Some(found.trim().parse::<i64>().expect("a number"));
            } else if let Some(data) = line.strip_prefix("data: ") {
                let event: Value = serde_json::from_str(data).expect("JSON");
                assert_eq!(event["frame_id"].as_i64(), id);
                self.cursor = id.expect("an id");
                return Some(event);
            } else if line == "\n" {
                self.cursor = id.take().unwrap_or(self.cursor);
            }
        }
    }

    /// Reads until the keepalive at the start, which has the cursor.
    fn await_start(&mut self) {
        while self.cursor < 0 {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).expect("a line"), 0);
            if let Some(id) = line.strip_prefix("id: ") {
                self.cursor = id.trim().parse().expect("a number");
            }
        }
    }
}

/// Returns the readings of an event.
fn rows(event: &Value) -> Vec<Row> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let row = |reading: &Value| {
        (
            event["frame_id"].as_i64().expect("an id"),
            text(&event["device"]),
            text(&reading["channel"]),
            reading["ts"].as_i64().expect("a time"),
            reading["value"].as_f64().map(f64::to_bits),
        )
    };
    let readings = event["readings"].as_array().expect("readings");
    readings.iter().map(row).collect()
}

fn count(rows: Vec<Row>, counts: &mut BTreeMap<Row, u32>) {
    for row in rows {
        *counts.entry(row).or_default() += 1;
    }
}

/// Where the gateway stores.
enum Store {
    File,
    Postgres(PgDatabase),
}

impl Store {
    fn flags(&self) -> Vec<String> {
        match self {
            Store::File => vec![],
            Store::Postgres(database) => {
                vec![
                    "--store".into(),
                    database.url(),
                    "--postgres-writers".into(),
                    "4".into(),
                ]
            }
        }
    }

    /// Returns all stored readings.
    fn rows(&mut self, dir: &Path) -> BTreeMap<Row, u32> {
        let of = |ts: &str| {
            format!(
                "SELECT r.frame_id, d.name, s.channel, {ts}, r.value FROM readings AS r \
                 JOIN series AS s ON s.id = r.series_id JOIN devices AS d ON d.id = s.device_id"
            )
        };
        type Found = (i64, String, String, i64, Option<f64>);
        let found: Vec<Found> = match self {
            Store::File => Database::open(&dir.join("fieldgate.db")).rows(&of("r.ts")),
            Store::Postgres(database) => {
                { database.session() }.rows(&of("(extract(epoch FROM r.ts) * 1000000)::bigint"))
            }
        };
        let mut counts = BTreeMap::new();
        let bits = |(frame, device, channel, ts, value): Found| {
            (frame, device, channel, ts, value.map(f64::to_bits))
        };
        count(found.into_iter().map(bits).collect(), &mut counts);
        counts
    }
}

/// Reads all events in a number of connections, each of which ends at a random event.
fn read_all(addr: &Mutex<SocketAddr>, is_done: &Mutex<bool>) -> BTreeMap<Row, u32> {
    let seed = rand::random();
    println!("seed of the reader: {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut counts, mut cursor, mut connections) = (BTreeMap::new(), 0, 0);
    loop {
        let addr = *addr.lock().expect("no panic");
        let was_done = *is_done.lock().expect("no panic") && connections > RECONNECTS;
        let Some(mut reader) = Reader::open(addr, "?after=0", Some(cursor)) else {
            std::thread::yield_now();
            continue;
        };
        connections += 1;
        let events = match was_done {
            true => u32::MAX,
            false => random.random_range(0..60),
        };
        for _ in 0..events {
            let Some(event) = reader.next(true) else {
                break;
            };
            count(rows(&event), &mut counts);
            cursor = reader.cursor;
        }
        if was_done {
            return counts;
        }
    }
}

fn a_reader_that_reconnects_misses_nothing(mut store: Store) {
    let dir = TempDir::new().expect("a directory");
    let start = |listen: &str| {
        let mut flags = store.flags();
        flags.extend([HTTP[0], HTTP[1], "--listen", listen].map(String::from));
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Gateway::start_in(dir.path(), &flags)
    };
    let gateway = start("127.0.0.1:0");
    let listen = gateway.addr.to_string();
    let mut fleet = simulator("run")
        .args(["--gateway", &listen, "--devices", "12", "--frames", "150"])
        .args(["--profile", "burst", "--seed", "5", "--journal"])
        .arg(dir.path().join("journal"))
        .arg("--key-file")
        .arg(dir.path().join("fleet.key"))
        .args(["--faults", "disconnect=0.02,duplicate=0.02"])
        .spawn()
        .expect("starts");
    let addr = Mutex::new(gateway.http_addr());
    let is_done = Mutex::new(false);
    let (read, _gateway) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_all(&addr, &is_done));
        // The kill hits a gateway that has sent some events.
        let mut first = Reader::open(gateway.http_addr(), "?after=0", None).expect("a reader");
        for _ in 0..100 {
            first.next(false).expect("an event");
        }
        gateway.kill();
        let gateway = start(&listen);
        *addr.lock().expect("no panic") = gateway.http_addr();
        assert!(fleet.wait().expect("a child").success());
        *is_done.lock().expect("no panic") = true;
        (reader.join().expect("no panic"), gateway)
    });
    let stored = store.rows(dir.path());
    assert!(stored.len() > 1000, "{}", stored.len());
    let lacks: Vec<_> = stored
        .keys()
        .filter(|row| !read.contains_key(row))
        .take(3)
        .collect();
    assert!(lacks.is_empty(), "missed: {lacks:?}");
    let more: Vec<_> = { read.iter() }
        .filter(|(row, times)| stored.get(row) != Some(times))
        .take(3)
        .collect();
    assert!(more.is_empty(), "too often: {more:?}");
}

#[test]
fn a_reader_that_reconnects_misses_nothing_in_sqlite() {
    a_reader_that_reconnects_misses_nothing(Store::File);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_reader_that_reconnects_misses_nothing_in_postgres() {
    a_reader_that_reconnects_misses_nothing(Store::Postgres(PgDatabase::create()));
}

#[test]
fn a_reader_that_never_reads_stops_nobody() {
    let gateway = Gateway::start(&HTTP);
    let addr = gateway.http_addr();
    let stalled: Vec<_> = (0..20)
        .map(|_| Reader::open(addr, "?after=0", None).expect("a reader"))
        .collect();
    let mut reader = Reader::open(addr, "?after=0", None).expect("a reader");
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=3000 {
        link.send(&readings(seq));
        if seq % 50 == 0 {
            link.expect_ack(seq);
        }
    }
    for seq in 1..=3000 {
        let event = reader.next(false).expect("an event");
        assert_eq!(event["seq"].as_u64(), Some(seq));
    }
    drop(stalled);
}

#[test]
fn filters_and_cursors_select_events() {
    let gateway = Gateway::start(&HTTP);
    let addr = gateway.http_addr();
    let (mut pump, _) = gateway.connect("pump");
    let (mut valve, _) = gateway.connect("valve");
    pump.send(&readings(1));
    pump.expect_ack(1);
    let mut live = Reader::open(addr, "", None).expect("a reader");
    live.await_start();
    let mut of_valve = Reader::open(addr, "?after=0&device=valve", None).expect("a reader");
    let mut temperatures = Reader::open(addr, "?after=0&channel=temperature", None).expect("one");
    let mut other = Reader::open(addr, "?after=0&channel=other", None).expect("a reader");
    valve.send(&readings(1));
    valve.expect_ack(1);
    let name = |event: Option<Value>| event.expect("an event")["device"].clone();
    assert_eq!(name(live.next(false)), "valve");
    assert_eq!(name(of_valve.next(false)), "valve");
    assert_eq!(name(temperatures.next(false)), "pump");
    let event = temperatures.next(false).expect("an event");
    assert_eq!(name(Some(event.clone())), "valve");
    assert_eq!(event["quality"], "utc");
    let keys: Vec<_> = event["readings"][0]
        .as_object()
        .expect("one")
        .keys()
        .collect();
    assert_eq!(keys, ["channel", "ts", "unit", "value"]);
    assert_eq!(other.next(true), None);
    for query in ["?after=x", "?after=1&after=2"] {
        let mut socket = TcpStream::connect(addr).expect("connects");
        let request = format!("GET /v1/feed{query} HTTP/1.1\r\nHost: {addr}\r\n\r\n");
        socket.write_all(request.as_bytes()).expect("sends");
        let mut status = String::new();
        BufReader::new(socket)
            .read_line(&mut status)
            .expect("a line");
        assert!(status.contains(" 400 "), "{status}");
    }
}

#[test]
fn the_number_of_readers_is_limited() {
    let gateway = Gateway::start(&HTTP);
    let addr = gateway.http_addr();
    let status = || {
        let mut socket = TcpStream::connect(addr).expect("connects");
        let request = format!("GET /v1/feed HTTP/1.1\r\nHost: {addr}\r\n\r\n");
        socket.write_all(request.as_bytes()).expect("sends");
        let mut lines = BufReader::new(socket);
        let mut status = String::new();
        lines.read_line(&mut status).expect("a line");
        (status.contains(" 200 "), lines)
    };
    let readers: Vec<_> = (0..64).map(|_| status()).collect();
    assert!(readers.iter().all(|(is_open, _)| *is_open));
    assert!(!status().0);
    drop(readers);
    eventually("a free slot", PATIENCE, || status().0);
}

#[test]
fn tail_survives_a_crash_of_the_gateway() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &HTTP);
    let (listen, http) = (gateway.addr.to_string(), gateway.http_addr().to_string());
    let url = format!("http://{http}");
    let tail = |format: &str| {
        let mut tail = command(&["tail", "--url", &url, "--after", "0", "--format", format]);
        let tail = tail.args(["--device", "pump"]).stdout(Stdio::piped());
        let mut tail = tail.spawn().expect("starts");
        let out = BufReader::new(tail.stdout.take().expect("piped"));
        (tail, out.lines())
    };
    let (mut json, mut events) = tail("json");
    let (mut text, mut lines) = tail("text");
    let (mut link, _) = gateway.connect("pump");
    let mut send = |link: &mut crate::support::client::Link,
                    seqs: std::ops::RangeInclusive<u64>| {
        for seq in seqs {
            link.send(&readings(seq));
            link.expect_ack(seq);
            let event = events.next().expect("a line").expect("text");
            let event: Value = serde_json::from_str(&event).expect("JSON");
            assert_eq!(event["seq"].as_u64(), Some(seq));
            let line = lines.next().expect("a line").expect("text");
            assert!(line.contains("  pump  temperature  0.0"), "{line}");
        }
    };
    send(&mut link, 1..=3);
    drop(link);
    gateway.kill();
    let flags = ["--listen", &listen, "--http", &http];
    let gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, _) = gateway.connect("pump");
    send(&mut link, 4..=6);
    // A closed pipe and Ctrl-C end it without an error.
    drop(lines);
    link.send(&readings(7));
    link.expect_ack(7);
    assert!(text.wait().expect("a child").success());
    let interrupt = Command::new("kill")
        .args(["-INT", &json.id().to_string()])
        .status();
    assert!(interrupt.expect("kill").success());
    assert!(json.wait().expect("a child").success());
    let refused = crate::support::gateway::run(&["tail", "--url", "http://127.0.0.1:1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("--url"), "{}", refused.stderr);
}
