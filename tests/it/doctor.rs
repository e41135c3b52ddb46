//! `fieldgate doctor`: shows each check with its result and what to do, also while a gateway runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use crate::support::gateway::{Gateway, command};
use crate::support::site::Said;

fn doctor(data_dir: &Path, flags: &[&str]) -> Said {
    let mut doctor = command(&["doctor"]);
    doctor.arg("--data-dir").arg(data_dir).args(flags);
    Said::of(doctor)
}

/// Asserts that the check has this result, with `text`.
#[track_caller]
fn assert_line(said: &Said, level: &str, name: &str, text: &str) {
    let start = format!("{level:<5} {name} ");
    let mut lines = said.out.lines();
    let is_there = lines.any(|line| line.starts_with(&start) && line.contains(text));
    assert!(is_there, "no {start:?} with {text:?}: {said:?}");
}

#[test]
fn a_running_gateway_and_an_empty_directory_are_fit() {
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().join("data");
    let said = doctor(&data_dir, &["--connections-max", "100"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_line(&said, "warn", "store", "serve creates it");
    assert!(!data_dir.exists(), "created");

    let mut gateway = Gateway::start_in(&data_dir, &[]);
    gateway.connect("pump").0.ping();
    let listen = gateway.addr.to_string();
    let said = doctor(
        &data_dir,
        &["--listen", &listen, "--connections-max", "100"],
    );
    assert_eq!(said.code, 0, "{said:?}");
    assert_line(&said, "ok", "listener", "a gateway is running");
    for name in [
        "settings",
        "fleet key",
        "store",
        "clock",
        "certificate",
        "open files",
    ] {
        assert_line(&said, "ok", name, "");
    }
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let said = doctor(&data_dir, &["--listen", &listen]);
    assert_line(&said, "ok", "listener", "is free");
}

#[test]
fn problems_are_named_with_what_to_do() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    gateway.connect("pump").0.ping();
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let chmod = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode));
    chmod(dir.path(), 0o777).expect("chmod");
    chmod(&dir.path().join("fleet.key"), 0o644).expect("chmod");
    let other = Gateway::start(&[]);
    let listen = other.addr.to_string();
    let many = [
        "--connections-max",
        "1000000",
        "--tls-listen",
        "127.0.0.1:0",
    ];
    let said = doctor(dir.path(), &[&["--listen", &listen][..], &many].concat());
    assert_eq!(said.code, 1, "{said:?}");
    assert_line(&said, "warn", "data directory", "chmod 700");
    assert_line(&said, "warn", "listener", "stop what uses that port");
    assert_line(&said, "fail", "certificate", "fieldgate tls init");
    assert_line(&said, "fail", "fleet key", "chmod 600");

    let database = dir.path().join("fieldgate.db");
    fs::write(&database, "no database").expect("writes");
    let said = doctor(dir.path(), &[]);
    assert_line(&said, "fail", "store", "is not an SQLite database");
    let said = doctor(dir.path(), &["--idle-timeout-s", "1"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert_line(&said, "fail", "settings", "idle-timeout-s");
}

#[test]
fn it_reads_the_settings_of_the_gateway() {
    let dir = TempDir::new().expect("a directory");
    let config = dir.path().join("fieldgate.toml");
    fs::write(
        &config,
        "listen = \"192.0.2.1:7300\"\nallow-plaintext = true\n",
    )
    .expect("writes");
    let config = config.to_str().expect("UTF-8");
    let said = doctor(&dir.path().join("data"), &["--config", config]);
    assert_eq!(said.code, 1, "{said:?}");
    assert_line(&said, "fail", "listener", "192.0.2.1:7300");
    let mut from_environment = command(&["doctor"]);
    from_environment.env("FIELDGATE_LISTEN", "192.0.2.1:7300");
    let said = Said::of(from_environment);
    assert_line(&said, "fail", "settings", "--allow-plaintext");
}
