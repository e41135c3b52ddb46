//! Tests of the verifier: it accepts a correct store, and rejects every copy that one statement falsified.

mod falsifications;

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use self::falsifications::{FALSIFICATIONS, Falsification, POSTGRES_ONLY, SQLITE_ONLY};
use crate::support::database::PgDatabase;
use crate::support::fleet::{File, Fleet, simulator};
use crate::support::gateway::{Gateway, meddle};
use crate::support::logs::keep_of;

/// Returns whether a store passes, and the verifier's output.
fn verify(store: &str, journals: &[PathBuf], flags: &[&str]) -> (bool, String) {
    let mut command = simulator("verify");
    command.args(["--store", store]).args(flags);
    for journal in journals {
        command.arg("--journal").arg(journal);
    }
    let output = keep_of(command.output().expect("starts"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said + &errors)
}

/// Runs a small fleet with all kinds of content: three devices, damaged and malformed frames.
fn run(gateway: &Gateway, journal: &Path, flags: &[&str]) {
    let output = simulator("run")
        .args(["--gateway", &gateway.addr.to_string(), "--journal"])
        .arg(journal)
        .arg("--key-file")
        .arg(gateway.data_dir().join("fleet.key"))
        .args(["--profile", "burst", "--seed", "4", "--batch", "5"])
        .args(flags)
        .output();
    let output = keep_of(output.expect("starts"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

const SMALL: [&str; 6] = [
    "--devices",
    "3",
    "--frames",
    "12",
    "--faults",
    "malformed=0.1,corrupt=0.4,disconnect=0.1",
];

/// Checks that every falsification is reported; panics with all that are not.
fn check(falsified: impl Iterator<Item = (&'static Falsification, (bool, String))>) {
    let missed: Vec<String> = falsified
        .filter(|(falsification, (passed, said))| *passed || !said.contains(falsification.said))
        .map(|(falsification, (_, said))| {
            format!(
                "{}: not {:?} but\n{said}",
                falsification.what, falsification.said
            )
        })
        .collect();
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Runs a fleet into a store in `dir`, ends the gateway and returns the journal.
fn true_run(dir: &Path, gateway_flags: &[&str], flags: &[&str]) -> PathBuf {
    let mut gateway = Gateway::start_in(&dir.join("gateway"), gateway_flags);
    let journal = dir.join("journal");
    run(&gateway, &journal, &[&SMALL[..], flags].concat());
    gateway.terminate();
    gateway.wait();
    journal
}

fn sqlite_url(path: &Path) -> String {
    format!("sqlite://{}", path.display())
}

fn prove_sqlite(flags: &[&str]) {
    let dir = TempDir::new().expect("a directory");
    let journal = [true_run(dir.path(), &[], flags)];
    let database = dir.path().join("gateway/fieldgate.db");
    let (passed, said) = verify(&sqlite_url(&database), &journal, &[]);
    assert!(
        passed && said.contains("equal: every acknowledged reading"),
        "{said}"
    );
    let falsifications = FALSIFICATIONS.iter().chain(SQLITE_ONLY);
    check(falsifications.map(|falsification| {
        let copy = dir.path().join("copy.db");
        std::fs::copy(&database, &copy).expect("a copy");
        meddle(
            &copy,
            &format!("PRAGMA foreign_keys = OFF; {}", falsification.sql(true)),
        );
        (falsification, verify(&sqlite_url(&copy), &journal, &[]))
    }));
}

#[test]
fn no_falsified_store_passes() {
    prove_sqlite(&[]);
}

#[test]
fn no_falsified_store_of_devices_without_utc_passes() {
    prove_sqlite(&["--clock", "boot"]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn no_falsified_store_in_postgres_passes() {
    let dir = TempDir::new().expect("a directory");
    let database = PgDatabase::create();
    let journal = [true_run(dir.path(), &["--store", &database.url()], &[])];
    let (passed, said) = verify(&database.url(), &journal, &[]);
    assert!(passed, "{said}");
    let falsifications = FALSIFICATIONS.iter().chain(POSTGRES_ONLY);
    check(falsifications.map(|falsification| {
        let mut copy = database.copy();
        copy.session().execute(&falsification.sql(false));
        (falsification, verify(&copy.url(), &journal, &[]))
    }));
}

/// Starts a proxy to `gateway`, at another address.
fn proxy(gateway: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let pass = |mut from: TcpStream, mut to: TcpStream| {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        })
    };
    std::thread::spawn(move || {
        for device in listener.incoming().flatten() {
            let to = TcpStream::connect(gateway).expect("a gateway");
            pass(
                device.try_clone().expect("a socket"),
                to.try_clone().expect("a socket"),
            );
            pass(to, device);
        }
    });
    address
}

#[test]
fn addresses_behind_a_proxy_are_left_out() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let journal = [dir.path().join("journal")];
    gateway.addr = proxy(gateway.addr);
    run(&gateway, &journal[0], &SMALL);
    gateway.terminate();
    gateway.wait();
    let store = sqlite_url(&dir.path().join("fieldgate.db"));
    let (passed, said) = verify(&store, &journal, &[]);
    let left_out = "not compared: login addresses";
    assert!(passed && said.contains(left_out), "{said}");
}

#[test]
fn frames_lost_by_the_gateway_are_reported() {
    let (mut fleet, gateway) = Fleet::start(
        |dir| File(dir.join("fieldgate.db")),
        &["--devices", "2", "--interval", "10ms", "--batch", "2"],
    );
    fleet.await_progress(1);
    let database = fleet.dir().join("fieldgate.db");
    let older = fleet.dir().join("older.db");
    let gateway = fleet.restart_after(gateway, || {
        std::fs::copy(&database, &older).expect("a copy");
    });
    fleet.take_stock();
    fleet.await_progress(2);
    let gateway = fleet.restart_after(gateway, || {
        std::fs::copy(&older, &database).expect("a copy");
    });
    fleet.take_stock();
    fleet.await_progress(3);
    let (status, said) = fleet.interrupt();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("acknowledged frames; was its store"),
        "{said}"
    );
    let journal = [fleet.dir().join("journal")];
    drop(gateway);
    let (passed, said) = verify(&sqlite_url(&database), &journal, &[]);
    assert!(
        !passed && said.contains("were acknowledged but are not stored: the gateway lost them"),
        "{said}"
    );
    assert!(!said.contains("reason 0: stored but not sent"), "{said}");
}

#[test]
fn data_of_other_runs_is_verified_with_them_or_left_out() {
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_in(dir.path(), &[]);
    let journals = ["first", "second"].map(|name| dir.path().join(name));
    run(&gateway, &journals[0], &["--devices", "1", "--frames", "2"]);
    run(&gateway, &journals[1], &["--devices", "2", "--frames", "3"]);
    gateway.terminate();
    gateway.wait();
    let database = dir.path().join("fieldgate.db");
    let store = sqlite_url(&database);
    let hint = "add its journal";
    let left_out = "not compared: 1 devices, streams, series and schemas";
    for (journals, flags, passes, says) in [
        (&journals[..], &["--others", "none"][..], true, "equal"),
        // The first run's data was stored before.
        (&journals[1..], &[], true, left_out),
        (&journals[1..], &["--others", "none"], false, hint),
        // The second run's data was stored later.
        (&journals[..1], &[], false, hint),
        (
            &journals[..1],
            &["--others", "any"],
            true,
            "not compared: 2 ",
        ),
    ] {
        let (passed, said) = verify(&store, journals, flags);
        assert!(passed == passes && said.contains(says), "{flags:?}: {said}");
    }
    let invented = "INSERT INTO readings_sorted (series_id, ts, frame_id, value)
         SELECT s.id, 5, 1000000, 0.5 FROM series AS s JOIN devices AS d ON d.id = s.device_id
         WHERE d.name = 'sim-00000' LIMIT 1";
    meddle(&database, invented);
    for journals in [&journals[1..], &journals[..1]] {
        let (passed, said) = verify(&store, journals, &["--others", "any"]);
        assert!(
            !passed && said.contains("1 readings without a frame: stored but not sent"),
            "{said}"
        );
    }
}
