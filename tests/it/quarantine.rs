//! The rows of the table of malformed input (SPEC, section 12) that end in quarantine, against the real
//! gateway: the frame is stored completely under its number, leaves no other data, and its stream continues.

use fieldgate_protocol::column::encoding;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;
use fieldgate_protocol::message::{Column, CommandResult, Data, Event, Gap};
use fieldgate_protocol::value::{Clock, TimeUnit};

use crate::malformed::{Cases, assert_only, assert_serves};
use crate::support::gateway::Gateway;
use crate::support::messages::{
    FLOW, LEVEL, OPEN, SCHEMA, T0_US, TEMPERATURE, event, frame, gap, header, no_columns, payload,
    raw, readings, reheaded, sealed, with_byte, with_columns,
};

/// Asserts for frames with number 2 that are rejected permanently with `code`: each is quarantined completely and
/// leaves no other data, and its stream continues.
fn assert_quarantined(code: Code, cases: Cases) {
    let gateway = Gateway::start(&[]);
    for (i, (what, bytes)) in cases.iter().enumerate() {
        eprintln!("{what}");
        let name = format!("device-{i}");
        let (mut link, _) = gateway.connect(&name);
        link.send(&readings(1));
        link.expect_ack(1);
        link.send(bytes);
        link.expect_nack(2, code, 3);
        link.expect_ack(2);
        link.send(&readings(3));
        link.expect_ack(3);
        let mut database = gateway.database();
        let kept = (2, code as i64, bytes.clone());
        assert_eq!(database.quarantine(&name), [kept], "{what}");
        let numbers: Vec<i64> = database.frames(&name).iter().map(|frame| frame.0).collect();
        assert_eq!(numbers, [1, 2, 3], "{what}");
        let values: Vec<_> = database.readings(&name).iter().map(|row| row.1).collect();
        assert_eq!(values, [Some(0.01), Some(0.03)], "{what}");
    }
    let mut database = gateway.database();
    let events = "SELECT count(*) FROM device_events WHERE kind = 'event'";
    assert_eq!(database.count(events), 0);
    assert_eq!(database.count("SELECT count(*) FROM gaps"), 0);
    assert_eq!(
        database.count("SELECT count(*) FROM schemas"),
        cases.len() as i64
    );
    assert_serves(&gateway, "good");
}

fn data_of(payload: &[u8]) -> Vec<u8> {
    sealed(header(types::DATA, 2), payload)
}

#[test]
fn content_that_does_not_decode_is_quarantined() {
    let good = readings(2);
    let good = payload(&good);
    let mut trailing = good.to_vec();
    trailing.push(0);
    // The schema, 1, as a varint of two bytes.
    let mut overlong = good.to_vec();
    overlong.splice(0..1, [0x81, 0x00]);
    let mut too_wide = good.to_vec();
    too_wide.splice(0..1, [0xFF, 0xFF, 0x07]);
    let mut bad_ext = good.to_vec();
    bad_ext.splice(good.len() - 1.., [2, 1, 5]);
    let good_event = event(2, 1, 1, "ab");
    let mut not_utf8 = payload(&good_event).to_vec();
    let text_at = not_utf8.len() - 3;
    not_utf8[text_at] = 0xFF;
    let mut columns = vec![SCHEMA as u8, 1, 0, 7, 0, 1, 0, 0, 33];
    columns.extend((0..33).flat_map(|channel| [channel, 0, 0, 0]));
    columns.push(0);
    let cases: Cases = vec![
        ("empty", data_of(&[])),
        ("cut short", data_of(&good[..good.len() - 3])),
        ("trailing byte", data_of(&trailing)),
        ("overlong varint", data_of(&overlong)),
        ("number too wide", data_of(&too_wide)),
        ("bad ext", data_of(&bad_ext)),
        ("33 columns", data_of(&columns)),
        (
            "length beyond the payload",
            data_of(&[1, 1, 0, 7, 0, 1, 0, 0xFF, 0x7F]),
        ),
        ("not UTF-8", sealed(header(types::EVENT, 2), &not_utf8)),
        ("U+0000", event(2, 1, 1, "a\0b")),
        ("GAP of nothing", sealed(header(types::GAP, 2), &[])),
    ];
    assert_quarantined(Code::Malformed, cases);
}

#[test]
fn numbers_out_of_range_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let column = [raw(TEMPERATURE, &value)];
    let with = |data: Data<'_>| with_columns(data, 2, &column);
    let good = no_columns(1);
    let open = [0; 8192];
    let packed = Column {
        channel: TEMPERATURE,
        encoding: encoding::DELTA_PACKED,
        nulls: &[],
        data: &[2, 0],
    };
    let columns = [
        packed,
        Column {
            channel: OPEN,
            ..packed
        },
        Column {
            channel: 9,
            ..packed
        },
    ];
    let long_text = "x".repeat(129);
    let last_us = 253_402_300_799_999_999;
    let event_at = |clock, time_us| {
        frame(
            &Event {
                clock,
                boot: 7,
                time_us,
                level: 1,
                code: 1,
                text: "",
                ext: &[],
            },
            2,
        )
    };
    let cases: Cases = vec![
        ("clock 2", with_byte(&with(good.clone()), 1, 2)),
        ("time unit 3", with_byte(&with(good.clone()), 2, 3)),
        (
            "no rows",
            with(Data {
                rows: 0,
                ..good.clone()
            }),
        ),
        ("4097 rows", with_columns(no_columns(4097), 2, &[packed])),
        ("65535 rows", with_columns(no_columns(65535), 2, &[packed])),
        ("8193 readings", with_columns(no_columns(2731), 2, &columns)),
        ("no rows, and a column that has some", {
            with_columns(no_columns(0), 2, &[raw(OPEN, &open[..9])])
        }),
        (
            "year 10000",
            with(Data {
                t0: last_us + 1,
                ..good.clone()
            }),
        ),
        (
            "year 0",
            with(Data {
                t0: -62_135_596_800_000_001,
                ..good.clone()
            }),
        ),
        (
            "year 0, seconds",
            with(Data {
                t0: -62_135_596_801,
                time_unit: TimeUnit::Seconds,
                ..good.clone()
            }),
        ),
        (
            "overflow",
            with(Data {
                t0: i64::MAX,
                time_unit: TimeUnit::Seconds,
                ..good.clone()
            }),
        ),
        (
            "before boot",
            with(Data {
                clock: Clock::Boot,
                t0: -1,
                ..good.clone()
            }),
        ),
        (
            "long after boot",
            with(Data {
                clock: Clock::Boot,
                t0: (1 << 53) + 1,
                ..good.clone()
            }),
        ),
        ("second row in year 10000", {
            with_columns(
                Data {
                    t0: last_us,
                    ..no_columns(2)
                },
                2,
                &[packed],
            )
        }),
        ("level 5", event(2, 5, 1, "")),
        ("text of 129 bytes", event(2, 1, 1, &long_text)),
        ("event in year 10000", event_at(Clock::Utc, last_us + 1)),
        ("event before boot", event_at(Clock::Boot, -1)),
        (
            "event of clock 2",
            with_byte(&event_at(Clock::Utc, 0), 0, 2),
        ),
        ("GAP from 0", gap(0, 2, 0)),
        ("GAP from behind itself", gap(3, 2, 0)),
    ];
    assert_quarantined(Code::Limit, cases);
}

#[test]
fn times_and_columns_that_do_not_decode_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let two = [0; 16];
    let rows = |count: u16| no_columns(count);
    let of = |encoding: u8, data: &'static [u8]| Column {
        channel: TEMPERATURE,
        encoding,
        nulls: &[],
        data,
    };
    let one = |column: Column<'_>| with_columns(rows(1), 2, &[column]);
    let dt = |dt: &'static [u8]| {
        let data = Data {
            step: 0,
            dt,
            ..rows(2)
        };
        with_columns(data, 2, &[raw(TEMPERATURE, &two)])
    };
    let temperature = raw(TEMPERATURE, &value);
    let nulls = |nulls: &'static [u8]| Column {
        nulls,
        ..temperature
    };
    let cases: Cases = vec![
        ("no columns", with_columns(rows(1), 2, &[])),
        (
            "channel unknown",
            one(Column {
                channel: 99,
                ..temperature
            }),
        ),
        (
            "channel twice",
            with_columns(rows(1), 2, &[temperature, temperature]),
        ),
        ("encoding 3", one(of(3, &[0]))),
        ("encoding 255", one(of(255, &[0]))),
        (
            "delta of a float",
            one(Column {
                channel: LEVEL,
                ..of(1, &[0])
            }),
        ),
        (
            "packed delta of a float",
            one(Column {
                channel: FLOW,
                ..of(2, &[0, 0])
            }),
        ),
        ("raw, too short", one(raw(TEMPERATURE, &value[..7]))),
        ("raw, too long", one(raw(TEMPERATURE, &two))),
        ("binary32 of 8 bytes", one(raw(FLOW, &value))),
        ("bool 2", one(raw(OPEN, &[2]))),
        (
            "bool 2 by delta",
            one(Column {
                channel: OPEN,
                ..of(1, &[4])
            }),
        ),
        ("delta, no value", one(of(1, &[]))),
        ("delta, two values", one(of(1, &[0, 0]))),
        ("delta, overlong", one(of(1, &[0x80, 0x00]))),
        (
            "delta, 65 bits",
            one(of(
                1,
                &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 3],
            )),
        ),
        ("packed, no width", one(of(2, &[0]))),
        (
            "packed, width 65",
            with_columns(rows(2), 2, &[of(2, &[0, 65, 0, 0, 0, 0, 0, 0, 0, 0, 0])]),
        ),
        (
            "packed, spare bits",
            with_columns(rows(2), 2, &[of(2, &[0, 2, 0xFD])]),
        ),
        (
            "packed, too short",
            with_columns(rows(2), 2, &[of(2, &[0, 9, 1])]),
        ),
        ("nulls too long", one(nulls(&[0, 0]))),
        ("nulls, spare bits", one(nulls(&[2]))),
        ("a value for a null", one(nulls(&[1]))),
        ("times not increasing", dt(&[0])),
        ("dt missing", dt(&[])),
        ("dt too long", dt(&[1, 1])),
        ("dt overlong", dt(&[0x81, 0x00])),
        (
            "dt and step",
            with_columns(
                Data {
                    dt: &[1],
                    ..rows(2)
                },
                2,
                &[raw(TEMPERATURE, &two)],
            ),
        ),
    ];
    assert_quarantined(Code::Column, cases);
}

#[test]
fn unknown_or_unsupported_sequenced_types_are_quarantined() {
    let result = CommandResult {
        id: 1,
        status: 0,
        body: b"done",
        ext: &[],
    };
    let cases: Cases = vec![
        ("10", sealed(header(0x10, 2), &[])),
        ("15", sealed(header(0x15, 2), b"unheard of")),
        ("1F", sealed(header(0x1F, 2), &[0; 100])),
        ("RESULT", frame(&result, 2)),
        (
            "RESULT that does not decode",
            sealed(header(types::RESULT, 2), &[]),
        ),
    ];
    assert_quarantined(Code::UnknownType, cases);
}

#[test]
fn flags_and_critical_tags_are_quarantined() {
    let value = 5i64.to_le_bytes();
    let column = [raw(TEMPERATURE, &value)];
    let with_ext = |ext: &'static [u8]| {
        with_columns(
            Data {
                ext,
                ..no_columns(1)
            },
            2,
            &column,
        )
    };
    let gap = Gap {
        from_seq: 2,
        reason: 0,
        ext: &[4, 0],
    };
    let cases: Cases = vec![
        (
            "flag on DATA",
            reheaded(&readings(2), |header| header.flags = 1),
        ),
        (
            "flag on EVENT",
            reheaded(&event(2, 1, 1, ""), |header| header.flags = 0x80),
        ),
        (
            "flag before type",
            reheaded(&sealed(header(0x1B, 2), &[]), |h| h.flags = 2),
        ),
        (
            "flag before content",
            reheaded(&data_of(&[]), |header| header.flags = 2),
        ),
        ("even tag", with_ext(&[2, 0])),
        (
            "even tag after an odd one",
            with_ext(&[1, 2, 7, 7, 0, 1, 9]),
        ),
        ("even tag on GAP", frame(&gap, 2)),
    ];
    assert_quarantined(Code::Critical, cases);
}

#[test]
fn odd_tags_are_ignored() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    let value = 5i64.to_le_bytes();
    let data = Data {
        ext: &[1, 2, 7, 7, 255, 0],
        ..no_columns(1)
    };
    link.send(&with_columns(data, 1, &[raw(TEMPERATURE, &value)]));
    link.expect_ack(1);
    assert_eq!(gateway.database().readings("pump"), [(T0_US, Some(0.05))]);
    assert_only(&gateway, 1);
}

#[test]
fn the_ninth_rejection_in_a_minute_ends_the_connection() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=8 {
        link.send(&sealed(header(0x1E, seq), &[]));
        link.expect_nack(seq, Code::UnknownType, seq + 1);
        link.expect_ack(seq);
    }
    // Valid frames do not count.
    link.send(&readings(9));
    link.expect_ack(9);
    link.send(&sealed(header(0x1E, 10), &[]));
    link.expect_bye_after(Code::Protocol, 60_000);
    let mut database = gateway.database();
    assert_eq!(database.quarantine("pump").len(), 8);
    assert_eq!(database.durable_seq("pump"), 9);
    // The ninth was not stored: it can be resent.
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 9);
    link.send(&readings(10));
    link.expect_ack(10);
    assert_serves(&gateway, "good");
}
