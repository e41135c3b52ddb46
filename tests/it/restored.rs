//! The store changes under a running gateway: it is restored to an earlier state, deleted, replaced, moved, or
//! used by a second gateway. Nothing is stored under another device's name, and nothing is acknowledged into
//! a file that is out of reach.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fieldgate_protocol::error::Code;
use sqlx::ConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use tempfile::TempDir;

use crate::support::client::{Heard, Link};
use crate::support::database::{PgDatabase, Session};
use crate::support::fleet::spool_status;
use crate::support::gateway::{Ended, Gateway, clean, command, run};
use crate::support::messages::{SCHEMA, declare, event, readings};
use crate::support::{PATIENCE, eventually};

/// Maximum time in which a gateway exits when its files are gone, on a busy machine.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Expects BYE 40, and before it no ACK beyond `acked`.
fn expect_replaced(link: &mut Link, acked: u64) {
    loop {
        match link.hear() {
            Heard::Nack { code, .. } if code == Code::StoreDown as u8 => {}
            Heard::Ack { seq, .. } if seq <= acked => {}
            Heard::Bye { code, .. } if code == Code::Shutdown as u8 => return,
            other => panic!("{other:?} instead of BYE 40"),
        }
    }
}

/// Connects as a device that has deleted the acknowledged frames before `oldest_seq`.
fn connect_from(gateway: &Gateway, name: &str, oldest_seq: u64) -> (Link, u64) {
    let mut login = gateway.device(name);
    login.oldest_seq = oldest_seq;
    let (mut link, welcomed) = Link::login(gateway.addr, &login);
    link.send(&declare(SCHEMA));
    (link, welcomed.durable_seq)
}

fn gaps(database: &mut PgDatabase) -> Vec<(String, i64, i64, i16)> {
    let sql = "SELECT d.name, g.from_seq, g.to_seq, g.reason FROM gaps g
        JOIN streams s ON s.id = g.stream_id JOIN devices d ON d.id = s.device_id ORDER BY 1, 2";
    database.session().rows(sql)
}

fn series_of_other_devices(database: &mut PgDatabase) -> i64 {
    database.session().count(
        "SELECT count(*) FROM readings r JOIN frames f ON f.id = r.frame_id
         JOIN streams st ON st.id = f.stream_id JOIN series se ON se.id = r.series_id
         WHERE st.device_id <> se.device_id",
    )
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_live_session_stores_nothing_under_another_device() {
    let mut database = PgDatabase::create();
    let url = database.url();
    // One writer, so that all devices share its caches.
    let mut gateway = Gateway::start(&["--store", &url, "--postgres-writers", "1"]);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    let backup = database.back_up();
    // Until the gateway has connected again.
    pump.send(&readings(2));
    let mut acked = 0;
    while acked < 2 {
        match pump.hear() {
            Heard::Ack { seq, .. } => acked = seq,
            Heard::Nack { .. } => pump.send(&readings(2)),
            other => panic!("{other:?}"),
        }
    }
    let (mut valve, _) = gateway.connect("valve");
    (1..=3).for_each(|seq| valve.send(&readings(seq)));
    valve.expect_ack(3);
    database.restore(&backup);
    // Another gateway gives valve's ids to another device.
    let key = gateway.data_dir().join("fleet.key");
    let dir = TempDir::new().expect("a directory");
    fs::copy(key, dir.path().join("fleet.key")).expect("copies");
    let other = Gateway::start_in(dir.path(), &["--store", &url]);
    let (mut fan, _) = other.connect("fan");
    fan.send(&readings(1));
    fan.expect_ack(1);
    // 4 was never acknowledged; an open session resends nothing that was.
    valve.send(&readings(4));
    expect_replaced(&mut valve, 3);
    pump.send(&readings(3));
    expect_replaced(&mut pump, 2);
    gateway.wait_for_line("restored to an earlier state");
    let (mut valve, durable_seq) = connect_from(&gateway, "valve", 4);
    assert_eq!(durable_seq, 3);
    valve.send(&readings(4));
    valve.expect_ack(4);
    // This one has not received the ACK of 2.
    let (mut pump, durable_seq) = connect_from(&gateway, "pump", 2);
    assert_eq!(durable_seq, 1);
    (2..=3).for_each(|seq| pump.send(&readings(seq)));
    pump.expect_ack(3);
    assert_eq!(gaps(&mut database), [("valve".to_owned(), 1, 3, 254)]);
    assert_eq!(database.frames("valve").len(), 2);
    assert_eq!(database.frames("fan").len(), 1);
    assert_eq!(database.frames("pump").len(), 3);
    assert_eq!(series_of_other_devices(&mut database), 0);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_spool_stores_nothing_under_another_device() {
    let mut database = PgDatabase::create();
    let url = database.url();
    let (gateway, mut pump) = start_with_spool(&mut database);
    let backup = database.back_up();
    let (mut valve, _) = gateway.connect("valve");
    (1..=3).for_each(|seq| valve.send(&readings(seq)));
    valve.expect_ack(3);
    // Otherwise the gateway would copy it again.
    eventually("the spool is empty", PATIENCE, || {
        spool_status(&url, gateway.data_dir()).contains("empty")
    });
    database.restore(&backup);
    // In the database these two get their ids in reverse order.
    let (mut fan, _) = gateway.connect("fan");
    fan.send(&readings(1));
    fan.expect_ack(1);
    valve.send(&readings(4));
    valve.expect_ack(4);
    pump.send(&readings(2));
    pump.expect_ack(2);
    database.session().wait_for(
        "SELECT count(*) = 3 FROM streams JOIN devices ON devices.id = device_id
         WHERE (name, durable_seq) IN (('pump', 2), ('fan', 1), ('valve', 4))",
    );
    assert_eq!(gaps(&mut database), [("valve".to_owned(), 1, 3, 254)]);
    assert_eq!(series_of_other_devices(&mut database), 0);
    let values: Vec<_> = database.readings("valve").iter().map(|row| row.1).collect();
    assert_eq!(values, [Some(0.04)]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_gateway_with_a_copied_spool_does_not_start() {
    let mut database = PgDatabase::create();
    let url = database.url();
    let (gateway, mut pump) = start_with_spool(&mut database);
    let copy = TempDir::new().expect("a directory");
    for file in fs::read_dir(gateway.data_dir()).expect("a directory") {
        let file = file.expect("a file");
        if !file.file_name().to_string_lossy().ends_with("-shm") {
            fs::copy(file.path(), copy.path().join(file.file_name())).expect("copies");
        }
    }
    let dir = copy.path().to_str().expect("UTF-8");
    let twin = [
        "serve",
        "--data-dir",
        dir,
        "--store",
        &url,
        "--spool",
        "--listen",
        "127.0.0.1:0",
    ];
    let refused = run(&twin);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("a copy of this spool"),
        "{}",
        refused.stderr
    );
    pump.send(&readings(2));
    pump.expect_ack(2);
    database
        .session()
        .wait_for("SELECT count(*) = 2 FROM frames");
}

/// Starts a gateway with a spool that has drained the first frame of `pump`.
fn start_with_spool(database: &mut PgDatabase) -> (Gateway, Link) {
    let gateway = Gateway::start(&["--store", &database.url(), "--spool"]);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    database
        .session()
        .wait_for("SELECT count(*) = 1 FROM frames");
    (gateway, pump)
}

/// Waits for a gateway that exits on its own.
fn ends(mut gateway: Gateway) -> Ended {
    eventually("the gateway exits", ENDS_WITHIN, || !gateway.is_alive());
    gateway.wait()
}

fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

#[test]
fn a_gateway_exits_if_its_database_was_moved() {
    let dir = TempDir::new().expect("a directory");
    for (how, said) in [
        ("delete", "deleted"),
        ("replace", "replaced"),
        ("move", "moved"),
        ("log", "-wal"),
        ("index", "-shm"),
        ("write over", "overwritten"),
        ("empty the log", "emptied"),
    ] {
        let data = dir.path().join(how);
        let gateway = Gateway::start_in(&data, &[]);
        let (mut link, _) = gateway.connect("pump");
        link.send(&readings(1));
        link.expect_ack(1);
        let file = data.join("fieldgate.db");
        let log = data.join("fieldgate.db-wal");
        match how {
            "delete" => [&file, &log].map(|path| remove(path)).into_iter().collect(),
            "replace" => {
                fs::copy(&file, data.join("backup")).expect("copies");
                fs::rename(data.join("backup"), &file).expect("replaces");
            }
            "move" => fs::rename(&data, dir.path().join("elsewhere")).expect("moves"),
            "index" => remove(&data.join("fieldgate.db-shm")),
            // Like `cp` and a shell: device and inode stay.
            "write over" => fs::write(&file, []).expect("writes"),
            "empty the log" => fs::write(&log, []).expect("writes"),
            _ => remove(&log),
        }
        link.send_in_vain(&readings(2));
        // No acknowledgement may follow.
        while let Ok(heard) = link.try_hear() {
            match heard {
                Heard::Closed => break,
                Heard::Ack { seq, .. } => assert_eq!(seq, 1, "{how}"),
                _ => {}
            }
        }
        let ended = ends(gateway);
        assert_eq!(ended.status.code(), Some(1), "{how}: {}", ended.stderr);
        let lines = ended.stderr.lines().filter(|line| line.contains("error: "));
        let lines: Vec<&str> = lines.collect();
        assert!(
            lines.len() == 1 && lines[0].contains(said),
            "{how}: {}",
            ended.stderr
        );
        // A file that another program has put there stays unchanged.
        assert!(how != "replace" || log.exists());
    }
}

/// The data directory is a symbolic link, whose target changes.
#[test]
fn a_gateway_exits_if_its_data_directory_is_redirected() {
    let dir = TempDir::new().expect("a directory");
    let (data, first, second) = (
        dir.path().join("data"),
        dir.path().join("1"),
        dir.path().join("2"),
    );
    fs::create_dir(&first).expect("a directory");
    fs::create_dir(&second).expect("a directory");
    std::os::unix::fs::symlink(&first, &data).expect("a link");
    let gateway = Gateway::start_in(&data, &[]);
    remove(&data);
    std::os::unix::fs::symlink(&second, &data).expect("a link");
    let ended = ends(gateway);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
}

#[test]
fn an_idle_gateway_exits_if_its_database_was_moved() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    remove(&dir.path().join("fieldgate.db"));
    let ended = ends(gateway);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("was deleted or moved"),
        "{}",
        ended.stderr
    );
}

/// SQLite restores the database under the same name: once to an old state, once to a recent one.
#[test]
fn a_gateway_exits_if_its_database_is_restored() {
    for statements in [
        "DELETE FROM device_events; DELETE FROM frames; DELETE FROM streams;
         UPDATE store_identity SET transactions = 0",
        "DELETE FROM frames; UPDATE streams SET durable_seq = 0, frames = 0, readings = 0",
    ] {
        ends_when_restored_by(statements);
    }
}

fn ends_when_restored_by(statements: &'static str) {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    let file = dir.path().join("fieldgate.db");
    // Like `.restore`: the content of another file in one transaction. Here, only the relevant part.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(&file);
        let mut conn = options.connect().await.expect("opens");
        for statement in ["BEGIN IMMEDIATE", statements, "COMMIT"] {
            let written = sqlx::raw_sql(statement).execute(&mut conn).await;
            written.expect("writes");
        }
    });
    pump.send_in_vain(&readings(2));
    let ended = ends(gateway);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("restored to an earlier state"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_database_has_one_gateway_under_any_name() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let (mut pump, _) = gateway.connect("pump");
    let file = dir.path().join("fieldgate.db");
    let (link, other) = (dir.path().join("linked"), dir.path().join("other"));
    fs::create_dir(&link).expect("a directory");
    fs::create_dir(&other).expect("a directory");
    fs::hard_link(&file, link.join("fieldgate.db")).expect("a link");
    let serve = |dir: &Path| {
        let dir = dir.to_str().expect("UTF-8");
        run(&["serve", "--data-dir", dir, "--listen", "127.0.0.1:0"])
    };
    let refused = serve(&link);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("in use by another gateway"),
        "{}",
        refused.stderr
    );
    // Like a user who considers it stale.
    remove(&dir.path().join("fieldgate.db.lock"));
    let refused = serve(dir.path());
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("in use by another gateway"),
        "{}",
        refused.stderr
    );
    // Readers and device commands are not gateways.
    let dir = dir.path().to_str().expect("UTF-8");
    for args in [
        &["query", "--data-dir", dir, "SELECT count(*) FROM devices"][..],
        &["device", "add", "--data-dir", dir, "valve"],
    ] {
        let output = command(args).output().expect("runs");
        assert!(output.status.success(), "{output:?}");
    }
    pump.send(&readings(1));
    pump.expect_ack(1);
    assert!(gateway.is_alive());
}

impl PgDatabase {
    /// Copies the database, like a backup; sessions end.
    fn back_up(&mut self) -> String {
        let (name, copy) = (self.name().to_owned(), format!("{}_old", self.name()));
        let mut admin = self.admin();
        admin.execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"));
        admin.execute(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        ));
        admin.execute(&format!("CREATE DATABASE {copy} TEMPLATE {name}"));
        admin.execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"));
        admin.execute(&format!("ALTER DATABASE {copy} ALLOW_CONNECTIONS true"));
        copy
    }

    /// Replaces the database by a copy.
    fn restore(&mut self, copy: &str) {
        let name = self.name().to_owned();
        let mut admin = self.admin();
        admin.execute(&format!("DROP DATABASE {name} WITH (FORCE)"));
        admin.execute(&format!("ALTER DATABASE {copy} RENAME TO {name}"));
    }

    /// Opens a session outside the database, after closing the one inside.
    fn admin(&mut self) -> Session {
        self.close_session();
        Session::open(self.server())
    }
}

/// A file size limit acts like a full disk. It is the length of the log that the previous gateway left behind.
#[test]
fn a_gateway_starts_on_a_full_disk() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    let _ = gateway.kill();
    let log = fs::metadata(dir.path().join("fieldgate.db-wal")).expect("a log");
    let limited = clean("prlimit")
        .arg(format!("--fsize={}", log.len()))
        .arg(env!("CARGO_BIN_EXE_fieldgate"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut limited = limited.expect("prlimit");
    let out = BufReader::new(limited.stdout.take().expect("piped"));
    let mut lines = out.lines().map_while(Result::ok);
    let serves = lines.any(|line| line.starts_with("listening on"));
    let _ = limited.kill();
    let ended = limited.wait_with_output().expect("ends");
    let says = String::from_utf8_lossy(&ended.stderr);
    assert!(serves, "{says}");
}

/// As from a backup on a disc. Not every system lets its users mount.
#[test]
fn a_backup_on_a_read_only_medium_is_read() {
    let dir = TempDir::new().expect("a directory");
    let gateway = Gateway::start_in(dir.path(), &[]);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(1));
    pump.expect_ack(1);
    let log = dir.path().join("fieldgate.db-wal");
    let query = |with: &str| {
        let binary = env!("CARGO_BIN_EXE_fieldgate");
        let script = format!(
            "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" || exit 77; \
             exec {binary} {with} --data-dir \"$1\""
        );
        let dir = dir.path().to_str().expect("UTF-8");
        let mut unshare = clean("unshare");
        unshare.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            &script,
            "sh",
            dir,
        ]);
        unshare.output().expect("unshare")
    };
    let _ = gateway.kill();
    let _ = fs::remove_file(dir.path().join("fieldgate.db-shm"));
    assert!(fs::metadata(&log).expect("a log").len() > 0);
    let refused = query("status");
    if refused.status.code() == Some(77) || refused.stderr.starts_with(b"unshare: ") {
        eprintln!("not tested: this system does not let its users mount");
        return;
    }
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("copy it with"), "{said}");
    // A gateway that exits normally leaves no log.
    let gateway = Gateway::start_in(dir.path(), &[]);
    gateway.terminate();
    let mut gateway = gateway;
    assert!(gateway.wait().status.success());
    for with in [
        "query \"SELECT device, value FROM telemetry\"",
        "status",
        "device list",
        "quarantine list",
    ] {
        let read = query(with);
        let said = String::from_utf8_lossy(&read.stderr);
        assert!(read.status.success(), "{with}: {said}");
    }
}

/// A queue that was copied to another device, or restored, uses numbers twice.
#[test]
fn a_reused_number_with_other_content_is_recorded() {
    let mut gateway = Gateway::start(&[]);
    let (mut pump, _) = gateway.connect("pump");
    (1..=3).for_each(|seq| pump.send(&readings(seq)));
    pump.expect_ack(3);
    // Resending the same frame is not a reuse, in this session or in the next.
    pump.send(&readings(2));
    pump.expect_ack(3);
    let (mut pump, _) = gateway.connect("pump");
    pump.send(&readings(3));
    pump.expect_ack(3);
    pump.send(&readings(4));
    pump.expect_ack(4);
    let recorded = "SELECT detail FROM device_events WHERE kind = 'number_reused'";
    let none: Vec<(String,)> = gateway.database().rows(recorded);
    assert!(none.is_empty(), "{none:?}");
    pump.send(&event(2, 1, 7, "other"));
    pump.expect_ack(4);
    pump.send(&event(3, 1, 7, "other"));
    pump.send(&readings(5));
    pump.expect_ack(5);
    let rows: Vec<(String,)> = gateway.database().rows(recorded);
    assert_eq!(
        rows,
        [("number 2 was reused with different content".to_owned(),)]
    );
    gateway.wait_for_line("device reused a sequence number with different content");
}
