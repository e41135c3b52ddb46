//! A Postgres that stops, freezes, or throws clients out under load: nothing that was acknowledged is
//! lost, nothing is stored twice, and acknowledgements flow again as soon as it is back.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::client::readings;
use crate::cluster::Cluster;
use crate::database::{PgDatabase, Session};
use crate::fleet::{Fleet, rounds};
use crate::gateway::Gateway;
use crate::store_down::{expect_store_down, resend_until_acked};

/// How many times Postgres is stopped; `tests/run` says 10, `tests/run --long` 50.
pub const ROUNDS_VARIABLE: &str = "FIELDGATE_TEST_OUTAGE_ROUNDS";
pub const ROUNDS_DEFAULT: u64 = 2;
/// From the moment Postgres lets clients in again to the first ACK.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// The same for a server that answers nothing until then.
const THAWED_WITHIN: Duration = Duration::from_secs(10);
/// As many backends are thrown out while they commit.
const COMMITS_CUT: usize = 8;

const BURST: [&str; 4] = ["--profile", "burst", "--devices", "50"];

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_stopped_server_is_told_to_devices_and_waited_for() {
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
    // Once the gateway knows, each further try is answered at once.
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
fn what_was_acked_survives_crashes_of_the_server() {
    let rounds = rounds(ROUNDS_VARIABLE, ROUNDS_DEFAULT);
    let seed = rand::random();
    println!("seed of the moments of the crashes: {seed}");
    let mut moments = SmallRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(&[]);
    let (mut fleet, mut gateway) = Fleet::start(|_| cluster.database(), &BURST);
    for round in 1..=rounds {
        fleet.await_progress(round);
        // The moment is random: anywhere within some commits.
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
fn a_commit_that_is_cut_off_is_stored_once() {
    let (mut fleet, gateway) = Fleet::start(|_| PgDatabase::create(), &BURST);
    let mut killer = Session::open(&fleet.place.url());
    let deadline = Instant::now() + THAWED_WITHIN * 6;
    let mut cut = 0;
    while cut < COMMITS_CUT {
        fleet.await_progress(cut as u64);
        // Who is syncing its COMMIT: the server may have it or not, and the gateway will not hear.
        let hit: Vec<(bool,)> = killer.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'fieldgate'
                 AND state = 'active' AND query LIKE '%COMMIT'",
        );
        cut += hit.len();
        assert!(Instant::now() < deadline, "only {cut} COMMITs were met");
    }
    println!("{cut} backends thrown out while they committed");
    fleet.await_progress(cut as u64);
    fleet.prove(gateway);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_frozen_server_costs_no_memory_and_no_data() {
    /// The queue's million readings of 8 bytes and their times, and what a gateway takes up anyway.
    const BYTES_MAX: u64 = 64 << 20;
    // More in flight than the queue takes.
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
    let told_after = frozen_at.elapsed();
    assert!(told_after < THAWED_WITHIN, "told after {told_after:?}");
    // The freeze itself is the event: the fleet pushes for as long as it lasts.
    std::thread::sleep(Duration::from_secs(8).saturating_sub(told_after));
    let taken = gateway.memory_bytes();
    println!("{} MiB while nothing was stored", taken >> 20);
    assert!(taken < BYTES_MAX, "{taken} bytes");
    cluster.thaw();
    resend_until_acked(&mut link, &readings(2), 2, THAWED_WITHIN);
    fleet.await_progress_within(THAWED_WITHIN, 2);
    drop(link);
    fleet.prove_among_others(gateway);
}
