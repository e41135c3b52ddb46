//! Starts that must fail: each prints one or two clear lines, and returns the exit code for the cause.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::malformed::assert_serves;
use crate::support::gateway::{Gateway, meddle, run};
use crate::support::logs::by_default;

/// Asserts that `serve` on `data_dir` with `flags` exits with `code` and prints an error that contains all `words`.
pub fn assert_refused(data_dir: &Path, flags: &[&str], code: i32, words: &[&str]) {
    let data_dir = data_dir.to_str().expect("UTF-8");
    let mut args = vec!["serve", "--data-dir", data_dir];
    if !flags.contains(&"--listen") {
        args.extend(["--listen", "127.0.0.1:0"]);
    }
    args.extend(flags);
    let ended = run(&args);
    assert_eq!(ended.status.code(), Some(code), "{}", ended.stderr);
    let said = by_default(&ended.stderr);
    assert!((1..=2).contains(&said.lines().count()), "{said}");
    assert!(said.starts_with("error: "), "{said}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "no {word:?} in {}",
            ended.stderr
        );
    }
}

fn directory() -> TempDir {
    TempDir::new().expect("a directory")
}

/// Creates a data directory with a finished gateway run.
fn used_directory() -> TempDir {
    let dir = directory();
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    // A gateway that serves has also installed its signal handlers.
    gateway.connect("first").0.ping();
    gateway.terminate();
    let ended = gateway.wait();
    assert!(ended.status.success(), "{ended:?}");
    dir
}

#[test]
fn a_data_directory_that_cannot_be_written_is_refused() {
    let dir = directory();
    let file = dir.path().join("file");
    fs::write(&file, "").expect("writes");
    let below = file.join("data");
    let path = below.to_str().expect("UTF-8");
    assert_refused(
        &below,
        &[],
        1,
        &["could not write the data directory", path],
    );
}

#[test]
fn a_port_in_use_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = taken.local_addr().expect("an address").to_string();
    let dir = directory();
    let words = ["could not listen on", addr.as_str(), "--listen"];
    assert_refused(dir.path(), &["--listen", &addr], 1, &words);
}

#[test]
fn a_database_of_a_newer_version_is_refused_and_left_alone() {
    let dir = used_directory();
    let path = dir.path().join("fieldgate.db");
    meddle(
        &path,
        "INSERT INTO _sqlx_migrations \
         (version, description, installed_on, success, checksum, execution_time) \
         VALUES (9999, 'of the future', '2030-01-01', 1, x'00', 1)",
    );
    let before = fs::read(&path).expect("reads");
    assert_refused(dir.path(), &[], 1, &["newer Fieldgate", "9999"]);
    assert!(fs::read(&path).expect("reads") == before, "changed");
}

/// Creates an SQLite file of another program.
fn foreign_database(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("fieldgate.db");
    meddle(
        &path,
        "CREATE TABLE customers (name TEXT); INSERT INTO customers VALUES ('x')",
    );
    path
}

#[test]
fn a_database_of_another_program_is_rejected() {
    let dir = directory();
    let path = foreign_database(&dir);
    assert_refused(dir.path(), &[], 1, &["is the database of another program"]);
    fs::write(&path, "no database at all, just a file that is in the way").expect("writes");
    assert_refused(dir.path(), &[], 1, &["is not an SQLite database"]);
}

#[test]
fn a_database_of_another_program_stays_unchanged() {
    let dir = directory();
    let path = foreign_database(&dir);
    let before = fs::read(&path).expect("reads");
    assert_refused(dir.path(), &[], 1, &["is the database of another program"]);
    // Its journal mode stays unchanged as well.
    assert!(fs::read(&path).expect("reads") == before, "changed");
}

#[test]
fn a_second_gateway_on_the_same_directory_is_refused() {
    let gateway = Gateway::start(&[]);
    let words = ["in use by another gateway", "--data-dir"];
    assert_refused(gateway.data_dir(), &[], 1, &words);
    // The first one is unaffected.
    let (mut link, _) = gateway.connect("pump");
    link.ping();
}

#[test]
fn c03_a_key_that_others_can_read_is_refused() {
    let dir = used_directory();
    let key = dir.path().join("fleet.key");
    let mode = fs::metadata(&key).expect("a key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for mode in [0o644, 0o640, 0o604, 0o602, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).expect("chmod");
        assert_refused(dir.path(), &[], 1, &["chmod 600", "fleet.key"]);
    }
}

#[test]
fn an_invalid_key_is_rejected_and_not_shown() {
    let dir = used_directory();
    let key = dir.path().join("fleet.key");
    for text in ["", "00ff", &"zq".repeat(32), &"ab".repeat(33)] {
        fs::write(&key, text).expect("writes");
        assert_refused(dir.path(), &[], 1, &["hexadecimal digits"]);
        let kept = fs::read_to_string(&key).expect("reads");
        assert_eq!(kept, text);
    }
}

#[test]
fn an_unknown_setting_in_the_file_is_refused() {
    let dir = directory();
    let file = dir.path().join("fieldgate.toml");
    let path = file.to_str().expect("UTF-8");
    for (text, word) in [
        ("window-frame = 3\n", "window-frame"),
        ("[serve]\nlisten = 1\n", "serve"),
        ("window-frames = \n", "fieldgate.toml"),
        ("window-frames = \"many\"\n", "window-frames"),
        ("window-frames = 0\n", "window-frames"),
    ] {
        fs::write(&file, text).expect("writes");
        assert_refused(&dir.path().join("data"), &["--config", path], 2, &[word]);
    }
    assert!(
        !dir.path().join("data").exists(),
        "created although nothing was started"
    );
}

#[test]
fn c06_plain_tcp_beyond_loopback_needs_a_flag() {
    let dir = directory();
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7300"] {
        let flags = ["--listen", listen];
        assert_refused(
            dir.path(),
            &flags,
            2,
            &["--allow-plaintext", "without encryption"],
        );
    }
    assert!(!dir.path().join("fleet.key").exists());
    let gateway = Gateway::start_in(dir.path(), &["--listen", "0.0.0.0:0", "--allow-plaintext"]);
    assert!(gateway.addr.ip().is_unspecified());
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let dir = directory();
    let flags = ["--idle-timeout-s", "40", "--keepalive-s", "40"];
    assert_refused(dir.path(), &flags, 2, &["idle-timeout-s", "keepalive-s"]);
    let store = ["--store", "mysql://localhost/x"];
    assert_refused(dir.path(), &store, 2, &["sqlite://PATH", "postgres://"]);
}

/// SIGHUP means "reload" to many programs, and ends those that do not handle it.
#[test]
fn a_hangup_ends_nothing() {
    let mut gateway = Gateway::start(&[]);
    gateway.signal("HUP");
    gateway.wait_for_line("settings reloaded");
    assert_serves(&gateway, "good");
}
