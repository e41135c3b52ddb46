//! Audit events and sessions, for every store.

use super::*;

pub(in crate::store) async fn events_are_kept<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let content = Content::Event {
        time: ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        },
        at_us: 5,
        level: 4,
        code: 65_535,
        text: "pump's dry".to_owned(),
    };
    let event = |kind, at_us, code| DeviceEvent {
        device: peer.device,
        session: None,
        at_us,
        kind,
        code,
        detail: "192.0.2.1:9".to_owned(),
    };
    let batch = Batch {
        entries: vec![
            peer.entry(1, 1, 0x14, content.clone()),
            peer.entry(1, 1, 0x14, content),
        ],
        events: vec![
            event(DeviceEventKind::Connected, 1, 0),
            event(DeviceEventKind::Disconnected, 9, 42),
        ],
        ..Batch::default()
    };
    assert_eq!(durable(h.store(), &batch).await, [1]);
    let line = |at, kind: &str, code, detail: &str| {
        ("a".to_owned(), at, kind.to_owned(), code, detail.to_owned())
    };
    assert_eq!(
        h.dump().await.events,
        [
            line(1, "connected", 0, "192.0.2.1:9"),
            line(5, "event", 65_535, "pump's dry"),
            line(9, "disconnected", 42, "192.0.2.1:9"),
        ]
    );
}

/// A session that was taken over, in this gateway or another, ends after its successor has begun. The next run
/// of a gateway closes sessions that the last run left open.
pub(in crate::store) async fn a_device_is_connected_while_a_session_is_open<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let event = |session, kind, at_us| DeviceEvent {
        device: peer.device,
        session: Some(SessionId(session)),
        at_us,
        kind,
        code: 0,
        detail: format!("192.0.2.1:{session}"),
    };
    let (begins, ends) = (DeviceEventKind::Connected, DeviceEventKind::Disconnected);
    // The clock steps back in between, so events are not in time order.
    for (events, open) in [
        (vec![event(1, begins, 900)], vec!["192.0.2.1:1"]),
        (
            vec![event(2, begins, 100)],
            vec!["192.0.2.1:1", "192.0.2.1:2"],
        ),
        (vec![event(1, ends, 950)], vec!["192.0.2.1:2"]),
        (
            vec![event(3, begins, 101), event(2, ends, 101)],
            vec!["192.0.2.1:3"],
        ),
        (
            vec![event(4, begins, 7), event(4, ends, 7)],
            vec!["192.0.2.1:3"],
        ),
        // Repeat the batch, as after a COMMIT with unknown outcome.
        (vec![event(3, begins, 101)], vec!["192.0.2.1:3"]),
    ] {
        let batch = Batch {
            events,
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
        assert_eq!(h.dump().await.open_sessions, open);
    }
    let mut h = h.reopen().await;
    let dump = h.dump().await;
    assert_eq!(dump.open_sessions, Vec::<String>::new());
    let closed = { dump.events.iter() }.filter(|(.., detail)| detail == LEFT_OPEN);
    assert_eq!(closed.count(), 1);
}
