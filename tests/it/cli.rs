//! The command line, as its users see it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use fieldgate::internals::{Batch, Store};

use crate::support::fleet::simulator;
use crate::support::site::{DATABASE, Gateway, Said, Site, readings};

#[test]
fn commands_without_a_database_say_what_to_do() {
    let site = Site::new();
    for args in [
        &["status"][..],
        &["status", "--data-dir", "mistyped"],
        &["query", "SELECT 1"],
        &["device", "list"],
        &["device", "show", "x"],
        &["quarantine", "list"],
    ] {
        site.run(args)
            .refused(1, &["/fieldgate.db", "fieldgate serve", "--data-dir"]);
    }
    // Read-only commands create nothing.
    assert_eq!(fs::read_dir(site.dir.path()).unwrap().count(), 0);
}

#[test]
fn migrate_creates_a_database_once() {
    let site = Site::new();
    let said = site.run(&["migrate"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("fieldgate.db: created"), "{said:?}");
    let said = site.run(&["migrate"]);
    assert!(said.out.contains("up to date"), "{said:?}");
    assert!(site.run(&["device", "list"]).out.contains("no devices yet"));
    let empty = site.query("SELECT name, enabled FROM devices", "table");
    assert!(
        empty.contains("name") && empty.contains("(0 rows)"),
        "{empty}"
    );
    assert_eq!(
        site.query("SELECT name, enabled FROM devices", "csv"),
        "name,enabled\n"
    );
    assert_eq!(site.query("SELECT name FROM devices", "json"), "[]\n");
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused() {
    let (site, store) = Site::with_readings().await;
    store.close().await.unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(site.path(DATABASE));
    let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations(version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', TRUE, x'00', 0)",
    )
    .execute(&mut connection)
    .await
    .unwrap();
    drop(connection);
    for args in [&["migrate"][..], &["status"], &["query", "SELECT 1"]] {
        site.run(args).refused(1, &["fieldgate.db", "newer"]);
    }
}

#[test]
fn a_flag_wins_over_the_environment_which_wins_over_the_file() {
    let site = Site::new();
    site.write(
        "f.toml",
        "data-dir = \"from-file\"\nlisten = \"0.0.0.0:1\"\n",
    );
    let store_of = |args: &[&str], environment: &[(&str, &str)]| {
        let said = site.run_with(args, environment);
        said.refused(1, &["no database at "]);
        let path = said.err.split("no database at ").nth(1).unwrap().to_owned();
        path.split("; start").next().unwrap().to_owned()
    };
    let environment = [("FIELDGATE_DATA_DIR", "from-env")];
    assert_eq!(store_of(&["status"], &[]), "./fieldgate-data/fieldgate.db");
    let file = ["status", "--config", "f.toml"];
    assert_eq!(store_of(&file, &[]), "from-file/fieldgate.db");
    let named = [("FIELDGATE_CONFIG", "f.toml")];
    assert_eq!(store_of(&["status"], &named), "from-file/fieldgate.db");
    assert_eq!(store_of(&file, &environment), "from-env/fieldgate.db");
    for flag in [
        &["--config", "f.toml", "--data-dir=flag", "status"][..],
        &["--config", "f.toml", "status", "--data-dir", "flag"],
    ] {
        assert_eq!(store_of(flag, &environment), "flag/fieldgate.db");
    }
    let store = [("FIELDGATE_STORE", "sqlite://other.db")];
    assert_eq!(store_of(&file, &store), "other.db");
    // Compose files and unit files leave a setting out with an empty variable.
    let empty = [("FIELDGATE_STORE", ""), ("FIELDGATE_DATA_DIR", "")];
    assert_eq!(store_of(&file, &empty), "from-file/fieldgate.db");
    // Values in the file apply to `serve`, and are rejected like those of a flag.
    let refused = site.run(&["--config", "f.toml", "serve"]);
    refused.refused(2, &["0.0.0.0:1", "--allow-plaintext"]);
    let refused = site.run_with(&["serve"], &[("FIELDGATE_LISTEN", "0.0.0.0:2")]);
    refused.refused(2, &["0.0.0.0:2", "--allow-plaintext"]);
    assert!(!site.path("from-file").exists());
}

#[test]
fn a_wrong_settings_file_is_reported_in_one_line() {
    let site = Site::new();
    let cases: [(&str, &[&str]); 15] = [
        ("lisen = \"a\"", &["\"lisen\"", "did you mean \"listen\"?"]),
        ("[listen]", &["listen = {…}", "a quoted string"]),
        ("listen = [\"a\"]", &["listen = […]", "a quoted string"]),
        ("listen = \"there\"", &["listen = \"there\""]),
        (
            "config = \"f.toml\"",
            &["\"config\"", "on the command line"],
        ),
        (
            "connections_max = 5",
            &["did you mean \"connections-max\"?"],
        ),
        ("connections-max = \"5\"", &["\"5\"", "a whole number"]),
        ("connections-max = -5", &["connections-max = -5"]),
        ("frame-bytes-max = 70000", &["70000", "from 4096 to 16384"]),
        ("allow-plaintext = 1", &["true or false"]),
        (
            "format = \"csv\"",
            &["\"format\"", "use --format on the command line"],
        ),
        ("all = true", &["\"all\"", "use --all on the command line"]),
        ("queue-bytes-max = \"a lot\"", &["a lot", "64MiB"]),
        ("keepalive-s = \"1500ms\"", &["1500ms", "whole seconds"]),
        ("a = 1\nb =", &["line 2"]),
    ];
    for (text, words) in cases {
        site.write("f.toml", text);
        // The file is rejected even if the subcommand has no such flag.
        let said = site.run(&["--config", "f.toml", "status"]);
        said.refused(2, words);
        said.refused(2, &["settings file f.toml"]);
    }
    site.run(&["--config", "none.toml", "status"])
        .refused(2, &["could not read settings file none.toml"]);
    for keepalive in ["500", "\"500s\"", "\"8min 20s\""] {
        site.write("f.toml", &format!("keepalive-s = {keepalive}"));
        site.run(&["--config", "f.toml", "serve"])
            .refused(2, &["idle-timeout-s (120)", "keepalive-s (500)"]);
    }
}

#[test]
fn wrong_usage_prints_at_most_two_lines() {
    let site = Site::new();
    for (args, word) in [
        (&["serve", "--listne", "1"][..], "--listen"),
        (&["serve", "--listen", "somewhere"], "somewhere"),
        (&["query"], "<SQL>"),
        (&["stats"], "status"),
        (
            &["query", "SELECT 1", "--format", "xml"],
            "table, csv, json",
        ),
        (&["status", "--store", "mysql://host/db"], "sqlite://PATH"),
    ] {
        let said = site.run(args);
        assert_eq!((said.code, &*said.out), (2, ""), "{said:?}");
        assert!(said.err.starts_with("error: ") && said.err.lines().count() <= 2);
        assert!(said.err.contains(word), "{said:?}");
    }
    let said = site.run_with(&["serve"], &[("FIELDGATE_LISTEN", "nowhere")]);
    assert!(said.err.contains("(from FIELDGATE_LISTEN)"), "{said:?}");
    let said = site.run_with(&["status"], &[("RUST_LOG", "a=b=c")]);
    said.refused(2, &["RUST_LOG"]);
    let help = site.run(&["serve", "--help"]);
    assert_eq!((help.code, &*help.err), (0, ""));
    assert!(
        help.out.contains("[env: FIELDGATE_WAL_BYTES_MAX]"),
        "{}",
        help.out
    );
    assert!(help.out.contains("[default: 16384]"));
}

/// Wherever a wrong URL comes from, its password is not printed, but the problem is.
#[test]
fn the_password_of_a_store_is_not_printed() {
    let site = Site::new();
    for (address, word) in [
        ("postgres://ann:s3cret@host/db?sslmod=require", "`sslmod`"),
        ("postgres://ann:s3cret@host:x/db", "port"),
        (
            "postgres://host/db?password=s3cret&sslmode=require",
            "`password`",
        ),
        ("postgres://host/db?pass%77ord=s3cret", "`pass%77ord`"),
        ("postgres://host/db?sslpassword=s3cret", "`sslpassword`"),
        ("postgres://ann:5/s3cret@host/db", "after the host"),
        ("ann:s3cret@host/db", "not a store URL"),
        ("host=db user=ann password=s3cret", "not a store URL"),
    ] {
        site.write("f.toml", &format!("store = {address:?}"));
        let mut simulator = simulator("verify");
        simulator.args(["--journal", "j", "--store", address]);
        for said in [
            site.run(&["--config", "f.toml", "status"]),
            site.run(&["status", "--store", address]),
            site.run_with(&["status"], &[("FIELDGATE_STORE", address)]),
            Said::of(simulator),
        ] {
            assert_eq!((said.code, &*said.out), (2, ""), "{said:?}");
            assert!(!said.err.contains("s3cret"), "{said:?}");
            assert!(said.err.contains(word), "{said:?}");
        }
    }
    let address = "postgres://ann:s3cret@host/db";
    for text in [
        &format!("store = [{address:?}]"),
        "[store]\npassword = \"s3cret\"",
        &format!("listen = {address:?}"),
        &format!("store = {address}"),
    ] {
        site.write("f.toml", text);
        let said = site.run(&["--config", "f.toml", "status"]);
        said.refused(2, &["settings file f.toml"]);
        assert!(!said.err.contains("s3cret"), "{said:?}");
    }
    let mut simulator = simulator("verify");
    simulator.args(["--journal", "j", address]);
    for said in [
        site.run(&["status", address]),
        site.run(&[address]),
        Said::of(simulator),
    ] {
        assert_eq!(said.code, 2, "{said:?}");
        assert!(!said.err.contains("s3cret"), "{said:?}");
    }
}

#[test]
fn a_switch_in_the_environment_may_be_a_number() {
    let site = Site::new();
    for (value, word) in [
        ("1", "--spool requires"),
        ("yes", "--spool requires"),
        ("0", "--allow-plaintext"),
        ("perhaps", "perhaps"),
    ] {
        let environment = [
            ("FIELDGATE_LISTEN", ":0"),
            ("FIELDGATE_ALLOW_PLAINTEXT", value),
            ("FIELDGATE_SPOOL", "1"),
        ];
        let said = site.run_with(&["serve"], &environment);
        assert_eq!(said.code, 2, "{said:?}");
        assert!(said.err.contains(word), "{said:?}");
    }
}

/// A variable or a file that was written for something else must not select what is deleted.
#[tokio::test]
async fn the_target_of_a_command_comes_from_the_command_line_only() {
    let (site, _store) = Site::with_readings().await;
    for variable in ["ALL", "DEVICE", "BEFORE"] {
        let value = match variable {
            "ALL" => "true",
            "DEVICE" => "pump-1",
            _ => "2100-01-01T00:00:00Z",
        };
        let name = format!("FIELDGATE_{variable}");
        let said = site.run_with(&["quarantine", "purge"], &[(&name, value)]);
        assert_eq!(said.code, 2, "{said:?}");
        let listed = site.run_with(&["quarantine", "list"], &[(&name, value)]);
        assert!(
            listed.err.contains("unknown environment variable") && listed.err.contains(&name),
            "{listed:?}"
        );
    }
    assert_eq!(
        site.query("SELECT count(*) AS n FROM quarantine", "csv"),
        "n\n1\n"
    );
}

/// Without `USER` the account's name comes from the system, as in every Postgres client.
#[test]
fn the_user_of_a_store_is_the_account() {
    let site = Site::new();
    let id = std::process::Command::new("id")
        .arg("-un")
        .output()
        .unwrap();
    let account = String::from_utf8(id.stdout).unwrap();
    let mut command = site.command(&["status", "--store", "postgres://127.0.0.1:1/db"]);
    for variable in ["USER", "LOGNAME", "USERNAME", "PGUSER"] {
        command.env_remove(variable);
    }
    let url = format!("postgres://{}@127.0.0.1:1/db", account.trim());
    let said = Said::of(command);
    assert!(said.err.contains(&url), "{said:?}");
}

/// A line lacks fields: any of them may be the password.
#[test]
fn a_damaged_password_file_is_not_logged() {
    let site = Site::new();
    site.write("pgpass", "127.0.0.1:1:s3cret\n");
    fs::set_permissions(site.path("pgpass"), fs::Permissions::from_mode(0o600)).unwrap();
    let file = site.path("pgpass");
    let args = ["status", "--store", "postgres://ann@127.0.0.1:1/db"];
    for format in ["text", "json"] {
        let environment = [
            ("PGPASSFILE", file.to_str().unwrap()),
            ("RUST_LOG", "trace"),
            ("FIELDGATE_LOG_FORMAT", format),
        ];
        let said = site.run_with(&args, &environment);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.err.contains("could not reach Postgres"), "{said:?}");
        assert!(!said.err.contains("s3cret"), "{said:?}");
    }
}

#[tokio::test]
async fn devices_are_listed_and_shown() {
    let (site, _store) = Site::with_readings().await;
    let said = site.run(&["device", "list"]);
    let lines: Vec<&str> = said.out.lines().map(str::trim).collect();
    let fields: Vec<&str> = lines[2].split_whitespace().collect();
    assert_eq!(
        fields,
        [
            "pump-1",
            "yes",
            "disconnected",
            "2026-02-25T06:13:20Z",
            "derived",
            "1.2.0",
            "1",
            "3",
            "2",
            "silent",
            "40"
        ]
    );
    assert!(
        lines[3].starts_with("pump-2") && lines[4] == "(2 devices)",
        "{said:?}"
    );

    let said = site.run(&["device", "list", "--state", "never"]);
    assert!(
        said.out.contains("pump-2") && !said.out.contains("pump-1"),
        "{said:?}"
    );
    let said = site.run(&["device", "list", "--state", "late", "--silent", "1h"]);
    assert!(!said.out.contains("pump"), "{said:?}");
    let said = site.run(&["device", "set", "pump-1", "pmup-2", "--interval", "1h"]);
    said.refused(1, &["\"pmup-2\"", "did you mean pump-2"]);
    let said = site.run(&["device", "set", "pump-1", "--interval", "0"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(
        said.err.contains("from 1 s to 366 days, or `learned`"),
        "{said:?}"
    );

    let said = site.run(&["device", "show", "pump-1"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("40 s, learned"), "{}", said.out);
    for word in [
        "temperature",
        "Cel",
        "integer",
        "77",
        "overwritten",
        "disconnected",
        "42 idle",
        "0101010101010101",
    ] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    // Text from a device does not control the terminal.
    assert!(said.out.contains("silent\\u{1b}[2J") && !said.out.contains('\u{1b}'));

    let said = site.run(&["device", "show", "pmup-1"]);
    said.refused(1, &["\"pmup-1\"", "did you mean pump-1"]);
    let said = site.run(&["device", "show", "turbine"]);
    said.refused(1, &["\"turbine\"", "device list"]);
}

#[tokio::test]
async fn a_device_is_shown_with_its_newest_plausible_reading() {
    let (site, mut store) = Site::with_readings().await;
    let year_9999_us = 253_400_000_000_000_000;
    for (seq, rows) in [
        (5, vec![(year_9999_us, 7.0), (year_9999_us + 1, 8.0)]),
        // Compacted immediately, while the others are still level 0.
        (6, (2..200).map(|n| (year_9999_us + n, 9.0)).collect()),
    ] {
        let batch = Batch {
            entries: vec![readings(seq, &rows)],
            ..Batch::default()
        };
        store.commit(&batch).await.unwrap();
    }
    let shown = |said: &Said| {
        let line = said.out.lines().find(|line| line.contains("temperature"));
        line.unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let said = site.run(&["device", "show", "pump-1"]);
    let newest = [
        "temperature",
        "Cel",
        "integer",
        "2026-02-25T06:13:20Z",
        "NULL",
    ];
    assert_eq!(shown(&said)[..5], newest, "{}", said.out);
    assert_eq!(shown(&said)[5..], ["200"], "{}", said.out);
    // Readings in the future are counted up to a limit.
    let rows: Vec<_> = (200..1500).map(|n| (year_9999_us + n, 9.0)).collect();
    let batch = Batch {
        entries: vec![readings(7, &rows)],
        ..Batch::default()
    };
    store.commit(&batch).await.unwrap();
    let said = site.run(&["device", "show", "pump-1"]);
    assert_eq!(shown(&said)[5..], ["1000", "or", "more"], "{}", said.out);
}

#[tokio::test]
async fn quarantine_shows_the_fault() {
    let (site, _store) = Site::with_readings().await;
    let said = site.run(&["quarantine", "list"]);
    for word in [
        "pump-1",
        "30 malformed",
        "R21",
        "2026-02-25T06:13:20Z",
        " 32 ",
        "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf",
        "(1 of 1, newest first; 32 B in total)",
    ] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    assert!(!said.out.contains("afb0"), "{}", said.out);
    let said = site.run(&["quarantine", "list", "--limit", "0"]);
    assert!(
        said.out.contains("(0 of 1, newest first; 32 B in total)"),
        "{said:?}"
    );
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_first_serve_creates_all_files_and_prints_their_paths() {
    let site = Site::new();
    let gateway = Gateway::start(&site);
    let said = gateway.announced.join("\n");
    for word in [
        "./fieldgate-data",
        "./fieldgate-data/fieldgate.db",
        "./fieldgate-data/fleet.key (newly created",
        "127.0.0.1:",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(mode(&site.path("fieldgate-data")), 0o700);
    assert_eq!(mode(&site.path("fieldgate-data/fleet.key")), 0o600);
    let key = fs::read_to_string(site.path("fieldgate-data/fleet.key")).unwrap();
    // A second gateway is rejected; read-only commands are not.
    site.run(&["serve", "--listen", "127.0.0.1:0"])
        .refused(1, &["in use by another"]);
    assert!(site.run(&["status"]).out.contains("none yet"));
    let (code, log) = gateway.terminate();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains(key.trim()) && !said.contains(key.trim()));

    let again = Gateway::start(&site);
    assert!(!again.announced.join("\n").contains("newly created"));
    assert_eq!(again.terminate().0, Some(0));
    let kept = fs::read_to_string(site.path("fieldgate-data/fleet.key")).unwrap();
    assert_eq!(kept, key);
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let site = Site::new();
    Gateway::start(&site).terminate();
    let path = site.path("fieldgate-data/fleet.key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    site.run(&["serve"])
        .refused(1, &["mode 0644", "others can read it", "chmod 600"]);
}

#[test]
fn a_port_in_use_is_reported_in_one_line() {
    let site = Site::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    site.run(&["serve", "--listen", &listen])
        .refused(1, &["could not listen on", &listen, "another --listen"]);
}
