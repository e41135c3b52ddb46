//! kill -9 of the gateway under load, again and again, while a fleet goes on sending; then the proof.
//!
//! The simulator's binary stands beside the gateway's: `cargo build --workspace` makes both.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use crate::gateway::{Database, Gateway};

/// How many times the gateway is killed; `tests/run` says 20, `tests/run --long` 200.
const ROUNDS_VARIABLE: &str = "FIELDGATE_TEST_KILL_ROUNDS";
/// Without the variable: enough to see the test work.
const ROUNDS_DEFAULT: u64 = 3;
/// Within this time after a start, something must be acknowledged again.
const READY_AGAIN: Duration = Duration::from_secs(20);

#[test]
fn what_was_acked_survives_kill_9() {
    survive(&["--profile", "burst", "--devices", "50"], rounds());
}

#[test]
fn what_was_acked_survives_kill_9_in_a_bad_field() {
    let faults =
        "disconnect=0.01,duplicate=0.01,corrupt=0.005,slow=0.01,abandon=0.01,malformed=0.0002";
    let flags = [
        "--profile",
        "burst",
        "--devices",
        "20",
        "--clock",
        "boot",
        "--faults",
        faults,
    ];
    survive(&flags, rounds().div_ceil(4));
}

fn rounds() -> u64 {
    match std::env::var(ROUNDS_VARIABLE) {
        Ok(rounds) => rounds.parse().expect("a number of rounds"),
        Err(_) => {
            eprintln!("{ROUNDS_DEFAULT} rounds; set {ROUNDS_VARIABLE} for more");
            ROUNDS_DEFAULT
        }
    }
}

fn survive(flags: &[&str], rounds: u64) {
    let dir = TempDir::new().expect("a directory");
    let (data_dir, journal) = (dir.path().join("data"), dir.path().join("journal"));
    let seed = rand::random();
    println!("seed of the moments of death: {seed}");
    let mut moments = SmallRng::seed_from_u64(seed);
    let mut gateway = Gateway::start_in(&data_dir, &[]);
    let listen = gateway.addr.to_string();
    let mut fleet = Fleet::start(&listen, &data_dir, &journal, flags);
    let mut durable = 0;
    for round in 1..=rounds {
        durable = fleet.await_progress(&data_dir, durable, round);
        // The moment of death is random: anywhere within some commits.
        std::thread::sleep(Duration::from_micros(moments.random_range(0..300_000)));
        gateway.kill();
        gateway = Gateway::start_in(&data_dir, &["--listen", &listen]);
    }
    fleet.await_progress(&data_dir, durable, rounds + 1);
    fleet.stop();
    drop(gateway);
    let mut database = Database::open(&data_dir.join("fieldgate.db"));
    let checked: Vec<(String,)> = database.rows("SELECT * FROM pragma_integrity_check");
    assert_eq!(checked, [("ok".to_owned(),)]);
    verify(&data_dir, &journal);
}

/// The simulator at work.
struct Fleet {
    process: Child,
}

impl Fleet {
    fn start(gateway: &str, data_dir: &Path, journal: &Path, flags: &[&str]) -> Fleet {
        let process = simulator("run")
            .args(["--gateway", gateway, "--duration", "1h", "--journal"])
            .arg(journal)
            .arg("--key-file")
            .arg(data_dir.join("fleet.key"))
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        Fleet { process }
    }

    /// Waits until more frames are stored than `before`; gives back how many.
    fn await_progress(&mut self, data_dir: &Path, before: i64, round: u64) -> i64 {
        let deadline = Instant::now() + READY_AGAIN;
        let mut database = Database::open(&data_dir.join("fieldgate.db"));
        loop {
            let durable = database.count("SELECT coalesce(sum(durable_seq), 0) FROM streams");
            if durable > before {
                return durable;
            }
            if let Some(status) = self.process.try_wait().expect("a child") {
                panic!(
                    "round {round}: the simulator ended, {status}: {}",
                    self.said()
                );
            }
            assert!(
                Instant::now() < deadline,
                "round {round}: nothing is stored any more"
            );
            std::thread::yield_now();
        }
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        let mut stderr = self.process.stderr.take().expect("piped");
        stderr.read_to_string(&mut said).expect("text");
        said
    }

    /// As Ctrl-C does: what is in flight is still acknowledged, and the journal completed.
    fn stop(mut self) {
        let pid = self.process.id().to_string();
        let told = Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .expect("kill");
        assert!(told.success());
        let status = self.process.wait().expect("a child");
        assert!(status.success(), "{status}: {}", self.said());
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn verify(data_dir: &Path, journal: &Path) {
    let store = format!("sqlite://{}", data_dir.join("fieldgate.db").display());
    let output = simulator("verify")
        .arg("--journal")
        .arg(journal)
        .args(["--store", &store])
        .output()
        .expect("starts");
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
    let mut command = Command::new(path);
    command.arg(subcommand).stdin(Stdio::null());
    command
}
