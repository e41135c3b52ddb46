//! A gateway with a spool, and crashes on either side of it: devices continue, and in the end the database has
//! every acknowledged frame, once.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use crate::outage::{ROUNDS_DEFAULT, ROUNDS_VARIABLE};
use crate::support::cluster::Cluster;
use crate::support::fleet::{Fleet, Place, Spooled, rounds, spool_status};
use crate::support::gateway::{Gateway, run};
use crate::support::messages::readings;

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn devices_do_not_notice_an_outage() {
    let mut cluster = Cluster::start(&[]);
    let mut place = Spooled(cluster.database());
    let (url, dir) = (place.url(), TempDir::new().expect("a directory"));
    let flags = ["--store", url.as_str(), "--spool"];
    let mut gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    place.settle(dir.path());
    cluster.stop_immediately();
    for seq in 2..=4 {
        link.send(&readings(seq));
        link.expect_ack(seq);
    }
    // New devices do not notice it either.
    let (mut newcomer, _) = gateway.connect("valve");
    newcomer.send(&readings(1));
    newcomer.expect_ack(1);
    let waits = spool_status(&url, dir.path());
    assert!(waits.contains("4 frames with 4 readings wait"), "{waits}");
    drop((link, newcomer));
    gateway.terminate();
    let ended = gateway.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("left in the spool"),
        "{}",
        ended.stderr
    );
    // Another store is refused, because it would leave acknowledged frames in the spool.
    let data_dir = dir.path().to_str().expect("UTF-8");
    let elsewhere = run(&["serve", "--data-dir", data_dir, "--listen", "127.0.0.1:0"]);
    assert_eq!(elsewhere.status.code(), Some(1), "{}", elsewhere.stderr);
    assert!(
        elsewhere.stderr.contains("acknowledged frames wait"),
        "{}",
        elsewhere.stderr
    );
    // It also starts without the database, and knows the state of the stream.
    let gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 4);
    link.send(&readings(5));
    link.expect_ack(5);
    cluster.run();
    place.settle(dir.path());
    let numbers: Vec<_> = (1..=5).map(|seq| (seq, 17)).collect();
    assert_eq!(place.0.frames("pump"), numbers);
    assert_eq!(place.0.frames("valve"), [(1, 17)]);
    let values: Vec<_> = place.0.readings("pump").iter().map(|row| row.1).collect();
    let sent = [0.01, 0.02, 0.03, 0.04, 0.05].map(Some);
    assert_eq!(values, sent);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn acknowledged_frames_survive_crashes_on_both_sides() {
    let rounds = rounds(ROUNDS_VARIABLE, ROUNDS_DEFAULT);
    let seed = rand::random();
    println!("seed of the crash times: {seed}");
    let mut moments = SmallRng::seed_from_u64(seed);
    let mut moment = || Duration::from_micros(moments.random_range(0..300_000));
    let mut cluster = Cluster::start(&[]);
    // Slower than the drain: stored frames show in the database while the fleet sends.
    let flags = ["--devices", "50", "--interval", "5ms"];
    let (mut fleet, mut gateway) = Fleet::start(|_| Spooled(cluster.database()), &flags);
    for round in 1..=rounds {
        fleet.await_progress(round);
        // The times are random: the gateway is killed while it drains, and while it cannot.
        std::thread::sleep(moment());
        if round % 2 == 0 {
            gateway = fleet.restart(gateway);
            std::thread::sleep(moment());
        }
        cluster.stop_immediately();
        std::thread::sleep(moment());
        if round % 3 == 0 {
            gateway = fleet.restart(gateway);
        }
        cluster.run();
        fleet.take_stock();
        fleet.await_progress(round);
        assert!(gateway.is_alive(), "round {round}");
    }
    fleet.await_progress(rounds + 1);
    fleet.prove(gateway);
}
