//! `fieldgate query`, as its users see it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::support::site::{AT_US, DATABASE, Site};
use crate::tls::until;

#[tokio::test]
async fn values_are_distinguishable_in_every_format() {
    let (site, _store) = Site::with_readings().await;
    let sql = "SELECT 7 AS n, NULL AS missing, '' AS empty, 0.1 + 0.2 AS real, 9e999 AS big,
               x'00ff' AS bytes, 'a,\"b\"' AS text, 1 AS n";
    let json = site.query(sql, "json");
    let rows: serde_json::Value = serde_json::from_str(&json).unwrap();
    let expected = serde_json::json!([{
        "n": 7, "missing": null, "empty": "", "real": 0.1 + 0.2, "big": "Infinity",
        "bytes": "00ff", "text": "a,\"b\"", "n_2": 1,
    }]);
    assert_eq!(rows, expected);
    let order = [
        "\"n\"", "missing", "empty", "real", "big", "bytes", "\"text\"", "n_2",
    ];
    let places: Vec<usize> = order.iter().map(|key| json.find(key).unwrap()).collect();
    assert!(places.is_sorted(), "{json}");

    let csv = site.query(sql, "csv");
    let (_, line) = csv.trim_end().split_once('\n').unwrap();
    assert!(
        line.starts_with("7,,\"\",0.30000000000000004,Infinity,00ff,"),
        "{line}"
    );
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let record = reader.records().next().unwrap().unwrap();
    assert_eq!(&record[6], "a,\"b\"");

    let table = site.query(sql, "table");
    assert!(
        table.contains("NULL") && table.ends_with("(1 row)\n"),
        "{table}"
    );
}

#[tokio::test]
async fn readings_can_be_queried_while_the_gateway_runs() {
    let (site, _store) = Site::with_readings().await;
    let csv = site.query(
        "SELECT device, channel, unit, ts, value FROM telemetry",
        "csv",
    );
    let expected = format!(
        "device,channel,unit,ts,value\npump-1,temperature,Cel,{},21.57\n\
         pump-1,temperature,Cel,{AT_US},\n",
        AT_US - 1_000_000
    );
    assert_eq!(csv, expected);
    let said = site.run(&["status"]);
    assert_eq!(said.code, 0, "{said:?}");
    for (name, value) in [
        ("devices", "2: 1 never, 1 silent"),
        ("streams", "2"),
        ("frames", "3"),
        ("readings", "2"),
        ("quarantined", "1"),
        ("gaps", "1, 2 frames in total"),
    ] {
        let line = said.out.lines().find(|line| line.trim().starts_with(name));
        let line = line.unwrap_or_default().trim();
        assert_eq!(line.trim_start_matches(name).trim(), value, "{}", said.out);
    }
    assert!(said.out.contains("2026-02-25T06:13:20Z, "), "{}", said.out);
}

#[tokio::test]
async fn statements_that_write_are_rejected() {
    let (site, _store) = Site::with_readings().await;
    let target = site.path("copy.db");
    let vacuum = format!("VACUUM INTO '{}'", target.display());
    for sql in [
        "DELETE FROM devices",
        "WITH a AS (SELECT 1) DELETE FROM devices",
        "CREATE TEMP TABLE t (a)",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "ATTACH 'copy.db' AS copy",
        &vacuum,
    ] {
        site.run(&["query", sql])
            .refused(1, &["query is read-only"]);
    }
    assert!(!target.exists());
    site.run(&["query", "SELECT 1; DELETE FROM devices"])
        .refused(1, &["one statement"]);
    site.run(&["query", "SELECT * FORM devices"])
        .refused(1, &["near \"FORM\""]);
    site.run(&["query", "SELECT * FROM absent"])
        .refused(1, &["no such table: absent"]);
    assert_eq!(
        site.query("SELECT count(*) AS n FROM devices", "csv"),
        "n\n2\n"
    );
}

#[test]
fn a_closed_pipe_ends_a_query_quietly() {
    let site = Site::new();
    assert_eq!(site.run(&["migrate"]).code, 0);
    // An endless query: its end shows that rows are streamed and that the closed pipe is detected.
    let endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c";
    for (format, first) in [("csv", "n\n"), ("json", "[\n")] {
        let mut child = site
            .command(&["query", endless, "--format", format])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, first);
        drop(out);
        let done = child.wait_with_output().unwrap();
        assert_eq!((done.status.code(), &*done.stderr), (Some(0), &b""[..]));
    }
    let table = site.query(endless, "table");
    assert!(table.ends_with("(10000 rows, more omitted: use --format csv or json for all)\n"));
}

/// A gateway that cannot checkpoint its log stops storing; a query ends before that, whatever it waits for.
#[test]
fn a_query_ends_before_it_stops_the_gateway() {
    let site = Site::new();
    assert_eq!(site.run(&["migrate"]).code, 0);
    let endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c";
    let silent =
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c";
    // One waits for a stopped reader of its output, the other has nothing to write yet.
    for sql in [endless, silent] {
        let log = site.path(DATABASE).with_extension("db-wal");
        let mut child = site
            .command(&["query", sql, "--format", "csv"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let log = until(|| fs::OpenOptions::new().append(true).open(&log).ok());
        assert!(child.try_wait().unwrap().is_none());
        // The log becomes long, but nothing in it belongs to the database.
        let mut bytes = 600 << 20;
        until(|| {
            bytes += 1;
            log.set_len(bytes).unwrap();
            child.try_wait().unwrap()
        });
        let done = child.wait_with_output().unwrap();
        let says = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{says}");
        assert!(says.contains("write-ahead log"), "{says}");
        drop(out);
        log.set_len(0).unwrap();
    }
}
