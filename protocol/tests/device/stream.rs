//! Tests of sending, acknowledgement, credit, loss and resumption (R83 to R94).

use super::*;
use crate::corpus::handshake::challenge;

#[test]
fn an_ack_deletes_through_its_number() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 5), 0);
    rig.sends();
    assert_eq!(rig.ack(3, 67), Ok(Some(Notice::Acked { through_seq: 3 })));
    assert_eq!(rig.queue.held(), [4]);
    assert_eq!(rig.device.in_flight(), 1);
    assert_eq!(rig.ack(3, 67), Ok(None));
    assert_eq!(rig.ack(2, 67), Ok(None));
    assert_eq!(rig.queue.held(), [4]);
}

#[test]
fn an_ack_of_an_unassigned_number_is_a_fault() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 5), 0);
    rig.sends();
    assert!(matches!(rig.ack(5, 70), Err(Fault::Protocol(_))));
    assert_eq!(rig.queue.held(), [1, 2, 3, 4]);
    assert_eq!(rig.ack(4, 70), Ok(Some(Notice::Acked { through_seq: 4 })));
}

#[test]
fn an_ack_of_an_earlier_connections_frames_is_accepted() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 5), 0);
    assert_eq!(rig.ack(2, 66), Ok(Some(Notice::Acked { through_seq: 2 })));
    assert_eq!(rig.sends(), [Sent::Data(3), Sent::Data(4)]);
}

#[test]
fn welcome_replaces_a_lost_ack() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 4), 0);
    assert_eq!(rig.sends(), [Sent::Data(1), Sent::Data(2), Sent::Data(3)]);
    rig.device.disconnect(None, rig.now_us, 0);
    assert_eq!(rig.device.in_flight(), 0);
    rig.queue.push();
    rig.welcome(welcome(2, 1)).unwrap();
    assert_eq!(rig.queue.held(), [3, 4]);
    assert_eq!(rig.sends(), [Sent::Data(3), Sent::Data(4)]);
}

#[test]
fn limits_are_absolute_and_never_fall() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 9));
    let limited = Welcome {
        limit_seq: 2,
        ..welcome(0, 1)
    };
    rig.welcome(limited).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(1), Sent::Data(2)]);
    rig.ack(1, 2).unwrap();
    assert_eq!(rig.sends(), []);
    rig.ack(1, 4).unwrap();
    rig.ack(2, 3).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(3), Sent::Data(4)]);
}

#[test]
fn the_devices_own_window_also_applies() {
    let config = Config {
        window_frames: 2,
        ..config()
    };
    let mut rig = Rig::with(config, MemoryQueue::holding(1, 9));
    rig.welcome(welcome(0, 1)).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(1), Sent::Data(2)]);
    rig.ack(1, 65).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(3)]);
}

#[test]
fn overwritten_frames_are_reported_as_a_gap() {
    let mut rig = Rig::ready(MemoryQueue::holding(5, 7), 2);
    assert_eq!(rig.sends(), [Sent::Gap(3, 4), Sent::Data(5), Sent::Data(6)]);
    rig.ack(6, 70).unwrap();
    assert!(rig.queue.held().is_empty());
}

#[test]
fn a_gap_needs_no_schema() {
    let mut rig = Rig::new(MemoryQueue::holding(5, 6));
    rig.welcome(welcome(2, 0)).unwrap();
    assert_eq!(rig.sends(), [Sent::Gap(3, 4), Sent::Declare, Sent::Data(5)]);

    let mut rig = Rig::new(MemoryQueue::holding(5, 5));
    rig.welcome(welcome(2, 0)).unwrap();
    assert_eq!(rig.sends(), [Sent::Gap(3, 4)]);
}

#[test]
fn frames_overwritten_in_flight_become_a_gap_when_requested_again() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 5), 0);
    rig.sends();
    rig.queue.overwrite_below(3);
    assert_eq!(rig.sends(), []);
    rig.nack(21, 4, 2, 0).unwrap();
    assert_eq!(rig.sends(), [Sent::Gap(2, 2), Sent::Data(3), Sent::Data(4)]);
}

#[test]
fn a_gap_may_end_beyond_the_limit_but_not_begin_there() {
    let mut rig = Rig::new(MemoryQueue::holding(500, 501));
    let limited = Welcome {
        limit_seq: 3,
        ..welcome(2, 1)
    };
    rig.welcome(limited).unwrap();
    assert_eq!(rig.sends(), [Sent::Gap(3, 499)]);
    rig.ack(499, 563).unwrap();
    assert_eq!(rig.sends(), [Sent::Data(500)]);
}

#[test]
fn a_frame_this_gateway_cannot_receive_is_neither_sent_nor_skipped() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    let hello = Hello {
        mono_us: rig.now_us,
        ..hello()
    };
    let small = fieldgate_protocol::message::Challenge {
        rx_bytes_max: 30,
        ..challenge()
    };
    let [challenge, welcomed] = handshake_with(&hello, &small, rig.now_us);
    rig.connect();
    rig.sends();
    rig.receive(&challenge).unwrap();
    rig.sends();
    rig.receive(&welcomed).unwrap();
    assert_eq!(rig.sends(), []);
    assert!(rig.device.poll_deadline().unwrap() <= rig.now_us);
    assert_eq!(rig.pass(0), Err(Fault::FrameTooLong));
    assert_eq!(rig.queue.held(), [1, 2]);
    rig.device
        .disconnect(Some(Fault::FrameTooLong), rig.now_us, 0);
    assert_eq!(rig.pass(0), Ok(()));
}

/// Returns CHALLENGE and WELCOME for a gateway with a given CHALLENGE.
fn handshake_with(
    hello: &Hello<'_>,
    challenge: &fieldgate_protocol::message::Challenge<'_>,
    now_us: u64,
) -> [Vec<u8>; 2] {
    use fieldgate_protocol::auth::Transcript;
    use fieldgate_protocol::message::Auth;

    let key = config().key;
    let mut transcript = Transcript::default();
    let challenge = message_frame(challenge, 0);
    transcript.add(corpus::payload_of(&message_frame(hello, 0)));
    transcript.add(corpus::payload_of(&challenge));
    let auth = Auth {
        mono_us: now_us,
        ext: &[],
        mac: [0; 32],
    };
    let unsigned = message_frame(&auth, 0);
    transcript.add(&corpus::payload_of(&unsigned)[..unsigned.len() - 52]);
    let mac = transcript.device_mac(&key, &NO_CHANNEL_BINDING);
    transcript.add(&mac);
    let unsigned = message_frame(&welcome(0, 1), 0);
    transcript.add(&corpus::payload_of(&unsigned)[..unsigned.len() - 52]);
    let welcomed = Welcome {
        mac: transcript.gateway_mac(&key, &NO_CHANNEL_BINDING),
        ..welcome(0, 1)
    };
    [challenge, message_frame(&welcomed, 0)]
}

#[test]
fn frames_are_the_same_bytes_each_time() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 2), 0);
    rig.sends();
    let first = rig.out.clone();
    rig.nack(22, 1, 1, 0).unwrap();
    rig.sends();
    assert_eq!(rig.out, first);
    assert_eq!(
        first[2],
        <fieldgate_protocol::message::Data<'_> as Message<'_>>::TYPE
    );
}
