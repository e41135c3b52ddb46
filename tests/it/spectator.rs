//! The simulator's messages for its user: while it waits, and when no device can connect.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::fleet::simulator;
use crate::support::gateway::Gateway;
use crate::support::logs::{collect, keep_of};
use crate::tls::until;

/// Writes a file with a fleet key.
fn key_file(dir: &Path) -> PathBuf {
    let path = dir.join("fleet.key");
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&path);
    file.expect("a file")
        .write_all(&[b'7'; 64])
        .expect("written");
    path
}

/// Runs it to its end; returns its exit code and its stderr.
fn ended(gateway: SocketAddr, key: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let output = simulator("run")
        .args(["--gateway", &gateway.to_string(), "--key-file"])
        .arg(key)
        .args(flags)
        .output();
    let output = keep_of(output.expect("starts"));
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Starts a peer that treats each connection the same.
fn peer(each: fn(TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || listener.incoming().flatten().for_each(each));
    address
}

#[test]
fn it_exits_if_no_device_can_connect() {
    let dir = TempDir::new().expect("a directory");
    let key = key_file(dir.path());
    // A TLS listener's answer to plain text, a web server's, and a peer that closes without an answer.
    let alert: fn(TcpStream) = |mut peer| {
        let _ = peer.read(&mut [0; 4096]);
        let _ = peer.write_all(b"\x15\x03\x03\x00\x02\x02\x32");
    };
    let closes: fn(TcpStream) = |mut peer| {
        let _ = peer.read(&mut [0; 4096]);
    };
    for (answer, says) in [
        (alert, "not an FWP frame"),
        (closes, "closed by the gateway"),
    ] {
        // Long enough that the simulator gives up first, and short enough for a test.
        let (code, said) = ended(peer(answer), &key, &["--duration", "1m", "--devices", "4"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("waiting: ") && said.contains(says), "{said}");
        assert!(said.contains("error: no device could connect to"), "{said}");
    }
}

#[test]
fn it_exits_if_a_required_client_certificate_is_missing() {
    let dir = TempDir::new().expect("a directory");
    let made = crate::support::gateway::run(&[
        "tls",
        "init",
        "--data-dir",
        &dir.path().display().to_string(),
    ]);
    assert!(made.status.success(), "{}", made.stderr);
    let ca = dir.path().join("tls/ca.pem").display().to_string();
    let flags = ["--tls-listen", "127.0.0.1:0", "--tls-client-ca", &ca];
    let gateway = Gateway::start_in(dir.path(), &flags);
    let address = format!("localhost:{}", gateway.tls_addr().port());
    let output = simulator("run")
        .args(["--gateway", &address, "--tls", "--duration", "1m"])
        .args(["--data-dir", &dir.path().display().to_string()])
        .output();
    let output = keep_of(output.expect("starts"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("error: no device could connect to") && said.contains("--identities"),
        "{said}"
    );
}

/// Starts a long run with a captured stderr.
fn lasting(gateway: &Gateway, flags: &[&str]) -> Child {
    simulator("run")
        .args(["--gateway", &gateway.addr.to_string(), "--duration", "1m"])
        .arg("--key-file")
        .arg(gateway.data_dir().join("fleet.key"))
        .args(["--interval", "10ms", "--batch", "2"])
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts")
}

fn interrupt(child: &Child) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status();
    assert!(sent.expect("kill").success());
}

#[test]
fn it_reports_waits_and_prints_its_report_when_stopped() {
    let mut gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let report = dir.path().join("report.json");
    let mut child = lasting(&gateway, &["--report", report.to_str().expect("text")]);
    let mut stderr = collect(child.stderr.take().expect("piped"));
    stderr.wait_for("readings stored");
    gateway.terminate();
    gateway.wait();
    stderr.wait_for("waiting: BYE 40 (shutdown)");
    interrupt(&child);
    stderr.wait_for("stopping: waiting up to 30 s");
    // With nothing in flight it has exited already.
    interrupt(&child);
    let mut said = String::new();
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_to_string(&mut said).expect("text");
    child.wait().expect("a child");
    assert!(
        said.contains("devices for") && said.contains("connections lost"),
        "{said}"
    );
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&report).expect("a report")).expect("JSON");
    assert!(json["frames_acked"].as_u64() > Some(0), "{json}");
}

#[test]
fn a_closed_pipe_causes_no_panic() {
    let gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let journal = dir.path().join("journal");
    let mut child = lasting(&gateway, &["--journal", journal.to_str().expect("text")]);
    let mut first = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    stdout.read_line(&mut first).expect("a line");
    assert!(first.starts_with("seed "), "{first}");
    drop((stdout, child.stderr.take()));
    let mut database = gateway.database();
    until(|| (database.count("SELECT count(*) FROM frames") > 20).then_some(()));
    interrupt(&child);
    let status = until(|| child.try_wait().expect("a child"));
    assert_eq!(status.code(), Some(0));
    // A failed verification returns its exit code even if the output has no reader.
    for (store, code) in [("fieldgate.db", 0), ("nothing.db", 2)] {
        let mut child = simulator("verify")
            .arg("--journal")
            .arg(&journal)
            .args([
                "--store",
                &format!("sqlite://{}", gateway.data_dir().join(store).display()),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().expect("a child").code(), Some(code), "{store}");
    }
}

#[test]
fn an_unwritable_report_fails_before_anything_is_sent() {
    let gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let report = dir.path().join("missing/report.json");
    let key = gateway.data_dir().join("fleet.key");
    let flags = [
        "--report",
        report.to_str().expect("text"),
        "--duration",
        "1s",
    ];
    let (code, said) = ended(gateway.addr, &key, &flags);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("could not write") && said.contains("missing/report.json"),
        "{said}"
    );
    assert_eq!(gateway.database().count("SELECT count(*) FROM devices"), 0);
}
