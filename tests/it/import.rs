//! `fieldgate import` against a real gateway: exactly once, even if import or gateway is killed.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::database::PgDatabase;
use crate::support::gateway::{Gateway, command};
use crate::support::logs::keep_of;
use crate::support::{PATIENCE, eventually};

/// Rows of the file: enough for an import to take some time, in about 680 frames.
const ROWS: i64 = 120_000;
/// 2024-01-01T00:00:00Z.
const START_S: i64 = 1_704_067_200;

/// A gateway's store, with the queries of the tests.
trait Place {
    fn flags(&self) -> Vec<String>;
    fn durable_seq(&mut self, gateway: &Gateway) -> i64;
    fn readings(&mut self, gateway: &Gateway) -> Vec<(i64, Option<f64>)>;
    fn streams(&mut self, gateway: &Gateway) -> i64;
}

const DURABLE: &str = "SELECT COALESCE(max(s.durable_seq), 0) FROM streams s JOIN devices d ON d.id = s.device_id \
                       WHERE d.name = 'well'";
const STREAMS: &str =
    "SELECT count(*) FROM streams s JOIN devices d ON d.id = s.device_id WHERE d.name = 'well'";

struct File;

impl Place for File {
    fn flags(&self) -> Vec<String> {
        Vec::new()
    }

    fn durable_seq(&mut self, gateway: &Gateway) -> i64 {
        gateway.database().count(DURABLE)
    }

    fn readings(&mut self, gateway: &Gateway) -> Vec<(i64, Option<f64>)> {
        gateway.database().readings("well")
    }

    fn streams(&mut self, gateway: &Gateway) -> i64 {
        gateway.database().count(STREAMS)
    }
}

impl Place for PgDatabase {
    fn flags(&self) -> Vec<String> {
        vec!["--store".to_owned(), self.url()]
    }

    fn durable_seq(&mut self, _: &Gateway) -> i64 {
        self.session().count(DURABLE)
    }

    fn readings(&mut self, _: &Gateway) -> Vec<(i64, Option<f64>)> {
        PgDatabase::readings(self, "well")
    }

    fn streams(&mut self, _: &Gateway) -> i64 {
        self.session().count(STREAMS)
    }
}

fn value(row: i64) -> f64 {
    (row * 37 % 1_000) as f64 / 10.0
}

/// Writes the file like a data logger in Germany, and returns its path.
fn history(dir: &Path) -> PathBuf {
    let mut csv = "Zeit;Pegel [m]\r\n".to_owned();
    for row in 0..ROWS {
        let time = jiff::Timestamp::from_second(START_S + 60 * row).expect("a time");
        let local = time.to_zoned(jiff::tz::TimeZone::fixed(jiff::tz::offset(1)));
        let value = format!("{:.1}", value(row)).replace('.', ",");
        writeln!(csv, "{};{value}\r", local.strftime("%d.%m.%Y %H:%M")).expect("writes");
    }
    let path = dir.join("well.csv");
    std::fs::write(&path, csv).expect("writes");
    path
}

fn import(gateway: &Gateway, flags: &[String], file: &Path) -> Command {
    let mut import = command(&["import", "--time-zone", "+01:00", "--gateway"]);
    import
        .arg(gateway.addr.to_string())
        .arg("--data-dir")
        .arg(gateway.data_dir())
        .args(flags)
        .arg(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    import
}

fn finish(mut import: Command) -> Output {
    keep_of(import.output().expect("starts"))
}

/// Starts an import and waits until more of it is stored.
fn begin(place: &mut impl Place, gateway: &Gateway, flags: &[String], file: &Path) -> Child {
    let before = place.durable_seq(gateway);
    let mut import = import(gateway, flags, file).spawn().expect("starts");
    eventually("more is stored", PATIENCE, || {
        assert!(import.try_wait().expect("a child").is_none(), "ended early");
        place.durable_seq(gateway) > before
    });
    import
}

fn kill(mut import: Child) {
    import.kill().expect("kills");
    import.wait().expect("a child");
}

/// Kills the import, then the gateway, and then the import repeatedly.
fn is_stored_once(mut place: impl Place) {
    let dir = TempDir::new().expect("a directory");
    let file = history(dir.path());
    let flags = place.flags();
    let gateway_flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let gateway = Gateway::start_in(dir.path(), &gateway_flags);

    kill(begin(&mut place, &gateway, &flags, &file));
    let first = place.durable_seq(&gateway);
    let import = begin(&mut place, &gateway, &flags, &file);
    gateway.kill();
    kill(import);

    let gateway = Gateway::start_in(dir.path(), &gateway_flags);
    let second = place.durable_seq(&gateway);
    let done = finish(self::import(&gateway, &flags, &file));
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let last = place.durable_seq(&gateway);
    assert!(
        0 < first && first < second && second < last,
        "{first} {second} {last}"
    );
    assert!(
        said.contains(&format!(", {second} of them earlier")),
        "{said}"
    );

    let expected: Vec<(i64, Option<f64>)> = (0..ROWS)
        .map(|row| ((START_S + 60 * row) * 1_000_000, Some(value(row))))
        .collect();
    assert!(
        place.readings(&gateway) == expected,
        "other readings are stored"
    );

    let again = finish(self::import(&gateway, &flags, &file));
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(
        again.status.success() && said.contains("nothing to do"),
        "{said}"
    );
    assert!(
        place.readings(&gateway) == expected,
        "a second import stored something"
    );
    assert_eq!(place.streams(&gateway), 1);
}

#[test]
fn an_import_is_stored_once_despite_kills() {
    is_stored_once(File);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn an_import_is_stored_once_in_postgres_despite_kills() {
    is_stored_once(PgDatabase::create());
}

#[test]
fn an_import_reports_its_guesses_and_creates_a_device_per_site() {
    let gateway = Gateway::start(&[]);
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("sites.csv");
    let header: String = (0..40).map(|column| format!(",c{column}")).collect();
    let mut csv = format!("date,site{header}\n");
    for site in ["north", "south 1"] {
        for day in 1..=20 {
            writeln!(csv, "2024-03-{day:02},{site}{}", ",1.5".repeat(40)).expect("writes");
        }
    }
    std::fs::write(&file, csv).expect("writes");

    let dry = finish({
        let mut dry = import(&gateway, &[], &file);
        dry.arg("--dry-run");
        dry
    });
    let said = String::from_utf8_lossy(&dry.stdout).into_owned();
    assert!(said.contains("device sites-south-1: 20 rows"), "{said}");
    let guesses = String::from_utf8_lossy(&dry.stderr).into_owned();
    assert!(
        guesses.contains("guess: using \"site\" as the device column (2 devices)"),
        "{guesses}"
    );
    let mut database = gateway.database();
    assert_eq!(database.count("SELECT count(*) FROM devices"), 0);

    let done = finish(import(&gateway, &[], &file));
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    // 40 channels need two schemas.
    let stored: Vec<(String, i64, i64)> = database.rows(
        "SELECT d.name, count(*), count(DISTINCT s.channel) FROM readings r JOIN series s ON s.id = r.series_id \
         JOIN devices d ON d.id = s.device_id GROUP BY 1 ORDER BY 1",
    );
    let expected = ["sites-north", "sites-south-1"].map(|name| (name.to_owned(), 800, 40));
    assert_eq!(stored, expected);
    let qualities = "SELECT count(*) FROM frames WHERE type = 17 AND quality IS NOT 0";
    assert_eq!(database.count(qualities), 0);
}

#[test]
fn an_import_that_cannot_begin_prints_the_reason() {
    let gateway = Gateway::start(&["--registration", "closed"]);
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("a.csv");
    std::fs::write(&file, "time,v\n2024-03-05,1\n").expect("writes");
    let said = |import: Command| {
        let ended = finish(import);
        assert_eq!(ended.status.code(), Some(1));
        String::from_utf8_lossy(&ended.stderr).into_owned()
    };
    let closed = said(import(&gateway, &[], &file));
    assert!(
        closed.contains("run `fieldgate device add` first"),
        "{closed}"
    );
    let missing = dir.path().join("b.csv");
    let missing = said(import(&gateway, &[], &missing));
    assert!(missing.contains("b.csv: No such file"), "{missing}");
    std::fs::write(&file, "depth,v\n1,1\n2,2\n").expect("writes");
    let wrong = said(import(&gateway, &[], &file));
    assert!(
        wrong.contains("a.csv: line 2: no column contains a time"),
        "{wrong}"
    );
}
