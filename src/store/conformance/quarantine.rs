//! Quarantined frames.

use fieldgate_protocol::frame::{self, HEADER_BYTES, Header, types};
use fieldgate_protocol::message::{self, Gap};

use super::*;

pub(in crate::store) async fn quarantine_moves_the_watermark<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let content = Content::Quarantined {
        code: 31,
        detail: "column 'x'".to_owned(),
        bytes: vec![0, 255, 39],
        peer: "192.0.2.1:9".to_owned(),
    };
    let batch = entries(vec![
        peer.entry(1, 1, 0x11, content),
        peer.readings(2, &[(5, 5.0)]),
    ]);
    assert_eq!(durable(h.store(), &batch).await, [2]);
    let dump = h.dump().await;
    assert_eq!(
        dump.quarantine,
        [(1, 1, 31, "column 'x'".to_owned(), vec![0, 255, 39])]
    );
    assert_eq!(dump.frames[0], ("a".into(), 1, 1, 0x11, None, None));
}

pub(in crate::store) async fn quarantine_usage_is_the_sum_of_its_frames<H: Harness>() {
    let mut h = H::create().await;
    let [a, b] = [peer(h.store(), "a").await, peer(h.store(), "b").await];
    let frame = |peer: &Peer, seq: u64, bytes: usize| {
        let content = Content::Quarantined {
            code: 30,
            detail: String::new(),
            bytes: vec![7; bytes],
            peer: "192.0.2.1:9".to_owned(),
        };
        peer.entry(seq, seq, 0x11, content)
    };
    // In another order than their ids.
    let batch = entries(vec![frame(&b, 1, 50), frame(&a, 1, 3), frame(&a, 2, 4)]);
    durable(h.store(), &batch).await;
    // The first is a duplicate.
    let batch = entries(vec![frame(&a, 2, 4), frame(&a, 3, 20)]);
    durable(h.store(), &batch).await;
    let mut h = h.reopen().await;
    let usage = [("a".to_owned(), 27), ("b".to_owned(), 50)];
    assert_eq!(h.dump().await.quarantine_usage, BTreeMap::from(usage));
}

/// No other record says that these numbers were lost, and a spool needs the record to determine which frame
/// continues a stream.
pub(in crate::store) async fn a_quarantined_gap_covers_its_numbers<H: Harness>() {
    let mut h = H::create().await;
    let peer = peer(h.store(), "a").await;
    let content = Content::Quarantined {
        code: 34,
        detail: "flags".to_owned(),
        bytes: flagged_gap(3, 5),
        peer: "192.0.2.1:9".to_owned(),
    };
    let batch = entries(vec![
        peer.readings(1, &[(1, 1.0)]),
        peer.readings(2, &[(2, 2.0)]),
        peer.entry(3, 5, types::GAP, content),
        peer.readings(6, &[(6, 6.0)]),
    ]);
    assert_eq!(durable(h.store(), &batch).await, [6]);
    let dump = h.dump().await;
    assert_eq!(seqs(&dump), [1, 2, 5, 6]);
    assert_eq!(dump.gaps, [(1, 3, 5, ledger::REASON_REFUSED)]);
    let kept = (1, 5, 34, "flags".to_owned(), flagged_gap(3, 5));
    assert_eq!(dump.quarantine, [kept]);
}

/// Returns a GAP with an unknown flag.
fn flagged_gap(from_seq: u64, seq: u64) -> Vec<u8> {
    let gap = Gap {
        from_seq,
        reason: 3,
        ext: &[],
    };
    let mut bytes = vec![0; 64];
    let frame_bytes = message::encode(&gap, seq, &mut bytes).unwrap();
    bytes.truncate(frame_bytes);
    let header = Header {
        flags: 1,
        ..frame::decode_header(&bytes[..HEADER_BYTES], bytes.len())
            .unwrap()
            .unwrap()
    };
    frame::seal(header, &mut bytes).unwrap();
    bytes
}
