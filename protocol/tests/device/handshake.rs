//! Tests up to WELCOME (R81, R82), and of every type in every state (R87).

use fieldgate_protocol::message::Bye;

use super::*;
use crate::corpus::{frame_of, frame_with, handshake, messages};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    SendHello,
    ExpectChallenge,
    SendAuth,
    ExpectWelcome,
    Ready,
}

const STATES: [At; 5] = [
    At::SendHello,
    At::ExpectChallenge,
    At::SendAuth,
    At::ExpectWelcome,
    At::Ready,
];

fn rig_at(state: At) -> Rig {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    let (challenge, welcomed) = rig.gateway_frames(welcome(0, 1));
    rig.connect();
    if state == At::SendHello {
        return rig;
    }
    rig.sends();
    if state == At::ExpectChallenge {
        return rig;
    }
    rig.receive(&challenge).unwrap();
    if state == At::SendAuth {
        return rig;
    }
    rig.sends();
    if state == At::Ready {
        rig.receive(&welcomed).unwrap();
        assert_eq!(rig.sends(), [Sent::Data(1), Sent::Data(2)]);
    }
    rig
}

/// Returns a valid frame of each type, and the states that allow it.
fn frames_of_all_types() -> Vec<(Vec<u8>, Vec<At>)> {
    let (challenge, welcomed) = Rig::new(MemoryQueue::holding(1, 3)).gateway_frames(welcome(0, 1));
    let ack = message_frame(
        &Ack {
            limit_seq: 66,
            ext: &[],
        },
        2,
    );
    let nack = Nack {
        code: 21,
        expected_seq: 1,
        retry_after_ms: 0,
        detail: "",
        ext: &[],
    };
    let mut out = vec![
        (challenge, vec![At::ExpectChallenge]),
        (welcomed, vec![At::ExpectWelcome]),
        (ack, vec![At::Ready]),
        (message_frame(&nack, 2), vec![At::Ready]),
        // PONG without a PING.
        (message_frame(&messages::pong(), 0), vec![]),
        (message_frame(&handshake::hello(), 0), vec![]),
        (message_frame(&messages::auth(), 0), vec![]),
        (message_frame(&corpus::data(), 1), vec![]),
        (message_frame(&messages::result(), 1), vec![]),
    ];
    for unassigned in [0x00, 0x08, 0x10, 0x1F, 0x30, 0x40, 0x55, 0x7E] {
        out.push((frame_of(unassigned, 0, &[]), vec![]));
    }
    for skippable in [0x80, 0xFF] {
        out.push((frame_with(9, skippable, 9, 9, &[1, 2, 3]), STATES.to_vec()));
    }
    out
}

#[test]
fn each_state_allows_just_its_types() {
    for state in STATES {
        for (frame, allowed) in frames_of_all_types() {
            let mut rig = rig_at(state);
            let deleted_through = rig.queue.deleted_through;
            let found = rig.receive(&frame);
            let what = format!("type {:#04x} in {state:?}: {found:?}", frame[2]);
            if allowed.contains(&state) {
                assert!(found.is_ok(), "{what}");
            } else {
                assert!(matches!(found, Err(Fault::Protocol(_))), "{what}");
                assert_eq!(rig.queue.deleted_through, deleted_through, "{what}");
            }
        }
    }
}

#[test]
fn bye_ends_every_state() {
    let bye = Bye {
        code: 40,
        retry_after_ms: 7,
        min_version: 1,
        max_version: 1,
        detail: "",
        ext: &[],
    };
    for state in STATES {
        assert_eq!(
            rig_at(state).receive(&message_frame(&bye, 0)),
            Err(Fault::Bye {
                code: 40,
                retry_after_ms: 7
            })
        );
    }
}

#[test]
fn a_damaged_or_flagged_frame_or_another_version_is_a_fault() {
    for state in STATES {
        for (mut frame, _) in frames_of_all_types() {
            let payload = corpus::payload_of(&frame).to_vec();
            if frame[2] < 0x80 {
                for (version, flags) in [(0, 0), (2, 0), (1, 1)] {
                    let wrong = frame_with(version, frame[2], flags, 0, &payload);
                    assert!(rig_at(state).receive(&wrong).is_err());
                }
            }
            let last = frame.len() - 1;
            frame[last] ^= 0x10;
            assert!(rig_at(state).receive(&frame).is_err());
        }
    }
}

#[test]
fn a_gateway_that_does_not_prove_the_key_changes_nothing() {
    let mut rig = rig_at(At::ExpectWelcome);
    let (_, mut welcomed) = rig.gateway_frames(welcome(2, 1));
    let payload_end = welcomed.len() - 4;
    welcomed[payload_end - 1] ^= 1;
    let forged = frame_of(types::WELCOME, 0, &welcomed[16..payload_end]);
    assert_eq!(rig.receive(&forged), Err(Fault::NotOurGateway));
    assert_eq!(rig.queue.deleted_through, 0);
    assert_eq!(rig.queue.held(), [1, 2]);
    assert!(!rig.device.is_ready());
    assert_eq!(rig.sends(), []);
}

#[test]
fn a_welcome_of_another_connection_is_no_proof() {
    let mut rig = rig_at(At::ExpectWelcome);
    rig.now_us += 1;
    // Correct for a HELLO sent a microsecond later.
    let (_, welcomed) = rig.gateway_frames(welcome(2, 1));
    assert_eq!(rig.receive(&welcomed), Err(Fault::NotOurGateway));
    assert_eq!(rig.queue.held(), [1, 2]);
}

#[test]
fn another_channel_binding_is_no_proof() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    let (challenge, welcomed) = rig.gateway_frames(welcome(2, 1));
    rig.device.connect(DEVICE_NONCE, [1; 32], rig.now_us, 0);
    rig.sends();
    rig.receive(&challenge).unwrap();
    rig.sends();
    assert_eq!(rig.receive(&welcomed), Err(Fault::NotOurGateway));
}

#[test]
fn welcome_deletes_durable_frames_and_resumes_after_them() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 5), 2);
    assert!(rig.device.is_ready());
    assert_eq!(rig.queue.held(), [3, 4]);
    assert_eq!(rig.sends(), [Sent::Data(3), Sent::Data(4)]);
    assert_eq!(rig.device.in_flight(), 2);
}

#[test]
fn welcome_beyond_the_assigned_numbers_is_a_fault() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    let found = rig.welcome(welcome(3, 1));
    assert!(matches!(found, Err(Fault::Protocol(_))));
    assert_eq!(rig.queue.held(), [1, 2]);
}

#[test]
fn an_empty_queue_is_welcome() {
    let mut rig = Rig::ready(MemoryQueue::holding(3, 3), 2);
    assert_eq!(rig.sends(), []);
    rig.queue.push();
    assert_eq!(rig.sends(), [Sent::Data(3)]);
}

#[test]
fn an_unknown_schema_is_declared_first() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    rig.welcome(welcome(0, 0)).unwrap();
    assert_eq!(rig.sends(), [Sent::Declare, Sent::Data(1), Sent::Data(2)]);
}

#[test]
fn the_handshake_has_a_deadline() {
    for state in [
        At::SendHello,
        At::ExpectChallenge,
        At::SendAuth,
        At::ExpectWelcome,
    ] {
        let mut rig = rig_at(state);
        assert_eq!(rig.device.poll_deadline(), Some(rig.now_us + 10_000_000));
        assert_eq!(rig.pass(9_999_999), Ok(()));
        assert_eq!(rig.pass(1), Err(Fault::Timeout));
    }
}
