//! Runs the simulator against a gateway and verifies the result.
//!
//! Its binary is next to the gateway's: `cargo build --workspace` builds both.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::database::PgDatabase;
use crate::support::eventually;
use crate::support::gateway::{Database, Gateway, clean, command};
use crate::support::logs::{Stderr, collect, keep_of};

/// Maximum time from a restart of the gateway or database to the next acknowledgement.
const READY_AGAIN: Duration = Duration::from_secs(20);
/// Maximum time to drain the spool after the fleet has stopped.
const DRAINED_WITHIN: Duration = Duration::from_secs(120);
/// Progress of the gateway.
const DURABLE: &str = "SELECT CAST(coalesce(sum(durable_seq), 0) AS BIGINT) FROM streams";
/// Inconsistencies of the ledger: each query counts rows that must not exist.
const FAULTS: [(&str, &str); 4] = [
    (
        "numbers that do not follow those before",
        "SELECT count(*) FROM (
             SELECT coalesce(g.from_seq, f.seq) AS first_seq,
                 lag(f.seq, 1, CAST(0 AS BIGINT)) OVER (PARTITION BY f.stream_id ORDER BY f.seq) AS before
             FROM frames AS f LEFT JOIN gaps AS g ON g.stream_id = f.stream_id AND g.to_seq = f.seq
         ) AS numbered WHERE first_seq <> before + 1",
    ),
    (
        "streams whose last frame is not the durable one",
        "SELECT count(*) FROM streams AS s WHERE durable_seq <>
             (SELECT coalesce(max(seq), 0) FROM frames AS f WHERE f.stream_id = s.id)",
    ),
    (
        "streams with wrong totals",
        "SELECT count(*) FROM streams AS s WHERE (frames, readings) <> (
             SELECT count(*), CAST(coalesce(sum(f.readings), 0) AS BIGINT) FROM frames AS f
             WHERE f.stream_id = s.id)",
    ),
    (
        "frames with a wrong number of readings",
        "SELECT count(*) FROM frames AS f
         LEFT JOIN (SELECT frame_id, count(*) AS n FROM readings GROUP BY frame_id) AS r
             ON r.frame_id = f.id
         WHERE f.readings <> coalesce(r.n, 0)",
    ),
];

/// A store for a fleet.
pub trait Place {
    fn url(&self) -> String;
    /// Returns the one number that a query returns; `None` while the store is not available.
    fn poll(&mut self, sql: &str) -> Option<i64>;
    /// Returns further flags for the gateway.
    fn serve_flags(&self) -> &'static [&'static str] {
        &[]
    }
    /// Waits until everything that was acknowledged can be seen.
    fn settle(&mut self, _data_dir: &Path) {}
    /// Checks invariants of the database that hold for any content.
    fn check(&mut self) {}
}

pub struct File(pub PathBuf);

impl Place for File {
    fn url(&self) -> String {
        format!("sqlite://{}", self.0.display())
    }

    fn poll(&mut self, sql: &str) -> Option<i64> {
        Some(Database::open(&self.0).count(sql))
    }

    fn check(&mut self) {
        let mut database = Database::open(&self.0);
        let checked: Vec<(String,)> = database.rows("SELECT * FROM pragma_integrity_check");
        assert_eq!(checked, [("ok".to_owned(),)]);
    }
}

impl Place for PgDatabase {
    fn url(&self) -> String {
        self.url()
    }

    fn poll(&mut self, sql: &str) -> Option<i64> {
        self.poll(sql)
    }
}

/// A database on a server, with a spool in the gateway.
pub struct Spooled(pub PgDatabase);

impl Place for Spooled {
    fn url(&self) -> String {
        self.0.url()
    }

    fn poll(&mut self, sql: &str) -> Option<i64> {
        self.0.poll(sql)
    }

    fn serve_flags(&self) -> &'static [&'static str] {
        &["--spool"]
    }

    fn settle(&mut self, data_dir: &Path) {
        eventually("the spool is empty", DRAINED_WITHIN, || {
            spool_status(&self.url(), data_dir).contains("empty")
        });
    }
}

/// Returns the line of `fieldgate status` about the spool.
pub fn spool_status(store: &str, data_dir: &Path) -> String {
    let data_dir = data_dir.to_str().expect("UTF-8");
    let output = command(&["status", "--store", store, "--data-dir", data_dir]).output();
    let said = String::from_utf8(keep_of(output.expect("starts")).stdout).expect("text");
    let mut lines = said.lines();
    let line = lines.find(|line| line.trim_start().starts_with("spool"));
    line.unwrap_or_else(|| panic!("no spool in {said:?}"))
        .to_owned()
}

/// A fleet that sends to a gateway until the test stops it.
pub struct Fleet<P> {
    pub place: P,
    dir: TempDir,
    process: Child,
    stderr: Stderr,
    durable: i64,
}

impl<P: Place> Fleet<P> {
    /// Starts a fleet with these `flags`, and a gateway for it.
    pub fn start(place: impl FnOnce(&Path) -> P, flags: &[&str]) -> (Fleet<P>, Gateway) {
        let dir = TempDir::new().expect("a directory");
        let place = place(dir.path());
        let url = place.url();
        let flags_of_place = [&["--store", url.as_str()], place.serve_flags()].concat();
        let gateway = Gateway::start_in(dir.path(), &flags_of_place);
        let mut process = simulator("run")
            .args(["--gateway", &gateway.addr.to_string()])
            .args(["--duration", "1h", "--journal"])
            .arg(dir.path().join("journal"))
            .arg("--key-file")
            .arg(dir.path().join("fleet.key"))
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let fleet = Fleet {
            place,
            dir,
            stderr: collect(process.stderr.take().expect("piped")),
            process,
            durable: 0,
        };
        (fleet, gateway)
    }

    pub fn restart(&self, gateway: Gateway) -> Gateway {
        let listen = gateway.addr.to_string();
        gateway.kill();
        self.start_again(&listen)
    }

    /// Restarts the same gateway, with a change to its files in between.
    pub fn restart_after(&self, mut gateway: Gateway, then: impl FnOnce()) -> Gateway {
        let listen = gateway.addr.to_string();
        gateway.terminate();
        gateway.wait();
        then();
        self.start_again(&listen)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn start_again(&self, listen: &str) -> Gateway {
        let url = self.place.url();
        let flags = ["--store", url.as_str(), "--listen", listen];
        let flags = [&flags[..], self.place.serve_flags()].concat();
        Gateway::start_in(self.dir.path(), &flags)
    }

    /// Takes the current durable numbers as the baseline for further progress.
    pub fn take_stock(&mut self) {
        // A session from before a crash fails on its first use.
        let durable = self.place.poll(DURABLE);
        let durable = durable.or_else(|| self.place.poll(DURABLE));
        self.durable = durable.expect("it runs");
    }

    /// Waits until more is durable than the last time.
    pub fn await_progress(&mut self, round: u64) {
        self.await_progress_within(READY_AGAIN, round);
    }

    pub fn await_progress_within(&mut self, patience: Duration, round: u64) {
        let before = self.durable;
        eventually(&format!("progress in round {round}"), patience, || {
            if let Some(status) = self.process.try_wait().expect("a child") {
                panic!(
                    "round {round}: the simulator ended, {status}: {}",
                    self.said()
                );
            }
            let durable = self.place.poll(DURABLE);
            self.durable = durable.unwrap_or(before).max(before);
            self.durable > before
        });
    }

    /// Stops fleet and gateway, and verifies that every acknowledged frame is stored, once, with
    /// its values.
    pub fn prove(self, gateway: Gateway) {
        self.prove_with(gateway, &[]);
    }

    /// The same for a store with data of others.
    pub fn prove_among_others(self, gateway: Gateway) {
        self.prove_with(gateway, &["--others", "any"]);
    }

    fn prove_with(mut self, gateway: Gateway, flags: &[&str]) {
        self.stop();
        self.place.settle(self.dir.path());
        drop(gateway);
        self.place.check();
        check_ledger(&mut self.place);
        verify_with(&self.place.url(), &self.dir.path().join("journal"), flags);
    }

    fn said(&mut self) -> String {
        self.stderr.read_to_end().expect("an end")
    }

    /// Stops it like Ctrl-C: frames in flight are still acknowledged, and the journal is completed.
    fn stop(&mut self) {
        let (status, said) = self.interrupt();
        assert!(status.success(), "{status}: {said}");
    }

    /// Stops it; returns its exit status and its stderr.
    pub fn interrupt(&mut self) -> (ExitStatus, String) {
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args(["-INT", &pid]).status();
        assert!(status.expect("kill").success());
        let status = self.process.wait().expect("a child");
        (status, self.said())
    }
}

impl<P> Drop for Fleet<P> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Checks that numbers continue each stream, none is missing or duplicate, and totals are correct.
pub fn check_ledger(place: &mut impl Place) {
    for (what, sql) in FAULTS {
        assert_eq!(place.poll(sql), Some(0), "{what}");
    }
}

/// Returns the number of rounds from an environment variable; otherwise a small default.
pub fn rounds(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(rounds) => rounds.parse().expect("a number of rounds"),
        Err(_) => {
            eprintln!("{default} rounds; set {variable} for more");
            default
        }
    }
}

/// Compares a store with a journal, row by row.
pub fn verify(store: &str, journal: &Path) {
    verify_with(store, journal, &[]);
}

fn verify_with(store: &str, journal: &Path, flags: &[&str]) {
    let output = simulator("verify")
        .arg("--journal")
        .arg(journal)
        .args(["--store", store])
        .args(flags)
        .output();
    let output = keep_of(output.expect("starts"));
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn simulator(subcommand: &str) -> Command {
    let path = PathBuf::from(env!("CARGO_BIN_EXE_fieldgate")).with_file_name("fieldgate-sim");
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace`",
        path.display()
    );
    let mut command = clean(path);
    command.arg(subcommand);
    command
}
