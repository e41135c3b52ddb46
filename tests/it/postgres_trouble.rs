//! A Postgres that starts slowly, loses its durability or its standby, or has a month's table
//! detached; and a network to it that goes silent during every command.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use fieldgate_protocol::error::Code;
use tempfile::TempDir;

use crate::store_down::{expect_store_down, resend_until_acked};
use crate::support::client::{Heard, Link};
use crate::support::cluster::Cluster;
use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::{Gateway, run};
use crate::support::messages::{T0_US, readings, readings_at};
use crate::support::{PATIENCE, eventually};

/// Maximum time from when the cause is removed to the first ACK.
const BACK_WITHIN: Duration = Duration::from_secs(20);

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_start_waits_for_a_server_that_is_not_up_yet() {
    for more in [&["--spool"][..], &[]] {
        let mut cluster = Cluster::start(&[]);
        let mut database = cluster.database();
        let url = database.url();
        cluster.stop_immediately();
        thread::scope(|scope| {
            let starting = scope.spawn(|| Gateway::start(&[&["--store", &url], more].concat()));
            cluster.run();
            let mut gateway = starting.join().expect("starts");
            let (mut link, _) = gateway.connect("pump");
            link.send(&readings(1));
            link.expect_ack(1);
            drop(link);
            gateway.terminate();
            assert!(gateway.wait().status.success());
        });
        assert_eq!(database.frames("pump"), [(1, 17)]);
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn durability_that_is_turned_off_stops_acknowledgements() {
    // Only a commit that waits for the disk writes the log soon.
    let cluster = Cluster::start(&["wal_writer_delay=10000"]);
    let mut database = cluster.database();
    let mut gateway = Gateway::start(&["--store", &database.url()]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let mut admin = Session::open(&cluster.url());
    let mut set = |setting: &str, value: &str| {
        admin.execute(&format!("ALTER SYSTEM SET {setting} = {value}"));
        admin.execute("SELECT pg_reload_conf()");
        // A session applies it with its next message.
        admin.wait_for(&format!("SELECT current_setting('{setting}') = '{value}'"));
    };
    let mut seq = 1;
    for setting in ["fsync", "full_page_writes"] {
        set(setting, "off");
        link.send(&readings(seq + 1));
        expect_store_down(&mut link, seq);
        gateway.wait_for_line(&format!("{setting} off"));
        set(setting, "on");
        resend_until_acked(&mut link, &readings(seq + 1), seq + 1, BACK_WITHIN);
        seq += 1;
    }
    // The gateway overrides a setting that a session can set itself.
    set("synchronous_commit", "off");
    let mut log: Vec<(String,)> = admin.rows("SELECT pg_current_wal_insert_lsn()::text");
    let before = log.remove(0).0;
    link.send(&readings(seq + 1));
    link.expect_ack(seq + 1);
    let is_synced = format!("SELECT pg_current_wal_flush_lsn() > '{before}'");
    assert_eq!(admin.rows::<(bool,)>(&is_synced), [(true,)], "{before}");
    assert!(gateway.is_alive());
    assert_eq!(database.frames("pump").len() as u64, seq + 1);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn commits_without_their_standby_do_not_accumulate() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let gateway = Gateway::start(&["--store", &database.url()]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let mut admin = Session::open(&cluster.url());
    admin.execute("SET synchronous_commit = local");
    admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'gone'");
    admin.execute("SELECT pg_reload_conf()");
    admin.wait_for("SELECT current_setting('synchronous_standby_names') = 'gone'");
    link.send(&readings(2));
    expect_store_down(&mut link, 1);
    let waits =
        "FROM pg_stat_activity WHERE application_name = 'fieldgate' AND wait_event = 'SyncRep'";
    admin.wait_for(&format!("SELECT EXISTS (SELECT {waits})"));
    let first: Vec<(i32,)> = admin.rows(&format!("SELECT pid {waits}"));
    for (pid,) in first {
        let gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ";
        admin.wait_for(&format!("{gone}{pid})"));
    }
    let there = admin
        .count("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'fieldgate%'");
    assert!(there <= 8, "{there} connections");
    admin.execute("ALTER SYSTEM RESET synchronous_standby_names");
    admin.execute("SELECT pg_reload_conf()");
    resend_until_acked(&mut link, &readings(2), 2, BACK_WITHIN);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_writer_that_waits_for_a_lock_does_not_block_others() {
    let mut database = PgDatabase::create();
    let gateway = Gateway::start(&[
        "--store",
        &database.url(),
        "--postgres-writers=2",
        "--batch-readings-max=8192",
        "--queue-readings-max=16384",
    ]);
    let (mut held, _) = gateway.connect("held");
    held.send(&readings(1));
    held.expect_ack(1);
    let mut links: Vec<Link> = (0..8)
        .map(|n| gateway.connect(&format!("pump-{n}")).0)
        .collect();
    for link in &mut links {
        link.send(&readings(1));
        link.expect_ack(1);
    }
    let lock = database.session();
    lock.execute("BEGIN");
    lock.execute(
        "SELECT FROM streams JOIN devices ON devices.id = device_id WHERE name = 'held' FOR UPDATE OF streams",
    );
    // More than the whole queue holds.
    let hundredths: Vec<i64> = (0..400).collect();
    for seq in 2..=60 {
        held.send(&readings_at(seq, T0_US, &hundredths));
    }
    // At this point the gateway has accepted as many as the queue holds.
    expect_store_down(&mut held, 1);
    let mut acked = 0;
    for link in &mut links {
        link.send(&readings(2));
        match link.hear() {
            Heard::Ack { seq: 2, .. } => acked += 1,
            Heard::Nack { code, .. } => assert_eq!(code, Code::StoreDown as u8),
            other => panic!("{other:?}"),
        }
    }
    assert!((1..8).contains(&acked), "{acked} of 8");
    database.session().execute("ROLLBACK");
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_detached_partition_causes_a_warning() {
    let mut database = PgDatabase::create();
    let dir = TempDir::new().expect("a directory");
    let url = database.url();
    let flags = ["--store", &url];
    drop(Gateway::start_in(dir.path(), &flags));
    let month: Vec<(String,)> = database
        .session()
        .rows("SELECT 'readings_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMM')");
    let month = &month[0].0;
    let detach = format!("ALTER TABLE readings DETACH PARTITION {month}");
    database.session().execute(&detach);
    let mut gateway = Gateway::start_in(dir.path(), &flags);
    gateway.wait_for_line("partition detached");
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    drop(link);
    gateway.terminate();
    let stderr = gateway.wait().stderr;
    assert!(stderr.contains(month.as_str()), "{stderr}");
}

/// Starts a server that forwards this many bytes from the real one on each connection, and then stays silent.
fn silent_after(bytes: usize, server: &str) -> String {
    let server = server.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("an address").to_string();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(server) = TcpStream::connect(&server) else {
                continue;
            };
            let (mut up, mut to_server) = (
                client.try_clone().expect("a socket"),
                server.try_clone().expect("a socket"),
            );
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = up.read(&mut buffer) {
                    if to_server.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
            });
            thread::spawn(move || carry(server, client, bytes));
        }
    });
    addr
}

/// Forwards this many bytes, and then keeps both ends open and silent.
fn carry(mut from: TcpStream, mut to: TcpStream, mut bytes: usize) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let let_through = read.min(bytes);
        let _ = to.write_all(&buffer[..let_through]);
        bytes -= let_through;
        if bytes == 0 {
            loop {
                thread::park();
            }
        }
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn no_command_waits_for_a_network_that_went_silent() {
    let database = PgDatabase::create();
    drop(Gateway::start(&["--store", &database.url()]));
    let direct = database.url();
    let server = direct
        .split(['@', '/'])
        .nth(3)
        .expect("host and port")
        .to_owned();
    thread::scope(|scope| {
        // While the connection begins, while the session is set up, and in the middle of a query.
        for bytes in [0, 300, 480, 1200] {
            for command in [
                &["serve", "--listen", "127.0.0.1:0", "--postgres-wait-s", "0"][..],
                &["status"],
                &["device", "list"],
                &["device", "add", "pump"],
                &["query", "SELECT 1"],
                &["quarantine", "list"],
            ] {
                let url = direct.replace(&server, &silent_after(bytes, &server));
                scope.spawn(move || {
                    let dir = TempDir::new().expect("a directory");
                    let data_dir = ["--data-dir", dir.path().to_str().expect("UTF-8")];
                    let store = ["--store", url.as_str()];
                    let ended = run(&[command, &store, &data_dir].concat());
                    assert!(!ended.status.success(), "{command:?} after {bytes} bytes");
                });
            }
        }
    });
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_gateway_with_a_spool_exits_in_time_despite_a_silent_server() {
    let mut cluster = Cluster::start(&[]);
    let mut database = cluster.database();
    let dir = TempDir::new().expect("a directory");
    let url = database.url();
    let flags = ["--store", url.as_str(), "--spool"];
    let mut gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    cluster.freeze();
    link.send(&readings(2));
    link.expect_ack(2);
    drop(link);
    gateway.terminate();
    let ended = gateway.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("left in the spool"),
        "{}",
        ended.stderr
    );
    cluster.thaw();
    let mut gateway = Gateway::start_in(dir.path(), &flags);
    eventually("the spool is drained", PATIENCE, || {
        database.frames("pump").len() == 2
    });
    gateway.terminate();
    assert!(gateway.wait().status.success());
}
