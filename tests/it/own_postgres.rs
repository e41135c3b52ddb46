//! Starts on an unsuitable Postgres: each prints one clear line without a password, returns the exit code for the
//! cause, and leaves the database unchanged.

use std::net::TcpListener;

use tempfile::TempDir;

use crate::support::cluster::Cluster;
use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::{Gateway, run};
use crate::support::logs::by_default;

/// Counts the tables that a store would have created.
const TABLES: &str = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";

/// Asserts that `serve` into `store` exits with `code` and prints one line that contains all `words`.
fn assert_refused(store: &str, code: i32, words: &[&str]) {
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().to_str().expect("UTF-8");
    let (listen, store_flag) = (["--listen", "127.0.0.1:0"], ["--store", store]);
    let at_once = ["--postgres-wait-s", "0"];
    let serve = ["serve", "--data-dir", data_dir];
    let args = [&serve[..], &listen, &store_flag, &at_once].concat();
    let ended = run(&args);
    let said = by_default(&ended.stderr);
    assert_eq!(ended.status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("error: "), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    assert!(!said.contains("s3cret"), "{said}");
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_rejected_login_prints_the_reason() {
    let cluster = Cluster::start(&[]);
    cluster.ask_for_password("guarded");
    Session::open(&cluster.url())
        .execute("CREATE ROLE guarded LOGIN PASSWORD 'right'; CREATE ROLE limited LOGIN");
    let mut database = cluster.database();
    let words = ["denied access", "guarded@", "password"];
    assert_refused(&database.url_as("guarded:s3cret"), 1, &words);
    assert_refused(&database.url_as("no_such_user"), 1, &["denied access"]);
    // Before Postgres 15, every user could create tables.
    let session = database.session();
    session.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    let words = ["limited@", "lacks privileges", "owner"];
    assert_refused(&database.url_as("limited"), 1, &words);
    assert_eq!(database.session().count(TABLES), 0);
    // With the right password and rights it succeeds.
    let session = database.session();
    session.execute("GRANT CREATE ON SCHEMA public TO guarded");
    Gateway::start(&["--store", &database.url_as("guarded:right")]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_server_that_may_lose_data_is_accepted_only_on_demand() {
    for setting in ["fsync", "full_page_writes"] {
        let cluster = Cluster::start(&[&format!("{setting}=off")]);
        let mut database = cluster.database();
        let words = [setting, "--allow-postgres-data-loss"];
        assert_refused(&database.url(), 1, &words);
        assert_eq!(database.session().count(TABLES), 0, "{setting}");
        let flags = ["--store", &database.url(), "--allow-postgres-data-loss"];
        Gateway::start(&flags).connect("pump").0.ping();
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn an_unavailable_server_is_reported() {
    let free = TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = free.local_addr().expect("an address").to_string();
    drop(free);
    let url = format!("postgres://ann:s3cret@{addr}/site");
    assert_refused(&url, 1, &["could not reach Postgres", &addr]);
    let words = ["could not reach Postgres", "db.invalid"];
    assert_refused("postgres://ann:s3cret@db.invalid/site", 1, &words);
    // A listener that never sends anything.
    let silent = TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = silent.local_addr().expect("an address").to_string();
    let url = format!("postgres://ann:s3cret@{addr}/site");
    assert_refused(&url, 1, &["no answer within 5 s", &addr]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_missing_database_is_reported() {
    let database = PgDatabase::create();
    let url = database.url().replace(database.name(), "no_such_one");
    assert_refused(&url, 1, &["does not exist", "no_such_one", "createdb"]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn tables_of_another_program_are_left_alone() {
    let mut database = PgDatabase::create();
    let session = database.session();
    session.execute("CREATE TABLE devices (serial text); INSERT INTO devices VALUES ('x')");
    let words = ["table devices of another program"];
    assert_refused(&database.url(), 1, &words);
    assert_eq!(database.session().count(TABLES), 1);
    let kept: Vec<(String,)> = database.session().rows("SELECT serial FROM devices");
    assert_eq!(kept, [("x".to_owned(),)]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_database_of_a_newer_version_is_refused() {
    let mut database = PgDatabase::create();
    Gateway::start(&["--store", &database.url()]);
    database.session().execute(
        "INSERT INTO fieldgate_migrations
         (version, description, installed_on, success, checksum, execution_time)
         VALUES (9999, 'of the future', now(), true, '', 1)",
    );
    assert_refused(&database.url(), 1, &["newer Fieldgate", "9999"]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_database_without_unicode_is_refused() {
    let cluster = Cluster::start(&[]);
    let kind = "TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'";
    let mut database = PgDatabase::create_as(&cluster.url(), kind);
    assert_refused(&database.url(), 1, &["SQL_ASCII", "UTF8"]);
    assert_eq!(database.session().count(TABLES), 0);
}

#[test]
fn an_address_with_an_unknown_parameter_is_refused() {
    let words = ["unknown parameter `sslmod`", "sslmode"];
    let dir = TempDir::new().expect("a directory");
    let data_dir = dir.path().to_str().expect("UTF-8");
    let url = "postgres://ann:s3cret@localhost/site?sslmod=disable";
    let ended = run(&["serve", "--data-dir", data_dir, "--store", url]);
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    assert!(!ended.stderr.contains("s3cret"), "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "{}", ended.stderr);
    }
    assert!(!ended.stderr.contains("s3cret"), "{}", ended.stderr);
}
