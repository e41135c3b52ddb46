//! Device administration takes effect in running gateways and open sessions: line 2 of
//! the security checklist, for every kind of store.

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;

use crate::gateways::Pair;
use crate::handshake::AT_ONCE;
use crate::support::client::{Heard, Link, Login};
use crate::support::database::PgDatabase;
use crate::support::gateway::{Gateway, command};
use crate::support::logs::{keep_key, keep_of};
use crate::support::messages::{T0_US, ping, readings, readings_at};
use crate::tls::until;

/// A gateway, and its store as commands reach it.
pub struct Place {
    pub gateway: Gateway,
    database: Option<PgDatabase>,
}

impl Place {
    pub fn sqlite(flags: &[&str]) -> Place {
        Place {
            gateway: Gateway::start(&[&AT_ONCE[..], flags].concat()),
            database: None,
        }
    }

    pub fn postgres(flags: &[&str]) -> Place {
        let database = PgDatabase::create();
        let url = database.url();
        Place {
            gateway: Gateway::start(&[&AT_ONCE[..], &["--store", &url], flags].concat()),
            database: Some(database),
        }
    }

    /// Runs `fieldgate device`, which must succeed, and returns its output.
    pub fn device(&self, args: &[&str]) -> String {
        said(self.run(args, ""))
    }

    /// Runs it with an expected failure, and returns its one line of stderr.
    pub fn device_fails(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args, "");
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// Runs `fieldgate device import` on a file, which must succeed, and returns its output.
    pub fn import(&self, csv: &str) -> String {
        said(self.run(&["import", "-"], csv))
    }

    pub fn run(&self, args: &[&str], input: &str) -> Output {
        let url = self.database.as_ref().map(PgDatabase::url);
        run(self.gateway.data_dir(), url.as_deref(), args, input)
    }

    /// Returns the device with the key that `device key` prints.
    pub fn login(&self, name: &str) -> Login {
        with_key(self.gateway.device(name), &self.device(&["key", name]))
    }

    /// Returns the kinds and codes of the device's events except presence, oldest first.
    pub fn events(&self, name: &str) -> String {
        self.query(&format!(
            "SELECT kind, code FROM device_events WHERE device_id =
                 (SELECT id FROM devices WHERE name = '{name}') AND kind <> 'presence' ORDER BY id"
        ))
    }

    pub fn query(&self, sql: &str) -> String {
        let url = self.database.as_ref().map(PgDatabase::url);
        let mut query = command(&["query", sql, "--format", "csv"]);
        query.arg("--data-dir").arg(self.gateway.data_dir());
        query.args(url.iter().flat_map(|url| ["--store", url]));
        said(keep_of(query.output().expect("runs")))
    }
}

fn with_key(login: Login, digits: &str) -> Login {
    let digits = digits.trim_end();
    assert_eq!(digits.len(), 64);
    let byte = |i: usize| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).expect("hex");
    let key = std::array::from_fn(byte);
    keep_key(&key);
    Login { key, ..login }
}

pub fn run(data_dir: &Path, store: Option<&str>, args: &[&str], input: &str) -> Output {
    let mut device = command(&["device"]);
    device.args(args).arg("--data-dir").arg(data_dir);
    device.args(store.iter().flat_map(|url| ["--store", url]));
    let mut process = device
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stdin = process.stdin.take().expect("piped");
    // If it fails before it reads, its output shows that.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    keep_of(process.wait_with_output().expect("ends"))
}

pub fn said(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).expect("text")
}

fn answer(gateway: &Gateway, login: &Login) -> (Link, Heard) {
    let mut link = Link::open(gateway.addr);
    let (auth, _) = login.auth(link.challenge(login));
    link.send(&auth);
    let heard = link.hear();
    (link, heard)
}

fn assert_refused(gateway: &Gateway, login: &Login, expected: Code) {
    match answer(gateway, login).1 {
        Heard::Bye { code, .. } if code == expected as u8 => {}
        other => panic!("{other:?} instead of BYE {}", expected as u8),
    }
}

/// Logs in as soon as the gateway has applied the change that allows it; until then it must reject the login with this
/// code.
pub fn get_in(gateway: &Gateway, login: &Login, meanwhile: Code) -> Link {
    let begun = Instant::now();
    loop {
        match answer(gateway, login) {
            (link, Heard::Welcome(_)) => return link,
            (_, Heard::Bye { code, .. }) if code == meanwhile as u8 => {}
            (_, other) => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "never gets in");
    }
}

/// Connects two devices and waits until the store has them.
fn two_devices(place: &Place) -> [Link; 2] {
    let links = ["pump", "other"].map(|name| {
        let (mut link, _) = place.gateway.connect(name);
        link.send(&readings(1));
        link.expect_ack(1);
        link
    });
    // A spool copies them to the database a moment later.
    let begun = Instant::now();
    while place.device(&["list"]).matches("yes").count() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(60), "never listed");
    }
    links
}

fn a_disabled_device_is_disconnected(place: &Place) {
    let [mut pump, mut other] = two_devices(place);
    let login = place.gateway.device("pump");
    assert_eq!(place.device(&["disable", "pump"]), "pump is disabled\n");
    pump.expect_bye(Code::Disabled);
    assert_refused(&place.gateway, &login, Code::Disabled);
    let already = place.device(&["disable", "pump"]);
    assert_eq!(already, "pump is already disabled\n");
    place.device(&["enable", "pump"]);
    let mut pump = get_in(&place.gateway, &login, Code::Disabled);
    pump.ping();
    other.ping();
}

#[test]
fn c02_a_disabled_device_is_disconnected() {
    let place = Place::sqlite(&[]);
    a_disabled_device_is_disconnected(&place);
    // The last event of a session is written after its peer has gone, so it may be stored after later events.
    let begun = Instant::now();
    let mut events = place.events("pump");
    while !["disconnected,52", "refused,52"]
        .iter()
        .all(|line| events.contains(line))
    {
        assert!(begun.elapsed() < Duration::from_secs(60), "{events}");
        events = place.events("pump");
    }
    for line in ["disabled,0", "disconnected,52", "enabled,0"] {
        assert_eq!(events.matches(line).count(), 1, "{line}: {events}");
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn c02_a_disabled_device_is_disconnected_in_postgres_with_and_without_a_spool() {
    a_disabled_device_is_disconnected(&Place::postgres(&[]));
    a_disabled_device_is_disconnected(&Place::postgres(&["--spool"]));
}

/// The database is restored to its state before any change, as from a backup.
fn changes_lost_by_a_restore_no_longer_apply(place: &mut Place) {
    let [mut pump, mut other] = two_devices(place);
    let login = place.gateway.device("pump");
    place.device(&["disable", "pump"]);
    pump.expect_bye(Code::Disabled);
    assert_refused(&place.gateway, &login, Code::Disabled);
    let put_back = "BEGIN; UPDATE devices SET enabled = 1, revision = 0;
        UPDATE device_revision SET latest = 0; COMMIT";
    let database = place.database.as_mut().expect("Postgres");
    database.session().execute(put_back);
    // Until the gateway has noticed, a session ends as soon as it has begun.
    let begun = Instant::now();
    let mut pump = loop {
        let mut pump = get_in(&place.gateway, &login, Code::Disabled);
        pump.send_in_vain(&ping(77, 0, 0));
        match pump.hear() {
            Heard::Pong { .. } => break pump,
            Heard::Bye { code, .. } if code == Code::Disabled as u8 => {}
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "never stays in");
    };
    other.ping();
    // The number of this change was used before.
    assert_eq!(place.device(&["disable", "pump"]), "pump is disabled\n");
    pump.expect_bye(Code::Disabled);
    assert_refused(&place.gateway, &login, Code::Disabled);
    other.ping();
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn changes_lost_by_a_restore_no_longer_apply_in_postgres_with_and_without_a_spool() {
    changes_lost_by_a_restore_no_longer_apply(&mut Place::postgres(&[]));
    changes_lost_by_a_restore_no_longer_apply(&mut Place::postgres(&["--spool"]));
}

fn a_replaced_key_is_rejected(place: &Place) {
    let [mut pump, mut other] = two_devices(place);
    let first = place.gateway.device("pump");
    assert_eq!(place.login("pump").key, first.key);
    place.device(&["rotate-key", "pump"]);
    pump.expect_bye(Code::Authentication);
    assert_refused(&place.gateway, &first, Code::Authentication);
    let second = place.login("pump");
    assert_ne!(second.key, first.key);
    let mut pump = get_in(&place.gateway, &second, Code::Authentication);

    place.device(&["rotate-key", "pump", "--own-key"]);
    pump.expect_bye(Code::Authentication);
    assert_refused(&place.gateway, &second, Code::Authentication);
    let own = place.login("pump");
    let mut pump = get_in(&place.gateway, &own, Code::Authentication);
    pump.ping();
    other.ping();
}

#[test]
fn c02_a_replaced_key_is_rejected() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut place = Place {
        gateway: Gateway::start_in(dir.path(), &AT_ONCE),
        database: None,
    };
    a_replaced_key_is_rejected(&place);
    let (first, own) = (place.gateway.device("pump"), place.login("pump"));
    // The end of a session is stored a moment after the peer was answered.
    let events = until(|| {
        let events = place.events("pump");
        events.contains("refused,50").then_some(events)
    });
    assert_eq!(events.matches("key_changed,0").count(), 2, "{events}");

    // The next gateway knows the keys from its start.
    let restart = |place: &mut Place| {
        place.gateway.terminate();
        assert!(place.gateway.wait().status.success());
        place.gateway = Gateway::start_in(dir.path(), &AT_ONCE);
    };
    restart(&mut place);
    assert_refused(&place.gateway, &first, Code::Authentication);
    let (_, heard) = answer(&place.gateway, &own);
    assert!(matches!(heard, Heard::Welcome(_)), "{heard:?}");

    // Under another fleet key, sealed keys cannot be opened, and a derived key is a new one.
    place.gateway.terminate();
    assert!(place.gateway.wait().status.success());
    std::fs::remove_file(dir.path().join("fleet.key")).expect("removes");
    let data_dir = dir.path().to_str().expect("UTF-8");
    let adopted =
        crate::support::gateway::run(&["fleet-key", "adopt", "--create", "--data-dir", data_dir]);
    assert!(adopted.status.success(), "{}", adopted.stderr);
    place.gateway = Gateway::start_in(dir.path(), &AT_ONCE);
    place.gateway.wait_for_line("wrong fleet key or damaged");
    assert_refused(&place.gateway, &own, Code::Authentication);
    let says = place.device_fails(&["key", "pump"], 1);
    assert!(says.contains("wrong fleet key"), "{says}");
    place.device(&["rotate-key", "pump", "--derived-key"]);
    let login = place.login("pump");
    get_in(&place.gateway, &login, Code::Authentication);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn c02_a_replaced_key_is_rejected_in_postgres_with_and_without_a_spool() {
    a_replaced_key_is_rejected(&Place::postgres(&[]));
    a_replaced_key_is_rejected(&Place::postgres(&["--spool"]));
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn c02_a_change_reaches_every_gateway_on_a_database() {
    let database = PgDatabase::create();
    let pair = Pair::start(&database);
    let url = database.url();
    let data_dir = pair.gateways[0].data_dir();
    let mut links = pair.gateways.each_ref().map(|gateway| {
        let (mut link, _) = gateway.connect("pump");
        link.ping();
        link
    });
    said(run(data_dir, Some(&url), &["rotate-key", "pump"], ""));
    for link in &mut links {
        link.expect_bye(Code::Authentication);
    }
    said(run(data_dir, Some(&url), &["disable", "pump"], ""));
    let digits = said(run(data_dir, Some(&url), &["key", "pump"], ""));
    for gateway in &pair.gateways {
        assert_refused(gateway, &gateway.device("pump"), Code::Authentication);
        // Both have ended their sessions, so both have the new key.
        let login = with_key(gateway.device("pump"), &digits);
        assert_refused(gateway, &login, Code::Disabled);
    }
}

/// With closed registration, a key derived from the fleet key is not enough.
fn only_those_that_were_added_may_connect(place: &Place) {
    let gateway = &place.gateway;
    let pump = gateway.device("pump");
    assert_refused(gateway, &pump, Code::Authentication);
    let added = place.device(&["add", "pump", "valve"]);
    assert_eq!(added.lines().count(), 2, "{added}");
    let mut link = get_in(gateway, &pump, Code::Authentication);
    link.ping();
    assert_refused(gateway, &gateway.device("other"), Code::Authentication);
    let says = place.device_fails(&["show", "other"], 1);
    assert!(says.contains("unknown device"), "{says}");
}

#[test]
fn only_devices_that_were_added_may_connect() {
    only_those_that_were_added_may_connect(&Place::sqlite(&["--registration", "closed"]));
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn only_devices_that_were_added_may_connect_to_postgres() {
    let closed = ["--registration", "closed"];
    only_those_that_were_added_may_connect(&Place::postgres(&closed));
    let spooled = ["--registration", "closed", "--spool"];
    only_those_that_were_added_may_connect(&Place::postgres(&spooled));
}

/// Claims of unauthenticated peers fill neither the audit trail nor the device list.
#[test]
fn rejections_are_recorded_for_existing_devices_only() {
    let place = Place::sqlite(&["--log-lines-per-address-max", "3"]);
    let _links = two_devices(&place);
    let wrong = |name| Login {
        key: [7; 32],
        ..place.gateway.device(name)
    };
    assert_refused(&place.gateway, &wrong("absent"), Code::Authentication);
    for _ in 0..10 {
        assert_refused(&place.gateway, &wrong("pump"), Code::Authentication);
    }
    // A later commit, so that refusals before it are stored.
    let (_link, _) = place.gateway.connect("later");
    let begun = Instant::now();
    while place.events("pump").matches("refused,50").count() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    assert_eq!(place.events("pump").matches("refused,50").count(), 2);
    assert_eq!(place.events("absent").lines().count(), 1);
    assert!(!place.device(&["list"]).contains("absent"));
}

/// The session of a removed device ends, its data is deleted, and the next device with its name is a new one.
fn a_removed_device_starts_as_a_new_one(place: &Place) {
    place.device(&["add", "fan", "--own-key"]);
    let fan = place.login("fan");
    get_in(&place.gateway, &fan, Code::Authentication);
    let (mut pump, _) = place.gateway.connect("pump");
    // Dense enough to be compacted immediately; otherwise that takes a minute.
    let dense = |seq| readings_at(seq, T0_US + seq.cast_signed() * 60_000_000, &[7; 130]);
    pump.send(&dense(1));
    pump.expect_ack(1);
    let shown = place.device(&["remove", "pump"]);
    for words in ["readings", "130", "nothing removed", "--yes"] {
        assert!(shown.contains(words), "{shown}");
    }
    pump.send(&dense(2));
    pump.expect_ack(2);
    let (removed, mut again) = std::thread::scope(|scope| {
        let removing = scope.spawn(|| place.device(&["remove", "pump", "--yes"]));
        pump.expect_bye(Code::Disabled);
        let (mut again, welcomed) = place.gateway.connect("pump");
        assert_eq!(welcomed.durable_seq, 0);
        again.send(&dense(1));
        again.expect_ack(1);
        (removing.join().expect("no panic"), again)
    });
    assert!(removed.ends_with("removed pump\n"), "{removed}");
    place.device(&["remove", "fan", "--yes"]);
    // Its individual key was removed with it.
    get_in(
        &place.gateway,
        &place.gateway.device("fan"),
        Code::Authentication,
    );
    again.send(&dense(2));
    again.expect_ack(2);
    let listed = place.device(&["list"]);
    assert!(listed.contains("(2 devices)"), "{listed}");
    assert!(!listed.contains('#'), "{listed}");
    let sql = "SELECT device, count(*) AS n FROM telemetry GROUP BY device";
    assert_eq!(place.query(sql), "device,n\npump,260\n");
    let says = place.device_fails(&["remove", "absent", "--yes"], 1);
    assert!(says.contains("unknown device"), "{says}");
}

#[test]
fn a_removed_device_starts_as_a_new_one_in_sqlite() {
    a_removed_device_starts_as_a_new_one(&Place::sqlite(&[]));
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_removed_device_starts_as_a_new_one_in_postgres() {
    a_removed_device_starts_as_a_new_one(&Place::postgres(&[]));
    // A spool would restore it.
    let spooled = Place::postgres(&["--spool"]);
    two_devices(&spooled);
    let says = spooled.device_fails(&["remove", "pump", "--yes"], 1);
    assert!(says.contains("has a spool"), "{says}");
}
