//! Streams: entries, watermarks and receipts, for every store.

use super::*;

pub(in crate::store) async fn duplicates_are_stored_once<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let first = entries(vec![
        peer.readings(1, &[(10, 1.0)]),
        peer.readings(1, &[(10, 1.0)]),
        peer.readings(2, &[(11, 2.0), (12, 3.0)]),
    ]);
    assert_eq!(durable(h.store(), &first).await, [2]);
    assert_eq!(durable(h.store(), &first).await, [2]);
    assert_eq!(
        durable(h.store(), &entries(vec![peer.readings(1, &[])])).await,
        [2]
    );
    let dump = h.dump().await;
    assert_eq!(seqs(&dump), [1, 2]);
    assert_eq!(dump.readings.len(), 3);
    assert_eq!(dump.frames[0], ("a".into(), 1, 1, 0x11, Some(1), Some(77)));
}

pub(in crate::store) async fn entries_that_do_not_continue_the_stream_wait<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![
        peer.readings(2, &[(2, 2.0)]),
        peer.readings(1, &[(1, 1.0)]),
    ]);
    assert_eq!(durable(h.store(), &batch).await, [1]);
    assert_eq!(
        durable(h.store(), &entries(vec![peer.gap(3, 9)])).await,
        [1]
    );
    assert_eq!(seqs(&h.dump().await), [1]);
}

pub(in crate::store) async fn a_gap_is_stored_from_the_first_number_that_is_not_durable<
    H: Harness,
>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![peer.gap(1, 4), peer.gap(3, 9), peer.gap(2, 9)]);
    assert_eq!(durable(h.store(), &batch).await, [9]);
    let dump = h.dump().await;
    assert_eq!(dump.gaps, [(1, 1, 4, 3), (1, 5, 9, 3)]);
    assert_eq!(seqs(&dump), [4, 9]);
    // The longest gap that can be stored, and one that cannot.
    let batch = entries(vec![peer.gap(10, u64::MAX), peer.gap(10, ledger::SEQ_MAX)]);
    assert_eq!(durable(h.store(), &batch).await, [ledger::SEQ_MAX]);
}

pub(in crate::store) async fn values_keep_their_bits<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let values = [
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -0.0,
        21.57,
        3.0,
        -1.0,
        9_007_199_254_740_993.0,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
        1e18,
        -9_223_372_036_854_775_808.0,
    ];
    let mut rows: Vec<(i64, f64)> = (0..).zip(values).collect();
    rows.push((1000, f64::NAN));
    rows.push((i64::MAX, 1.0));
    durable(h.store(), &entries(vec![peer.readings(1, &rows)])).await;
    let stored: Vec<_> = h
        .dump()
        .await
        .readings
        .into_iter()
        .map(|r| (r.3, r.5))
        .collect();
    let sent = |(ts, value): &(i64, f64)| (*ts, (!value.is_nan()).then_some(value.to_bits()));
    assert_eq!(stored, rows.iter().map(sent).collect::<Vec<_>>());
}

pub(in crate::store) async fn readings_with_equal_times_are_both_stored<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = entries(vec![
        peer.readings(1, &[(10, 1.0), (20, 2.0)]),
        peer.readings(2, &[(10, 1.0)]),
    ]);
    durable(h.store(), &batch).await;
    let stored: Vec<_> = h
        .dump()
        .await
        .readings
        .into_iter()
        .map(|r| (r.3, r.4))
        .collect();
    assert_eq!(stored, [(10, 1), (10, 2), (20, 1)]);
}

pub(in crate::store) async fn a_login_sees_the_entries_before_it<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let batch = Batch {
        logins: vec![
            login("a", 1, 2),
            login("a", 1, 3),
            login("a", 2, 1),
            login("a", 2, 1),
        ],
        entries: vec![peer.readings(1, &[]), peer.readings(2, &[])],
        ..Batch::default()
    };
    let committed = h.store().commit(&batch).await.unwrap();
    assert!(matches!(committed.logins[0], LoginOutcome::StreamConflict));
    let receipt = |outcome: &LoginOutcome| match outcome {
        LoginOutcome::Admitted(admission) => admission.receipt,
        other => panic!("{other:?}"),
    };
    assert_eq!(receipt(&committed.logins[1]).durable_seq(), 2);
    assert_eq!(receipt(&committed.logins[1]).stream(), peer.stream);
    assert_eq!(receipt(&committed.logins[2]).durable_seq(), 0);
    assert_ne!(receipt(&committed.logins[2]).stream(), peer.stream);
    assert_eq!(receipt(&committed.logins[2]), receipt(&committed.logins[3]));
}

pub(in crate::store) async fn watermarks_survive_a_restart<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    durable(h.store(), &entries(vec![peer.readings(1, &[(1, 1.0)])])).await;
    let before = h.dump().await;
    let mut h = h.reopen().await;
    assert_eq!(h.dump().await, before);
    assert_eq!(
        admitted(h.store(), login("a", 1, 2))
            .await
            .receipt
            .durable_seq(),
        1
    );
    let again = entries(vec![
        peer.readings(1, &[(1, 1.0)]),
        peer.readings(2, &[(2, 1.0)]),
    ]);
    assert_eq!(durable(h.store(), &again).await, [2]);
    assert_eq!(seqs(&h.dump().await), [1, 2]);
}

pub(in crate::store) async fn receipts_are_sorted_by_stream<H: Harness>() {
    let mut h = H::create().await;
    let mut peers = Vec::new();
    for n in 0..23 {
        peers.push(peer(h.store(), &format!("d{n}")).await);
    }
    let batch = entries(
        peers
            .iter()
            .rev()
            .map(|peer| peer.readings(1, &[(1, 1.0)]))
            .collect(),
    );
    let receipts = h.store().commit(&batch).await.unwrap().receipts;
    let streams: Vec<StreamId> = receipts.iter().map(Receipt::stream).collect();
    assert_eq!(
        streams,
        peers.iter().map(|peer| peer.stream).collect::<Vec<_>>()
    );
    assert!(receipts.iter().all(|receipt| receipt.durable_seq() == 1));
}

pub(in crate::store) async fn after_a_transient_error_the_same_batch_commits_once<H: Harness>() {
    let mut h = H::create().await;
    let one = peer(h.store(), "a").await;
    durable(h.store(), &entries(vec![one.readings(1, &[(1, 1.0)])])).await;
    let rows: Vec<(i64, f64)> = (0..20_000).map(|ts| (ts, ts as f64)).collect();
    let batch = Batch {
        logins: vec![login("b", 1, 1)],
        declares: vec![declare(one.device, 2, 2, &["new"])],
        entries: vec![one.readings(2, &rows), one.gap(3, 5)],
        clocks: vec![(one.device, clock(9, AT_US))],
        ..Batch::default()
    };
    let before = h.dump().await;
    h.fill_disk().await;
    let failed = h.store().commit(&batch).await;
    assert!(
        matches!(failed, Err(StoreError::Transient(_))),
        "{failed:?}"
    );
    h.free_disk().await;
    assert_eq!(h.dump().await, before);
    let committed = h.store().commit(&batch).await.unwrap();
    assert_eq!(committed.receipts[0].durable_seq(), 5);
    assert!(matches!(committed.logins[0], LoginOutcome::Admitted(_)));
    assert_eq!(
        durable(h.store(), &entries(vec![one.readings(6, &[(6, 6.0)])])).await,
        [6]
    );
    let dump = h.dump().await;
    assert_eq!(seqs(&dump), [1, 2, 5, 6]);
    assert_eq!(dump.readings.len(), 20_002);
}

/// The gateway's clock at either end of its valid range, and device times up to 285 years (R50) beyond it.
pub(in crate::store) async fn times_at_the_edges_are_kept<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let boot_us = 1 << 53;
    let times = [
        UTC_MIN_US - boot_us,
        UTC_MIN_US,
        UTC_MAX_US,
        UTC_MAX_US + boot_us,
    ];
    for (seq, received_at_us) in [(1, UTC_MIN_US), (2, UTC_MAX_US)] {
        let rows = times.map(|us| (us, 1.0));
        let mut entry = peer.readings(seq, &rows);
        entry.received_at_us = received_at_us;
        let mut login = login("a", 1, seq + 1);
        login.at_us = received_at_us;
        login.clock = clock(seq as u32, received_at_us);
        let batch = Batch {
            entries: vec![entry],
            logins: vec![login],
            ..Batch::default()
        };
        let committed = h.store().commit(&batch).await.unwrap();
        assert!(matches!(committed.logins[0], LoginOutcome::Admitted(_)));
    }
    let dump = h.dump().await;
    let mut found: Vec<i64> = dump.readings.iter().map(|row| row.3).collect();
    found.dedup();
    assert_eq!(found, times);
}

pub(in crate::store) async fn an_empty_batch_commits<H: Harness>() {
    let mut h = H::create().await;
    let committed = h.store().commit(&Batch::default()).await.unwrap();
    assert!(committed.receipts.is_empty() && committed.logins.is_empty());
}

/// For example, the stream of a device that was removed while its frames waited for an unavailable store.
pub(in crate::store) async fn a_missing_stream_ends_sessions_but_not_the_store<H: Harness>() {
    let mut h = H::create().await;
    let good = peer(h.store(), "a").await;
    let mut gone = peer(h.store(), "b").await;
    gone.stream = StreamId(4711);
    let batch = entries(vec![good.readings(1, &[]), gone.readings(1, &[])]);
    let failed = h.store().commit(&batch).await;
    assert!(matches!(failed, Err(StoreError::Replaced(_))), "{failed:?}");
    let batch = entries(vec![good.readings(1, &[])]);
    let committed = h.store().commit(&batch).await.unwrap();
    assert_eq!(committed.receipts[0].durable_seq(), 1);
}

/// For example, when two sessions of copies of one device sent it at the same time.
pub(in crate::store) async fn a_number_reused_with_different_content_is_recorded<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let frame = |seq, crc| Entry {
        crc: Some(crc),
        ..peer.readings(seq, &[(seq.cast_signed(), 1.0)])
    };
    // Duplicates within one batch and across two.
    for batch in [
        vec![frame(1, 10), frame(1, 10)],
        vec![frame(2, 20), frame(1, 10)],
    ] {
        h.store().commit(&entries(batch)).await.unwrap();
    }
    assert!(h.dump().await.events.is_empty());
    h.store()
        .commit(&entries(vec![frame(3, 30), frame(3, 31)]))
        .await
        .unwrap();
    let events = h.dump().await.events;
    let kinds: Vec<_> = events
        .iter()
        .map(|event| (&event.2[..], &event.4[..]))
        .collect();
    assert_eq!(
        kinds,
        [(
            "number_reused",
            "number 3 was reused with different content"
        )]
    );
}
