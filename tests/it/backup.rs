//! `fieldgate backup`: a copy of the store under load, the proof on what is restored from it, and a kill in the
//! middle.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use tempfile::TempDir;

use crate::support::PATIENCE;
use crate::support::database::PgDatabase;
use crate::support::eventually;
use crate::support::fleet::{File, Fleet, Place, check_ledger, verify};
use crate::support::gateway::{Gateway, command, meddle};
use crate::support::site::Said;

const LOAD: [&str; 4] = ["--profile", "burst", "--devices", "50"];

fn backup(data_dir: &Path, file: &Path, flags: &[&str]) -> Said {
    let mut backup = command(&["backup"]);
    backup.arg(file).arg("--data-dir").arg(data_dir).args(flags);
    Said::of(backup)
}

#[test]
fn a_backup_under_load_holds_everything_acknowledged_before() {
    let place = |dir: &Path| File(dir.join("fieldgate.db"));
    let (mut fleet, gateway) = Fleet::start(place, &LOAD);
    fleet.await_progress(1);
    let files = TempDir::new().expect("a directory");
    let file = files.path().join("backup.db");
    let journal = files.path().join("journal");
    for round in 2..4 {
        fleet.await_progress(round);
        // All that it says was acknowledged is stored before the backup begins.
        fs::copy(fleet.dir().join("journal"), &journal).expect("copies");
        let said = backup(fleet.dir(), &file, &["--replace"]);
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.out.contains("fleet key is not in it"), "{said:?}");
        fleet.await_progress(round);

        let restored = files.path().join(format!("restored-{round}"));
        fs::create_dir(&restored).expect("creates");
        let mut place = File(restored.join("fieldgate.db"));
        fs::copy(&file, &place.0).expect("copies");
        fs::copy(fleet.dir().join("fleet.key"), restored.join("fleet.key")).expect("copies");
        place.check();
        check_ledger(&mut place);
        verify(&place.url(), &journal);
        let gateway = Gateway::start_in(&restored, &[]);
        gateway.connect("new").0.ping();
    }
    fleet.prove(gateway);
}

/// The devices have deleted what was acknowledged after the backup, and go on with what they hold.
#[test]
fn devices_continue_after_a_restore() {
    let place = |dir: &Path| File(dir.join("fieldgate.db"));
    let (mut fleet, gateway) = Fleet::start(place, &LOAD);
    fleet.await_progress(1);
    let files = TempDir::new().expect("a directory");
    let file = files.path().join("backup.db");
    let said = backup(fleet.dir(), &file, &[]);
    assert_eq!(said.code, 0, "{said:?}");
    for round in 2..4 {
        fleet.await_progress(round);
    }
    let database = fleet.place.0.clone();
    let gateway = fleet.restart_after(gateway, || {
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(database.with_extension(format!("db{suffix}")));
        }
        fs::copy(&file, &database).expect("restores");
    });
    fleet.take_stock();
    for round in 4..6 {
        fleet.await_progress(round);
    }
    let mut restored = gateway.database();
    eventually("all devices are back", PATIENCE, || {
        restored.count("SELECT count(*) FROM streams WHERE durable_seq > 32") == 50
    });
    // The simulator notices what was lost.
    let (_, said) = fleet.interrupt();
    assert!(said.contains("was its store restored"), "{said}");
    drop(gateway);
    fleet.place.check();
    check_ledger(&mut fleet.place);
    let lost = "SELECT count(*) FROM missing_frames WHERE reason = 'overwritten'";
    assert!(restored.count(lost) > 0);
    let others = "SELECT count(*) FROM missing_frames WHERE reason <> 'overwritten'";
    assert_eq!(restored.count(others), 0);
    assert_eq!(restored.count("SELECT count(*) FROM devices"), 50);
}

/// In a directory in which others may write, a link could lead to any file of the gateway's user.
#[test]
fn a_link_is_not_followed() {
    let gateway = Gateway::start(&[]);
    gateway.connect("pump").0.ping();
    let dir = TempDir::new().expect("a directory");
    let precious = dir.path().join("precious");
    fs::write(&precious, "precious").expect("writes");
    let file = dir.path().join("backup.db");
    let draft = dir.path().join("backup.db.part");
    std::os::unix::fs::symlink(&precious, &draft).expect("links");
    assert_eq!(backup(gateway.data_dir(), &file, &[]).code, 1);
    fs::remove_file(&draft).expect("removes");
    fs::hard_link(&precious, &draft).expect("links");
    backup(gateway.data_dir(), &file, &[]).refused(1, &["the draft is a link"]);
    assert_eq!(fs::read_to_string(&precious).expect("reads"), "precious");
}

#[test]
fn no_file_is_overwritten_by_mistake() {
    let gateway = Gateway::start(&[]);
    gateway.connect("pump").0.ping();
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("backup.db");
    fs::write(&file, "precious").expect("writes");
    backup(gateway.data_dir(), &file, &[]).refused(1, &["exists", "--replace"]);
    assert_eq!(fs::read_to_string(&file).expect("reads"), "precious");
    let database = gateway.data_dir().join("fieldgate.db");
    let refused = backup(gateway.data_dir(), &database, &["--replace"]);
    refused.refused(1, &["the database of a gateway"]);
    assert_eq!(backup(gateway.data_dir(), &file, &["--replace"]).code, 0);
    let empty = dir.path().join("empty");
    backup(&empty, &dir.path().join("none.db"), &[]).refused(1, &["no database"]);
    let names: Vec<_> = fs::read_dir(dir.path()).expect("reads").collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn a_killed_backup_leaves_no_file_with_its_name() {
    let gateway = Gateway::start(&[]);
    gateway.connect("pump").0.ping();
    // So large that the copy takes a while.
    let database = gateway.data_dir().join("fieldgate.db");
    meddle(
        &database,
        "CREATE TABLE ballast (x BLOB);
         INSERT INTO ballast WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
             SELECT randomblob(1048576) FROM n",
    );
    let dir = TempDir::new().expect("a directory");
    let (file, draft) = (
        dir.path().join("backup.db"),
        dir.path().join("backup.db.part"),
    );
    let mut killed = command(&["backup"]);
    killed.arg(&file).arg("--data-dir").arg(gateway.data_dir());
    let mut killed = killed
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    eventually("a part of the copy", PATIENCE, || {
        fs::metadata(&draft).is_ok_and(|draft| draft.len() > 0)
    });
    let second = backup(gateway.data_dir(), &file, &[]);
    second.refused(1, &["another backup"]);
    killed.kill().expect("kills");
    killed.wait().expect("a child");
    assert!(!file.exists() && draft.exists(), "killed too late");
    let said = backup(gateway.data_dir(), &file, &[]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(!draft.exists());
    File(file).check();
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn postgres_has_its_own_tools() {
    let database = PgDatabase::create();
    let dir = TempDir::new().expect("a directory");
    let said = backup(
        dir.path(),
        &dir.path().join("x"),
        &["--store", &database.url()],
    );
    said.refused(1, &["pg_dump"]);
}
