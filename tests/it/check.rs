//! `config check`: prints a line for each problem, writes nothing except the files that SQLite keeps, and opens no
//! port.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use crate::support::database::PgDatabase;
use crate::support::gateway::{Ended, Gateway, run};

fn check(data_dir: &Path, flags: &[&str]) -> Ended {
    let data_dir = data_dir.to_str().expect("UTF-8");
    run(&[&["config", "check", "--data-dir", data_dir], flags].concat())
}

#[track_caller]
fn assert_fit(data_dir: &Path, flags: &[&str]) {
    let ended = check(data_dir, flags);
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(!ended.stderr.contains("error: "), "{}", ended.stderr);
}

/// Asserts that the output has a line with each of the problems.
#[track_caller]
fn assert_problems(data_dir: &Path, flags: &[&str], code: i32, problems: &[&str]) {
    let ended = check(data_dir, flags);
    assert_eq!(ended.status.code(), Some(code), "{}", ended.stderr);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    let lines: Vec<&&str> = lines
        .iter()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(lines.len(), problems.len(), "{}", ended.stderr);
    for problem in problems {
        let is_there = lines.iter().any(|line| line.contains(problem));
        assert!(is_there, "no {problem:?} in {}", ended.stderr);
    }
}

/// Returns all files below a directory, except those that SQLite keeps while a database is open.
fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir)
        .expect("reads")
        .map(|entry| entry.expect("an entry").path());
    let name = |path: &Path| path.display().to_string();
    let files = entries.filter(|path| path.is_file() && !name(path).ends_with("-shm"));
    let files = files.map(|path| (name(&path), fs::read(&path).expect("reads")));
    files.filter(|(_, bytes)| !bytes.is_empty()).collect()
}

#[test]
fn a_valid_directory_passes_and_stays_unchanged() {
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().join("a/data");
    assert_fit(&data_dir, &[]);
    assert!(!dir.path().join("a").exists(), "created");
    let mut gateway = Gateway::start_in(&data_dir, &[]);
    gateway.connect("pump").0.ping();
    // It also passes while the gateway that will be replaced still has the port.
    assert_fit(&data_dir, &["--listen", &gateway.addr.to_string()]);
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let before = content(&data_dir);
    assert_fit(&data_dir, &[]);
    assert_eq!(content(&data_dir), before);
}

#[test]
fn each_problem_has_a_line() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    gateway.connect("pump").0.ping();
    gateway.terminate();
    assert!(gateway.wait().status.success());
    let key = dir.path().join("fleet.key");
    fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("chmod");
    let flags = [
        "--listen",
        "192.0.2.1:7300",
        "--allow-plaintext",
        "--tls-listen",
        "127.0.0.1:0",
    ];
    let problems = [
        "could not listen on 192.0.2.1",
        "could not find certificate",
        "mode 0644",
    ];
    assert_problems(dir.path(), &flags, 1, &problems);

    fs::remove_file(&key).expect("removes");
    assert_problems(dir.path(), &[], 1, &["could not find fleet key"]);
    let flags = [
        "--idle-timeout-s",
        "1",
        "--commit-interval-min-ms",
        "30s",
        "--spool",
    ];
    let problems = ["--spool", "idle-timeout-s", "ack-timeout-s"];
    assert_problems(dir.path(), &flags, 2, &problems);
    let file = dir.path().join("file");
    fs::write(&file, "no database").expect("writes");
    let problems = [
        "could not write the data directory",
        "is not an SQLite database",
    ];
    let store = format!("sqlite://{}", file.display());
    assert_problems(&file, &["--store", &store], 1, &problems);
}

#[test]
fn check_is_not_a_setting() {
    let dir = TempDir::new().expect("a directory");
    let config = dir.path().join("fieldgate.toml");
    fs::write(&config, "check = true\n").expect("writes");
    let config = config.to_str().expect("UTF-8");
    let refused = run(&["serve", "--config", config]);
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_database_is_checked_and_stays_unchanged() {
    let database = PgDatabase::create();
    let dir = TempDir::new().expect("a directory");
    let url = database.url();
    for spool in [&[][..], &["--spool"]] {
        assert_fit(dir.path(), &[&["--store", &url], spool].concat());
    }
    let mut session = crate::support::database::Session::open(&url);
    assert_eq!(
        session.count("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"),
        0
    );
    session.execute("CREATE TABLE devices (id int)");
    assert_problems(dir.path(), &["--store", &url], 1, &["of another program"]);
    let nowhere = "postgres://127.0.0.1:1/none";
    assert_problems(
        dir.path(),
        &["--store", nowhere],
        1,
        &["could not reach Postgres"],
    );
    assert_eq!(fs::read_dir(dir.path()).expect("reads").count(), 0);
}
