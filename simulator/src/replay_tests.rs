//! Tests of the replay, beside it in a file of their own for their length.

use super::*;

fn replay(csv: &str, batch: usize) -> Result<Replay, ReplayError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    std::fs::write(&path, csv).unwrap();
    Replay::open(&path, batch)
}

/// What is wrong with a file, from its name on.
fn fault(csv: &str) -> String {
    let error = replay(csv, 15).unwrap_err().to_string();
    error[error.find("a.csv").unwrap()..].to_owned()
}

fn frame(replay: &Replay, seq: u64) -> Readings {
    let mut readings = Readings::default();
    assert!(replay.fill(seq, 0, &mut readings));
    readings
}

#[test]
fn the_recorded_water_flow_is_kept_exactly() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/water-flow.csv");
    let replay = Replay::open(&path, 15).unwrap();
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
    for seq in 1..=replay.frames() {
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
fn times_may_be_written_in_several_ways() {
    let noon = 1_748_779_200_000_000;
    for time in [
        "2025-06-01T12:00:00Z",
        "2025-06-01T14:00:00+02:00",
        "2025-06-01 07:00:00-05:00",
        "2025-06-01 12:00:00 UTC",
        "2025-06-01 14:00:00.000 +02:00",
        "2025-06-01T12:00:00.0000009Z",
    ] {
        let replay = replay(&format!("Time,a\n{time},1\n"), 15).unwrap();
        assert_eq!(frame(&replay, 1).t0_us, noon, "{time}");
    }
    let replay = replay("Time [UTC],a\n2025-06-01 12:00:00,1\n", 15).unwrap();
    assert_eq!(frame(&replay, 1).t0_us, noon);
}

#[test]
fn a_time_without_offset_is_not_guessed() {
    assert_eq!(
        fault("Time,a\n2025-06-01 12:00:00,1\n"),
        "a.csv, line 2, column 1 (Time): \"2025-06-01 12:00:00\" does not say its offset from UTC; add \
         it, or head the column \"Time [UTC]\""
    );
}

#[test]
fn byte_order_mark_crlf_quotes_and_columns_in_any_order_are_fine() {
    let csv = "\u{feff}\"Tank, level [m]\",Time,door\r\n\"1.5\",2025-06-01T12:00:00Z,0\r\n\
               ,2025-06-01T12:00:01Z,1\r\n2.25, 2025-06-01T12:00:03Z ,NaN\r\n";
    let replay = replay(csv, 15).unwrap();
    let names: Vec<&str> = replay
        .channels()
        .iter()
        .map(|channel| channel.name.as_str())
        .collect();
    assert_eq!(names, ["Tank, level", "door"]);
    let readings = frame(&replay, 1);
    assert_eq!(
        (readings.step_us, &readings.offsets_us),
        (0, &vec![0, 1_000_000, 3_000_000])
    );
    let Values::Integer(levels) = &readings.columns[0].values else {
        panic!()
    };
    assert_eq!((levels[0], levels[2]), (150, 225));
    let nulls = |column: usize| (0..3).map(move |row| (column, row));
    let nulls: Vec<(usize, usize)> = nulls(0)
        .chain(nulls(1))
        .filter(|&(column, row)| readings.columns[column].nulls.contains(row))
        .collect();
    assert_eq!(nulls, [(0, 1), (1, 2)]);
}

#[test]
fn a_frame_ends_when_full_and_before_a_time_that_does_not_increase() {
    let seconds = [0, 1, 2, 3, 3, 1, 2, 9];
    let rows = seconds
        .map(|s| format!("2025-06-01T12:00:{s:02}Z,{s}\n"))
        .concat();
    let replay = replay(&format!("Time,a\n{rows}"), 3).unwrap();
    let frames: Vec<usize> = (1..=replay.frames())
        .map(|seq| frame(&replay, seq).rows)
        .collect();
    assert_eq!(frames, [3, 1, 1, 3]);
    let mut readings = Readings::default();
    assert!(!replay.fill(0, 0, &mut readings) && !replay.fill(5, 0, &mut readings));
    assert_eq!(frame(&replay, 1).step_us, 1_000_000);
    let uneven = frame(&replay, 4);
    assert_eq!(uneven.time_us(2) - uneven.t0_us, 8_000_000);
}

#[test]
fn faults_are_told_with_line_and_column() {
    let row = "2025-06-01T12:00:00Z";
    let cases = [
        (
            "",
            "line 1: no readings: nothing follows the header".to_owned(),
        ),
        (
            "Time,a\n",
            "line 1: no readings: nothing follows the header".to_owned(),
        ),
        (
            "Time,a\n1,2\n",
            "line 2: no column holds a time such as 2025-06-01T12:00:00Z".to_owned(),
        ),
        (
            &format!("Time\n{row}\n"),
            "line 1: no column with values beside that of the time".into(),
        ),
        (
            &format!("Time,a\n{row},1\n\n{row},x\n"),
            "line 4, column 2 (a): \"x\" is not a number".into(),
        ),
        (
            &format!("Time,a\n{row},1\nlater,2\n"),
            "line 3, column 1 (Time): \"later\" is not a time \
          such as 2025-06-01T12:00:00Z"
                .into(),
        ),
        (
            &format!("Time,a\n{row},1\n{row}\n"),
            "line 3: 1 columns where the header has 2".into(),
        ),
        (
            &format!("Time,a,a [m]\n{row},1,2\n"),
            "line 1, column 3 (a [m]): another column has the same \
          name"
                .into(),
        ),
        (
            &format!("Time,[m]\n{row},1\n"),
            "line 1, column 2 ([m]): the channel has no name".into(),
        ),
        (
            &format!("Time,{}\n{row}{}\n", [const { "b" }; 33].concat(), ",1"),
            format!(
                "line 1, column 2 \
          ({}): the channel's name is longer than 32 bytes",
                "b".repeat(33)
            ),
        ),
    ];
    for (csv, expected) in cases {
        assert_eq!(fault(csv), format!("a.csv, {expected}"), "{csv}");
    }
    let crlf = format!("\u{feff}Time,a\r\n{row},1\r\n\r\n{row},\"1\n\"\r\n{row},x\r\n");
    assert_eq!(
        fault(&crlf),
        "a.csv, line 6, column 2 (a): \"x\" is not a number"
    );
    let many: String = (0..33).map(|column| format!(",c{column}")).collect();
    let csv = format!("Time{many}\n{row}{}\n", ",1".repeat(33));
    assert!(fault(&csv).ends_with("33 columns with values; a device has at most 32 channels"));
}

#[test]
fn a_missing_file_is_named() {
    let error = Replay::open(Path::new("no/such.csv"), 1)
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
    let rows: usize = (1..=replay.frames())
        .map(|seq| frame(&replay, seq).rows)
        .sum();
    assert_eq!(rows, 100_000);
}
