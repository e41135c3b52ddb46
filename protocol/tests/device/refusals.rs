//! Tests of the reaction to each class of NACK (R61, R62, R88).

use fieldgate_protocol::device::{FIXES_MAX, RETRY_AFTER_MS_MAX};
use fieldgate_protocol::error::{Class, Code};

use super::*;

fn in_flight_3() -> Rig {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 4), 0);
    assert_eq!(rig.sends(), [Sent::Data(1), Sent::Data(2), Sent::Data(3)]);
    rig
}

#[test]
fn every_code_is_answered_by_its_class() {
    for code in 0..=u8::MAX {
        let mut rig = in_flight_3();
        let found = rig.nack(code, 2, 2, 50);
        let sent = rig.sends();
        let again = [Sent::Data(2), Sent::Data(3)];
        match Class::of(code) {
            Class::RetryLater => {
                assert_eq!(found, Ok(Some(Notice::Refused { seq: 2, code })));
                assert_eq!(sent, [], "code {code}: the device waits");
                rig.pass(50_000).unwrap();
                assert_eq!(
                    rig.sends(),
                    again[..1],
                    "code {code}: one frame until an ACK covers it"
                );
                assert_eq!(rig.queue.deleted_through, 0, "code {code}");
                rig.ack(2, 66).unwrap();
                assert_eq!(rig.sends(), again[1..], "code {code}");
                continue;
            }
            Class::Fix if code == Code::SchemaConflict as u8 => {
                assert_eq!(found, Err(Fault::SchemaConflict));
            }
            Class::Fix if code == Code::SchemaBound as u8 => {
                assert_eq!(found, Err(Fault::SchemaBound));
            }
            Class::Fix if code == Code::UnknownSchema as u8 => {
                assert_eq!(sent, [Sent::Declare, Sent::Data(2), Sent::Data(3)]);
            }
            Class::Fix => assert_eq!(sent, again, "code {code}"),
            Class::Refused => {
                assert_eq!(found, Ok(Some(Notice::Refused { seq: 2, code })));
                assert_eq!(sent, [], "code {code}: the frame is not resent");
                assert_eq!(rig.queue.held(), [1, 2, 3], "only an ACK deletes");
            }
            Class::Reconnect | Class::Operator | Class::Unknown => {
                assert!(matches!(found, Err(Fault::Protocol(_))), "code {code}");
            }
        }
        assert_eq!(rig.queue.deleted_through, 0, "code {code}");
    }
}

#[test]
fn classes_are_tens_digits() {
    for code in Code::ALL {
        assert_eq!(Code::from_wire(code as u8), Some(code));
        let tens = match code.class() {
            Class::RetryLater => 1,
            Class::Fix => 2,
            Class::Refused => 3,
            Class::Reconnect => 4,
            Class::Operator => 5,
            Class::Unknown => 0,
        };
        assert_eq!(code as u8 / 10, tens, "{}", code.name());
    }
}

#[test]
fn a_refused_frame_is_deleted_by_the_ack_that_follows() {
    let mut rig = in_flight_3();
    rig.nack(30, 2, 4, 0).unwrap();
    rig.ack(3, 67).unwrap();
    assert!(rig.queue.held().is_empty());
    assert_eq!(rig.sends(), []);
}

#[test]
fn a_damaged_unsequenced_frame_is_declared_again_and_rewinds_nothing() {
    let mut rig = in_flight_3();
    rig.nack(22, 0, 1, 0).unwrap();
    assert_eq!(rig.sends(), []);
    rig.queue.push();
    assert_eq!(rig.sends(), [Sent::Declare, Sent::Data(4)]);
}

#[test]
fn a_nack_that_expects_an_impossible_number_is_a_fault() {
    for (code, expected_seq) in [(21, 0), (21, 5), (11, 5), (22, u64::MAX), (11, 0)] {
        let mut rig = in_flight_3();
        assert!(matches!(
            rig.nack(code, 3, expected_seq, 1),
            Err(Fault::Protocol(_))
        ));
    }
    let mut rig = in_flight_3();
    rig.ack(2, 66).unwrap();
    assert!(matches!(rig.nack(21, 3, 2, 0), Err(Fault::Protocol(_))));
}

#[test]
fn a_nack_may_expect_the_next_new_number() {
    let mut rig = in_flight_3();
    rig.nack(21, 3, 4, 0).unwrap();
    rig.queue.push();
    assert_eq!(rig.sends(), [Sent::Data(4)]);
}

#[test]
fn the_pause_of_class_1_is_kept_and_capped() {
    let mut rig = in_flight_3();
    rig.nack(11, 1, 1, u32::MAX).unwrap();
    let mut waited_us = 0;
    while rig.sends().iter().all(|sent| *sent == Sent::Ping) {
        if rig.out[2] == types::PING {
            let _ = rig.pong();
        }
        rig.pass(10_000_000).unwrap();
        waited_us += 10_000_000;
    }
    assert_eq!(waited_us, u64::from(RETRY_AFTER_MS_MAX) * 1000);
}

#[test]
fn a_retry_without_a_wait_is_not_a_busy_loop() {
    let mut rig = in_flight_3();
    rig.nack(10, 1, 1, 0).unwrap();
    assert_eq!(rig.sends(), []);
    assert_eq!(rig.device.poll_deadline(), Some(rig.now_us + 1_000));
    rig.pass(1_000).unwrap();
    assert_eq!(rig.sends().len(), 1);
}

#[test]
fn an_ack_ends_the_pause_of_class_1_and_one_that_advances_opens_the_window() {
    let mut rig = in_flight_3();
    rig.nack(11, 1, 1, 60_000).unwrap();
    assert_eq!(rig.sends(), []);
    // The store is available again: no new number is durable, but frames are accepted.
    assert_eq!(rig.ack(0, 64), Ok(None));
    assert_eq!(rig.sends(), [Sent::Data(1)]);
    // The store was unavailable again, and is back.
    rig.nack(11, 1, 1, 60_000).unwrap();
    rig.pass(30_000_000).unwrap();
    assert_eq!(rig.sends(), []);
    rig.pass(30_000_000).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(1)]);
    rig.ack(1, 65).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(2), Sent::Data(3)]);
    // Frames accepted before the one that does not fit in quarantine are acknowledged meanwhile.
    rig.nack(12, 3, 3, 1_000).unwrap();
    rig.pass(1_000_000).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(3)]);
    rig.queue.push();
    rig.ack(2, 66).unwrap();
    assert_eq!(rig.sends(), []);
    rig.ack(3, 67).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(4)]);
}

#[test]
fn a_cause_that_cannot_be_fixed_ends_the_connection() {
    let mut rig = in_flight_3();
    for _ in 0..FIXES_MAX {
        rig.nack(20, 1, 1, 0).unwrap();
        rig.sends();
    }
    assert_eq!(
        rig.nack(20, 1, 1, 0),
        Err(Fault::Protocol("too many failed resends"))
    );

    let mut rig = in_flight_3();
    for seq in 1..=3 {
        for _ in 0..FIXES_MAX {
            rig.nack(22, seq, seq, 0).unwrap();
            rig.sends();
        }
        rig.ack(seq, 67).unwrap();
    }
}
