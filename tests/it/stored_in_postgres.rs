//! Values, times and texts are stored in Postgres exactly as sent, each frame once.

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::column::encoding;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::message::{Channel, Column};
use fieldgate_protocol::value::Kind;
use tempfile::TempDir;

use crate::support::client::Link;
use crate::support::database::PgDatabase;
use crate::support::gateway::Gateway;
use crate::support::messages::{
    FLOW, LEVEL, OPEN, SCHEMA, T0_US, TEMPERATURE, bye, declare_channels, event, gap, no_columns,
    payload, raw, readings, readings_at, with_columns,
};

/// 0001-01-01T00:00:00Z and 9999-12-31T23:59:59.999999Z.
const FIRST_US: i64 = -62_135_596_800_000_000;
const LAST_US: i64 = 253_402_300_799_999_999;

fn gateway() -> (Gateway, PgDatabase) {
    let database = PgDatabase::create();
    let gateway = Gateway::start(&["--store", &database.url()]);
    (gateway, database)
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_reading_is_visible_to_others_before_its_ack() {
    let (gateway, mut database) = gateway();
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!((welcomed.durable_seq, welcomed.limit_seq), (0, 64));
    for seq in 1..=50 {
        link.send(&readings(seq));
        link.expect_ack(seq);
        assert_eq!(database.readings("pump").len(), seq as usize);
    }
    let numbers: Vec<_> = (1..=50).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames("pump"), numbers);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn resent_frames_are_stored_once() {
    let (gateway, mut database) = gateway();
    let (mut link, _) = gateway.connect("pump");
    for seq in [1, 2, 3, 1, 2, 3, 2, 4] {
        link.send(&readings(seq));
    }
    link.expect_ack(4);
    drop(link);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 4);
    for seq in 1..=6 {
        link.send(&readings(seq));
    }
    link.expect_ack(6);
    let numbers: Vec<_> = (1..=6).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames("pump"), numbers);
    let values: Vec<_> = (1..=6).map(|seq| Some(f64::from(seq) / 100.0)).collect();
    let stored = database.readings("pump");
    assert_eq!(stored.iter().map(|row| row.1).collect::<Vec<_>>(), values);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn values_are_stored_bit_for_bit() {
    let (gateway, mut database) = gateway();
    let (mut link, _) = gateway.connect("pump");
    let values = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        -0.0,
        0.0,
        5e-324,
        f64::MAX,
        f64::MIN,
        0.1,
        -f64::NAN,
    ];
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    link.send(&with_columns(no_columns(10), 1, &[raw(LEVEL, &bytes)]));
    let narrow = [0.1f32, f32::NAN, f32::from_bits(1), -0.0];
    let bytes: Vec<u8> = narrow.iter().flat_map(|v| v.to_le_bytes()).collect();
    link.send(&with_columns(no_columns(4), 2, &[raw(FLOW, &bytes)]));
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
    let mut stored = |channel: &str| -> Vec<Option<u64>> {
        let sql = format!("SELECT value FROM telemetry WHERE channel = '{channel}' ORDER BY ts");
        let rows: Vec<(Option<f64>,)> = database.session().rows(&sql);
        rows.iter().map(|row| row.0.map(f64::to_bits)).collect()
    };
    let bits = |values: &[f64]| -> Vec<Option<u64>> {
        let known = |value: &f64| (!value.is_nan()).then(|| value.to_bits());
        values.iter().map(known).collect()
    };
    assert_eq!(stored("level"), bits(&values));
    assert_eq!(stored("flow"), bits(&narrow.map(f64::from)));
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
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn extreme_times_are_stored_and_create_no_partitions() {
    let (gateway, mut database) = gateway();
    let (mut link, _) = gateway.connect("pump");
    let times = [FIRST_US, -1, 0, 946_684_799_999_999, LAST_US];
    for (seq, time_us) in (1..).zip(times) {
        link.send(&readings_at(seq, time_us, &[seq as i64]));
    }
    link.expect_ack(5);
    let stored: Vec<i64> = database.readings("pump").iter().map(|row| row.0).collect();
    assert_eq!(stored, times);
    let session = database.session();
    assert_eq!(session.count("SELECT count(*) FROM readings_default"), 5);
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'readings'::regclass";
    // The default one, this month, and the next if it is near.
    let count = session.count(partitions);
    assert!((2..=3).contains(&count), "{count} partitions");
    let texts: Vec<(String,)> = session.rows("SELECT ts_text FROM telemetry ORDER BY ts");
    assert_eq!(texts[0].0, "0001-01-01T00:00:00.000000Z");
    assert_eq!(texts[4].0, "9999-12-31T23:59:59.999999Z");
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn c16_hostile_texts_are_stored_unchanged() {
    let (gateway, mut database) = gateway();
    let names = [
        "'; DROP TABLE readings; --",
        "\"quoted\" `and` [more]",
        "\u{202e}πυρ 🌡\u{fe0f} \\",
        "%s {} $1 ?1 \n\r\t\u{1b}[31m",
    ];
    let units = ["'", "\"\\\"", "µm·s⁻¹", "\u{7f}\u{1}%n"];
    let text = "');DELETE FROM frames;--\u{1b}]0;x\u{7} \u{feff}é\u{0301}\\N";
    let mut pump = gateway.device("Pump_07.a:b-c");
    pump.firmware = "1.0'; --\n\"é".to_owned();
    let (mut link, _) = Link::login(gateway.addr, &pump);
    let channel = |i: usize| Channel {
        id: i as u8,
        name: names[i],
        unit: units[i],
        kind: Kind::Bool,
        exp10: 0,
    };
    let channels: Vec<Channel<'_>> = (0..4).map(channel).collect();
    link.send(&declare_channels(SCHEMA, &channels));
    let columns: Vec<Column<'_>> = (0..4).map(|i| raw(i, &[1])).collect();
    link.send(&with_columns(no_columns(1), 1, &columns));
    link.send(&event(2, 1, 1, text));
    link.expect_ack(2);
    let mut expected: Vec<_> = (0..4)
        .map(|i| (pump.name.clone(), names[i].to_owned(), units[i].to_owned()))
        .collect();
    let session = database.session();
    let mut stored: Vec<(String, String, String)> =
        session.rows("SELECT device, channel, unit FROM telemetry WHERE value = 1");
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected);
    let kept: Vec<(String,)> =
        session.rows("SELECT detail FROM device_events WHERE kind = 'event'");
    assert_eq!(kept, [(text.to_owned(),)]);
    let firmware: Vec<(String,)> = session.rows("SELECT firmware FROM devices");
    assert_eq!(firmware, [(pump.firmware.clone(),)]);
    assert_eq!(database.frames(&pump.name), [(1, 17), (2, 20)]);
    // The schema is also read back when the device names it.
    let declare = declare_channels(SCHEMA, &channels);
    (pump.schema, pump.schema_hash) = (SCHEMA, schema_hash(payload(&declare)));
    let (mut link, welcomed) = Link::login(gateway.addr, &pump);
    assert!(welcomed.schema_known);
    link.send(&with_columns(no_columns(1), 3, &columns));
    link.expect_ack(3);
    let series = database.session().count("SELECT count(*) FROM series");
    assert_eq!(series, 4);
}

/// Postgres has no U+0000 in texts; the protocol rejects it first.
#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn undecodable_frames_are_quarantined() {
    let (gateway, mut database) = gateway();
    let (mut link, _) = gateway.connect("pump");
    let nul = event(2, 1, 1, "a\0b");
    link.send(&readings(1));
    link.expect_ack(1);
    link.send(&nul);
    link.expect_nack(2, Code::Malformed, 3);
    link.expect_ack(2);
    link.send(&readings(3));
    link.expect_ack(3);
    assert_eq!(database.quarantine("pump"), [(2, 30, nul)]);
    let numbers: Vec<i64> = database.frames("pump").iter().map(|f| f.0).collect();
    assert_eq!(numbers, [1, 2, 3]);
    let values: Vec<_> = database.readings("pump").iter().map(|row| row.1).collect();
    assert_eq!(values, [Some(0.01), Some(0.03)]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn gaps_events_and_totals_are_recorded() {
    let (gateway, mut database) = gateway();
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.send(&gap(2, 5, 1));
    link.send(&gap(6, 1_000_000_000, 9));
    link.expect_ack(1_000_000_000);
    // Repeating a gap, or reporting a part of it, changes nothing.
    link.send(&gap(1, 5, 2));
    link.send(&event(1_000_000_001, 3, 65_535, "valve stuck"));
    link.expect_ack(1_000_000_001);
    link.send(&bye());
    link.expect_closed();
    let session = database.session();
    let missing: Vec<(i64, i64, i64, String)> = session
        .rows("SELECT from_seq, to_seq, frames, reason FROM missing_frames ORDER BY from_seq");
    let expected = [
        (2, 5, 4, "queue damaged".to_owned()),
        (6, 1_000_000_000, 999_999_995, "reason 9".to_owned()),
    ];
    assert_eq!(missing, expected);
    let events: Vec<(Option<i16>, i32, String)> =
        session.rows("SELECT level, code, detail FROM device_events WHERE kind = 'event'");
    assert_eq!(events, [(Some(3), 65_535, "valve stuck".to_owned())]);
    session.wait_for("SELECT state = 'disconnected' FROM device_status");
    let totals: Vec<(i64, i64, i64)> =
        session.rows("SELECT frames, readings, missing FROM device_status");
    assert_eq!(totals, [(4, 1, 999_999_999)]);
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn a_restart_continues_from_the_store() {
    let database = PgDatabase::create();
    let dir = TempDir::new().expect("a directory");
    let flags = ["--store", &database.url()];
    let gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, _) = gateway.connect("pump");
    for seq in 1..=20 {
        link.send(&with_columns(
            no_columns(1),
            seq,
            &[raw(TEMPERATURE, &(seq as i64).to_le_bytes())],
        ));
    }
    link.expect_ack(20);
    gateway.kill();
    let mut gateway = Gateway::start_in(dir.path(), &flags);
    let (mut link, welcomed) = gateway.connect("pump");
    assert_eq!(welcomed.durable_seq, 20);
    link.send(&readings(21));
    link.expect_ack(21);
    gateway.terminate();
    assert!(gateway.wait().status.success());
    assert!(
        !dir.path().join("fieldgate.db").exists(),
        "created needlessly"
    );
}
