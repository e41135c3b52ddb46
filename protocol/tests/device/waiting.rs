//! Tests of keepalive, timeouts and reconnect delays (R89 to R92, R72).

use fieldgate_protocol::device::{RETRY_AFTER_MS_MAX, TIME_EXCHANGE_US};

use super::*;

const KEEPALIVE_US: u64 = 40_000_000;
const ACK_TIMEOUT_US: u64 = 30_000_000;

#[test]
fn silence_is_broken_by_a_ping() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 1), 0);
    assert_eq!(rig.device.poll_deadline(), Some(rig.now_us + KEEPALIVE_US));
    rig.pass(KEEPALIVE_US - 1).unwrap();
    assert_eq!(rig.sends(), []);
    rig.pass(1).unwrap();
    assert_eq!(rig.sends(), [Sent::Ping]);
    assert_eq!(rig.pong(), Ok(Some(Notice::Time { utc_us: 6 })));
    assert!(rig.pong().is_err(), "one PONG for each PING");
}

#[test]
fn a_ping_carries_the_latest_pong() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 1), 0);
    rig.pass(KEEPALIVE_US).unwrap();
    rig.sends();
    let ping: Ping<'_> = decode(corpus::payload_of(&rig.out)).unwrap();
    assert_eq!((ping.pong_sent_us, ping.pong_mono_us), (0, 0));
    rig.now_us += 70;
    rig.pong().unwrap();
    let heard_us = rig.now_us;
    rig.pass(KEEPALIVE_US).unwrap();
    rig.sends();
    let ping: Ping<'_> = decode(corpus::payload_of(&rig.out)).unwrap();
    assert_eq!((ping.pong_sent_us, ping.pong_mono_us), (6, heard_us));
    assert_eq!(ping.mono_us, rig.now_us);
}

#[test]
fn a_ping_without_an_answer_ends_the_connection() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 1), 0);
    rig.pass(KEEPALIVE_US).unwrap();
    rig.sends();
    assert_eq!(
        rig.device.poll_deadline(),
        Some(rig.now_us + ACK_TIMEOUT_US)
    );
    rig.pass(ACK_TIMEOUT_US - 1).unwrap();
    assert_eq!(rig.pass(1), Err(Fault::Timeout));
}

#[test]
fn a_busy_device_still_exchanges_time() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 1), 0);
    let mut pings = 0;
    for seq in 1..=2 * TIME_EXCHANGE_US / 5_000_000 {
        rig.pass(5_000_000).unwrap();
        rig.queue.push();
        for sent in rig.sends() {
            if sent == Sent::Ping {
                pings += 1;
                rig.device.disconnect(None, rig.now_us, 0);
                rig.welcome(welcome(seq - 1, 1)).unwrap();
                rig.sends();
            }
        }
        rig.ack(seq, seq + 64).unwrap();
    }
    assert_eq!(pings, 2);
}

#[test]
fn no_progress_ends_the_connection() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 3), 0);
    rig.pass(3_000_000).unwrap();
    rig.sends();
    assert_eq!(
        rig.device.poll_deadline(),
        Some(rig.now_us + ACK_TIMEOUT_US)
    );
    rig.pass(20_000_000).unwrap();
    rig.ack(1, 65).unwrap();
    rig.pass(ACK_TIMEOUT_US - 1).unwrap();
    // An ACK that does not advance is not progress.
    rig.ack(1, 66).unwrap();
    assert_eq!(rig.pass(1), Err(Fault::Timeout));
}

#[test]
fn no_progress_is_needed_without_frames_in_flight() {
    let mut rig = Rig::ready(MemoryQueue::holding(1, 1), 0);
    rig.pass(ACK_TIMEOUT_US + 1).unwrap();
    rig.queue.push();
    assert_eq!(rig.sends(), [Sent::Data(1)]);
    rig.pass(ACK_TIMEOUT_US - 1).unwrap();
    assert_eq!(rig.pass(1), Err(Fault::Timeout));
}

/// Returns the shortest and longest delay after a fault, in milliseconds.
fn waits(rig: &mut Rig, fault: Option<Fault>) -> (u64, u64) {
    let config = config();
    let least = Device::new(config.clone()).disconnect(fault, 0, 0);
    let greatest = Device::new(config).disconnect(fault, 0, u32::MAX);
    rig.device.disconnect(fault, 0, 0);
    (least / 1000, greatest / 1000)
}

fn bye(code: u8, retry_after_ms: u32) -> Option<Fault> {
    Some(Fault::Bye {
        code,
        retry_after_ms,
    })
}

#[test]
fn the_first_wait_depends_on_the_fault() {
    let rig = &mut Rig::new(MemoryQueue::holding(1, 1));
    let (short, long) = ((500, 1_000), (150_000, 300_000));
    for fault in [
        None,
        Some(Fault::Timeout),
        Some(Fault::Protocol("")),
        bye(40, 0),
        bye(44, 0),
        bye(0, 0),
        bye(99, 0),
    ] {
        assert_eq!(waits(rig, fault), short, "{fault:?}");
    }
    for fault in [
        Some(Fault::NotOurGateway),
        Some(Fault::SchemaConflict),
        Some(Fault::SchemaBound),
        Some(Fault::FrameTooLong),
        bye(41, 0),
        bye(50, 0),
        bye(51, 0),
        bye(52, 0),
        bye(59, 0),
    ] {
        assert_eq!(waits(rig, fault), long, "{fault:?}");
    }
    assert_eq!(waits(rig, bye(44, 60_000)), (60_500, 61_000));
    let cap = u64::from(RETRY_AFTER_MS_MAX);
    assert_eq!(waits(rig, bye(40, u32::MAX)), (cap + 500, cap + 1_000));
}

#[test]
fn waits_double_up_to_the_longest() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 1));
    let mut expected_ms = 1_000;
    for _ in 0..40 {
        let wait_us = rig.device.disconnect(None, 0, u32::MAX);
        assert_eq!(wait_us / 1000, expected_ms);
        expected_ms = (expected_ms * 2).min(300_000);
    }
}

#[test]
fn waits_lie_in_the_upper_half() {
    for random in [0, 1, 1 << 16, u32::MAX / 2, u32::MAX] {
        let wait_us = Device::new(config()).disconnect(None, 7, random);
        assert!((7 + 500_000..=7 + 1_000_000).contains(&wait_us), "{random}");
    }
}

#[test]
fn only_progress_resets_the_wait() {
    let wait_ms = |rig: &mut Rig| {
        let now_us = rig.now_us;
        (rig.device.disconnect(None, now_us, u32::MAX) - now_us) / 1000
    };
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    assert_eq!(wait_ms(&mut rig), 1_000);
    rig.welcome(welcome(0, 1)).unwrap();
    rig.sends();
    assert_eq!(wait_ms(&mut rig), 2_000, "WELCOME alone is not progress");
    rig.welcome(welcome(0, 1)).unwrap();
    rig.sends();
    rig.ack(1, 65).unwrap();
    assert_eq!(wait_ms(&mut rig), 1_000);
    rig.welcome(welcome(2, 1)).unwrap();
    rig.pass(KEEPALIVE_US).unwrap();
    rig.sends();
    rig.pong().unwrap();
    assert_eq!(wait_ms(&mut rig), 1_000);
}

#[test]
fn a_disconnected_device_has_no_output_or_deadline() {
    let mut rig = Rig::new(MemoryQueue::holding(1, 3));
    assert_eq!(rig.device.poll_deadline(), None);
    assert_eq!(rig.sends(), []);
    assert_eq!(rig.pass(u64::MAX / 2), Ok(()));
}
