//! The fleet key belongs to the store: a gateway with another key, or without one, does not start, commands that use
//! the key reject it, and only an operator can give the store another key.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::start::assert_refused;
use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::{Ended, Gateway, meddle, run};

/// A gateway's data directory and the flags that select its store.
struct Site {
    dir: TempDir,
    flags: Vec<String>,
    database: Option<PgDatabase>,
}

impl Site {
    fn sqlite() -> Site {
        Site {
            dir: TempDir::new().expect("a directory"),
            flags: Vec::new(),
            database: None,
        }
    }

    fn postgres(has_spool: bool) -> Site {
        let database = PgDatabase::create();
        let mut flags = vec!["--store".to_owned(), database.url()];
        flags.extend(has_spool.then(|| "--spool".to_owned()));
        Site {
            database: Some(database),
            flags,
            ..Site::sqlite()
        }
    }

    fn flags(&self) -> Vec<&str> {
        self.flags.iter().map(String::as_str).collect()
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("fleet.key")
    }

    /// Starts a gateway, connects a device, and ends the gateway.
    fn use_once(&self) {
        let mut gateway = Gateway::start_in(self.dir.path(), &self.flags());
        gateway.connect("pump").0.ping();
        gateway.terminate();
        let ended = gateway.wait();
        assert!(ended.status.success(), "{ended:?}");
    }

    fn assert_refused(&self, words: &[&str]) {
        assert_refused(self.dir.path(), &self.flags(), 1, words);
    }

    /// Runs a command on the same store.
    fn run(&self, args: &[&str]) -> Ended {
        let data_dir = self.dir.path().to_str().expect("UTF-8");
        let flags = self.flags();
        let store = flags.iter().copied().filter(|flag| *flag != "--spool");
        let args = args.iter().copied().chain(["--data-dir", data_dir]);
        run(&args.chain(store).collect::<Vec<_>>())
    }

    #[track_caller]
    fn succeeds(&self, args: &[&str]) {
        let ended = self.run(args);
        assert!(ended.status.success(), "{ended:?}");
    }
}

fn write_other_key(path: &Path) {
    fs::write(path, "5a".repeat(32)).expect("writes");
}

fn only_the_store_s_key_serves(site: &Site) {
    site.use_once();
    let first = fs::read(site.key()).expect("a key");
    site.succeeds(&["device", "add", "own", "--own-key"]);

    write_other_key(&site.key());
    let words = ["does not belong to", "fleet-key adopt", "fleet.key"];
    site.assert_refused(&words);
    let csv = site.dir.path().join("devices.csv");
    fs::write(&csv, "name\nvalve\n").expect("writes");
    let csv = csv.to_str().expect("UTF-8");
    for args in [
        &["device", "key", "pump"][..],
        &["device", "add", "other", "--own-key"],
        &["device", "rotate-key", "pump", "--own-key"],
        &["device", "export", "--with-keys"],
        &["device", "import", csv],
    ] {
        let refused = site.run(args);
        assert_eq!(refused.status.code(), Some(1), "{args:?}: {refused:?}");
        let said = refused.stderr;
        assert!(said.contains("does not belong to"), "{args:?}: {said}");
    }
    // Commands that use no key do not require one.
    site.succeeds(&["device", "disable", "pump"]);
    site.succeeds(&["device", "enable", "pump"]);

    fs::write(site.key(), first).expect("writes");
    site.use_once();

    fs::remove_file(site.key()).expect("removes");
    site.assert_refused(&["could not find fleet key", "fleet-key adopt --create"]);
    assert!(!site.key().exists(), "created silently");

    let refused = site.run(&["fleet-key", "adopt"]);
    assert!(refused.stderr.contains("--create"), "{refused:?}");
    site.succeeds(&["fleet-key", "adopt", "--create"]);
    let created = fs::read(site.key()).expect("a key");
    let refused = site.run(&["fleet-key", "adopt", "--create"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(fs::read(site.key()).expect("a key"), created);
    let mut gateway = Gateway::start_in(site.dir.path(), &site.flags());
    gateway.connect("pump").0.ping();
    gateway.terminate();
    assert!(gateway.wait().status.success());

    write_other_key(&site.key());
    site.succeeds(&["fleet-key", "adopt"]);
    site.use_once();
}

#[test]
fn only_the_key_of_a_store_serves() {
    only_the_store_s_key_serves(&Site::sqlite());
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn only_the_key_of_a_database_serves_with_and_without_a_spool() {
    only_the_store_s_key_serves(&Site::postgres(false));
    only_the_store_s_key_serves(&Site::postgres(true));
}

/// Its data directory is new, and so is the key that it would create.
#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_second_gateway_without_the_store_s_key_is_refused() {
    let site = Site::postgres(false);
    site.use_once();
    for spool in [&[][..], &["--spool"]] {
        let dir = TempDir::new().expect("a directory");
        let flags = [&site.flags()[..], spool].concat();
        assert_refused(dir.path(), &flags, 1, &["could not find fleet key"]);
        write_other_key(&dir.path().join("fleet.key"));
        let key = fs::metadata(dir.path().join("fleet.key")).expect("a key");
        let mut mode = key.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o600);
        fs::set_permissions(dir.path().join("fleet.key"), mode).expect("chmod");
        assert_refused(dir.path(), &flags, 1, &["does not belong to"]);
    }
    // The database is unlocked again.
    site.use_once();
}

/// As in a database from before fingerprints were stored.
#[test]
fn a_store_with_devices_but_no_fingerprint_gets_no_new_key() {
    let site = Site::sqlite();
    site.use_once();
    let path = site.dir.path().join("fieldgate.db");
    meddle(&path, "DELETE FROM fleet_key");
    // The existing key becomes the store's.
    let key = fs::read(site.key()).expect("a key");
    fs::remove_file(site.key()).expect("removes");
    site.assert_refused(&["could not find fleet key"]);
    fs::write(site.key(), key).expect("writes");
    let chmod = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(site.key(), chmod).expect("chmod");
    site.use_once();
    write_other_key(&site.key());
    site.assert_refused(&["does not belong to"]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn the_store_does_not_hold_the_key() {
    let site = Site::postgres(false);
    site.use_once();
    let key = fs::read_to_string(site.key()).expect("a key");
    let database = site.database.as_ref().expect("one");
    let kept: Vec<(String,)> =
        Session::open(&database.url()).rows("SELECT fingerprint FROM fleet_key");
    assert_eq!(kept.len(), 1);
    assert!(!key.contains(&kept[0].0));
    site.use_once();
}
