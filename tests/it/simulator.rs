//! The simulator against the real gateway, as users run it.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::database::PgDatabase;
use crate::support::fleet::{simulator, verify};
use crate::support::gateway::Gateway;
use crate::support::logs::keep_of;

/// Runs the simulator to its end and verifies the stored data.
fn run(gateway: &Gateway, dir: &TempDir, journal: &str, flags: &[&str]) {
    let journal = dir.path().join(journal);
    let output = simulator("run")
        .args(["--gateway", &gateway.addr.to_string(), "--journal"])
        .arg(&journal)
        .arg("--key-file")
        .arg(gateway.data_dir().join("fleet.key"))
        .args(flags)
        .output();
    let output = keep_of(output.expect("starts"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{flags:?}: {said}");
    let database = gateway.data_dir().join("fieldgate.db");
    verify(&format!("sqlite://{}", database.display()), &journal);
}

fn water_flow() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("simulator/data/water-flow.csv")
}

#[test]
fn one_device_may_send_real_data_and_then_other_data() {
    let gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let csv = water_flow();
    let csv = csv.to_str().expect("text");
    run(&gateway, &dir, "real", &["--devices", "1", "--replay", csv]);
    run(
        &gateway,
        &dir,
        "made-up",
        &["--devices", "2", "--frames", "3", "--profile", "burst"],
    );
    run(
        &gateway,
        &dir,
        "again",
        &["--devices", "1", "--replay", csv],
    );

    // The daily mean of the file's first day in UTC, calculated independently.
    let mut database = gateway.database();
    let first_day: Vec<(f64, i64)> = database.rows(
        "SELECT round(avg(value), 2), count(*) FROM telemetry WHERE channel = 'Water flow' \
         AND ts < unixepoch('2022-03-21') * 1000000",
    );
    assert_eq!(first_day, [(100.98, 28)]);
}

#[test]
fn all_faults_together_lose_nothing() {
    let gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let faults =
        "disconnect=0.05,duplicate=0.05,corrupt=0.05,slow=0.05,abandon=0.05,malformed=0.01";
    let flags = [
        "--devices",
        "10",
        "--frames",
        "60",
        "--profile",
        "burst",
        "--faults",
        faults,
    ];
    run(&gateway, &dir, "faults", &flags);
}

/// Runs the shortest `bench`: its baseline fills the gateway's tables with separate statements.
fn bench(dir: &Path, store: &str) {
    let figures = dir.join("figures.json");
    let output = simulator("bench")
        .args(["--smoke", "--store", store, "--json"])
        .arg(&figures)
        .output();
    let output = keep_of(output.expect("starts"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let shown = String::from_utf8(output.stdout).expect("text");
    for words in [
        "Throughput",
        "10 x 1 x 1, window 16",
        "readings/s",
        "baseline/s",
    ] {
        assert!(shown.contains(words), "no {words:?} in {shown}");
    }
    let figures: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&figures).expect("figures")).expect("JSON");
    let round = &figures["throughput"][0]["rounds"][0];
    let acked = round["gateway"]["readings_per_s"].as_f64();
    assert!(acked > Some(0.0), "{figures}");
    assert!(round["baseline_readings_per_s"].is_number(), "{figures}");
    // No other file remains.
    assert_eq!(std::fs::read_dir(dir).expect("reads").count(), 1);
}

#[test]
fn a_bench_shows_results_and_leaves_nothing_behind() {
    let dir = TempDir::new().expect("a directory");
    let store = dir.path().join("bench.db");
    bench(dir.path(), &format!("sqlite://{}", store.display()));
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_bench_on_postgres_shows_results() {
    let dir = TempDir::new().expect("a directory");
    let database = PgDatabase::create();
    bench(dir.path(), &database.url());
}
