//! Values, times and texts are stored exactly as sent.

use std::time::{SystemTime, UNIX_EPOCH};

use fieldgate_protocol::column::encoding;
use fieldgate_protocol::message::{Channel, Column, Data, Event};
use fieldgate_protocol::value::{Clock, Kind};

use crate::support::client::{Heard, Link};
use crate::support::gateway::Gateway;
use crate::support::messages::{
    FLOW, LEVEL, OPEN, SCHEMA, T0_US, bye, declare_channels, event, frame, no_columns, ping, raw,
    readings, readings_at, with_columns,
};

fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_micros() as i64
}

#[test]
fn c16_hostile_texts_are_stored_unchanged() {
    let gateway = Gateway::start(&[]);
    let names = [
        "'; DROP TABLE readings; --",
        "\"quoted\" `and` [more]",
        "\u{202e}πυρ 🌡\u{fe0f} \\",
        "%s {} $1 ?1 \n\r\t\u{1b}[31m",
    ];
    let units = ["'", "\"\\\"", "µm·s⁻¹", "\u{7f}\u{1}%n"];
    let text = "');DELETE FROM frames;--\u{1b}]0;x\u{7} \u{feff}é\u{0301}";
    let mut pump = gateway.device("Pump_07.a:b-c");
    pump.firmware = "1.0'; --\n\"é".to_owned();
    let (mut link, _) = Link::login(gateway.addr, &pump);
    let channels: Vec<Channel<'_>> = (0..4)
        .map(|i| Channel {
            id: i as u8,
            name: names[i],
            unit: units[i],
            kind: Kind::Bool,
            exp10: 0,
        })
        .collect();
    link.send(&declare_channels(SCHEMA, &channels));
    let columns: Vec<Column<'_>> = (0..4).map(|i| raw(i, &[1])).collect();
    link.send(&with_columns(no_columns(1), 1, &columns));
    link.send(&event(2, 1, 1, text));
    link.expect_ack(2);
    let mut database = gateway.database();
    let mut stored: Vec<(String, String, String)> =
        database.rows("SELECT device, channel, unit FROM telemetry WHERE value = 1");
    let mut expected: Vec<_> = (0..4)
        .map(|i| (pump.name.clone(), names[i].to_owned(), units[i].to_owned()))
        .collect();
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected);
    let kept: Vec<(String,)> =
        database.rows("SELECT detail FROM device_events WHERE kind = 'event'");
    assert_eq!(kept, [(text.to_owned(),)]);
    assert_eq!(
        database.rows::<(String,)>("SELECT firmware FROM devices"),
        [(pump.firmware,)]
    );
    assert_eq!(database.count("SELECT count(*) FROM frames"), 2);
}

#[test]
fn values_are_stored_bit_for_bit() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    let values = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e300,
        0.0,
        5e-324,
        f64::MAX,
        f64::MIN,
        0.1,
        -f64::NAN,
    ];
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    link.send(&with_columns(no_columns(10), 1, &[raw(LEVEL, &bytes)]));
    let narrow: Vec<u8> = [0.1f32, f32::NAN, f32::from_bits(1), -1.5]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    link.send(&with_columns(no_columns(4), 2, &[raw(FLOW, &narrow)]));
    // Rows 0 and 3 have no value.
    let bools = Column {
        channel: OPEN,
        encoding: encoding::RAW,
        nulls: &[0b1001],
        data: &[1, 0],
    };
    link.send(&with_columns(no_columns(4), 3, &[bools]));
    link.send(&readings_at(4, T0_US, &[2157, -1, i64::MAX, i64::MIN]));
    link.expect_ack(4);
    let mut database = gateway.database();
    let mut stored = |channel: &str| -> Vec<Option<u64>> {
        let sql = format!("SELECT value FROM telemetry WHERE channel = '{channel}' ORDER BY ts");
        let rows: Vec<(Option<f64>,)> = database.rows(&sql);
        rows.iter().map(|row| row.0.map(f64::to_bits)).collect()
    };
    let bits = |values: &[f64]| -> Vec<Option<u64>> {
        let known = |value: &f64| (!value.is_nan()).then(|| value.to_bits());
        values.iter().map(known).collect()
    };
    assert_eq!(stored("level"), bits(&values));
    assert_eq!(
        stored("flow"),
        bits(&[
            f64::from(0.1f32),
            f64::NAN,
            f64::from(f32::from_bits(1)),
            -1.5
        ])
    );
    assert_eq!(stored("open"), bits(&[f64::NAN, 1.0, 0.0, f64::NAN]));
    let hundredths = [
        21.57,
        -0.01,
        i64::MAX as f64 / 100.0,
        i64::MIN as f64 / 100.0,
    ];
    assert_eq!(stored("temperature"), bits(&hundredths));
}

#[test]
fn negative_zero_is_stored_unchanged() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&with_columns(
        no_columns(1),
        1,
        &[raw(LEVEL, &(-0.0f64).to_le_bytes())],
    ));
    link.expect_ack(1);
    let stored: Vec<_> = gateway.database().readings("pump");
    let bits = stored[0].1.map(f64::to_bits);
    assert_eq!(bits, Some((-0.0f64).to_bits()), "R58");
}

#[test]
fn readings_with_the_same_time_in_two_frames_are_both_stored() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    for (seq, value) in [(1, 5), (2, 5), (3, 6)] {
        link.send(&readings_at(seq, T0_US, &[value]));
    }
    link.expect_ack(3);
    let stored = gateway.database().readings("pump");
    assert_eq!(
        stored,
        [
            (T0_US, Some(0.05)),
            (T0_US, Some(0.05)),
            (T0_US, Some(0.06))
        ]
    );
}

#[test]
fn times_get_the_correct_quality() {
    let gateway = Gateway::start(&[]);
    let before_us = now_us();
    let (mut link, _) = gateway.connect("pump");
    let value = 1i64.to_le_bytes();
    let two = [0; 16];
    let send = |link: &mut Link, seq: u64, data: Data<'_>| {
        let values: &[u8] = if data.rows == 2 { &two } else { &value };
        link.send(&with_columns(data, seq, &[raw(1, values)]));
        link.expect_ack(seq);
    };
    let since_boot = |boot: u32, t0: i64, rows: u16| Data {
        clock: Clock::Boot,
        boot,
        t0,
        ..no_columns(rows)
    };
    let utc = |t0: i64| Data {
        t0,
        ..no_columns(1)
    };
    // The boot of the handshake was measured there: its AUTH was sent at 1 s.
    send(&mut link, 1, since_boot(7, 400_000, 1));
    // Another boot has no measurement: its newest row is assumed to be measured now.
    send(&mut link, 2, since_boot(6, 9_000_000, 2));
    send(&mut link, 3, utc(T0_US));
    send(&mut link, 4, utc(before_us + 86_000_000_000));
    send(&mut link, 5, utc(before_us + 2 * 86_400_000_000));
    send(&mut link, 6, utc(1_577_836_799_999_999));
    send(&mut link, 7, utc(1_577_836_800_000_000));
    send(&mut link, 8, utc(-62_135_596_800_000_000));
    send(&mut link, 9, utc(253_402_300_799_999_999));
    let stamped = Event {
        clock: Clock::Boot,
        boot: 7,
        time_us: 500_000,
        level: 1,
        code: 1,
        text: "",
        ext: &[],
    };
    link.send(&frame(&stamped, 10));
    link.expect_ack(10);
    let after_us = now_us();
    let mut database = gateway.database();
    let qualities: Vec<(i64, i64)> = database.rows("SELECT seq, quality FROM frames ORDER BY seq");
    let (utc, anchored, unanchored, suspect) = (0, 1, 2, 3);
    let expected = [
        (1, anchored),
        (2, unanchored),
        (3, utc),
        (4, utc),
        (5, suspect),
        (6, suspect),
        (7, utc),
        (8, suspect),
        (9, suspect),
        (10, anchored),
    ];
    assert_eq!(qualities, expected);
    let mut times = |seq: i64| -> Vec<i64> {
        let rows: Vec<(i64,)> = database.rows(&format!(
            "SELECT ts FROM readings r JOIN frames f ON f.id = r.frame_id \
             WHERE f.seq = {seq} ORDER BY ts"
        ));
        rows.iter().map(|row| row.0).collect()
    };
    let anchored_us = times(1)[0];
    assert!((before_us - 600_000..=after_us - 600_000).contains(&anchored_us));
    let unanchored_us = times(2);
    assert!((before_us..=after_us).contains(&unanchored_us[1]));
    assert_eq!(unanchored_us[0], unanchored_us[1] - 1_000_000);
    assert_eq!(times(5), [before_us + 2 * 86_400_000_000]);
    assert_eq!(times(8), [-62_135_596_800_000_000]);
    let event_us = database.count("SELECT at FROM device_events WHERE kind = 'event'");
    assert_eq!(event_us, anchored_us + 100_000);
    let kept = "SELECT ts - clock_offset_us FROM readings r JOIN frames f ON f.id = r.frame_id \
                WHERE f.seq = 1";
    assert_eq!(database.count(kept), 400_000);
}

#[test]
fn each_ping_is_answered_and_better_measurements_hold() {
    let gateway = Gateway::start(&[]);
    let mut database = gateway.database();
    let (mut link, _) = gateway.connect("pump");
    let before_us = now_us();
    link.send(&ping(2_000_000, 0, 0));
    let Heard::Pong {
        mono_us,
        received_us,
        sent_us,
    } = link.hear()
    else {
        panic!("no PONG")
    };
    assert_eq!(mono_us, 2_000_000);
    assert!(before_us <= received_us && received_us <= sent_us && sent_us <= now_us());
    // The device reports that the PONG took no time, and that the device held it for as long as the test did: a round
    // trip of almost zero, which is better than the handshake's.
    let held_us = (now_us() - sent_us) as u64;
    link.send(&ping(3_000_000 + held_us, sent_us, 3_000_000));
    link.hear();
    // An impossible one: held for longer than the round trip.
    link.send(&ping(1 << 52, sent_us, 3_000_000));
    link.hear();
    link.send(&readings(1));
    link.expect_ack(1);
    let clocks: Vec<(i64, i64, i64)> =
        database.rows("SELECT boot, offset_us, delay_us FROM clocks");
    let [(7, offset_us, delay_us)] = clocks[..] else {
        panic!("{clocks:?}")
    };
    let true_us = sent_us - 3_000_000;
    let of_handshake_us = before_us - 1_000_000;
    let is_near = |wanted: i64| (offset_us - wanted).abs() <= delay_us / 2 + 1_000_000;
    assert!(is_near(true_us) || is_near(of_handshake_us), "{clocks:?}");
    assert!(offset_us > -(1 << 51), "the impossible trip counted");
}

#[test]
fn events_are_stored_unchanged() {
    let gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&event(1, 3, 65_535, "valve stuck"));
    link.send(&event(2, 0, 0, ""));
    link.expect_ack(2);
    link.send(&bye());
    link.expect_closed();
    let (mut newer, _) = gateway.connect("pump");
    newer.send(&event(3, 1, 7, "valve free"));
    newer.expect_ack(3);
    let mut database = gateway.database();
    let events: Vec<(i64, Option<i64>, i64, String)> = database
        .rows("SELECT at, level, code, detail FROM device_events WHERE kind = 'event' ORDER BY id");
    let expected = [
        (T0_US, Some(3), 65_535, "valve stuck".to_owned()),
        (T0_US, Some(0), 0, String::new()),
        (T0_US, Some(1), 7, "valve free".to_owned()),
    ];
    assert_eq!(events, expected);
    assert_eq!(database.frames("pump"), [(1, 20), (2, 20), (3, 20)]);
    let connected = "SELECT count(*) FROM device_events WHERE kind = 'connected'";
    assert_eq!(database.count(connected), 2);
}
