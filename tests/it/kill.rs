//! Kills the gateway with SIGKILL repeatedly while a fleet sends, then verifies the store.

use std::path::Path;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::database::PgDatabase;
use crate::support::fleet::{File, Fleet, Place, rounds};

/// Variable with the number of kills; `tests/run` sets 20, `tests/run --long` 200.
const ROUNDS_VARIABLE: &str = "FIELDGATE_TEST_KILL_ROUNDS";
const ROUNDS_DEFAULT: u64 = 3;

const BURST: [&str; 4] = ["--profile", "burst", "--devices", "50"];
const BAD_FIELD: [&str; 8] = [
    "--profile",
    "burst",
    "--devices",
    "20",
    "--clock",
    "boot",
    "--faults",
    "disconnect=0.01,duplicate=0.01,corrupt=0.005,slow=0.01,abandon=0.01,malformed=0.0002",
];

#[test]
fn acknowledged_frames_survive_kill_9() {
    survive(file, &BURST, 1);
}

#[test]
fn acknowledged_frames_survive_kill_9_with_faults() {
    survive(file, &BAD_FIELD, 4);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn acknowledged_frames_survive_kill_9_in_postgres() {
    survive(|_| PgDatabase::create(), &BURST, 2);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn acknowledged_frames_survive_kill_9_with_faults_in_postgres() {
    survive(|_| PgDatabase::create(), &BAD_FIELD, 4);
}

fn file(dir: &Path) -> File {
    File(dir.join("fieldgate.db"))
}

/// Runs a part of the rounds: `1 / share` of them.
fn survive<P: Place>(place: impl FnOnce(&Path) -> P, flags: &[&str], share: u64) {
    let rounds = rounds(ROUNDS_VARIABLE, ROUNDS_DEFAULT).div_ceil(share);
    let seed = rand::random();
    println!("seed of the kill times: {seed}");
    let mut moments = SmallRng::seed_from_u64(seed);
    let (mut fleet, mut gateway) = Fleet::start(place, flags);
    for round in 1..=rounds {
        fleet.await_progress(round);
        // A random time, so that the kill can hit any part of a commit.
        std::thread::sleep(Duration::from_micros(moments.random_range(0..300_000)));
        gateway = fleet.restart(gateway);
    }
    fleet.await_progress(rounds + 1);
    fleet.prove(gateway);
}
