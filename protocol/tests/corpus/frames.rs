//! Vectors of framing, versions, types, order and credit.

use fieldgate_protocol::frame::types;
use fieldgate_protocol::message::{Gap, Hello, Ping};

use super::*;

pub fn vectors() -> Vec<Vector> {
    [headers(), lengths(), checksums(), versions_and_types(), order(), gaps()].concat()
}

pub fn ping() -> Ping<'static> {
    Ping { mono_us: 5_000_000, pong_sent_us: 0, pong_mono_us: 0, ext: &[] }
}

pub fn data_frame(seq: u64) -> Vec<u8> {
    message_frame(&data(), seq)
}

/// Flips the lowest bit of one byte of the frame.
fn damaged(mut frame: Vec<u8>, at: usize) -> Vec<u8> {
    frame[at] ^= 1;
    frame
}

fn damaged_payload(frame: Vec<u8>) -> Vec<u8> {
    damaged(frame, 16)
}

fn headers() -> Vec<Vector> {
    let whole = data_frame(5);
    let mut out = vec![
        vector("frame-whole", SERVING, &whole, Expect::Taken, "the frame that the next vectors cut and damage"),
        vector("frame-empty", SERVING, &[], Expect::Incomplete, "no bytes received yet"),
        vector("frame-1-byte", SERVING, &whole[..1], Expect::Incomplete, "a right first byte"),
        vector("frame-15-bytes", SERVING, &whole[..15], Expect::Incomplete, "one byte short of a header"),
        vector("frame-header-only", SERVING, &whole[..16], Expect::Incomplete, "a header, no payload yet"),
        vector("frame-1-short", SERVING, &whole[..whole.len() - 1], Expect::Incomplete, "one byte short of a frame"),
        vector("frame-and-more", SERVING, &[&whole[..], &whole[..9]].concat(), Expect::Taken, "a frame and the beginning of another"),
        vector("magic-tls", AWAIT_HELLO, &[0x16, 3, 1], Expect::Close, "R2: a TLS ClientHello on the plain port; detected by one byte"),
        vector("magic-proxy", AWAIT_HELLO, b"PROXY TCP4 ", Expect::Close, "R2: a PROXY header"),
        vector("magic-http", AWAIT_HELLO, b"GET / HTTP/1.1\r\n", Expect::Close, "R2: a browser"),
        vector("magic-serving", SERVING, &[0xA6], Expect::Close, "R2: one bit off, in the middle of a session"),
        vector("magic-device", DEVICE, b"HTTP/1.1 400", Expect::Close, "R2 at the device"),
    ];
    for (id, at) in [("version", 1), ("type", 2), ("flags", 3), ("len", 4), ("seq", 6), ("crc", 14)] {
        out.push(vector(format!("header-crc-{id}"), SERVING, &damaged(whole.clone(), at), bye(46), "R4: one bit of the header is wrong"));
    }
    out.push(vector("header-crc-hello", AWAIT_HELLO, &damaged(message_frame(&handshake::hello(), 0), 6), bye(46), "R4 before authentication"));
    out.push(vector("header-crc-device", DEVICE, &damaged(message_frame(&messages::pong(), 0), 6), Expect::Close, "R4 at the device"));
    out
}

fn lengths() -> Vec<Vector> {
    let odd_ext = |bytes: usize| -> Vec<u8> {
        let mut ext = Vec::new();
        while ext.len() < bytes {
            let value = (bytes - ext.len() - 2).min(200);
            let value = if bytes - ext.len() - 2 - value == 1 { value - 1 } else { value };
            ext.extend([1, value as u8]);
            ext.resize(ext.len() + value, 0xEE);
        }
        ext
    };
    let hello = |ext_bytes| {
        let ext = odd_ext(ext_bytes);
        message_frame(&Hello { ext: &ext, ..handshake::hello() }, 0)
    };
    let data = |ext_bytes| {
        let ext = odd_ext(ext_bytes);
        message_frame(&Data { ext: &ext, ..data() }, 5)
    };
    // An ext of at least 128 bytes has a length of two bytes instead of one.
    let hello_512 = hello(512 - hello(0).len() - 1);
    let data_4096 = data(4096 - data(0).len() - 1);
    assert_eq!((hello_512.len(), data_4096.len()), (512, 4096));
    let header_of = |bytes: usize| frame_of(types::DATA, 5, &vec![0; bytes])[..16].to_vec();
    vec![
        vector("len-hello-512", AWAIT_HELLO, &hello_512, Expect::Taken, "R8: the longest frame before WELCOME"),
        vector("len-hello-513", AWAIT_HELLO, &hello(512 - hello(0).len())[..16], bye(45), "R8: one more; its header alone is enough to refuse it"),
        vector("len-data-4096", SERVING, &data_4096, Expect::Taken, "R8: the longest frame that this CHALLENGE allowed"),
        vector("len-data-4097", SERVING, &header_of(4077), bye(45), "R8: one more"),
        vector("len-65535", SERVING, &header_of(65_535), bye(45), "R8: the longest that a header can state"),
        vector("len-device-4097", DEVICE, &frame_of(types::BYE, 0, &[0; 4077])[..16], Expect::Close, "R8 at a device that stated 4096 in HELLO"),
        vector("len-0-data", SERVING, &frame_of(types::DATA, 5, &[]), refused(30), "R20: no payload where one must be"),
        vector("len-0-event", SERVING, &frame_of(types::EVENT, 5, &[]), refused(30), "R20"),
        vector("len-0-gap", SERVING, &frame_of(types::GAP, 5, &[]), refused(30), "R20: a GAP that does not decode stands for its own number"),
        vector("len-0-ping", SERVING, &frame_of(types::PING, 0, &[]), bye(44), "R109"),
        vector("len-0-declare", SERVING, &frame_of(types::DECLARE, 0, &[]), bye(44), "R109"),
        vector("len-0-hello", AWAIT_HELLO, &frame_of(types::HELLO, 0, &[]), bye(50), "R102"),
        vector("len-0-auth", AWAIT_AUTH, &frame_of(types::AUTH, 0, &[]), bye(50), "R102"),
        vector("len-0-ack", DEVICE, &frame_of(types::ACK, 3, &[]), Expect::Close, "R87"),
        vector("len-0-skippable", SERVING, &frame_of(0x80, 0, &[]), Expect::PassedOver, "R15"),
    ]
}

fn checksums() -> Vec<Vector> {
    let bad = |seq| damaged_payload(data_frame(seq));
    let unsequenced = Expect::Nack { code: 22, seq: 0, expected_seq: EXPECTED_SEQ, consumed: false };
    vec![
        vector("payload-crc-first", SERVING, &bad(5), refused(22), "R63: the first time"),
        vector(
            "payload-crc-trailer",
            SERVING,
            &{
                let f = data_frame(5);
                let at = f.len() - 1;
                damaged(f, at)
            },
            refused(22),
            "R6: the checksum itself is damaged",
        ),
        vector("payload-crc-again", CRC_FAILED, &bad(5), refused(35), "R63: the second time: quarantined as received"),
        vector("payload-crc-resent", CRC_FAILED, &data_frame(5), Expect::Taken, "R63: resent intact"),
        vector("payload-crc-dropping", DROPPING, &bad(5), refused(22), "R62: the awaited number, damaged"),
        vector("payload-crc-durable", SERVING, &bad(3), Expect::Ack { seq: 3 }, "R105: a duplicate, with any payload"),
        vector("payload-crc-duplicate", SERVING, &bad(4), Expect::Dropped, "R105"),
        vector("payload-crc-ahead", SERVING, &bad(6), nack(21, 6), "R106"),
        vector("payload-crc-ping", SERVING, &damaged_payload(message_frame(&ping(), 0)), unsequenced.clone(), "R108"),
        vector("payload-crc-declare", SERVING, &damaged_payload(message_frame(&declare(), 0)), unsequenced.clone(), "R108: the device declares again"),
        vector("payload-crc-skippable-seq", SERVING, &damaged_payload(frame_of(0x80, 66, &[1])), unsequenced.clone(), "R101: before the number is checked"),
        vector("payload-crc-skippable", SERVING, &damaged_payload(frame_of(0x90, 0, &[1, 2, 3])), unsequenced, "R108: the type may be skipped, but the damage is still reported"),
        vector("payload-crc-hello", AWAIT_HELLO, &damaged_payload(message_frame(&handshake::hello(), 0)), bye(50), "R102"),
        vector("payload-crc-device", DEVICE, &damaged_payload(message_frame(&messages::pong(), 0)), Expect::Close, "R87"),
    ]
}

fn versions_and_types() -> Vec<Vector> {
    let of = |frame: &[u8], version, flags| {
        let seq = u64::from_le_bytes(frame[6..14].try_into().unwrap());
        frame_with(version, frame[2], flags, seq, payload_of(frame))
    };
    let (data, pinged) = (data_frame(5), message_frame(&ping(), 0));
    let hello = message_frame(&handshake::hello(), 0);
    let pong = message_frame(&messages::pong(), 0);
    let mut out = vec![
        vector("version-0", SERVING, &of(&data, 0, 0), bye(51), "R3"),
        vector("version-2", SERVING, &of(&data, 2, 0), bye(51), "R3: above the one agreed"),
        vector("version-hello-2", AWAIT_HELLO, &of(&hello, 2, 0), bye(51), "R3: HELLO always has version 1"),
        vector("version-device", DEVICE, &of(&pong, 2, 0), Expect::Close, "R87"),
        vector("flags-data", SERVING, &of(&data, 1, 1), refused(34), "R11"),
        vector("flags-data-all", SERVING, &of(&data, 1, 0xFF), refused(34), "R11"),
        vector("flags-ping", SERVING, &of(&pinged, 1, 1), bye(44), "R109"),
        vector("flags-hello", AWAIT_HELLO, &of(&hello, 1, 0x80), bye(50), "R102"),
        vector("flags-device", DEVICE, &of(&pong, 1, 1), Expect::Close, "R87"),
        vector("skip-80", SERVING, &frame_with(1, 0x80, 0, 0, &[1]), Expect::PassedOver, "R15"),
        vector("skip-ff", SERVING, &frame_with(9, 0xFF, 0xFF, u64::MAX, &[1]), Expect::PassedOver, "R15: with any version, flags and number"),
        vector("skip-hello", AWAIT_HELLO, &frame_with(9, 0xC0, 3, 1, &[]), Expect::PassedOver, "R15 before authentication; the handshake deadline still applies"),
        vector("skip-device", DEVICE, &frame_with(9, 0xC0, 3, 1, &[]), Expect::PassedOver, "R15 at the device"),
        vector("seq-on-ping", SERVING, &message_frame(&ping(), 1), bye(44), "R12"),
        vector("seq-on-hello", AWAIT_HELLO, &message_frame(&handshake::hello(), 1), bye(50), "R102"),
        vector("seq-0-data", SERVING, &data_frame(0), bye(44), "R12"),
        vector("seq-2^63-data", SERVING, &data_frame(1 << 63), bye(44), "R12"),
        vector("seq-max-data", SERVING, &data_frame((1 << 63) - 1), bye(43), "R12 allows it, R107 does not"),
        vector("await-hello-data", AWAIT_HELLO, &data_frame(5), bye(50), "R102: anything but the handshake"),
        vector("await-hello-auth", AWAIT_HELLO, &message_frame(&messages::auth(), 0), bye(50), "R102"),
        vector("await-hello-bye", AWAIT_HELLO, &message_frame(&messages::leave(), 0), bye(50), "R102"),
        vector("await-auth-ping", AWAIT_AUTH, &pinged, bye(50), "R102"),
        vector("await-auth-hello", AWAIT_AUTH, &hello, bye(50), "R102: HELLO twice"),
        vector("serving-hello", SERVING, &hello, bye(44), "R109: the handshake is over"),
        vector("serving-auth", SERVING, &message_frame(&messages::auth(), 0), bye(44), "R109"),
        vector("device-hello", DEVICE, &hello, Expect::Close, "R87: not for a device"),
        vector("device-data", DEVICE, &data, Expect::Close, "R87"),
        vector("result", SERVING, &message_frame(&messages::result(), 5), refused(32), "R48: not supported by this gateway"),
    ];
    for frame_type in [0x10, 0x15, 0x1F] {
        out.push(vector(format!("type-{frame_type:02x}"), SERVING, &frame_of(frame_type, 5, &[1, 2]), refused(32), "R14: sequenced, unknown"));
    }
    for frame_type in [0x00, 0x02, 0x05, 0x0F, 0x20, 0x21, 0x22, 0x30, 0x41, 0x7E] {
        out.push(vector(format!("type-{frame_type:02x}"), SERVING, &frame_of(frame_type, 0, &[]), bye(44), "R109: unknown, or for the other direction"));
    }
    for frame_type in [0x00, 0x22, 0x50, 0x7E] {
        out.push(vector(format!("device-type-{frame_type:02x}"), DEVICE, &frame_of(frame_type, 0, &[]), Expect::Close, "R87"));
    }
    out
}

fn order() -> Vec<Vector> {
    let unknown_type = |seq| frame_of(0x1F, seq, &[]);
    vec![
        vector("order-next", SERVING, &data_frame(5), Expect::Taken, "R104"),
        vector("order-durable", SERVING, &data_frame(3), Expect::Ack { seq: 3 }, "R105: stored before"),
        vector("order-durable-old", SERVING, &data_frame(1), Expect::Ack { seq: 3 }, "R105: the ACK has the durable number, not the received one"),
        vector("order-in-flight", SERVING, &data_frame(4), Expect::Dropped, "R105: accepted before, not durable yet; the commit will acknowledge it"),
        vector("order-ahead", SERVING, &data_frame(6), nack(21, 6), "R106"),
        vector("order-limit", SERVING, &data_frame(LIMIT_SEQ), nack(21, LIMIT_SEQ), "R107 allows the limit itself"),
        vector("order-over-limit", SERVING, &data_frame(LIMIT_SEQ + 1), bye(43), "R107"),
        vector("order-over-limit-damaged", SERVING, &damaged_payload(data_frame(LIMIT_SEQ + 1)), bye(43), "R44: credit comes before the payload's checksum"),
        vector("dropping-ahead", DROPPING, &data_frame(6), Expect::Dropped, "R62"),
        vector("dropping-next", DROPPING, &data_frame(5), Expect::Taken, "R62: the awaited number"),
        vector("dropping-durable", DROPPING, &data_frame(3), Expect::Ack { seq: 3 }, "R105"),
        vector("dropping-over-limit", DROPPING, &data_frame(LIMIT_SEQ + 1), bye(43), "R107"),
        vector("order-type-durable", SERVING, &unknown_type(3), Expect::Ack { seq: 3 }, "R44: order comes before type"),
        vector("order-type-ahead", SERVING, &unknown_type(6), nack(21, 6), "R44"),
        vector("order-flags-type", SERVING, &frame_with(1, 0x1F, 1, 5, &[]), refused(34), "R44: flags come before type"),
        vector("order-flags-decode", SERVING, &frame_with(1, types::DATA, 1, 5, &[]), refused(34), "R44: flags come before content"),
    ]
}

fn gaps() -> Vec<Vector> {
    let gap = |from_seq, seq| message_frame(&Gap { from_seq, reason: 0, ext: &[] }, seq);
    let flagged = frame_with(1, types::GAP, 1, 9, payload_of(&gap(5, 9)));
    let critical = message_frame(&Gap { from_seq: 5, reason: 0, ext: &[2, 0] }, 9);
    let trailing = frame_with(1, types::GAP, 0, 9, &[5, 0, 0, 7]);
    let long = frame_with(1, types::GAP, 0, 9, &[0x85, 0, 0, 0]);
    let empty = frame_with(1, types::GAP, 0, 9, &[]);
    vec![
        vector("gap-one", SERVING, &gap(5, 5), Expect::Taken, "R45: a single number"),
        vector("gap-next", SERVING, &gap(5, 9), Expect::Taken, "R45: 6 to 9 as well; 10 is next"),
        vector("gap-overlap", SERVING, &gap(2, 9), Expect::Taken, "R45: only 5 to 9 are recorded, the rest is stored"),
        vector("gap-beyond-limit", SERVING, &gap(5, 100_000), Expect::Taken, "R107 checks the first number"),
        vector("gap-over-limit", SERVING, &gap(LIMIT_SEQ + 1, 100_000), bye(43), "R107"),
        vector("gap-ahead", SERVING, &gap(6, 9), nack(21, 9), "R106"),
        vector("gap-durable", SERVING, &gap(2, 3), Expect::Ack { seq: 3 }, "R105"),
        vector("gap-in-flight", SERVING, &gap(2, 4), Expect::Dropped, "R105"),
        vector("gap-backwards", SERVING, &gap(6, 5), refused(33), "R45: from_seq above the header's seq"),
        vector("gap-backwards-ahead", SERVING, &gap(8, 7), nack(21, 7), "R45: stands for its own number, which is not next"),
        vector("gap-from-0", SERVING, &gap(0, 5), refused(33), "R24"),
        vector("gap-from-0-ahead", SERVING, &gap(0, 9), nack(33, 9), "R45: covers 0 to 9 and is refused"),
        vector("gap-critical", SERVING, &critical, nack(34, 9), "R26, R45: still covers 5 to 9"),
        vector("gap-trailing", SERVING, &trailing, nack(30, 9), "R21, R45: still covers 5 to 9"),
        vector("gap-long-varint", SERVING, &long, nack(30, 9), "R22, R45: still covers 5 to 9"),
        vector("gap-of-nothing", SERVING, &empty, nack(21, 9), "R45: has no first number, so it covers only its own"),
        vector("gap-dropping", DROPPING, &gap(4, 9), Expect::Taken, "R62: covers the awaited number"),
        vector("gap-flags", SERVING, &flagged, nack(34, 9), "R11: all its numbers are used"),
        vector("gap-damaged", SERVING, &damaged_payload(gap(5, 9)), nack(21, 9), "R44: its first number cannot be known"),
        vector("gap-reason", SERVING, &message_frame(&Gap { from_seq: 5, reason: 255, ext: &[] }, 9), Expect::Taken, "R45: any reason"),
    ]
}
