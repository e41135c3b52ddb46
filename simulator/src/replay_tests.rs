//! Tests of the replay, in a separate file because of their length.

use super::*;
use crate::readings::Values;
use fieldgate_protocol::value::Kind;

fn replay(csv: &str, batch: usize) -> Result<Replay, ReplayError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    std::fs::write(&path, csv).unwrap();
    Replay::open(&path, batch, &ReplayOptions::default())
}

fn frame(replay: &Replay, seq: u64) -> Readings {
    let mut readings = Readings::default();
    assert!(replay.fill(0, seq, 0, &mut readings));
    readings
}

#[test]
fn the_recorded_water_flow_is_kept_exactly() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/water-flow.csv");
    let replay = Replay::open(&path, 15, &ReplayOptions::default()).unwrap();
    let flow = Channel {
        name: "Water flow".into(),
        unit: "l/s".into(),
        kind: Kind::Integer,
        exp10: -2,
    };
    assert_eq!(replay.channels(), [flow]);
    assert_eq!((replay.rows(), replay.fingerprint().bytes), (1_268, 41_672));
    let mut lines = std::fs::read_to_string(&path).unwrap();
    lines = lines.split_once('\n').unwrap().1.to_owned();
    let mut lines = lines.lines();
    for seq in 1..=replay.frames(0) {
        let readings = frame(&replay, seq);
        let Values::Integer(raws) = &readings.columns[0].values else {
            panic!()
        };
        for (row, raw) in raws.iter().enumerate() {
            let (time, value) = lines.next().unwrap().split_once(',').unwrap();
            let time: jiff::Timestamp = time.parse().unwrap();
            assert_eq!(readings.time_us(row), time.as_microsecond());
            assert_eq!(*raw as f64 / 100.0, value.parse::<f64>().unwrap());
        }
    }
    assert_eq!(lines.next(), None);
}

#[test]
fn rows_are_sorted_into_frames_of_increasing_times() {
    let seconds = [0, 1, 2, 3, 3, 1, 2, 9];
    let rows = seconds
        .map(|s| format!("2025-06-01T12:00:{s:02}Z,{s}\n"))
        .concat();
    let replay = replay(&format!("Time,a\n{rows}"), 3).unwrap();
    let sent: Vec<Vec<i64>> = (1..=replay.frames(0))
        .map(|seq| {
            let frame = frame(&replay, seq);
            let seconds = |row| frame.time_us(row) / 1_000_000 - 1_748_779_200;
            (0..frame.rows).map(seconds).collect()
        })
        .collect();
    assert_eq!(sent, [vec![0, 1, 2], vec![3, 9], vec![1, 2, 3]]);
    let mut readings = Readings::default();
    assert!(!replay.fill(0, 0, 0, &mut readings) && !replay.fill(0, 4, 0, &mut readings));
    assert_eq!(frame(&replay, 1).step_us, 1_000_000);
    assert_eq!(frame(&replay, 2).step_us, 6_000_000);
}

#[test]
fn a_fault_names_file_and_line() {
    let fault = |csv: &str| {
        let error = replay(csv, 15).unwrap_err().to_string();
        error[error.find("a.csv").unwrap()..].to_owned()
    };
    let error = fault("depth,a\n1,2\n2,3\n");
    assert!(
        error.starts_with("a.csv, line 2: no column contains a time"),
        "{error}"
    );
}

#[test]
fn a_column_of_devices_makes_one_device_each() {
    let csv = "site,time,v\nb,2025-06-01T00:00Z,1\na,2025-06-01T00:00Z,2\nb,2025-06-01T00:01Z,3\n";
    let options = ReplayOptions {
        read: ReadOptions {
            device_column: Some("site".to_owned()),
            ..ReadOptions::default()
        },
        last_us: Some(1_800_000_000_500_000),
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    std::fs::write(&path, csv).unwrap();
    let replay = Replay::open(&path, 15, &options).unwrap();
    assert_eq!(
        (replay.devices(), replay.id(0), replay.id(1)),
        (2, Some("b"), Some("a"))
    );
    let again = Replay::reopen(replay.fingerprint(), 15).unwrap();
    for (device, times) in [(0, vec![-60, 0]), (1, vec![-60]), (2, vec![-60, 0])] {
        let mut readings = Readings::default();
        for replay in [&replay, &again] {
            assert_eq!(replay.frames(device), 1);
            assert!(replay.fill(device, 1, 0, &mut readings));
            let seconds =
                (0..readings.rows).map(|row| readings.time_us(row) / 1_000_000 - 1_800_000_000);
            assert_eq!(seconds.collect::<Vec<_>>(), times);
        }
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = Replay::open(Path::new("no/such.csv"), 1, &ReplayOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("no/such.csv: "), "{error}");
}

#[test]
fn many_rows_are_read() {
    let rows: String = (0..100_000)
        .map(|row| {
            format!(
                "2025-06-01T{:02}:{:02}:{:02}Z,{row}\n",
                row / 3_600 % 24,
                row / 60 % 60,
                row % 60
            )
        })
        .collect();
    let replay = replay(&format!("Time,a\n{rows}"), 1_024).unwrap();
    assert_eq!(replay.rows(), 100_000);
    let rows: usize = (1..=replay.frames(0))
        .map(|seq| frame(&replay, seq).rows)
        .sum();
    assert_eq!(rows, 100_000);
}
