//! Vectors of each message but DATA: complete, at its limits, and invalid.

use fieldgate_protocol::frame::types;
use fieldgate_protocol::message::{Ack, Auth, Bye, Challenge, Command, CommandResult, Event, Gap, Hello, Nack, Ping, Pong, Welcome};

use super::frames::ping;
use super::handshake::{challenge, hello, welcome};
use super::*;

pub fn vectors() -> Vec<Vector> {
    [whole(), hellos(), texts(), declares(), events(), encodings(), exts(), ranges(), device_side()].concat()
}

pub fn auth() -> Auth<'static> {
    Auth { mono_us: 1_040_000, ext: &[], mac: [0x5A; 32] }
}

pub fn leave() -> Bye<'static> {
    Bye { code: 0, retry_after_ms: 0, min_version: 0, max_version: 0, detail: "restart", ext: &[] }
}

pub fn result() -> CommandResult<'static> {
    CommandResult { id: 77, status: 0, body: &[1, 2, 3], ext: &[] }
}

pub fn pong() -> Pong<'static> {
    Pong { mono_us: 5_000_000, received_us: 1_760_000_004_000_000, sent_us: 1_760_000_004_000_100, ext: &[] }
}

fn event() -> Event<'static> {
    Event { clock: Clock::Boot, boot: 7, time_us: 5_000_000, level: 2, code: 300, text: "battery low", ext: &[] }
}

fn nacked() -> Nack<'static> {
    Nack { code: 11, expected_seq: 5, retry_after_ms: 2000, detail: "store down", ext: &[] }
}

fn with_fields(mut vector: Vector, fields: Value) -> Vector {
    vector.fields = fields;
    vector
}

/// Numbers beyond 2^53 are strings, for readers whose numbers are doubles.
fn whole() -> Vec<Vector> {
    let taken = |id: &str, state, frame: &[u8], fields| with_fields(vector(id, state, frame, Expect::Taken, "complete, with every field"), fields);
    let schema_hash = hello().schema_hash;
    let channels: Vec<Value> = declare().channels.iter().map(|c| json!({ "id": c.id, "name": c.name, "unit": c.unit, "kind": c.kind as u8, "exp10": c.exp10 })).collect();
    vec![
        taken(
            "hello",
            AWAIT_HELLO,
            &message_frame(&hello(), 0),
            json!({
            "min_version": 1, "max_version": 1, "name": "pump-07", "stream": handshake::STREAM.to_string(),
            "oldest_seq": 1, "next_seq": 3, "boot": 7, "mono_us": 1_000_000, "utc_us": 0, "rx_bytes_max": 4096,
            "firmware": "2.4.1", "schema": 1, "schema_hash": hex(&schema_hash),
            "nonce": hex(&handshake::DEVICE_NONCE), "caps": 0, "ext": "" }),
        ),
        taken(
            "challenge",
            DEVICE,
            &message_frame(&challenge(), 0),
            json!({
            "version": 1, "nonce": hex(&handshake::GATEWAY_NONCE), "rx_bytes_max": 4096, "caps": 0, "ext": "" }),
        ),
        taken("auth", AWAIT_AUTH, &message_frame(&auth(), 0), json!({ "mono_us": 1_040_000, "ext": "", "mac": "5a".repeat(32) })),
        taken(
            "welcome",
            DEVICE,
            &message_frame(&welcome(1, 1), 0),
            json!({
            "durable_seq": 1, "limit_seq": 65, "keepalive_s": 40, "ack_timeout_s": 30,
            "utc_us": 1_760_000_000_250_000i64, "schema_known": 1, "ext": "", "mac": "00".repeat(32) }),
        ),
        taken("declare", SERVING, &message_frame(&declare(), 0), json!({ "schema": 1, "channels": channels, "ext": "" })),
        taken("gap", SERVING, &message_frame(&Gap { from_seq: 5, reason: 1, ext: &[] }, 300), json!({ "from_seq": 5, "reason": 1, "ext": "" })),
        with_fields(vector("result-whole", SERVING, &message_frame(&result(), 5), refused(32), "R48"), json!({ "id": 77, "status": 0, "body": "010203", "ext": "" })),
        taken(
            "event",
            SERVING,
            &message_frame(&event(), 5),
            json!({
            "clock": 0, "boot": 7, "time_us": 5_000_000, "level": 2, "code": 300, "text": "battery low", "ext": "" }),
        ),
        taken("ack", DEVICE, &message_frame(&Ack { limit_seq: 67, ext: &[] }, 3), json!({ "limit_seq": 67, "ext": "" })),
        taken(
            "nack",
            DEVICE,
            &message_frame(&nacked(), 5),
            json!({
            "code": 11, "expected_seq": 5, "retry_after_ms": 2000, "detail": "store down", "ext": "" }),
        ),
        with_fields(
            vector("command", DEVICE, &message_frame(&Command { id: u64::MAX, ttl_ms: 60_000, kind: 3, body: b"on", ext: &[] }, 0), Expect::Close, "R48: a fault at a device without commands"),
            json!({ "id": u64::MAX.to_string(), "ttl_ms": 60_000, "kind": 3, "body": "6f6e", "ext": "" }),
        ),
        taken(
            "ping",
            SERVING,
            &message_frame(&Ping { mono_us: 9_000_000, pong_sent_us: 1_760_000_004_000_100, pong_mono_us: 5_030_000, ext: &[] }, 0),
            json!({ "mono_us": 9_000_000, "pong_sent_us": 1_760_000_004_000_100i64, "pong_mono_us": 5_030_000, "ext": "" }),
        ),
        taken(
            "pong",
            DEVICE,
            &message_frame(&pong(), 0),
            json!({
            "mono_us": 5_000_000, "received_us": 1_760_000_004_000_000i64, "sent_us": 1_760_000_004_000_100i64, "ext": "" }),
        ),
        taken(
            "bye-device",
            SERVING,
            &message_frame(&leave(), 0),
            json!({
            "code": 0, "retry_after_ms": 0, "min_version": 0, "max_version": 0, "detail": "restart", "ext": "" }),
        ),
        taken(
            "bye-gateway",
            DEVICE,
            &message_frame(&Bye { code: 51, retry_after_ms: 1000, min_version: 2, max_version: 3, detail: "", ext: &[] }, 0),
            json!({ "code": 51, "retry_after_ms": 1000, "min_version": 2, "max_version": 3, "detail": "", "ext": "" }),
        ),
    ]
}

fn hellos() -> Vec<Vector> {
    let mut out = Vec::new();
    let mut say = |id: &str, hello: Hello<'_>, expect, note| {
        out.push(vector(format!("hello-{id}"), AWAIT_HELLO, &message_frame(&hello, 0), expect, note));
    };
    let name_33 = "n".repeat(33);
    for (id, name, expect) in [
        ("name-0", "", bye(50)),
        ("name-1", "n", Expect::Taken),
        ("name-32", &name_33[1..], Expect::Taken),
        ("name-33", &name_33, bye(50)),
        ("name-all", "azAZ09._:-", Expect::Taken),
        ("name-space", "pump 7", bye(50)),
        ("name-slash", "pump/7", bye(50)),
        ("name-umlaut", "p\u{fc}mp", bye(50)),
        ("name-nul", "pump\0", bye(50)),
    ] {
        say(id, Hello { name, ..hello() }, expect, "R31, R102");
    }
    for (id, firmware, expect) in [
        ("firmware-0", "", Expect::Taken),
        ("firmware-32", &name_33[1..], Expect::Taken),
        ("firmware-33", &name_33, bye(50)),
        ("firmware-nul", "2\0", bye(50)),
    ] {
        say(id, Hello { firmware, ..hello() }, expect, "R23, R102");
    }
    for (id, min_version, max_version, expect) in [
        ("versions-0-1", 0, 1, Expect::Taken),
        ("versions-1-9", 1, 9, Expect::Taken),
        ("versions-2-3", 2, 3, bye(51)),
        ("versions-0-0", 0, 0, bye(51)),
        ("versions-2-1", 2, 1, bye(50)),
    ] {
        say(id, Hello { min_version, max_version, ..hello() }, expect, "R38, R24");
    }
    let top = (1 << 63) - 1;
    for (id, stream, oldest_seq, next_seq, expect) in [
        ("stream-0", 0, 1, 3, Expect::Taken),
        ("stream-top", top, 1, 3, Expect::Taken),
        ("stream-2^63", top + 1, 1, 3, bye(50)),
        ("seq-new", 5, 1, 1, Expect::Taken),
        ("seq-0", 5, 0, 0, bye(50)),
        ("seq-oldest-0", 5, 0, 3, bye(50)),
        ("seq-empty-queue", 5, 3, 3, Expect::Taken),
        ("seq-oldest-above", 5, 4, 3, bye(50)),
        ("seq-top", 5, top, top, Expect::Taken),
        ("seq-2^63", 5, 1, top + 1, bye(50)),
    ] {
        say(id, Hello { stream, oldest_seq, next_seq, ..hello() }, expect, "R12, R24");
    }
    say("mono-top", Hello { mono_us: 1 << 53, ..hello() }, Expect::Taken, "R50");
    say("mono-over", Hello { mono_us: (1 << 53) + 1, ..hello() }, bye(50), "R50");
    say("utc-min", Hello { utc_us: i64::MIN, ..hello() }, Expect::Taken, "R24: a wrong clock does not lock a device out");
    say("no-schema", Hello { schema: 0, schema_hash: [0; 8], ..hello() }, Expect::Taken, "R30");
    say("caps", Hello { caps: u32::MAX, ..hello() }, Expect::Taken, "R38: unknown capabilities are accepted");
    out
}

fn texts() -> Vec<Vector> {
    let say = |id: &str, text: &str, expect, note| vector(format!("event-text-{id}"), SERVING, &message_frame(&Event { text, ..event() }, 5), expect, note);
    let payload = message_frame(&event(), 5);
    let bad_utf8 = replaced(payload_of(&payload), 10, b"battery low", b"\xC3\x28ttery low");
    let cut_utf8 = replaced(payload_of(&payload), 10, b"battery low", b"battery lo\xE2");
    vec![
        say("0", "", Expect::Taken, "R23"),
        say("128", &"t".repeat(128), Expect::Taken, "R23"),
        say("129", &"t".repeat(129), refused(33), "R23"),
        say("utf8", "Grad \u{b0}C \u{1F321}", Expect::Taken, "R23: UTF-8"),
        say("128-utf8", &"\u{e9}".repeat(64), Expect::Taken, "R23: bytes count, not characters"),
        say("nul", "a\0b", refused(30), "R23: U+0000"),
        vector("event-text-bad-utf8", SERVING, &frame_of(types::EVENT, 5, &bad_utf8), refused(30), "R23"),
        vector("event-text-cut-utf8", SERVING, &frame_of(types::EVENT, 5, &cut_utf8), refused(30), "R23"),
    ]
}

fn declares() -> Vec<Vector> {
    let one = Channel { id: 1, name: "t", unit: "Cel", kind: Kind::Integer, exp10: 0 };
    let mut out = Vec::new();
    let mut say = |id: String, channels: &[Channel<'_>], expect, note| {
        let declare = Declare { schema: 2, channels: channels.iter().copied().collect(), ext: &[] };
        out.push(vector(format!("declare-{id}"), SERVING, &message_frame(&declare, 0), expect, note));
    };
    let names: Vec<String> = (0..32).map(|i| format!("c{i}")).collect();
    let channels: Vec<Channel<'_>> = (0..32).map(|i| Channel { id: i, name: &names[usize::from(i)], ..one }).collect();
    say("0-channels".into(), &[], bye(44), "R42");
    say("32-channels".into(), &channels, Expect::Taken, "R42");
    say("id-twice".into(), &[one, Channel { name: "u", ..one }], bye(44), "R42");
    say("name-twice".into(), &[one, Channel { id: 2, ..one }], bye(44), "R42");
    say("name-0".into(), &[Channel { name: "", ..one }], bye(44), "R42");
    say("name-text".into(), &[Channel { name: "T\u{e4}nk 1", ..one }], Expect::Taken, "R42: any text");
    let long = "x".repeat(33);
    say("name-32".into(), &[Channel { name: &long[1..], ..one }], Expect::Taken, "R23");
    say("name-33".into(), &[Channel { name: &long, ..one }], bye(44), "R23");
    say("unit-0".into(), &[Channel { unit: "", ..one }], Expect::Taken, "R42");
    say("unit-16".into(), &[Channel { unit: &long[..16], ..one }], Expect::Taken, "R23");
    say("unit-17".into(), &[Channel { unit: &long[..17], ..one }], bye(44), "R23");
    for (kind, exp10, expect) in [
        (0, 22, Expect::Taken),
        (0, 23, bye(44)),
        (0, -22, Expect::Taken),
        (0, -23, bye(44)),
        (0, -128, bye(44)),
        (1, 0, Expect::Taken),
        (1, 1, bye(44)),
        (2, -1, bye(44)),
        (3, 1, bye(44)),
        (4, 0, bye(44)),
        (255, 0, bye(44)),
    ] {
        let declare = Declare { schema: 2, channels: [Channel { exp10, ..one }].into(), ext: &[] };
        let frame = with_byte(&message_frame(&declare, 0), 9, Kind::Integer as u8, kind);
        out.push(vector(format!("declare-kind-{kind}-exp-{exp10}"), SERVING, &frame, expect, "R43"));
    }
    let schema_0 = Declare { schema: 0, ..declare() };
    out.push(vector("declare-schema-0", SERVING, &message_frame(&schema_0, 0), bye(44), "R24"));
    let top = Declare { schema: u16::MAX, ..declare() };
    out.push(vector("declare-schema-65535", SERVING, &message_frame(&top, 0), Expect::Taken, "R24"));
    let whole = message_frame(&Declare { schema: 2, channels: channels.iter().copied().collect(), ext: &[] }, 0);
    let payload = payload_of(&whole);
    let mut more = replaced(payload, 0, &[2, 32], &[2, 33]);
    more.truncate(more.len() - 1);
    more.extend([99, 1, b'z', 0, 0, 0, 0]);
    out.push(vector("declare-33-channels", SERVING, &frame_of(types::DECLARE, 0, &more), bye(44), "R42"));
    let mut other = declare();
    other.channels[0].exp10 = -1;
    let conflict = Expect::Nack { code: 23, seq: 0, expected_seq: EXPECTED_SEQ, consumed: false };
    out.push(vector("declare-conflict", SERVING, &message_frame(&other, 0), conflict, "R40: number 1 has different content"));
    out
}

fn events() -> Vec<Vector> {
    let say = |id: &str, event: Event<'_>, expect, note| vector(format!("event-{id}"), SERVING, &message_frame(&event, 5), expect, note);
    vec![
        vector("event-clock-2", SERVING, &with_byte(&message_frame(&event(), 5), 0, 0, 2), refused(33), "R24"),
        say("level-4", Event { level: 4, ..event() }, Expect::Taken, "R46"),
        say("level-5", Event { level: 5, ..event() }, refused(33), "R24"),
        say("boot-time-top", Event { time_us: 1 << 53, ..event() }, Expect::Taken, "R50"),
        say("boot-time-over", Event { time_us: (1 << 53) + 1, ..event() }, refused(33), "R50"),
        say("boot-time-negative", Event { time_us: -1, ..event() }, refused(33), "R50"),
        say("utc-first", Event { clock: Clock::Utc, time_us: -62_135_596_800_000_000, ..event() }, Expect::Taken, "R50: year 1"),
        say("utc-before", Event { clock: Clock::Utc, time_us: -62_135_596_800_000_001, ..event() }, refused(33), "R50"),
        say("utc-last", Event { clock: Clock::Utc, time_us: 253_402_300_799_999_999, ..event() }, Expect::Taken, "R50: year 9999"),
        say("utc-after", Event { clock: Clock::Utc, time_us: 253_402_300_800_000_000, ..event() }, refused(33), "R50"),
        say("utc-1970", Event { clock: Clock::Utc, time_us: 0, ..event() }, Expect::Taken, "R75: suspect, not refused"),
    ]
}

/// EVENT is `clock boot time_us level code text ext`, here with the bytes `00 07 80ade204 02 ac02
/// 0b... 00`.
fn encodings() -> Vec<Vector> {
    let whole = message_frame(&event(), 5);
    let payload = payload_of(&whole);
    let say = |id: &str, payload: &[u8], code, note| vector(format!("encoding-{id}"), SERVING, &frame_of(types::EVENT, 5, payload), refused(code), note);
    let at = |at, old: &[u8], new: &[u8]| replaced(payload, at, old, new);
    let ext_at = payload.len() - 1;
    let pinged = message_frame(&ping(), 0);
    vec![
        say("trailing", &[payload, &[0]].concat(), 30, "R21: a byte after the message"),
        say("cut", &payload[..ext_at], 30, "R20: the last byte is missing"),
        say("long-boot", &at(1, &[0x07], &[0x87, 0x00]), 30, "R22: 7 in two bytes"),
        say("long-boot-3", &at(1, &[0x07], &[0x87, 0x80, 0x00]), 30, "R22: 7 in three bytes"),
        say("long-time", &at(2, &[0x80, 0xad, 0xe2, 0x04], &[0x80, 0xad, 0xe2, 0x84, 0x00]), 30, "R22"),
        say("long-code", &at(7, &[0xac, 0x02], &[0xac, 0x82, 0x00]), 30, "R22"),
        say("long-text-length", &at(9, &[0x0b], &[0x8b, 0x00]), 30, "R22"),
        say("long-ext-length", &at(ext_at, &[0x00], &[0x80, 0x00]), 30, "R22"),
        say("u16-over", &at(7, &[0xac, 0x02], &[0x80, 0x80, 0x04]), 30, "R20: 65,536 in a u16"),
        say("u16-4-bytes", &at(7, &[0xac, 0x02], &[0x80, 0x80, 0x80, 0x01]), 30, "R20: a u16 has at most 3 bytes"),
        say("u32-over", &at(1, &[0x07], &[0x80, 0x80, 0x80, 0x80, 0x10]), 30, "R20: 2^32 in a u32"),
        say("i64-over", &at(2, &[0x80, 0xad, 0xe2, 0x04], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]), 30, "R20: more than 64 bits"),
        say("text-past-end", &at(9, &[0x0b], &[0x7f]), 30, "R20: a length beyond the payload"),
        say("text-huge", &at(9, &[0x0b], &[0xff, 0xff, 0xff, 0xff, 0x0f]), 30, "R20: a length of 4 GiB; nothing is allocated for it"),
        vector("encoding-trailing-ping", SERVING, &frame_of(types::PING, 0, &[payload_of(&pinged), &[0]].concat()), bye(44), "R21, R109"),
        vector("encoding-trailing-hello", AWAIT_HELLO, &frame_of(types::HELLO, 0, &[payload_of(&message_frame(&hello(), 0)), &[0]].concat()), bye(50), "R21, R102"),
    ]
}

fn exts() -> Vec<Vector> {
    let say = |id: &str, ext: &[u8], expect, note| vector(format!("ext-{id}"), SERVING, &message_frame(&Event { ext, ..event() }, 5), expect, note);
    let longest = [&[0xFF, 0xFF][..], &[0xEE; 255]].concat();
    vec![
        say("odd", &[1, 2, 0xAA, 0xBB], Expect::Taken, "R26: an odd tag is skipped"),
        say("odd-empty", &[1, 0], Expect::Taken, "R25: no value"),
        say("odd-longest", &longest, Expect::Taken, "R25: 255 bytes of value"),
        say("odd-two", &[3, 1, 0, 1, 1, 0], Expect::Taken, "R25: any order"),
        say("odd-twice", &[1, 1, 0, 1, 1, 0], Expect::Taken, "R25: a repeated tag"),
        say("even", &[2, 0], refused(34), "R26: an even tag is critical"),
        say("even-0", &[0, 0], refused(34), "R26"),
        say("even-254", &[254, 1, 9], refused(34), "R26"),
        say("odd-even", &[1, 1, 0, 2, 1, 0], refused(34), "R26: after an odd one"),
        say("tag-only", &[1], refused(30), "R25"),
        say("even-tag-only", &[2], refused(30), "R25: no length, so no tag either"),
        say("short", &[1, 2, 0xAA], refused(30), "R25: a value that is cut short"),
        say("even-short", &[2, 2, 0xAA], refused(34), "R26 comes before R25: the tag is read first"),
        vector("ext-ping-even", SERVING, &message_frame(&Ping { ext: &[2, 0], ..ping() }, 0), bye(44), "R109"),
        vector("ext-hello-even", AWAIT_HELLO, &message_frame(&Hello { ext: &[2, 0], ..hello() }, 0), bye(50), "R102"),
        vector("ext-pong-odd", DEVICE, &message_frame(&Pong { ext: &[1, 0], ..pong() }, 0), Expect::Taken, "R26 at the device"),
        vector("ext-pong-even", DEVICE, &message_frame(&Pong { ext: &[2, 0], ..pong() }, 0), Expect::Close, "R26, R87"),
    ]
}

fn ranges() -> Vec<Vector> {
    let say = |id: &str, ping: Ping<'_>, expect, note| vector(format!("ping-{id}"), SERVING, &message_frame(&ping, 0), expect, note);
    let auth = |mono_us| message_frame(&Auth { mono_us, ..auth() }, 0);
    vec![
        say("mono-top", Ping { mono_us: 1 << 53, ..ping() }, Expect::Taken, "R50"),
        say("mono-over", Ping { mono_us: (1 << 53) + 1, ..ping() }, bye(44), "R50, R109"),
        say("pong-after-ping", Ping { pong_mono_us: 5_000_001, ..ping() }, bye(44), "R24: the PONG arrived after this PING was sent"),
        say("pong-utc-after", Ping { pong_sent_us: 253_402_300_800_000_000, ..ping() }, bye(44), "R50"),
        vector("auth-mono-over", AWAIT_AUTH, &auth((1 << 53) + 1), bye(50), "R50, R102"),
        vector(
            "auth-mac-31",
            AWAIT_AUTH,
            &{
                let f = auth(0);
                frame_of(types::AUTH, 0, &payload_of(&f)[..payload_of(&f).len() - 1])
            },
            bye(50),
            "R20",
        ),
    ]
}

fn device_side() -> Vec<Vector> {
    let say = |id: &str, frame: &[u8], expect, note| vector(id, DEVICE, frame, expect, note);
    let text = "d".repeat(97);
    vec![
        say("nack-detail-96", &message_frame(&Nack { detail: &text[1..], ..nacked() }, 5), Expect::Taken, "R23"),
        say("nack-detail-97", &message_frame(&Nack { detail: &text, ..nacked() }, 5), Expect::Close, "R23, R87"),
        say("bye-detail-96", &message_frame(&Bye { detail: &text[1..], ..leave() }, 0), Expect::Taken, "R23"),
        say("bye-detail-97", &message_frame(&Bye { detail: &text, ..leave() }, 0), Expect::Close, "R23, R87"),
        say("bye-unknown-code", &message_frame(&Bye { code: 99, ..leave() }, 0), Expect::Taken, "R61: unknown class, so reconnect"),
        say("welcome-keepalive-0", &message_frame(&Welcome { keepalive_s: 0, ..welcome(1, 1) }, 0), Expect::Close, "R24"),
        say("welcome-ack-timeout-0", &message_frame(&Welcome { ack_timeout_s: 0, ..welcome(1, 1) }, 0), Expect::Close, "R24"),
        say("welcome-limit-below", &message_frame(&Welcome { limit_seq: 0, ..welcome(1, 1) }, 0), Expect::Close, "R24"),
        say("welcome-known-2", &message_frame(&welcome(1, 2), 0), Expect::Close, "R24"),
        say("challenge-version-2", &message_frame(&Challenge { version: 2, ..challenge() }, 0), Expect::Close, "R38: not offered"),
    ]
}
