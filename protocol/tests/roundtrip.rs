//! Encoding and decoding preserve every message and every column, bit for bit.

use fieldgate_protocol::column::{
    decode_times, decode_values, encode_f32, encode_f64, encode_integers, encode_times, encoding,
    scaled,
};
use fieldgate_protocol::error::Violation;
use fieldgate_protocol::frame::{self, SEQ_MAX};
use fieldgate_protocol::message::{
    Ack, Auth, Bye, Challenge, Channel, Column, Command, CommandResult, Data, Declare, Event, Gap,
    Hello, Message, Nack, Ping, Pong, Welcome, decode, encode,
};
use fieldgate_protocol::value::{Clock, Kind, MONO_US_MAX, TimeUnit};
use proptest::prelude::*;

fn same<'a, M: Message<'a> + PartialEq + std::fmt::Debug>(
    message: &M,
    seq: u64,
    out: &'a mut [u8],
) {
    let len = encode(message, seq, out).unwrap();
    let frame = frame::decode(&out[..len], len).unwrap().unwrap();
    assert!(frame.intact);
    assert_eq!((frame.header.frame_type, frame.header.seq), (M::TYPE, seq));
    assert_eq!(decode::<M>(frame.payload()).as_ref(), Ok(message));
}

fn any_of<T: Copy + std::fmt::Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(values)
}

fn ext() -> impl Strategy<Value = Vec<u8>> {
    let entry = (any::<u8>(), prop::collection::vec(any::<u8>(), 0..8));
    prop::collection::vec(entry, 0..3).prop_map(|entries| {
        entries
            .into_iter()
            .flat_map(|(tag, value)| [vec![tag | 1, value.len() as u8], value].concat())
            .collect()
    })
}

fn text(bytes_max: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(
        any::<char>().prop_filter("R23", |c| *c != '\0'),
        0..bytes_max,
    )
    .prop_map(move |chars| {
        let text: String = chars.into_iter().collect();
        text[..text.floor_char_boundary(bytes_max)].to_owned()
    })
}

fn utc() -> impl Strategy<Value = i64> {
    -62_135_596_800_000_000..=253_402_300_799_999_999i64
}

proptest! {
    #[test]
    fn hello(
        name in "[A-Za-z0-9._:-]{1,32}", firmware in text(32), ext in ext(),
        (stream, next_seq, boot, mono_us) in (0..=SEQ_MAX, 1..=SEQ_MAX, any::<u32>(), 0..=MONO_US_MAX),
        (utc_us, rx_bytes_max, schema, caps) in any::<(i64, u16, u16, u32)>(),
        (schema_hash, nonce, min_version, more) in any::<([u8; 8], [u8; 16], u8, u8)>(),
        oldest in any::<u64>(),
    ) {
        let message = Hello {
            min_version, max_version: min_version.saturating_add(more), name: &name, stream,
            oldest_seq: 1 + oldest % next_seq, next_seq, boot, mono_us, utc_us, rx_bytes_max,
            firmware: &firmware, schema, schema_hash, nonce, caps, ext: &ext,
        };
        same(&message, 0, &mut [0; 512]);
    }

    #[test]
    fn handshake_answers(
        ext in ext(), (version, nonce, rx_bytes_max, caps) in any::<(u8, [u8; 16], u16, u32)>(),
        (mono_us, mac, durable_seq, utc_us) in (0..=MONO_US_MAX, any::<[u8; 32]>(), any::<u64>(), utc()),
        (keepalive_s, ack_timeout_s, schema_known) in (1..=u16::MAX, 1..=u16::MAX, 0..=1u8),
    ) {
        same(&Challenge { version, nonce, rx_bytes_max, caps, ext: &ext }, 0, &mut [0; 512]);
        same(&Auth { mono_us, ext: &ext, mac }, 0, &mut [0; 512]);
        let message = Welcome {
            durable_seq, limit_seq: durable_seq.saturating_add(64), keepalive_s, ack_timeout_s, utc_us,
            schema_known, ext: &ext, mac,
        };
        same(&message, 0, &mut [0; 512]);
    }

    #[test]
    fn declare(
        schema in 1..=u16::MAX, ext in ext(),
        channels in prop::collection::btree_map(any::<u8>(), (text(24), text(16), any_of(&Kind::ALL), -22..=22i8), 1..=32),
    ) {
        let names: Vec<String> = channels.iter().map(|(id, (name, ..))| format!("{id:03}{name}")).collect();
        let channels = channels.iter().zip(&names).map(|((id, (_, unit, kind, exp10)), name)| Channel {
            id: *id, name, unit, kind: *kind, exp10: if *kind == Kind::Integer { *exp10 } else { 0 },
        });
        same(&Declare { schema, channels: channels.collect(), ext: &ext }, 0, &mut [0; 4096]);
    }

    #[test]
    fn data(
        ext in ext(), dt in prop::collection::vec(any::<u8>(), 0..40), seq in any::<u64>(),
        (schema, boot, t0, rows, step) in any::<(u16, u32, i64, u16, u32)>(),
        (clock, time_unit) in (any_of(&Clock::ALL), any_of(&TimeUnit::ALL)),
        columns in prop::collection::vec(any::<(u8, u8, Vec<u8>, Vec<u8>)>(), 0..=32),
    ) {
        let columns = columns.iter().map(|(channel, encoding, nulls, data)| Column {
            channel: *channel, encoding: *encoding, nulls, data,
        });
        let message = Data {
            schema, clock, time_unit, boot, t0, rows, step, dt: &dt, columns: columns.collect(), ext: &ext,
        };
        same(&message, seq, &mut [0; 16_384]);
    }

    #[test]
    fn other_messages(
        ext in ext(), body in prop::collection::vec(any::<u8>(), 0..64), words in text(96), event in text(128),
        (a, b, c, d, seq) in any::<(u64, u32, u16, u8, u64)>(),
        (clock, level, status, mono_us) in (any_of(&Clock::ALL), 0..=4u8, 0..=3u8, 0..=MONO_US_MAX),
        (utc_us, sent_us, pong_mono) in (utc(), utc(), any::<u64>()),
    ) {
        let out = &mut [0; 1024];
        same(&Gap { from_seq: a.max(1), reason: d, ext: &ext }, seq, out);
        let time_us = if clock == Clock::Boot { mono_us as i64 } else { utc_us };
        let message = Event { clock, boot: b, time_us, level, code: c, text: &event, ext: &ext };
        same(&message, seq, &mut [0; 1024]);
        same(&CommandResult { id: a, status, body: &body, ext: &ext }, seq, &mut [0; 1024]);
        same(&Command { id: a, ttl_ms: b, kind: c, body: &body, ext: &ext }, 0, &mut [0; 1024]);
        same(&Ack { limit_seq: a, ext: &ext }, seq, &mut [0; 1024]);
        let message = Nack { code: d, expected_seq: a, retry_after_ms: b, detail: &words, ext: &ext };
        same(&message, seq, &mut [0; 1024]);
        let message = Ping { mono_us, pong_sent_us: sent_us, pong_mono_us: pong_mono % (mono_us + 1), ext: &ext };
        same(&message, 0, &mut [0; 1024]);
        same(&Pong { mono_us: a, received_us: utc_us, sent_us, ext: &ext }, 0, &mut [0; 1024]);
        let message = Bye {
            code: d, retry_after_ms: b, min_version: d, max_version: level, detail: &words, ext: &ext,
        };
        same(&message, 0, &mut [0; 1024]);
    }
}

/// Compares [`decode`] with rule R22: a valid message is encoded to the same bytes again.
fn is_judged_by_its_form<'a, M: Message<'a>>(payload: &'a [u8]) {
    let is_longer = match postcard::take_from_bytes::<M::Wire>(payload) {
        Ok((message, [])) => postcard::to_slice(&message, &mut [0; 512]).unwrap() != payload,
        _ => false,
    };
    let found = decode::<M>(payload);
    assert_eq!(matches!(found, Err(Violation::NotCanonical)), is_longer);
}

proptest! {
    #[test]
    fn only_the_shortest_form_decodes(
        (schema, boot, t0, rows, step) in any::<(u16, u32, i64, u16, u32)>(),
        bytes in prop::collection::vec(any::<u8>(), 0..10),
        edits in prop::collection::vec(any::<(prop::sample::Index, Option<u8>)>(), 1..4),
    ) {
        let column = |channel| Column { channel, encoding: 1, nulls: &[], data: &bytes };
        let columns = [column(1), column(2)].into_iter().collect();
        let data = Data {
            schema, clock: Clock::Utc, time_unit: TimeUnit::Milliseconds, boot, t0, rows, step, dt: &bytes, columns, ext: &[],
        };
        let channel = Channel { id: 1, name: "name", unit: "unit", kind: Kind::Integer, exp10: -1 };
        let declare = Declare { schema, channels: [channel].into_iter().collect(), ext: &[] };
        let mut out = [[0; 512]; 2];
        let [data_out, declare_out] = &mut out;
        let mut payloads = [
            postcard::to_slice(&data, data_out).unwrap().to_vec(),
            postcard::to_slice(&declare, declare_out).unwrap().to_vec(),
        ];
        for payload in &mut payloads {
            for (place, edit) in &edits {
                let place = place.index(payload.len());
                match edit {
                    Some(byte) => payload[place] = *byte,
                    // If the byte ends a varint, this makes the varint one byte longer than
                    // necessary.
                    None => {
                        payload[place] |= 0x80;
                        payload.insert(place + 1, 0);
                    }
                }
            }
        }
        is_judged_by_its_form::<Data<'_>>(&payloads[0]);
        is_judged_by_its_form::<Declare<'_>>(&payloads[1]);
    }
}

/// Decodes a column, with or without nulls.
fn unpacked(encoding: u8, kind: Kind, exp10: i8, nulls: &[bool], data: &[u8]) -> Vec<f64> {
    let mut bitmap = vec![0u8; nulls.len().div_ceil(8)];
    for (row, _) in nulls.iter().enumerate().filter(|(_, null)| **null) {
        bitmap[row / 8] |= 1 << (row % 8);
    }
    let nulls_bytes: &[u8] = if nulls.contains(&true) { &bitmap } else { &[] };
    let column = Column {
        channel: 1,
        encoding,
        nulls: nulls_bytes,
        data,
    };
    let mut out = vec![0.0; nulls.len()];
    decode_values(&column, kind, exp10, &mut out).unwrap();
    out
}

fn assert_bits(found: &[f64], nulls: &[bool], mut values: impl Iterator<Item = f64>) {
    for (row, found) in found.iter().enumerate() {
        if nulls[row] {
            assert!(found.is_nan(), "row {row} must be null");
        } else {
            let value = values.next().unwrap();
            assert!(
                found.to_bits() == value.to_bits() || (found.is_nan() && value.is_nan()),
                "row {row}: {found} is not {value}"
            );
        }
    }
}

fn rows<T: std::fmt::Debug + Clone>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<(Option<()>, T)>> {
    prop::collection::vec((prop::option::weighted(0.8, Just(())), value), 1..80)
}

fn split<T: Copy>(rows: &[(Option<()>, T)]) -> (Vec<bool>, Vec<T>) {
    let nulls = rows.iter().map(|(valid, _)| valid.is_none()).collect();
    let values = rows.iter().filter(|(valid, _)| valid.is_some());
    (nulls, values.map(|(_, value)| *value).collect())
}

/// Steps of every size, so that each of the two delta encodings is sometimes shorter.
fn integers() -> impl Strategy<Value = i64> {
    prop_oneof![
        any::<i64>(),
        -5..5i64,
        -70_000..70_000i64,
        Just(i64::MIN),
        Just(i64::MAX)
    ]
}

proptest! {
    #[test]
    fn integer_columns(rows in rows(integers()), exp10 in -22..=22i8) {
        let (nulls, values) = split(&rows);
        let mut packed = [0; 2048];
        let (encoding, len) = encode_integers(&values, &mut packed).unwrap();
        let expected = || values.iter().map(|value| scaled(*value, exp10));
        assert_bits(&unpacked(encoding, Kind::Integer, exp10, &nulls, &packed[..len]), &nulls, expected());
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_bits(&unpacked(encoding::RAW, Kind::Integer, exp10, &nulls, &raw), &nulls, expected());
    }

    #[test]
    fn slow_integer_columns(first in any::<i64>(), steps in prop::collection::vec(-3..=3i64, 0..100)) {
        let mut value = first;
        let values: Vec<i64> = std::iter::once(first)
            .chain(steps.iter().map(|step| { value = value.wrapping_add(*step); value }))
            .collect();
        let mut packed = [0; 2048];
        let (encoding, len) = encode_integers(&values, &mut packed).unwrap();
        let nulls = vec![false; values.len()];
        let expected = values.iter().map(|value| scaled(*value, 0));
        assert_bits(&unpacked(encoding, Kind::Integer, 0, &nulls, &packed[..len]), &nulls, expected);
    }

    #[test]
    fn bool_columns(rows in rows(any::<bool>())) {
        let (nulls, values) = split(&rows);
        let integers: Vec<i64> = values.iter().map(|value| i64::from(*value)).collect();
        let raw: Vec<u8> = values.iter().map(|value| u8::from(*value)).collect();
        let mut packed = [0; 512];
        let (encoding, len) = encode_integers(&integers, &mut packed).unwrap();
        let expected = || integers.iter().map(|value| *value as f64);
        assert_bits(&unpacked(encoding, Kind::Bool, 0, &nulls, &packed[..len]), &nulls, expected());
        assert_bits(&unpacked(encoding::RAW, Kind::Bool, 0, &nulls, &raw), &nulls, expected());
    }

    #[test]
    fn float_columns(doubles in rows(any::<u64>()), singles in rows(any::<u32>())) {
        let (nulls, bits) = split(&doubles);
        let values: Vec<f64> = bits.into_iter().map(f64::from_bits).collect();
        let mut raw = [0; 1024];
        let len = encode_f64(&values, &mut raw).unwrap();
        assert_bits(&unpacked(encoding::RAW, Kind::F64, 0, &nulls, &raw[..len]), &nulls, values.into_iter());

        let (nulls, bits) = split(&singles);
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let len = encode_f32(&values, &mut raw).unwrap();
        let widened = values.into_iter().map(f64::from);
        assert_bits(&unpacked(encoding::RAW, Kind::F32, 0, &nulls, &raw[..len]), &nulls, widened);
    }

    #[test]
    fn times(t0 in 0..=1i64 << 40, steps in prop::collection::vec(1..=1i64 << 30, 0..100)) {
        let mut time = t0;
        let times: Vec<i64> = std::iter::once(t0)
            .chain(steps.iter().map(|step| { time += step; time }))
            .collect();
        let mut dt = [0; 1024];
        let len = encode_times(&times, &mut dt).unwrap();
        let data = Data {
            schema: 1, clock: Clock::Utc, time_unit: TimeUnit::Milliseconds, boot: 0, t0, rows: times.len() as u16, step: 0,
            dt: &dt[..len], columns: Default::default(), ext: &[],
        };
        let mut out = vec![0; times.len()];
        decode_times(&data, &mut out).unwrap();
        prop_assert_eq!(out, times.iter().map(|time| time * 1000).collect::<Vec<_>>());
    }
}

#[test]
fn decimals_become_the_nearest_doubles() {
    for raw in -100_000..=100_000i64 {
        for exp10 in 1..=6u32 {
            let sign = if raw < 0 { "-" } else { "" };
            let (whole, part) = (raw.abs() / 10i64.pow(exp10), raw.abs() % 10i64.pow(exp10));
            let text = format!("{sign}{whole}.{part:0width$}", width = exp10 as usize);
            assert_eq!(
                scaled(raw, -(exp10 as i8)),
                text.parse::<f64>().unwrap(),
                "{text}"
            );
        }
    }
}
