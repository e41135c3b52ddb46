//! Health and metrics over HTTP, against the real gateway.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use tempfile::TempDir;

use crate::support::fleet::simulator;
use crate::support::gateway::{Gateway, command, run};
use crate::support::{PATIENCE, eventually};

pub const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

/// Sends a request with these header lines, and reads the answer to its end.
pub fn request(addr: SocketAddr, path: &str, headers: &[&str]) -> Answer {
    let mut socket = TcpStream::connect(addr).expect("connects");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let host = format!("Host: {addr}");
    let hosts = headers
        .iter()
        .filter(|line| line.starts_with("Host:"))
        .count();
    let lines = headers
        .iter()
        .copied()
        .chain((hosts == 0).then_some(host.as_str()));
    let lines = lines.collect::<Vec<_>>().join("\r\n");
    let request = format!("GET {path} HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).expect("sends");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Answer {
        status: status.expect("a status"),
        body: body.to_owned(),
    }
}

pub fn get(gateway: &Gateway, path: &str) -> Answer {
    request(gateway.http_addr(), path, &[])
}

/// Returns the sum of a metric over its labels.
fn metric(gateway: &Gateway, name: &str) -> f64 {
    let text = get(gateway, "/metrics").body;
    let of = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    let values: Vec<f64> = of
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(!values.is_empty(), "{name}: {text}");
    values.iter().sum()
}

/// Returns the value of the metric with these labels.
pub fn metric_line(gateway: &Gateway, labelled: &str) -> String {
    let text = get(gateway, "/metrics").body;
    let value = |line: &str| Some(line.strip_prefix(labelled)?.strip_prefix(' ')?.to_owned());
    text.lines().find_map(value).expect(labelled)
}

#[test]
fn counters_equal_the_rows_after_faults() {
    let gateway = Gateway::start(&HTTP);
    let dir = TempDir::new().expect("a directory");
    let run = simulator("run")
        .args([
            "--gateway",
            &gateway.addr.to_string(),
            "--devices",
            "10",
            "--frames",
            "60",
        ])
        .args(["--profile", "burst", "--seed", "7", "--journal"])
        .arg(dir.path().join("journal"))
        .arg("--key-file")
        .arg(gateway.data_dir().join("fleet.key"))
        .args([
            "--faults",
            "disconnect=0.05,duplicate=0.05,corrupt=0.05,malformed=0.05",
        ])
        .output()
        .expect("starts");
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let mut database = gateway.database();
    for (name, sql) in [
        (
            "fieldgate_readings_stored_total",
            "SELECT count(*) FROM readings",
        ),
        (
            "fieldgate_frames_quarantined_total",
            "SELECT count(*) FROM quarantine",
        ),
        (
            "fieldgate_gap_frames_total",
            "SELECT coalesce(sum(to_seq - from_seq + 1), 0) FROM gaps",
        ),
        (
            "fieldgate_frames_stored_total",
            "SELECT (SELECT count(*) FROM frames WHERE type <> 18) - (SELECT count(*) FROM quarantine)",
        ),
    ] {
        let rows: Vec<(i64,)> = database.rows(sql);
        assert_eq!(metric(&gateway, name), rows[0].0 as f64, "{name}");
        assert!(name.contains("gap") || rows[0].0 > 0, "{name}");
    }
    assert!(metric(&gateway, "fieldgate_nacks_sent_total") > 0.0);
    eventually("duplicates are counted", PATIENCE, || {
        metric(&gateway, "fieldgate_frames_duplicate_total") > 0.0
    });
    eventually("no connection", PATIENCE, || {
        metric(&gateway, "fieldgate_connections") == 0.0
    });
    let readings = metric(&gateway, "fieldgate_readings_stored_total");
    for name in ["readings_by_time_quality_total", "readings_by_age_total"] {
        assert_eq!(metric(&gateway, &format!("fieldgate_{name}")), readings);
    }
    assert!(metric(&gateway, "fieldgate_handshake_seconds_count") >= 10.0);
    eventually("the oldest frame", PATIENCE, || {
        metric(&gateway, "fieldgate_frame_oldest_timestamp_seconds") > 0.0
    });
    assert_eq!(metric(&gateway, "fieldgate_queue_readings"), 0.0);
    assert_eq!(metric(&gateway, "fieldgate_queue_bytes"), 0.0);
}

#[test]
fn every_label_is_present_from_the_start() {
    let gateway = Gateway::start(&HTTP);
    let text = get(&gateway, "/metrics").body;
    for line in [
        "fieldgate_nacks_sent_total{code=\"11\",name=\"store down\"} 0",
        "fieldgate_byes_sent_total{code=\"50\",name=\"authentication\"} 0",
        "fieldgate_frames_quarantined_total{code=\"31\",name=\"column\"} 0",
        "fieldgate_gap_frames_total{reason=\"overwritten\"} 0",
        "fieldgate_logins_total{result=\"disabled\"} 0",
        "fieldgate_store_up 1",
        "fieldgate_retention_deleted_total{content=\"readings\"} 0",
        "fieldgate_connections{state=\"session\"} 0",
        "fieldgate_readings_by_time_quality_total{quality=\"suspect\"} 0",
        "fieldgate_readings_by_age_total{age=\"over_7d\"} 0",
        "fieldgate_handshake_seconds_count 0",
        "fieldgate_unstored_oldest_timestamp_seconds 0.0",
        "fieldgate_spool_oldest_timestamp_seconds 0",
        "fieldgate_default_partition_readings 0",
        "fieldgate_frame_oldest_timestamp_seconds 0",
        "fieldgate_connections_max 16384",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    eventually("sizes", PATIENCE, || {
        metric(&gateway, "fieldgate_store_bytes") > 0.0
    });
    assert!(metric(&gateway, "fieldgate_disk_free_bytes") > 0.0);
    assert!(metric(&gateway, "process_resident_memory_bytes") > 1e6);
}

/// Returns the output of `fieldgate status` about a gateway.
fn status(gateway: &Gateway, url: &str) -> String {
    let data_dir = gateway.data_dir().to_str().expect("UTF-8");
    let output = command(&["status", "--data-dir", data_dir, "--url", url]).output();
    let output = output.expect("runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn status_shows_the_running_gateway_and_later_the_store() {
    let mut gateway = Gateway::start(&HTTP);
    let url = format!("http://{}", gateway.http_addr());
    let (mut link, _) = gateway.connect("pump");
    link.ping();
    let shown = status(&gateway, &url);
    for line in [
        format!("ready, at {url}/"),
        "1 device".to_owned(),
        "1 never".to_owned(),
    ] {
        assert!(shown.contains(&line), "{line}: {shown}");
    }
    assert!(status(&gateway, "http://127.0.0.1:1").contains("no answer from"));
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let shown = status(&gateway, &url);
    assert!(
        shown.contains("not running") && shown.contains("1 never"),
        "{shown}"
    );
}

#[test]
fn the_gateway_is_ready_until_it_shuts_down() {
    let mut gateway = Gateway::start(&HTTP);
    assert_eq!(get(&gateway, "/livez").status, 200);
    let ready = get(&gateway, "/readyz");
    assert_eq!(
        (ready.status, ready.body.as_str()),
        (200, r#"{"is_ready":true,"reasons":[]}"#)
    );
    assert_eq!(get(&gateway, "/nothing").status, 404);
    gateway.terminate();
    assert!(gateway.wait().status.success());
}

#[test]
fn requests_of_other_sites_are_refused() {
    let gateway = Gateway::start(&[
        "--http",
        "127.0.0.1:0",
        "--http-host",
        "gate.example,b.example",
    ]);
    let addr = gateway.http_addr();
    let status = |headers: &[&str]| request(addr, "/metrics", headers).status;
    for host in [
        "localhost",
        "localhost:7380",
        "[::1]:7380",
        "Gate.Example:80",
        "b.example",
        "10.1.2.3",
    ] {
        assert_eq!(status(&[&format!("Host: {host}")]), 200, "{host}");
    }
    for host in [
        "evil.example",
        "",
        "gate.example.evil.example",
        "127.0.0.1.evil.example:7380",
    ] {
        assert_eq!(status(&[&format!("Host: {host}")]), 421, "{host}");
    }
    let own = format!("Origin: http://{addr}");
    assert_eq!(status(&[&own]), 200);
    for origin in ["http://evil.example", "null", "http://127.0.0.1", "x"] {
        assert_eq!(status(&[&format!("Origin: {origin}")]), 403, "{origin}");
    }
}

#[test]
fn beyond_loopback_a_token_is_needed() {
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().to_str().expect("text");
    let serve = [
        "serve",
        "--data-dir",
        data_dir,
        "--listen",
        "127.0.0.1:0",
        "--http",
        "0.0.0.0:0",
    ];
    let refused = run(&serve);
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("--http-token-file"),
        "{}",
        refused.stderr
    );

    let file = dir.path().join("tokens");
    let file_flag = file.to_str().expect("text");
    let token = "0123456789abcdef0123";
    for (text, mode, words) in [
        ("read short\n".to_owned(), 0o600, "line 1"),
        ("# none\n\n".to_owned(), 0o600, "no token"),
        (format!("read {token}\n"), 0o644, "mode 0644"),
    ] {
        secret(&file, &text, mode);
        let refused = run(&[&serve[..], &["--http-token-file", file_flag]].concat());
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    secret(&file, &format!("# of monitoring\nread {token}\n"), 0o600);
    let gateway = Gateway::start(&["--http", "0.0.0.0:0", "--http-token-file", file_flag]);
    let port = gateway.http_addr().port();
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    let status = |path, headers: &[&str]| request(addr, path, headers).status;
    assert_eq!(status("/readyz", &[]), 200);
    assert_eq!(status("/metrics", &[]), 401);
    assert_eq!(
        status("/metrics", &["Authorization: Bearer 0123456789abcdef0124"]),
        401
    );
    assert_eq!(
        status("/metrics", &[&format!("Authorization: Bearer {token}")]),
        200
    );
    // The password that a browser asks for: "x:0123456789abcdef0123".
    let basic = "Authorization: Basic eDowMTIzNDU2Nzg5YWJjZGVmMDEyMw==";
    assert_eq!(status("/metrics", &[basic]), 200);
}

fn secret(path: &Path, text: &str, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).expect("writes");
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
}

#[test]
fn a_taken_port_names_the_flag() {
    let gateway = Gateway::start(&HTTP);
    let dir = TempDir::new().expect("a directory");
    let taken = gateway.http_addr().to_string();
    let mut serve = command(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--http",
        &taken,
        "--data-dir",
    ]);
    let output = serve.arg(dir.path()).output().expect("starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("could not listen on") && stderr.contains("--http"),
        "{stderr}"
    );
}
