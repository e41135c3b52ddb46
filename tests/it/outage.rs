//! A Postgres that stops, freezes, or terminates client sessions under load: no acknowledged frame is
//! lost, none is stored twice, and acknowledgements resume as soon as it is back.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::store_down::{expect_store_down, resend_until_acked};
use crate::support::cluster::Cluster;
use crate::support::database::{PgDatabase, Session};
use crate::support::fleet::{Fleet, rounds};
use crate::support::gateway::Gateway;
use crate::support::messages::readings;

/// Variable with the number of stops of Postgres; `tests/run` sets 10, `tests/run --long` 50.
pub const ROUNDS_VARIABLE: &str = "FIELDGATE_TEST_OUTAGE_ROUNDS";
pub const ROUNDS_DEFAULT: u64 = 2;
/// Maximum time from when Postgres accepts clients again to the first ACK.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// The same for a server that does not respond until then.
const THAWED_WITHIN: Duration = Duration::from_secs(10);
/// Number of backends to terminate while they commit.
const COMMITS_CUT: usize = 8;

const BURST: [&str; 4] = ["--profile", "burst", "--devices", "50"];

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn devices_wait_for_a_stopped_server() {
    let mut cluster = Cluster::start(&[]);
    let mut database = cluster.database();
    let mut gateway = Gateway::start(&["--store", &database.url()]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    cluster.stop_immediately();
    let frames: Vec<u8> = (2..=4).flat_map(readings).collect();
    link.send(&frames);
    expect_store_down(&mut link, 1);
    // Once the gateway has noticed the outage, it answers each further attempt immediately.
    link.send(&readings(2));
    expect_store_down(&mut link, 1);
    assert!(gateway.is_alive());
    cluster.run();
    resend_until_acked(&mut link, &frames, 4, BACK_WITHIN);
    let numbers: Vec<_> = (1..=4).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames("pump"), numbers);
    let values: Vec<_> = database.readings("pump").iter().map(|row| row.1).collect();
    assert_eq!(values, [Some(0.01), Some(0.02), Some(0.03), Some(0.04)]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn acknowledged_frames_survive_crashes_of_the_server() {
    let rounds = rounds(ROUNDS_VARIABLE, ROUNDS_DEFAULT);
    let seed = rand::random();
    println!("seed of the crash times: {seed}");
    let mut moments = SmallRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(&[]);
    let (mut fleet, mut gateway) = Fleet::start(|_| cluster.database(), &BURST);
    for round in 1..=rounds {
        fleet.await_progress(round);
        // A random time, so that the crash can hit any part of a commit.
        std::thread::sleep(Duration::from_micros(moments.random_range(0..300_000)));
        cluster.stop_immediately();
        cluster.run();
        fleet.take_stock();
        fleet.await_progress(round);
        assert!(gateway.is_alive(), "round {round}");
    }
    fleet.await_progress(rounds + 1);
    fleet.prove(gateway);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn an_interrupted_commit_is_stored_once() {
    let (mut fleet, gateway) = Fleet::start(|_| PgDatabase::create(), &BURST);
    let mut killer = Session::open(&fleet.place.url());
    let deadline = Instant::now() + THAWED_WITHIN * 6;
    let mut cut = 0;
    while cut < COMMITS_CUT {
        fleet.await_progress(cut as u64);
        // Backends that sync their COMMIT: the server may have stored it or not, and the gateway gets no answer.
        let hit: Vec<(bool,)> = killer.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'fieldgate'
                 AND state = 'active' AND query LIKE '%COMMIT'",
        );
        cut += hit.len();
        assert!(
            Instant::now() < deadline,
            "only {cut} COMMITs were interrupted"
        );
    }
    println!("{cut} backends terminated while they committed");
    fleet.await_progress(cut as u64);
    fleet.prove(gateway);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_frozen_server_costs_no_memory_and_no_data() {
    /// The queue's million readings of 8 bytes with their times, and the gateway's own memory.
    const BYTES_MAX: u64 = 64 << 20;
    // More in flight than the queue accepts.
    let flags = [
        "--profile",
        "burst",
        "--devices",
        "200",
        "--window",
        "64",
        "--batch",
        "120",
    ];
    let mut cluster = Cluster::start(&[]);
    let (mut fleet, gateway) = Fleet::start(|_| cluster.database(), &flags);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    fleet.await_progress(1);
    cluster.freeze();
    link.send(&readings(2));
    let frozen_at = Instant::now();
    expect_store_down(&mut link, 1);
    let nack_after = frozen_at.elapsed();
    assert!(nack_after < THAWED_WITHIN, "NACK after {nack_after:?}");
    // The freeze itself is the test: the fleet sends for as long as it lasts.
    std::thread::sleep(Duration::from_secs(8).saturating_sub(nack_after));
    let taken = gateway.memory_bytes();
    println!("{} MiB while nothing was stored", taken >> 20);
    assert!(taken < BYTES_MAX, "{taken} bytes");
    cluster.thaw();
    resend_until_acked(&mut link, &readings(2), 2, THAWED_WITHIN);
    fleet.await_progress_within(THAWED_WITHIN, 2);
    drop(link);
    fleet.prove_among_others(gateway);
}
