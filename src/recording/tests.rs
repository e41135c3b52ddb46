//! Tests of the reader: a small sample of each style of public CSV files.

use super::*;

fn options(set: impl FnOnce(&mut ReadOptions)) -> ReadOptions {
    let mut options = ReadOptions::default();
    set(&mut options);
    options
}

fn read_with(csv: &str, options: &ReadOptions) -> Recording {
    Recording::read(csv.as_bytes(), options).unwrap_or_else(|error| panic!("{csv}\n{error}"))
}

fn read(csv: &str) -> Recording {
    read_with(csv, &ReadOptions::default())
}

fn fault_with(csv: &str, options: &ReadOptions) -> String {
    Recording::read(csv.as_bytes(), options)
        .unwrap_err()
        .to_string()
}

fn fault(csv: &str) -> String {
    fault_with(csv, &ReadOptions::default())
}

/// Returns times as text, with fractions of a second if present.
fn times(recording: &Recording) -> Vec<String> {
    let text = |us: &i64| jiff::Timestamp::from_microsecond(*us).unwrap().to_string();
    recording.times_us.iter().map(text).collect()
}

/// Returns channels as `name [unit]` with their values; NaN if there is none.
fn values(recording: &Recording) -> Vec<(String, Vec<Option<f64>>)> {
    let columns = recording.channels.iter().zip(&recording.columns);
    columns
        .map(|(channel, (values, nulls))| {
            let value = |row: usize| match values {
                Values::Integer(values) => {
                    values[row] as f64 / 10_f64.powi(-i32::from(channel.exp10))
                }
                Values::F64(values) => values[row],
                _ => unreachable!(),
            };
            let rows = 0..recording.rows();
            let values = rows.map(|row| (!nulls.contains(row)).then(|| value(row)));
            let name = match channel.unit.as_str() {
                "" => channel.name.clone(),
                unit => format!("{} [{unit}]", channel.name),
            };
            (name, values.collect())
        })
        .collect()
}

fn names(recording: &Recording) -> Vec<String> {
    values(recording)
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

/// Returns whether a note contains the text.
fn has_note(recording: &Recording, words: &str) -> bool {
    recording.notes.iter().any(|note| note.contains(words))
}

const DAY: [&str; 2] = ["2024-03-05T00:00:00Z", "2024-03-06T00:00:00Z"];

#[test]
fn a_plain_file_needs_only_the_guess_of_its_time_column() {
    let recording =
        read("Time,Water flow [l/s]\n2024-03-05T00:00:00Z,1.5\n2024-03-06T01:00:00+01:00,2\n");
    assert_eq!(times(&recording), DAY);
    let expected = ("Water flow [l/s]".to_owned(), vec![Some(1.5), Some(2.0)]);
    assert_eq!(values(&recording), [expected]);
    assert_eq!(
        recording.notes,
        ["guess: time in \"Time\" (--time-column, --time-format)"]
    );
    assert_eq!((recording.bytes, recording.readings()), (75, 2));
}

#[test]
fn separators_are_found() {
    for (separator, name) in [(';', "';'"), ('\t', "tab"), ('|', "'|'"), (' ', "blanks")] {
        let csv = "time,a,b\n2024-03-05,1,2\n2024-03-06,3,4\n".replace(',', &separator.to_string());
        let recording = read(&csv);
        assert_eq!(
            (times(&recording), names(&recording).len()),
            (DAY.map(String::from).to_vec(), 2)
        );
        assert!(
            has_note(&recording, &format!("separator {name}")),
            "{:?}",
            recording.notes
        );
    }
    let padded = "date        temp   rh\n2024-03-05  1.5    20\n2024-03-06  12.25  100\n";
    assert_eq!(names(&read(padded)), ["temp", "rh"]);
}

#[test]
fn a_column_without_values_does_not_change_the_separator() {
    let recording = read(
        "t,v\n2024-03-05 00:00:00+00:00,1.5\n2024-03-06 00:00:00+00:00,\n2024-03-07 00:00:00+00:00,\n",
    );
    assert_eq!(times(&recording)[..2], DAY);
    assert_eq!(values(&recording)[0].1, [Some(1.5), None, None]);
}

#[test]
fn a_decimal_comma_is_found() {
    let recording = read("Datum;T\n05.03.2024;1,5\n06.03.2024;-0,25\n");
    assert_eq!(values(&recording)[0].1, [Some(1.5), Some(-0.25)]);
    assert_eq!(times(&recording), DAY);
    assert!(has_note(&recording, "decimal comma (--decimal)"));
    let recording = read("d,T\n2024-03-05,\"1,234.5\"\n2024-03-06,\"12,000\"\n");
    assert_eq!(values(&recording)[0].1, [Some(1234.5), Some(12000.0)]);
    assert!(has_note(&recording, "',' separates thousands"));
    let unclear = "d;T\n2024-03-05;1,234\n2024-03-06;2,345\n";
    assert_eq!(
        fault(unclear),
        "line 2: ambiguous numbers such as 1,234 (1.234 or 1234); use --decimal , or --thousands ,"
    );
    let comma = options(|options| options.decimal = Some(','));
    assert_eq!(values(&read_with(unclear, &comma))[0].1[0], Some(1.234));
    let grouped = options(|options| options.thousands = Some(','));
    assert_eq!(values(&read_with(unclear, &grouped))[0].1[0], Some(1234.0));
}

#[test]
fn times_are_in_one_column_or_in_several() {
    for csv in [
        "Date,Time,v\n05/03/2024,00:00:00,1\n06/03/2024,00:00:00,2\n25/03/2024,0:00,3\n",
        "Date;Time;v\n05/03/2024;00.00.00;1\n06/03/2024;00.00.00;2\n25/03/2024;00.00.00;3\n",
        "year,month,day,hour,v\n2024,3,5,0,1\n2024,3,6,0,2\n2024,3,25,0,3\n",
        "v,yr,mo,dy\n1,2024,3,5\n2,2024,3,6\n3,2024,3,25\n",
        "year,doy,v\n2024,65,1\n2024,66,2\n2024,85,3\n",
        "date,hr,v\n2024-03-05,0,1\n2024-03-06,0,2\n2024-03-25,0,3\n",
        "v,timestamp\n1,1709596800\n2,1709683200\n3,1711324800\n",
        "ts,v\n1709596800000,1\n1709683200000,2\n1711324800000,3\n",
        "date,v\n20240305,1\n20240306,2\n20240325,3\n",
        "when,v\n3/5/2024 12:00:00 AM,1\n3/6/2024 12:00:00 AM,2\n3/25/2024 12:00:00 AM,3\n",
        "d,v\nMar 5 2024,1\nMar 6 2024,2\nMar 25 2024,3\n",
        "date,v\n45356,1\n45357,2\n45376,3\n",
    ] {
        let recording = read(csv);
        let expected = [DAY[0], DAY[1], "2024-03-25T00:00:00Z"];
        assert_eq!(times(&recording), expected, "{csv}");
        assert_eq!(names(&recording), ["v"], "{csv}");
    }
    let quarters = read("year,quarter,v\n1959,1,5\n1959,2,6\n1959,4,8\n");
    assert_eq!(
        times(&quarters)[1..],
        ["1959-04-01T00:00:00Z", "1959-10-01T00:00:00Z"]
    );
    let buoy = "#YY  MM DD hh mm WSPD GST\n#yr  mo dy hr mn m/s  m/s\n2024 03 05 00 10 5.0 MM\n2024 03 05 00 20 6.0 7.5\n";
    let buoy = read(buoy);
    assert_eq!(
        times(&buoy),
        ["2024-03-05T00:10:00Z", "2024-03-05T00:20:00Z"]
    );
    assert_eq!(names(&buoy), ["WSPD [m/s]", "GST [m/s]"]);
    assert_eq!(values(&buoy)[1].1, [None, Some(7.5)]);
    let hours = read(
        "2024 03 05 00  -12 10\n2024 03 05 01 -9999 11\n2024 03 05 02 -9999 12\n2024 03 05 03 5 12\n",
    );
    assert_eq!(times(&hours)[1], "2024-03-05T01:00:00Z");
    assert_eq!(values(&hours)[0].1, [Some(-12.0), None, None, Some(5.0)]);
    let years = read("1821 269\n1822 321\n1823 585\n");
    assert_eq!(times(&years)[0], "1821-01-01T00:00:00Z");
    let given = options(|options| {
        options.time_column = vec!["2".to_owned()];
        options.time_format = Some("%Y~%j".to_owned());
    });
    let recording = read_with("v,t\n1,2024~065\n", &given);
    assert_eq!(times(&recording), ["2024-03-05T00:00:00Z"]);
    let elapsed = options(|options| {
        options.time_format = Some("elapsed-ms".to_owned());
        options.start = Some("2024-03-05T00:00:00Z".to_owned());
    });
    let recording = read_with("timer,hr\n0.0,1\n8.5,2\n", &elapsed);
    assert_eq!(times(&recording)[1], "2024-03-05T00:00:00.0085Z");
}

#[test]
fn years_are_recognized_by_their_range_and_order() {
    for (csv, expected) in [
        // Row names that skip years, and fractional years.
        (
            "\"\",\"N.Amer\"\n\"1951\",45939\n\"1956\",60423\n\"1957\",64721\n",
            ["1951-01-01T00:00:00Z", "1956-01-01T00:00:00Z"],
        ),
        (
            "t,air\n1871,87.3\n1871.25,75.7\n1871.5,1.5\n",
            ["1871-01-01T00:00:00Z", "1871-04-02T06:00:00Z"],
        ),
        // The month column has two names.
        (
            "YEAR,MON/MMM,ONI\n1871,1,-0.4\n1871,2,-0.5\n1871,3,-0.5\n",
            ["1871-01-01T00:00:00Z", "1871-02-01T00:00:00Z"],
        ),
    ] {
        assert_eq!(times(&read(csv))[..2], expected, "{csv}");
    }
    // Hours and minutes are not years.
    let clock =
        "day,time,temp\n307,930,36.5\n307,2350,36.7\n308,1210,36.9\n308,1220,37.0\n308,1240,36.9\n";
    assert!(fault(clock).contains("no column contains a time"));
    assert!(fault("no,x\n1951,1\n1956,2\n1957,3\n").contains("no column contains a time"));
}

#[test]
fn the_order_of_day_and_month_follows_from_all_rows() {
    let month_first = "t,v\n1/2/2024,1\n1/3/2024,2\n1/13/2024,3\n";
    assert_eq!(times(&read(month_first))[1], "2024-01-03T00:00:00Z");
    let day_first = "t,v\n1/2/2024,1\n3/2/2024,2\n13/2/2024,3\n";
    assert_eq!(times(&read(day_first))[1], "2024-02-03T00:00:00Z");
    // Half an hour around midnight: with the month first, the rows are consecutive.
    let inferred = read("t,v\n2/1/2024 23:30,1\n2/2/2024 0:00,2\n");
    assert_eq!(times(&inferred)[1], "2024-02-02T00:00:00Z");
    assert!(has_note(
        &inferred,
        "month first, inferred from the order of rows"
    ));
    let unclear = "t,v\n2/1/2024 10:00,1\n2/1/2024 10:01,2\n";
    assert!(
        fault(unclear).contains("day and month cannot be distinguished"),
        "{}",
        fault(unclear)
    );
    let given = options(|options| options.time_format = Some("DD/MM/YYYY HH:MM".to_owned()));
    assert_eq!(
        times(&read_with(unclear, &given))[0],
        "2024-01-02T10:00:00Z"
    );
    let mixed = "t,v\n13/1/2024,1\n1/14/2024,2\n";
    assert!(
        fault(mixed).starts_with("line 3: dates use both DD/MM"),
        "{}",
        fault(mixed)
    );
}

#[test]
fn local_times_follow_the_zone() {
    let csv = "t,v\n2024-03-31 01:30,0\n2024-03-31 02:30,1\n2024-03-31 03:30,2\n2024-10-27 02:30,3\n2024-10-27 02:30,4\n";
    let berlin = options(|options| options.time_zone = Some("Europe/Berlin".to_owned()));
    let recording = read_with(csv, &berlin);
    assert_eq!(
        times(&recording),
        [
            "2024-03-31T00:30:00Z",
            "2024-03-31T01:30:00Z",
            "2024-10-27T00:30:00Z",
            "2024-10-27T01:30:00Z",
            // The skipped hour is read as the one after it.
            "2024-03-31T01:30:00Z",
        ]
    );
    assert!(has_note(
        &recording,
        "2 times in the repeated hour: the first pass is summer time (lines 5, 6)"
    ));
    assert!(has_note(
        &recording,
        "1 time in the skipped hour: read with the earlier offset (line 3)"
    ));
    assert!(has_note(
        &read(csv),
        "times without an offset are UTC (--time-zone)"
    ));
    let said = read("Time [UTC],v\n2024-03-05 00:00:00,1\n");
    assert!(!has_note(&said, "--time-zone"));
    let offset = options(|options| options.time_zone = Some("-01:30".to_owned()));
    assert_eq!(times(&read_with(csv, &offset))[0], "2024-03-31T03:00:00Z");
    let wrong = options(|options| options.time_zone = Some("Berlin".to_owned()));
    assert!(fault_with(csv, &wrong).starts_with("--time-zone: unknown time zone"));
}

#[test]
fn missing_values_are_recognized() {
    let csv =
        "t,a,b,c\n2024-03-05,NA,-200,-\n2024-03-06,1,-200,?\n2024-03-07,2,5,3\n2024-03-08,,6,-4\n";
    let recording = read(csv);
    let [a, b, c] = &values(&recording)[..] else {
        panic!()
    };
    assert_eq!(a.1, [None, Some(1.0), Some(2.0), None]);
    assert_eq!(b.1, [None, None, Some(5.0), Some(6.0)]);
    assert_eq!(c.1, [None, None, Some(3.0), Some(-4.0)]);
    assert!(has_note(
        &recording,
        "treating -200 as a missing value (2 cells in 1 column) (--missing)"
    ));
    let given =
        options(|options| options.missing = vec!["NA".into(), "-".into(), "?".into(), "-4".into()]);
    let recording = read_with(csv, &given);
    let [_, b, c] = &values(&recording)[..] else {
        panic!()
    };
    assert_eq!(b.1[0], Some(-200.0));
    assert_eq!(c.1[3], None);
    // A value near others is a valid value.
    let cold = read("t,v\n2024-03-05,-99\n2024-03-06,-99\n2024-03-07,-80\n");
    assert_eq!(values(&cold)[0].1[0], Some(-99.0));
}

#[test]
fn lines_above_the_rows_are_recognized() {
    for (csv, line) in [
        (
            "# a comment, with \"a quote\ntime,v [m]\n2024-03-05,1\n2024-03-06,2\n",
            2,
        ),
        (
            "Station: A\nHeight: 12 m\n\ntime;v [m]\n2024-03-05;1\n2024-03-06;2\n",
            4,
        ),
        ("//x\n%y\ntime,v [m]\n2024-03-05,1\n2024-03-06,2\n", 3),
        ("time,v\n,m\n2024-03-05,1\n2024-03-06,2\n", 1),
        ("TIMESTAMP,v\nTS,m\n,Avg\n2024-03-05,1\n2024-03-06,2\n", 1),
        ("# time v\n2024-03-05 1\n2024-03-06 2\n", 1),
        (
            "703165,\"SAND, X\",AK\ntime,v [m],u\n2024-03-05,1,x\n2024-03-06,2,x\n",
            2,
        ),
    ] {
        let recording = read(csv);
        assert_eq!(times(&recording), DAY, "{csv}");
        let name = names(&recording).remove(0);
        assert!(["v [m]", "v"].contains(&name.as_str()), "{csv}: {name}");
        assert_eq!(
            has_note(&recording, "header in line"),
            line != 1,
            "{csv}: {:?}",
            recording.notes
        );
    }
    let given = options(|options| options.header_line = Some(2));
    let recording = read_with("a,b\nx,y\n2024-03-05,1\n", &given);
    assert_eq!(names(&recording), ["y"]);
}

#[test]
fn readings_are_not_a_header() {
    let recording = read("2024-03-05,1.5,2\n2024-03-06,2.5,3\n");
    assert_eq!(times(&recording), DAY);
    assert_eq!(names(&recording), ["column_2", "column_3"]);
    assert!(has_note(
        &recording,
        "no header: the first line holds readings"
    ));
}

#[test]
fn encodings_and_line_ends_do_not_matter() {
    let csv = "time;T [°C]\n2024-03-05;1\n2024-03-06;2\n";
    let latin: Vec<u8> = csv.chars().map(|char| char as u8).collect();
    let utf16: Vec<u8> = [0xFF, 0xFE]
        .into_iter()
        .chain(csv.encode_utf16().flat_map(u16::to_le_bytes))
        .collect();
    let mark = format!("\u{FEFF}{csv}").into_bytes();
    let crlf = csv.replace('\n', "\r\n").into_bytes();
    let cr = csv.replace('\n', "\r").into_bytes();
    for bytes in [latin, utf16, mark, crlf, cr] {
        let recording = Recording::read(&bytes[..], &ReadOptions::default()).unwrap();
        assert_eq!(
            (times(&recording).len(), names(&recording)),
            (2, vec!["T [°C]".to_owned()])
        );
    }
}

#[test]
fn columns_without_readings_are_skipped_with_a_note() {
    let csv = ",time,place,v,empty,on\n0,2024-03-05,a,1,,True\n1,2024-03-06,b,x,,False\n2,2024-03-07,c,3,,True\n";
    let recording = read(csv);
    assert_eq!(names(&recording), ["v", "on"]);
    assert_eq!(values(&recording)[0].1, [Some(1.0), None, Some(3.0)]);
    assert_eq!(values(&recording)[1].1[0], Some(1.0));
    for note in [
        "skipped columns of text: \"place\"",
        "skipped columns without values: \"empty\"",
        "skipped row numbers: column 1",
        "1 cell of \"v\" stored as NULL: not a number (line 3: \"x\")",
    ] {
        assert!(has_note(&recording, note), "{note}: {:?}", recording.notes);
    }
    let asked = options(|options| options.columns = vec!["place".to_owned()]);
    assert_eq!(
        fault_with(csv, &asked),
        "line 2: \"place\" is not numeric: \"a\""
    );
    let asked = options(|options| options.columns = vec!["on".to_owned(), "4".to_owned()]);
    assert_eq!(names(&read_with(csv, &asked)), ["on", "v"]);
    let asked = options(|options| options.columns = vec!["speed".to_owned()]);
    assert!(fault_with(csv, &asked).starts_with("--columns: no column \"speed\"; columns are "));
}

#[test]
fn names_fit_the_protocol() {
    let long = "the temperature of the water below the bridge (degC)";
    let csv = format!("time,{long},a (m),a (s),a,a\n2024-03-05,1,2,3,4,5\n");
    let recording = read(&csv);
    assert_eq!(
        names(&recording),
        [
            "the temperature of the water bel [degC]",
            "a (m) [m]",
            "a (s) [s]",
            "a",
            "a_2"
        ]
    );
    assert!(has_note(&recording, "names shortened or changed"));
}

#[test]
fn rows_are_sorted_and_none_is_dropped_silently() {
    let csv = "t,v\n2024-03-07,3\n2024-03-05,1\n2024-03-06,2\n2024-03-06,4\nbroken\nlater,5\n2024-03-08,6,7\n2024-03-09,8,\n2024-03-10,9\n2024-03-11,10\n";
    let recording = read(csv);
    assert_eq!(
        values(&recording)[0].1,
        [1.0, 2.0, 3.0, 8.0, 9.0, 10.0, 4.0].map(Some)
    );
    for note in [
        "2 rows skipped: not 2 fields (lines 6, 8: \"1 fields\")",
        "1 row skipped: no time in \"t\" (line 7: \"later\")",
        "3 rows out of time order, sorted (lines 3, 4, 5)",
        "1 row with a repeated time, kept (line 5)",
    ] {
        assert!(has_note(&recording, note), "{note}: {:?}", recording.notes);
    }
    assert_eq!(recording.frame_starts(0..7, 3), [0, 3, 6, 7]);
    assert_eq!(recording.frame_starts(0..7, 10), [0, 6, 7]);
    let backwards = read("t,v\n2024-03-07,3\n2024-03-06,2\n2024-03-05,1\n");
    assert!(has_note(
        &backwards,
        "time goes backwards between rows; sorting them"
    ));
}

#[test]
fn losses_of_numbers_are_reported() {
    let csv = "t,v,n\n2024-03-05,-0.0,9007199254740993\n2024-03-06,1e400,1\n2024-03-07,1e-400,2\n";
    let recording = read(csv);
    for note in [
        "1 value of -0 stored as 0 (line 2: \"-0.0\")",
        "1 whole number beyond 2^53 rounded to the nearest double (line 2: \"9007199254740993\")",
        "1 number too large for a double, stored as NULL (line 3: \"1e400\")",
        "1 number too small for a double, stored as 0 (line 4: \"1e-400\")",
    ] {
        assert!(has_note(&recording, note), "{note}: {:?}", recording.notes);
    }
    assert_eq!(values(&recording)[0].1, [Some(0.0), None, Some(0.0)]);
    assert_eq!(values(&recording)[1].1[0], Some(9_007_199_254_740_992.0));
}

#[test]
fn a_column_of_devices_is_given_or_found() {
    let mut csv = "site,t,v\n".to_owned();
    for site in ["a b", "c"] {
        for day in 1..20 {
            csv += &format!("{site},2024-03-{day:02},{day}\n");
        }
    }
    let found = read(&csv);
    assert!(
        has_note(
            &found,
            "using \"site\" as the device column (2 devices), because 19 rows repeat an earlier time (--device-column)"
        ),
        "{:?}",
        found.notes
    );
    let devices: Vec<(&str, usize)> = found
        .devices
        .iter()
        .map(|device| (device.id.as_str(), device.rows.len()))
        .collect();
    assert_eq!(devices, [("a-b", 19), ("c", 19)]);
    assert!(!has_note(&found, "out of time order"));
    let one = options(|options| options.device_column = Some("none".to_owned()));
    assert_eq!(read_with(&csv, &one).devices.len(), 1);
    let anonymous = read(
        &csv.replace("site,t", "t")
            .replace("a b,", "")
            .replace("c,", ""),
    );
    assert!(has_note(
        &anonymous,
        "19 of 38 rows repeat an earlier time; if the file has an id column, use --device-column"
    ));
    let given = options(|options| options.device_column = Some("v".to_owned()));
    let given_csv = "t,v,w\n2024-03-05,7,1\n2024-03-06,8,2\n";
    assert_eq!(read_with(given_csv, &given).devices.len(), 2);
}

#[test]
fn faults_name_the_line_and_the_likely_cause() {
    for (csv, expected) in [
        ("", "the file is empty"),
        (
            "time,a\n",
            "line 1: no readings: nothing follows the first line",
        ),
        (
            "depth,a\n1,2\n2,3\n",
            "line 2: no column contains a time (1,2); if \"depth\" is elapsed time, try \
         --time-column 1 --time-format elapsed-s --start 2024-01-01T00:00:00Z",
        ),
        (
            "time,a\n2024-03-05,x\n2024-03-06,y\n",
            "line 2: no numeric column",
        ),
        (
            "name,place\na,b\nc,d\n",
            "line 1: no table of times and numbers found",
        ),
    ] {
        let fault = fault(csv);
        assert!(fault.starts_with(expected), "{csv}: {fault}");
    }
    let comma = options(|options| options.separator = Some(','));
    assert!(
        fault_with("time;a\n2024-03-05;1\n2024-03-06;2\n", &comma)
            .ends_with("but some by ';'; try --separator ';'")
    );
    let epoch = options(|options| options.time_format = Some("DD/MM/YYYY".to_owned()));
    assert!(fault_with("t,v\n1709596800,1\n1709596801,2\n", &epoch).contains("--time-format"));
    // Lines are counted as in an editor, including blank lines and line ends within quotes.
    let csv =
        "\u{feff}t,v\r\n2024-03-05,1\r\n\r\n2024-03-06,\"1\n\"\r\n2024-03-07,x\r\n2024-03-08,2\r\n";
    assert!(has_note(&read(csv), "(line 6: \"x\")"));
    let open = format!("t,v\n2024-03-05,\"1\n{}", "2024-03-06,2\n".repeat(100));
    assert!(
        fault(&open).contains("unterminated quoted field"),
        "{}",
        fault(&open)
    );
}

#[test]
fn many_rows_are_read() {
    let rows: String = (0..200_000)
        .map(|row| format!("{},{row}\n", 1_700_000_000 + row))
        .collect();
    let recording = read(&format!("Time,a\n{rows}"));
    assert_eq!(recording.rows(), 200_000);
    let starts = recording.frame_starts(0..200_000, 1_024);
    assert_eq!(starts.len() - 1, 200_000_usize.div_ceil(1_024));
}
