//! Admission of devices: operators' changes to devices, for every store.

use super::*;
use crate::config::store_url::StoreUrl;
use crate::store::admin::device::{self, DeviceEdit, StoredKey};
use crate::store::admin::{Access, Connection};

/// Changes a known device, like the commands.
pub(in crate::store) async fn change(
    store: &StoreUrl,
    device: &str,
    is_enabled: bool,
    replaces_key: bool,
) -> i64 {
    let mut connection = Connection::open(store, Access::Write).await.unwrap();
    let mut edit = DeviceEdit::begin(&mut connection, AT_US).await.unwrap();
    let before = edit.find([device].into_iter()).await.unwrap();
    let before = &before[device];
    let key = StoredKey {
        version: before.key.version + u32::from(replaces_key),
        sealed: replaces_key.then(|| vec![7; 60]),
    };
    let key = if replaces_key { &key } else { &before.key };
    let is_set = edit.set(device, Some(before), is_enabled, key);
    assert!(is_set.await.unwrap());
    connection.commit().await.unwrap();
    revision_of(&mut connection, device).await
}

/// Returns the number of a device's latest change.
pub(in crate::store) async fn revision_of(connection: &mut Connection, device: &str) -> i64 {
    let found = device::find(connection, device).await.unwrap();
    found.unwrap().revision
}

async fn outcomes<H: Harness>(h: &mut H, logins: Vec<Login>) -> Vec<LoginOutcome> {
    let batch = Batch {
        logins,
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap().logins
}

pub(in crate::store) async fn a_disabled_device_is_refused<H: Harness>() {
    let mut h = H::create().await;
    peer(h.store(), "a").await;
    h.change("a", false, false).await;
    let found = outcomes(&mut h, vec![login("a", 1, 1), login("b", 1, 1)]).await;
    assert!(matches!(found[0], LoginOutcome::Disabled));
    assert!(matches!(found[1], LoginOutcome::Admitted(_)));
    let revision = h.change("a", true, false).await;
    match &outcomes(&mut h, vec![login("a", 1, 1)]).await[0] {
        LoginOutcome::Admitted(admission) => assert_eq!(admission.revision, revision),
        other => panic!("{other:?}"),
    }
}

pub(in crate::store) async fn a_replaced_key_is_refused<H: Harness>() {
    let mut h = H::create().await;
    peer(h.store(), "a").await;
    let revision = h.change("a", true, true).await;
    let with_key = |key_revision| Login {
        key_revision,
        ..login("a", 1, 1)
    };
    // In one batch, because its logins are independent.
    let logins = vec![with_key(0), with_key(revision), with_key(revision + 1)];
    let found = outcomes(&mut h, logins).await;
    assert!(matches!(found[0], LoginOutcome::KeyReplaced));
    assert!(matches!(found[1], LoginOutcome::Admitted(_)), "{found:?}");
    assert!(matches!(found[2], LoginOutcome::KeyReplaced));
    // A device with a replaced key receives only that error.
    let later = h.change("a", false, false).await;
    let found = outcomes(&mut h, vec![with_key(0), with_key(revision)]).await;
    assert!(matches!(found[0], LoginOutcome::KeyReplaced));
    assert!(matches!(found[1], LoginOutcome::Disabled));
    assert!(later > revision);
}

pub(in crate::store) async fn unknown_devices_are_refused_when_registration_is_closed<
    H: Harness,
>() {
    let mut h = H::create().await;
    peer(h.store(), "a").await;
    let closed = |device| Login {
        may_register: false,
        ..login(device, 1, 1)
    };
    let logins = vec![closed("b"), closed("a"), closed("c"), closed("b")];
    let found = outcomes(&mut h, logins).await;
    assert!(matches!(found[0], LoginOutcome::Unregistered));
    assert!(matches!(found[1], LoginOutcome::Admitted(_)));
    assert!(matches!(found[2], LoginOutcome::Unregistered));
    assert!(matches!(found[3], LoginOutcome::Unregistered));
    let found = outcomes(&mut h, vec![login("b", 1, 1)]).await;
    assert!(matches!(found[0], LoginOutcome::Admitted(_)));
}

pub(in crate::store) async fn refusals_are_recorded<H: Harness>() {
    let mut h = H::create().await;
    let refusal = |device: &str, at_us| Refusal {
        peer: "10.0.0.1".parse().unwrap(),
        device: device.to_owned(),
        code: 50,
        detail: "authentication failed".to_owned(),
        count: 2,
        first_at_us: at_us - 1,
        at_us,
        is_audited: true,
    };
    let quiet = Refusal {
        is_audited: false,
        ..refusal("a", 5)
    };
    let batch = Batch {
        logins: vec![login("a", 1, 1)],
        refusals: vec![
            refusal("a", 2),
            refusal("unknown", 3),
            refusal("a", 4),
            quiet,
        ],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
    let dump = h.dump().await;
    let line = |at| {
        let detail = "authentication failed (10.0.0.1)".to_owned();
        ("a".to_owned(), at, "refused".to_owned(), 50, detail)
    };
    assert_eq!(dump.events, [line(2), line(4)]);
    let row = |device: &str, count, first, last| {
        let (peer, device) = ("10.0.0.1".to_owned(), device.to_owned());
        (peer, device, 50, count, first, last)
    };
    let rows = [row("a", 6, 1, 5), row("unknown", 2, 2, 3)];
    assert_eq!(dump.refusals, rows);
}

pub(in crate::store) async fn the_latest_refusals_are_kept<H: Harness>() {
    let mut h = H::create().await;
    let refusal = |n: i64, at_us| Refusal {
        peer: "10.0.0.1".parse().unwrap(),
        device: format!("device-{n}"),
        code: 50,
        detail: "authentication failed".to_owned(),
        count: 1,
        first_at_us: at_us,
        at_us,
        is_audited: false,
    };
    let commit = async |h: &mut H, refusals| {
        let batch = Batch {
            refusals,
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
    };
    // A refusal from a time when the clock was ahead does not displace later ones.
    commit(&mut h, vec![refusal(9_999, 1_000_000_000)]).await;
    commit(&mut h, (0..700).map(|n| refusal(n, 10 + n)).collect()).await;
    commit(&mut h, (700..1100).map(|n| refusal(n, 10 + n)).collect()).await;
    let mut last: Vec<i64> = h.dump().await.refusals.iter().map(|row| row.5).collect();
    last.sort_unstable();
    assert_eq!(last, Vec::from_iter(110..1110));
}
