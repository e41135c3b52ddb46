//! `fieldgate device`: export, import and errors.

use fieldgate_protocol::auth::derive_device_key;
use fieldgate_protocol::error::Code;

use crate::lifecycle::{Place, get_in, run, said};
use crate::support::client::Login;

#[test]
fn devices_can_be_moved_to_another_site_as_csv() {
    let here = Place::sqlite(&["--registration", "closed"]);
    here.device(&["add", "derived", "rotated", "off"]);
    here.device(&["add", "own", "--own-key"]);
    here.device(&["rotate-key", "rotated"]);
    here.device(&["disable", "off"]);
    let own = here.login("own");
    let without_keys = here.device(&["export"]);
    let with_keys = here.device(&["export", "--with-keys"]);
    assert_eq!(
        without_keys,
        "name,enabled,key_version,own_key\nderived,yes,0,\noff,no,0,\nown,yes,0,-\nrotated,yes,1,\n"
    );
    let digits = here.device(&["key", "own"]);
    assert_eq!(
        with_keys,
        without_keys.replace(",-", &format!(",{}", digits.trim_end()))
    );

    let there = Place::sqlite(&["--registration", "closed"]);
    let refused = there.run(&["import", "-"], &without_keys);
    let says = String::from_utf8(refused.stderr).expect("text");
    assert!(
        says.contains("line 4") && says.contains("--with-keys"),
        "{says}"
    );
    assert_eq!(
        there.import(&with_keys),
        "4 added, 0 changed, 0 unchanged\n"
    );
    assert_eq!(there.device(&["export", "--with-keys"]), with_keys);
    for again in [&with_keys, &without_keys] {
        let same = there.import(again);
        assert_eq!(same, "0 added, 0 changed, 4 unchanged\n");
    }
    let own_there = Login {
        key: own.key,
        ..there.gateway.device("own")
    };
    let mut link = get_in(&there.gateway, &own_there, Code::Authentication);
    // Only differences are changed.
    let disabled = there.import("name,enabled\nderived,no\n");
    assert_eq!(disabled, "0 added, 1 changed, 0 unchanged\n");
    link.ping();
    let derived = there.import("name,own_key\nown,\n");
    assert_eq!(derived, "0 added, 1 changed, 0 unchanged\n");
    link.expect_bye(Code::Authentication);
}

/// Values without a column in the file stay, above all replaced keys and disabled devices.
#[test]
fn omitted_columns_change_nothing() {
    let place = Place::sqlite(&[]);
    place.device(&["add", "pump", "valve"]);
    place.device(&["add", "own", "--own-key"]);
    place.device(&["rotate-key", "pump"]);
    place.device(&["disable", "valve"]);
    let before = place.device(&["export", "--with-keys"]);
    let names = place.import("name\npump\nvalve\nown\n");
    assert_eq!(names, "0 added, 0 changed, 3 unchanged\n");
    assert_eq!(place.device(&["export", "--with-keys"]), before);

    // Each row of the export at that time.
    let row = |name: &str| {
        let export = place.device(&["export"]);
        let row = export.lines().find(|line| line.starts_with(name));
        row.expect(name).to_owned()
    };
    let digits = "01".repeat(32);
    let digits = digits.as_str();
    for (csv, name, expected) in [
        ("name,enabled\npump,no\n", "pump", "pump,no,1,"),
        ("name,enabled\nown,no\n", "own", "own,no,0,-"),
        ("name,key_version\nvalve,3\n", "valve", "valve,no,3,"),
        ("name,key_version\nown,0\n", "own", "own,no,0,-"),
        ("name,own_key\nvalve,\n", "valve", "valve,no,3,"),
        // A key without a number gets a number that no key had before.
        (
            &format!("name,own_key\npump,{digits}\n"),
            "pump",
            "pump,no,2,-",
        ),
        ("name,own_key\npump,\n", "pump", "pump,no,3,"),
        ("name\nnew\n", "new", "new,yes,0,"),
        (
            &format!("name,own_key\nnewer,{digits}\n"),
            "newer",
            "newer,yes,0,-",
        ),
    ] {
        place.import(csv);
        assert_eq!(row(name), expected, "{csv}");
    }

    // A number alone does not state what happens to an individual key.
    let refused = place.run(&["import", "-"], "name,key_version\nown,1\n");
    assert_eq!(refused.status.code(), Some(1));
    let says = String::from_utf8(refused.stderr).expect("text");
    for word in ["line 2", "an individual key", "own_key"] {
        assert!(says.contains(word), "{says}");
    }
    assert_eq!(row("own"), "own,no,0,-");

    // The last number is not followed by the first, whose key is known.
    place.import("name,key_version\npump,4294967295\n");
    let says = place.device_fails(&["rotate-key", "pump"], 1);
    assert!(says.contains("its version counter is exhausted"), "{says}");
    assert_eq!(row("pump").split(',').nth(2), Some("4294967295"));
}

/// A file is imported in batches of lines.
#[test]
fn a_failed_import_reports_its_progress() {
    let place = Place::sqlite(&[]);
    let mut csv = "name,own_key\n".to_owned();
    for number in 0..650 {
        csv += &format!("pump-{number},\n");
    }
    csv += "valve,-\n";
    let refused = place.run(&["import", "-"], &csv);
    let says = String::from_utf8(refused.stderr).expect("text");
    for word in ["line 652", "600 devices before line 602", "unchanged"] {
        assert!(says.contains(word), "{says}");
    }
    assert_eq!(place.device(&["export"]).lines().count(), 601);
}

#[test]
fn failed_device_commands_print_one_line() {
    let place = Place::sqlite(&[]);
    place.device(&["add", "pump"]);
    for (args, code, words) in [
        (&["add", "pump"][..], 1, &["pump", "already"][..]),
        (&["add", "p u m p"], 2, &["A-Z a-z 0-9"]),
        (
            &["add", "a", "b", "--own-key-file", "x"],
            2,
            &["impersonate"],
        ),
        (
            &["add", "a", "--own-key-file", "/nowhere"],
            1,
            &["/nowhere"],
        ),
        (&["add"], 2, &["NAME"]),
        (&["disable", "pumq"], 1, &["did you mean pump?"]),
        (
            &["enable", "pump", "absent"],
            1,
            &["unknown device", "absent"],
        ),
        (&["rotate-key", "absent"], 1, &["unknown device"]),
        (
            &["rotate-key", "pump", "--own-key", "--derived-key"],
            2,
            &["cannot be used"],
        ),
        (&["key", "not a name"], 2, &["A-Z a-z 0-9"]),
        (&["import", "/nowhere"], 1, &["/nowhere"]),
    ] {
        let says = place.device_fails(args, code);
        assert!(says.lines().count() <= 2, "{args:?}: {says}");
        for word in words {
            assert!(says.contains(word), "{args:?}: {says}");
        }
    }
    for (csv, words) in [
        ("nam\npump\n", &["nam"][..]),
        ("name\npump\npump\n", &["line 3", "line 2"]),
        ("name,enabled\npump,maybe\n", &["line 2", "maybe"]),
        ("name,enabled\npump,\n", &["line 2", "yes or no"]),
        ("name,key_version\npump,\n", &["line 2", "empty"]),
        ("name,own_key\npump,abc\n", &["line 2", "3 characters"]),
        ("name\na b\n", &["line 2", "A-Z a-z"]),
        ("name,colour\npump,red\n", &["colour"]),
    ] {
        let output = place.run(&["import", "-"], csv);
        let says = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{csv}");
        assert_eq!(says.lines().count(), 1, "{csv}: {says}");
        for word in words {
            assert!(says.contains(word), "{csv}: {says}");
        }
    }
    // None of the failed commands changed anything.
    assert_eq!(place.device(&["export"]).lines().count(), 2);
}

/// A factory needs no gateway and no database to derive a device's key.
#[test]
fn a_factory_derives_keys_without_a_database() {
    let dir = tempfile::tempdir().expect("a directory");
    let digits = "00".repeat(31) + "07";
    fieldgate::sys::secret_file::create_secret(&dir.path().join("fleet.key"), &digits)
        .expect("writes");
    let mut fleet_key = [0; 32];
    fleet_key[31] = 7;
    let expected = |name| -> String {
        let key = derive_device_key(&fleet_key, name, 0);
        key.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let one = run(dir.path(), None, &["key", "pump"], "");
    // The database may be elsewhere, with another key.
    let remark = String::from_utf8(one.stderr.clone()).expect("text");
    assert!(remark.contains("no database at"), "{remark}");
    assert_eq!(said(one), expected("pump") + "\n");
    let two = said(run(dir.path(), None, &["key", "pump", "valve"], ""));
    let lines = format!("pump {}\nvalve {}\n", expected("pump"), expected("valve"));
    assert_eq!(two, lines);
    assert!(!dir.path().join("fieldgate.db").exists());
}
