//! How many readings a second one core takes from bytes to values:
//! `cargo run --release -p fieldgate-protocol --features crc-tables --example throughput`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use fieldgate_protocol::column::{Kind, check_shape, decode_times, decode_values, encode_integers};
use fieldgate_protocol::frame;
use fieldgate_protocol::message::{Column, Data, decode, encode};

/// A frame of slowly changing values, a second apart.
fn frame_of(channels: u8, rows: usize) -> Vec<u8> {
    let mut packed = Vec::new();
    for channel in 0..channels {
        let mut value = 2157 + i64::from(channel) * 1000;
        let values: Vec<i64> = (0..rows as i64)
            .map(|row| {
                value += (row * 7 + i64::from(channel)) % 5 - 2;
                value
            })
            .collect();
        let mut out = vec![0; 1024];
        let (encoding, len) = encode_integers(&values, &mut out).unwrap();
        out.truncate(len);
        packed.push((channel, encoding, out));
    }
    let columns = packed.iter().map(|(channel, encoding, data)| Column {
        channel: *channel,
        encoding: *encoding,
        nulls: &[],
        data,
    });
    let data = Data {
        schema: 1,
        clock: 1,
        time_unit: 1,
        boot: 7,
        t0: 1_760_000_000_000,
        rows: rows as u16,
        step: 1_000,
        dt: &[],
        columns: columns.collect(),
        ext: &[],
    };
    let mut out = vec![0; 4096];
    let len = encode(&data, 5, &mut out).unwrap();
    out.truncate(len);
    out
}

fn take_in(bytes: &[u8], times: &mut [i64], values: &mut [f64]) {
    let frame = frame::decode(bytes, 4096).unwrap().unwrap();
    assert!(frame.intact);
    let data: Data<'_> = decode(frame.payload()).unwrap();
    check_shape(&data).unwrap();
    let rows = usize::from(data.rows);
    decode_times(&data, &mut times[..rows]).unwrap();
    for (column, values) in data.columns.iter().zip(values.chunks_exact_mut(rows)) {
        decode_values(column, Kind::Integer, -2, values).unwrap();
    }
}

fn main() {
    for (channels, rows) in [(1, 60), (4, 15)] {
        let bytes = frame_of(channels, rows);
        let (mut times, mut values) = ([0; 60], [0.0; 60]);
        let (mut frames, started) = (0u64, Instant::now());
        while started.elapsed() < Duration::from_secs(2) {
            for _ in 0..10_000 {
                take_in(black_box(&bytes), &mut times, &mut values);
                black_box((&times, &values));
            }
            frames += 10_000;
        }
        let seconds = started.elapsed().as_secs_f64();
        let readings = frames as f64 * 60.0 / seconds;
        println!(
            "{channels} x {rows}: {} bytes, {:.0} ns a frame, {:.1} million readings/s",
            bytes.len(),
            seconds * 1e9 / frames as f64,
            readings / 1e6
        );
    }
}
