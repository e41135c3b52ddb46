//! Measures DATA frames on one core, encoding and decoding: `cargo bench -p fieldgate-protocol
//! --features crc-tables --bench data`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fieldgate_protocol::column::{
    ROWS_MAX, check_shape, decode_times, decode_values, encode_integers,
};
use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX, OVERHEAD_BYTES, types};
use fieldgate_protocol::message::{self, CHANNELS_MAX, Column, Data};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

/// Channels and rows of the frames.
const SHAPES: [(usize, usize); 5] = [(1, 1), (1, 60), (4, 1), (4, 15), (4, 60)];

/// Returns readings with a period of one second: values that drift by a few of their smallest
/// steps, each channel a little faster than the previous one.
fn samples(channels: usize, rows: usize) -> Vec<Vec<i64>> {
    let mut state = 1u32;
    let mut noise = |height: i64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        i64::from(state >> 16) % (2 * height + 1) - height
    };
    let channel = |channel: i64| {
        (0..rows)
            .map(|_| 2157 + 1000 * channel + noise(2 + channel))
            .collect()
    };
    (0..channels as i64).map(channel).collect()
}

/// Encodes samples in a DATA frame like a device; returns its length in bytes.
fn write_frame(samples: &[Vec<i64>], packed: &mut [u8], out: &mut [u8]) -> usize {
    let mut rest = packed;
    let mut columns = heapless::Vec::<Column<'_>, CHANNELS_MAX>::new();
    for (channel, values) in (0..).zip(samples) {
        let (encoding, len) = encode_integers(values, rest).unwrap();
        let (data, more) = rest.split_at_mut(len);
        rest = more;
        let column = Column {
            channel,
            encoding,
            nulls: &[],
            data,
        };
        columns.push(column).unwrap();
    }
    let data = Data {
        schema: 1,
        clock: Clock::Utc,
        time_unit: TimeUnit::Milliseconds,
        boot: 7,
        t0: 1_760_000_000_000,
        rows: samples[0].len() as u16,
        step: 1_000,
        dt: &[],
        columns,
        ext: &[],
    };
    message::encode(&data, 5, out).unwrap()
}

/// Checks a frame and decodes its readings like a gateway.
fn read_frame(bytes: &[u8], times: &mut [i64], values: &mut [f64]) {
    let frame = frame::decode(bytes, FRAME_BYTES_MAX).unwrap().unwrap();
    assert!(frame.intact);
    let data: Data<'_> = message::decode(frame.payload()).unwrap();
    check_shape(&data).unwrap();
    let rows = usize::from(data.rows);
    decode_times(&data, &mut times[..rows]).unwrap();
    for (column, values) in data.columns.iter().zip(values.chunks_exact_mut(rows)) {
        decode_values(column, Kind::Integer, -2, values).unwrap();
    }
}

fn data(c: &mut Criterion) {
    let (mut packed, mut out) = (vec![0; FRAME_BYTES_MAX], vec![0; FRAME_BYTES_MAX]);
    let (mut times, mut values) = (vec![0; ROWS_MAX], vec![0.0; ROWS_MAX]);

    let mut group = c.benchmark_group("decode");
    for (channels, rows) in SHAPES {
        let samples = samples(channels, rows);
        let len = write_frame(&samples, &mut packed, &mut out);
        group.throughput(Throughput::Elements((channels * rows) as u64));
        let id = BenchmarkId::from_parameter(format_args!("{channels}x{rows}"));
        group.bench_function(id, |b| {
            b.iter(|| {
                read_frame(black_box(&out[..len]), &mut times, &mut values);
                black_box((&times, &values));
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("encode");
    for (channels, rows) in SHAPES {
        let samples = samples(channels, rows);
        group.throughput(Throughput::Elements((channels * rows) as u64));
        let id = BenchmarkId::from_parameter(format_args!("{channels}x{rows}"));
        group.bench_function(id, |b| {
            b.iter(|| {
                let len = write_frame(black_box(&samples), &mut packed, &mut out);
                black_box(&out[..len]);
            });
        });
    }
    group.finish();
}

/// Computes both checksums of a frame without decoding its payload.
fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksums");
    for frame_bytes in [64, 256, 4096, 16384] {
        let mut bytes = vec![0x5A; frame_bytes];
        frame::encode(types::DATA, 5, &mut bytes, |_| {
            Ok(frame_bytes - OVERHEAD_BYTES)
        })
        .unwrap();
        group.throughput(Throughput::Bytes(frame_bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(frame_bytes), |b| {
            b.iter(|| {
                frame::decode(black_box(&bytes), FRAME_BYTES_MAX)
                    .unwrap()
                    .unwrap()
                    .intact
            });
        });
    }
    group.finish();
}

criterion_group!(benches, data, checksums);
criterion_main!(benches);
