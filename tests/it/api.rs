//! The HTTP API: devices, queries, the feed over a WebSocket, and errors, against the real gateway.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::database::PgDatabase;
use crate::support::gateway::Gateway;
use crate::support::http::{Answer, call, get, send};
use crate::support::messages::readings;
use crate::support::{PATIENCE, eventually};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];
/// Never ends and never returns a row.
const SILENT: &str =
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n";
const ENDLESS: &str =
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n";

fn begin_query(addr: SocketAddr, sql: &str) -> TcpStream {
    let body = json!({ "sql": sql }).to_string();
    let headers = "Content-Type: application/json\r\n";
    send(addr, "POST", "/v1/query", headers, &body)
}

fn query(addr: SocketAddr, sql: &str, params: &Value) -> Answer {
    let body = json!({ "sql": sql, "params": params }).to_string();
    let headers = "Content-Type: application/json\r\n";
    call(addr, "POST", "/v1/query", headers, &body)
}

/// Starts a gateway that stores in SQLite, or in `database`.
fn start(database: Option<&PgDatabase>) -> Gateway {
    match database {
        None => Gateway::start(&HTTP),
        Some(database) => Gateway::start(&[&HTTP[..], &["--store", &database.url()]].concat()),
    }
}

fn devices_are_listed(database: Option<&PgDatabase>) {
    let gateway = start(database);
    let addr = gateway.http_addr();
    assert_eq!(
        get(addr, "/v1/devices").json(),
        json!({"devices": [], "next": null})
    );
    let mut links = Vec::new();
    for name in ["pump-1", "pump-2", "pump-10", "valve"] {
        let (mut link, _) = gateway.connect(name);
        if name != "valve" {
            link.send(&readings(1));
            link.expect_ack(1);
        }
        links.push(link);
    }
    let names = |path: &str| {
        let page = get(addr, path).json();
        let devices = page["devices"].as_array().expect("devices").iter();
        let names = devices.map(|device| device["device"].as_str().expect("a name").to_owned());
        (names.collect::<Vec<_>>(), page["next"].clone())
    };
    let all = ["pump-1", "pump-10", "pump-2", "valve"].map(String::from);
    assert_eq!(names("/v1/devices"), (all.to_vec(), Value::Null));
    assert_eq!(
        names("/v1/devices?limit=3"),
        (all[..3].to_vec(), json!("pump-2"))
    );
    let rest = (all[3..].to_vec(), Value::Null);
    assert_eq!(names("/v1/devices?limit=3&after=pump-2"), rest);
    assert_eq!(names("/v1/devices?limit=4"), (all.to_vec(), Value::Null));
    let ones = (all[..2].to_vec(), Value::Null);
    assert_eq!(names("/v1/devices?prefix=pump-1"), ones);
    assert_eq!(names("/v1/devices?prefix=%25").0, [""; 0]);
    eventually("the presence of all", PATIENCE, || {
        names("/v1/devices?state=never").0 == ["valve"]
    });
    assert_eq!(
        names("/v1/devices?state=online&limit=2"),
        (all[..2].to_vec(), json!("pump-10"))
    );
    assert_eq!(
        names("/v1/devices?state=online&limit=2&after=pump-10").0,
        ["pump-2"]
    );

    let device = get(addr, "/v1/devices/pump-1").json();
    for (key, value) in [
        ("device", json!("pump-1")),
        ("enabled", json!(true)),
        ("state", json!("connected")),
        ("presence", json!("online")),
        ("is_interval_set", json!(false)),
        ("firmware", json!("2.4.1")),
        ("frames", json!(1)),
        ("missing", json!(0)),
        ("quarantined", json!(0)),
    ] {
        assert_eq!(device[key], value, "{key}: {device}");
    }
    assert!(device["last_frame_at"].as_i64().expect("a time") > 1_700_000_000_000_000);
    let latest = get(addr, "/v1/devices/pump-1/latest").json();
    let reading = &latest["latest"][0];
    assert_eq!(reading["channel"], "temperature", "{latest}");
    assert_eq!(reading["quality"], "utc");
    assert!(
        reading["value"].is_number() && reading["ts"].is_i64(),
        "{reading}"
    );
    for path in [
        "/v1/devices/absent",
        "/v1/devices/absent/latest",
        "/v1/devices/%00",
    ] {
        let answer = get(addr, path);
        assert_eq!(answer.status, 404, "{answer:?}");
        assert_eq!(answer.json()["error"], "no such device");
    }
}

#[test]
fn devices_are_listed_in_sqlite() {
    devices_are_listed(None);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn devices_are_listed_in_postgres() {
    devices_are_listed(Some(&PgDatabase::create()));
}

fn statements_are_run(database: Option<&PgDatabase>) {
    let gateway = start(database);
    let addr = gateway.http_addr();
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let sql = "SELECT device, channel, $2 AS t, 1.5 AS x, 1.5 AS x, NULL AS n FROM telemetry WHERE device = $1 LIMIT 1";
    let text = "it's \\ \"$1\" ä";
    let rows = query(addr, sql, &json!(["pump", text]));
    assert_eq!(rows.status, 200, "{rows:?}");
    assert_eq!(
        rows.json(),
        json!([{"device": "pump", "channel": "temperature", "t": text, "x": 1.5, "x_2": 1.5, "n": null}])
    );
    let is_postgres = database.is_some();
    let typed = match is_postgres {
        true => {
            "SELECT 1 AS a WHERE $1::text IS NULL AND $2::int > 1 AND $3::float8 < 1 AND $4::bool"
        }
        false => "SELECT 1 AS a WHERE $1 IS NULL AND $2 > 1 AND $3 < 1 AND $4",
    };
    let rows = query(addr, typed, &json!([null, 2, 0.5, true]));
    assert_eq!(rows.json(), json!([{"a": 1}]), "{rows:?}");
    assert_eq!(query(addr, "SELECT 1 WHERE 1 = 2", &json!([])).body, "[]\n");
    let many = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 20000) SELECT x FROM n";
    let rows = query(addr, many, &json!([])).json();
    let rows = rows.as_array().expect("rows");
    assert_eq!((rows.len(), &rows[19_999]["x"]), (20_000, &json!(20_000)));

    let large = match is_postgres {
        true => "SELECT repeat('a', 9000000)",
        false => "SELECT zeroblob(9000000)",
    };
    for (sql, params, status, words) in [
        ("DELETE FROM devices", json!([]), 403, "read-only"),
        (
            "WITH a AS (SELECT 1) DELETE FROM devices",
            json!([]),
            403,
            "write",
        ),
        ("SELECT 1; SELECT 2", json!([]), 400, "one statement"),
        ("SELECT * FORM devices", json!([]), 400, "FORM"),
        ("SELECT * FROM absent", json!([]), 400, "absent"),
        ("SELECT $1", json!([]), 400, "parameter"),
        ("SELECT $0", json!([]), 400, "number"),
        ("SELECT 1", json!([1]), 400, "parameter"),
        ("SELECT $1", json!([[1]]), 400, "array"),
        ("SELECT $1", json!(["\0"]), 400, "NUL"),
        (large, json!([]), 400, "larger"),
    ] {
        let answer = query(addr, sql, &params);
        let error = answer.json()["error"].as_str().expect("text").to_owned();
        assert_eq!(answer.status, status, "{sql}: {answer:?}");
        assert!(error.contains(words), "{sql}: {error}");
    }
    // Nothing was written, and the gateway stores on.
    link.send(&readings(2));
    link.expect_ack(2);
}

#[test]
fn statements_are_run_in_sqlite() {
    statements_are_run(None);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn statements_are_run_in_postgres() {
    statements_are_run(Some(&PgDatabase::create()));
}

fn abandoned_queries_end(database: Option<&mut PgDatabase>) {
    let gateway = start(database.as_deref());
    let addr = gateway.http_addr();
    let mut running = vec![begin_query(addr, ENDLESS)];
    let one = || query(addr, "SELECT 1 AS one", &json!([])).status;
    // One that is refused, because the query before has just ended, is repeated.
    eventually("two queries", PATIENCE, || {
        running.push(begin_query(addr, SILENT));
        one() == 503
    });
    let refused = query(addr, "SELECT 1", &json!([]));
    assert!(
        refused.status == 503 && refused.head.contains("retry-after:"),
        "{refused:?}"
    );
    drop(running);
    let began = Instant::now();
    eventually("a free slot", PATIENCE, || one() == 200);
    assert!(began.elapsed() < Duration::from_secs(10));
    if let Some(database) = database {
        database.session().wait_for(
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database()
             AND state = 'active' AND query LIKE 'WITH RECURSIVE%'",
        );
    }
}

#[test]
fn abandoned_queries_end_in_sqlite() {
    abandoned_queries_end(None);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn abandoned_queries_end_in_postgres() {
    abandoned_queries_end(Some(&mut PgDatabase::create()));
}

#[test]
fn errors_have_one_shape() {
    let gateway = start(None);
    let addr = gateway.http_addr();
    let json_type = "Content-Type: application/json\r\n";
    let large = "a".repeat(70_000);
    let websocket = "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";
    for (method, path, headers, body, status) in [
        ("GET", "/v1", "", "", 404),
        ("GET", "/v1/", "", "", 404),
        ("GET", "/v1/nothing", "", "", 404),
        ("POST", "/v1/devices/a/b/c", "", "", 404),
        ("POST", "/v1/devices", "", "", 405),
        ("DELETE", "/v1/devices/pump", "", "", 405),
        ("GET", "/v1/query", "", "", 405),
        ("GET", "/v1/devices?limit=0", "", "", 400),
        ("GET", "/v1/devices?limit=1001", "", "", 400),
        ("GET", "/v1/devices?limit=x", "", "", 400),
        ("GET", "/v1/devices?state=x", "", "", 400),
        ("GET", "/v1/devices?limt=1", "", "", 400),
        ("GET", "/v1/devices?limit=1&limit=2", "", "", 400),
        ("GET", "/v1/devices?after=%00", "", "", 400),
        ("GET", "/v1/devices/a?x=1", "", "", 400),
        ("GET", "/v1/devices/%ff", "", "", 400),
        ("GET", "/v1/feed?after=-1", "", "", 400),
        ("GET", "/v1/feed?after=x", "", "", 400),
        ("GET", "/v1/feed?before=1", "", "", 400),
        ("GET", "/v1/feed", "Last-Event-ID: x\r\n", "", 400),
        ("GET", "/v1/feed?after=1000000", "", "", 409),
        ("GET", "/v1/feed", "Last-Event-ID: 1000000\r\n", "", 409),
        ("GET", "/v1/feed/ws", "", "", 426),
        ("GET", "/v1/feed/ws", websocket, "", 426),
        ("GET", "/v1/devices", "Host: evil.example\r\n", "", 421),
        (
            "GET",
            "/v1/devices",
            "Origin: http://evil.example\r\n",
            "",
            403,
        ),
        ("POST", "/v1/query", "", r#"{"sql":"SELECT 1"}"#, 415),
        (
            "POST",
            "/v1/query",
            "Content-Type: text/plain\r\n",
            "{}",
            415,
        ),
        ("POST", "/v1/query", json_type, "", 400),
        ("POST", "/v1/query", json_type, "{}", 400),
        ("POST", "/v1/query", json_type, r#"{"sql":1}"#, 400),
        (
            "POST",
            "/v1/query",
            json_type,
            r#"{"sql":"SELECT 1","unknown":[]}"#,
            400,
        ),
        (
            "POST",
            "/v1/query?x=1",
            json_type,
            r#"{"sql":"SELECT 1"}"#,
            400,
        ),
        ("POST", "/v1/query", json_type, &large, 413),
    ] {
        let answer = match status {
            421 => {
                let mut socket = TcpStream::connect(addr).expect("connects");
                let request = format!("{method} {path} HTTP/1.0\r\n{headers}\r\n");
                socket.write_all(request.as_bytes()).expect("sends");
                let mut text = String::new();
                socket.read_to_string(&mut text).expect("an answer");
                let (head, body) = text.split_once("\r\n\r\n").expect("a head");
                let status = head.split(' ').nth(1).expect("a status");
                Answer {
                    status: status.parse().expect("a number"),
                    head: head.to_ascii_lowercase(),
                    body: body.to_owned(),
                }
            }
            _ => call(addr, method, path, headers, body),
        };
        let what = format!("{method} {path} {headers}");
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(
            answer.head.contains("content-type: application/json"),
            "{what}: {answer:?}"
        );
        let json = answer.json();
        let keys: Vec<_> = json.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["error", "fix"], "{what}");
        assert_eq!(
            status == 405,
            answer.head.contains("\nallow: "),
            "{what}: {answer:?}"
        );
    }
    let description = get(addr, "/openapi.json").json();
    assert_eq!(description["openapi"], "3.1.0");
}

/// A WebSocket, as a client has it.
struct WebSocket(TcpStream);

impl WebSocket {
    fn open(addr: SocketAddr, query: &str) -> WebSocket {
        let mut socket = TcpStream::connect(addr).expect("connects");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let request = format!(
            "GET /v1/feed/ws{query} HTTP/1.1\r\nHost: {addr}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).expect("sends");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte).expect("a head");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("text");
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        WebSocket(socket)
    }

    /// Sends a frame with this opcode.
    fn send(&mut self, opcode: u8, payload: &[u8]) {
        let mask = [1, 2, 3, 4];
        let masked = payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b);
        let mut frame = vec![0x80 | opcode, 0x80 | payload.len() as u8];
        frame.extend(mask);
        frame.extend(masked);
        self.0.write_all(&frame).expect("sends");
    }

    /// Returns opcode and payload of the next frame; `None` at the end.
    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        match self.0.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("no frame"),
            Err(_) => return None,
        }
        let mut bytes = |count: usize| {
            let mut bytes = vec![0; count];
            self.0.read_exact(&mut bytes).expect("a frame");
            bytes
        };
        let length = match head[1] {
            126 => u16::from_be_bytes(bytes(2).try_into().expect("two")).into(),
            127 => u64::from_be_bytes(bytes(8).try_into().expect("eight")),
            length => length.into(),
        };
        Some((head[0] & 0x0F, bytes(length as usize)))
    }

    fn json(&mut self) -> Value {
        let (opcode, payload) = self.next().expect("a message");
        assert_eq!(opcode, 1, "{}", String::from_utf8_lossy(&payload));
        serde_json::from_slice(&payload).expect("JSON")
    }
}

#[test]
fn a_websocket_carries_the_feed() {
    let gateway = start(None);
    let addr = gateway.http_addr();
    let (mut pump, _) = gateway.connect("pump");
    let (mut valve, _) = gateway.connect("valve");
    let mut all = WebSocket::open(addr, "?after=0");
    assert_eq!(all.json(), json!({"cursor": 0}));
    let mut of_valve = WebSocket::open(addr, "?after=0&device=valve&channel=temperature");
    assert_eq!(of_valve.json(), json!({"cursor": 0}));
    for seq in 1..=3 {
        pump.send(&readings(seq));
        pump.expect_ack(seq);
    }
    valve.send(&readings(1));
    valve.expect_ack(1);
    let events: Vec<Value> = (0..4).map(|_| all.json()).collect();
    let seqs: Vec<_> = events.iter().map(|event| event["seq"].as_u64()).collect();
    assert_eq!(seqs, [Some(1), Some(2), Some(3), Some(1)]);
    let event = of_valve.json();
    assert_eq!(
        (&event["device"], &event["readings"][0]["channel"]),
        (&json!("valve"), &json!("temperature"))
    );
    // A reader that returns with its cursor misses nothing.
    let cursor = events[1]["frame_id"].as_i64().expect("an id");
    drop(all);
    let mut resumed = WebSocket::open(addr, &format!("?after={cursor}"));
    assert_eq!(resumed.json(), json!({ "cursor": cursor }));
    assert_eq!(resumed.json(), events[2]);
    assert_eq!(resumed.json(), events[3]);
    // Pings are answered; a text is ignored.
    resumed.send(1, b"hello");
    resumed.send(9, b"ping");
    assert_eq!(resumed.next(), Some((10, b"ping".to_vec())));
    resumed.send(8, &1000_u16.to_be_bytes());
    assert_eq!(resumed.next(), Some((8, 1000_u16.to_be_bytes().to_vec())));
    assert_eq!(resumed.next(), None);
    // A frame that is not masked is an error.
    of_valve.0.write_all(&[0x81, 1, b'a']).expect("sends");
    let (opcode, reason) = of_valve.next().expect("a close frame");
    assert_eq!((opcode, &reason[..2]), (8, &1002_u16.to_be_bytes()[..]));
    assert_eq!(of_valve.next(), None);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn readers_learn_that_the_store_was_restored() {
    let mut database = PgDatabase::create();
    let gateway = start(Some(&database));
    let addr = gateway.http_addr();
    let (mut pump, _) = gateway.connect("pump");
    for seq in 1..=3 {
        pump.send(&readings(seq));
        pump.expect_ack(seq);
    }
    let mut socket = WebSocket::open(addr, "?after=0");
    let cursor = loop {
        let event = socket.json();
        if event["seq"] == 3 {
            break event["frame_id"].as_i64().expect("an id");
        }
    };
    let mut events = send(addr, "GET", &format!("/v1/feed?after={cursor}"), "", "");
    let mut start = [0; 1];
    events.read_exact(&mut start).expect("an answer");
    // What a restore does to the feed.
    database.session().execute("DELETE FROM readings");
    database.session().execute("DELETE FROM frames");
    database
        .session()
        .execute("ALTER SEQUENCE frame_id_blocks RESTART");
    // Few cursors arrive before.
    let is_reset = (0..3).any(|_| socket.json() == json!({"reset": true}));
    assert!(is_reset);
    assert_eq!(socket.next().map(|(opcode, _)| opcode), Some(8));
    let mut rest = String::new();
    events.read_to_string(&mut rest).expect("an end");
    assert!(rest.ends_with("event: reset\ndata: {}\n\n"), "{rest}");
    let refused = get(addr, &format!("/v1/feed?after={cursor}"));
    assert_eq!(refused.status, 409, "{refused:?}");
}
