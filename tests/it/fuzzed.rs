//! Invalid bytes: random ones, and valid frames with every single bit flipped. In each case
//! the gateway survives, stores nothing of them, and accepts the valid frame afterwards.

use std::time::{SystemTime, UNIX_EPOCH};

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{HEADER_BYTES, MAGIC, types};

use crate::handshake::AT_ONCE;
use crate::support::client::{Heard, Link};
use crate::support::gateway::Gateway;
use crate::support::messages::{header, readings, sealed};

/// Xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    /// Seeds from the clock, or from FIELDGATE_TEST_SEED; the seed is printed if a test fails.
    fn new() -> Random {
        let seed = match std::env::var("FIELDGATE_TEST_SEED") {
            Ok(seed) => seed.parse().expect("a number"),
            Err(_) => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.expect("after 1970").as_nanos() as u64
            }
        };
        eprintln!("FIELDGATE_TEST_SEED={seed}");
        Random(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 24) as u8).collect()
    }
}

/// Closes the sending half and reads the gateway's output to its end.
fn hear_out(link: &mut Link) {
    link.finish();
    while link.hear() != Heard::Closed {}
}

fn assert_nothing_stored(gateway: &mut Gateway) {
    assert!(gateway.is_alive());
    let mut database = gateway.database();
    for table in ["readings", "gaps", "schemas"] {
        let sql = format!("SELECT count(*) FROM {table}");
        assert_eq!(database.count(&sql), 0, "{table}");
    }
    let (mut link, _) = gateway.connect("good");
    link.send(&readings(1));
    link.expect_ack(1);
    assert_eq!(gateway.database().readings("good").len(), 1);
}

#[test]
fn random_bytes_from_unauthenticated_peers_store_nothing() {
    let mut gateway = Gateway::start(&AT_ONCE);
    let mut random = Random::new();
    for i in 0..300 {
        let mut link = Link::open(gateway.addr);
        let count = 1 + random.below(600);
        let mut bytes = random.bytes(count);
        match i % 3 {
            0 => {}
            1 => bytes[0] = MAGIC,
            _ => {
                let frame_type = [types::HELLO, types::AUTH, bytes[0]][i / 3 % 3];
                bytes.truncate(400);
                bytes = sealed(header(frame_type, 0), &bytes);
            }
        }
        link.send_in_vain(&bytes);
        hear_out(&mut link);
    }
    assert_eq!(gateway.database().count("SELECT count(*) FROM devices"), 0);
    assert_nothing_stored(&mut gateway);
}

#[test]
fn random_frames_from_a_device_store_nothing() {
    let mut gateway = Gateway::start(&AT_ONCE);
    let mut random = Random::new();
    for i in 0..100 {
        let name = format!("device-{}", i % 5);
        let (mut link, welcomed) = Link::login(gateway.addr, &gateway.device(&name));
        let mut bytes = Vec::new();
        for seq in 1..=random.below(12) {
            let frame_type = match random.below(4) {
                0 => types::DATA,
                1 => 0x13 + random.below(13) as u8,
                _ => random.next() as u8,
            };
            // A GAP of random bytes can be valid.
            if frame_type == types::GAP || frame_type == types::DECLARE {
                continue;
            }
            let seq = if types::is_sequenced(frame_type) {
                welcomed.durable_seq + seq
            } else {
                0
            };
            let count = random.below(200);
            bytes.extend(sealed(header(frame_type, seq), &random.bytes(count)));
        }
        let count = random.below(40);
        bytes.extend(random.bytes(count));
        link.send_in_vain(&bytes);
        hear_out(&mut link);
    }
    assert_nothing_stored(&mut gateway);
}

#[test]
fn any_flipped_bit_in_a_header_ends_the_connection() {
    let mut gateway = Gateway::start(&AT_ONCE);
    let good = readings(1);
    for bit in 0..8 * HEADER_BYTES {
        let (mut link, welcomed) = gateway.connect("pump");
        assert_eq!(welcomed.durable_seq, 0, "bit {}", bit as i64 - 1);
        let mut turned = good.clone();
        turned[bit / 8] ^= 1 << (bit % 8);
        link.send(&turned);
        if bit < 8 {
            link.expect_closed();
        } else {
            link.expect_bye(Code::Header);
        }
    }
    let mut database = gateway.database();
    assert_eq!(database.frames("pump"), []);
    assert_eq!(database.quarantine("pump"), []);
    let (mut link, _) = gateway.connect("pump");
    link.send(&good);
    link.expect_ack(1);
    assert_eq!(database.readings("pump").len(), 1);
    assert!(gateway.is_alive());
}

#[test]
fn any_flipped_bit_in_a_payload_is_requested_again() {
    let mut gateway = Gateway::start(&AT_ONCE);
    let (mut link, _) = gateway.connect("pump");
    let bits = 8 * (readings(1).len() - HEADER_BYTES);
    for bit in 0..bits {
        let seq = bit as u64 + 1;
        let good = readings(seq);
        let mut turned = good.clone();
        turned[HEADER_BYTES + bit / 8] ^= 1 << (bit % 8);
        link.send(&turned);
        link.expect_nack(seq, Code::PayloadCrc, seq);
        link.send(&good);
        link.expect_ack(seq);
    }
    let mut database = gateway.database();
    let values: Vec<_> = database.readings("pump").iter().map(|row| row.1).collect();
    let expected: Vec<_> = (1..=bits).map(|seq| Some(seq as f64 / 100.0)).collect();
    assert_eq!(values, expected);
    assert_eq!(database.quarantine("pump"), []);
    assert!(gateway.is_alive());
}

#[test]
fn frames_of_any_length_are_answered() {
    let mut gateway = Gateway::start(&AT_ONCE);
    let max = 4096 - 20;
    for payload_bytes in [0, 1, max - 1, max] {
        let name = format!("device-{payload_bytes}");
        let (mut link, _) = gateway.connect(&name);
        let odd = sealed(header(types::DATA, 1), &vec![0xFF; payload_bytes]);
        link.send(&odd);
        link.expect_nack(1, Code::Malformed, 2);
        link.expect_ack(1);
        assert_eq!(gateway.database().quarantine(&name), [(1, 30, odd)]);
        link.send(&readings(2));
        link.expect_ack(2);
    }
    for payload_bytes in [max + 1, 65535] {
        let (mut link, _) = gateway.connect("long");
        let long = sealed(header(types::DATA, 1), &vec![0xFF; payload_bytes]);
        link.send_in_vain(&long);
        link.expect_bye(Code::TooLarge);
        let (mut link, welcomed) = gateway.connect("long");
        assert_eq!(welcomed.durable_seq, 0);
        link.ping();
    }
    for payload_bytes in [0, 512 - 20] {
        let mut link = Link::open(gateway.addr);
        link.send(&sealed(header(types::HELLO, 0), &vec![0; payload_bytes]));
        link.expect_bye(Code::Authentication);
    }
    let mut link = Link::open(gateway.addr);
    link.send_in_vain(&sealed(header(types::HELLO, 0), &[0; 513 - 20]));
    link.expect_bye(Code::TooLarge);
    assert!(gateway.is_alive());
}
