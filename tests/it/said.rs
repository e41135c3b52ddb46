//! Log events of a gateway about itself: start, settings, schema and end, in both formats, and their number.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::gateway::{Gateway, command, run};
use crate::support::logs::keep_of;

/// Returns the events of a JSON log; every line has to be JSON.
fn events(log: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
    log.lines().map(parse).collect()
}

fn find<'e>(events: &'e [Value], message: &str) -> &'e Value {
    let mut found = events.iter().filter(|event| {
        let said = event["fields"]["message"].as_str();
        said.is_some_and(|said| said.starts_with(message))
    });
    let event = found
        .next()
        .unwrap_or_else(|| panic!("no {message:?} in {events:?}"));
    assert!(found.next().is_none(), "{message:?} twice");
    &event["fields"]
}

#[test]
fn start_settings_schema_and_end_are_logged() {
    let dir = TempDir::new().expect("a directory");
    let config = dir.path().join("fieldgate.toml");
    fs::write(&config, "keepalive-s = 17\n").expect("writes");
    let flags = [
        "--log-format",
        "json",
        "--config",
        config.to_str().expect("UTF-8"),
        "--window-frames",
        "9",
    ];
    let data_dir = dir.path().join("data");
    let mut gateway = Gateway::start_in(&data_dir, &flags);
    let addr = gateway.addr.to_string();
    gateway.connect("pump").0.ping();
    gateway.terminate();
    let events = events(&gateway.wait().stderr);
    let starting = find(&events, "starting");
    assert_eq!(starting["version"], env!("CARGO_PKG_VERSION"));
    let settings = starting["settings"].as_str().expect("text");
    for setting in ["keepalive-s=17", "window-frames=9", "log-format=json"] {
        assert!(settings.contains(setting), "no {setting} in {settings}");
    }
    assert!(!settings.contains("ack-timeout-s"), "{settings}");
    assert!(find(&events, "schema updated")["after"].as_i64() > Some(0));
    let serving = find(&events, "serving");
    assert_eq!(serving["listen"], addr);
    let database = serving["database"].as_str().expect("text");
    assert!(database.ends_with("fieldgate.db"), "{database}");
    find(&events, "shutting down");
    find(&events, "stopped");
}

#[test]
fn a_fatal_error_is_an_event_in_a_json_log() {
    let dir = TempDir::new().expect("a directory");
    let below = dir.path().join("file/data");
    fs::write(dir.path().join("file"), "").expect("writes");
    let below = below.to_str().expect("UTF-8");
    let cases: [(&[&str], i32, &str); 4] = [
        (&["serve", "--data-dir", below], 1, "data directory"),
        (&["serve", "--window-frames", "0"], 2, "window-frames"),
        (&["serve", "--no-such-flag"], 2, "no-such-flag"),
        (
            &["device", "key", "pump", "--data-dir", below],
            1,
            "fleet key",
        ),
    ];
    for (args, code, word) in cases {
        let args = [&["--log-format=json"], args].concat();
        let ended = run(&args);
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        let events = events(&ended.stderr);
        let failed = find(&events, "fieldgate failed");
        assert_eq!(failed["exit_code"], code);
        let error = failed["error"].as_str().expect("text");
        assert!(error.contains(word), "no {word} in {error}");
    }
}

#[test]
fn a_log_level_is_a_minimum_and_rust_log_overrides_it() {
    let log_of = |level: &str, rust_log: Option<&str>| {
        let dir = TempDir::new().expect("a directory");
        let mut serve = command(&["serve", "--listen", "127.0.0.1:0", "--log-level", level]);
        serve
            .env_remove("RUST_LOG")
            .envs(rust_log.map(|levels| ("RUST_LOG", levels)));
        // Exits on its own, after the store is open.
        serve
            .arg("--data-dir")
            .arg(dir.path())
            .args(["--tls-listen", "127.0.0.1:0"]);
        let output = keep_of(serve.output().expect("runs"));
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    };
    assert!(log_of("info", None).contains("INFO"));
    let warn = log_of("warn", None);
    assert!(!warn.contains("INFO") && warn.contains("error: "), "{warn}");
    assert!(log_of("warn", Some("info")).contains("INFO"));
    assert!(!log_of("trace", Some("error")).contains("INFO"));
}

#[test]
fn logged_settings_contain_no_password() {
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().to_str().expect("UTF-8");
    let store = "postgres://ann:s3cret@127.0.0.1:1/db";
    let ended = run(&[
        "serve",
        "--data-dir",
        data_dir,
        "--store",
        store,
        "--listen",
        "127.0.0.1:0",
        "--postgres-wait-s",
        "0",
    ]);
    assert!(ended.stderr.contains("@127.0.0.1:1/db"), "{ended:?}");
    assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
}
