//! The gateway's path from a connection's bytes to the rows of a batch, without sockets and databases:
//! `cargo bench -p fieldgate --bench ingest`. All frames hold 4 channels of 15 samples.

mod device;

use std::hint::black_box;

use bytes::{Buf, BytesMut};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fieldgate::internals::{
    Appended, BatchLimits, Batcher, Content, Entry, Frame, Inbox, Run, SeriesId, Submission,
    sorted_runs,
};
use fieldgate_protocol::frame::{self, DEFAULT_FRAME_BYTES_MAX};

use device::{CHANNELS, NOW, ROWS, data_frame, inbox};

const READINGS: u64 = (CHANNELS.len() * ROWS) as u64;
const LIMITS: BatchLimits = BatchLimits {
    readings_max: usize::MAX,
    bytes_max: usize::MAX,
    interval_min_us: 0,
    interval_quiet_us: 0,
};

fn codec(c: &mut Criterion) {
    let stream: Vec<u8> = (1..=1000).flat_map(data_frame).collect();
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    for chunk_bytes in [1, 1024, 65536] {
        group.bench_function(BenchmarkId::new("chunk", chunk_bytes), |b| {
            b.iter(|| {
                let mut input = BytesMut::new();
                for chunk in black_box(&stream).chunks(chunk_bytes) {
                    input.extend_from_slice(chunk);
                    while let Some(frame) = frame::decode(&input, DEFAULT_FRAME_BYTES_MAX).unwrap()
                    {
                        let frame_bytes = black_box(frame).bytes.len();
                        input.advance(frame_bytes);
                    }
                }
            });
        });
    }
}

/// Checks a frame's bytes and returns the entry to be queued.
fn take_in(inbox: &mut Inbox, bytes: &[u8]) -> Entry {
    inbox.input().extend_from_slice(bytes);
    match inbox.poll_submission(NOW) {
        Some(Submission::Entry(entry)) => {
            inbox.handle_queued();
            entry
        }
        other => panic!("not an entry: {other:?}"),
    }
}

fn sessions(c: &mut Criterion) {
    let (mut inbox, mut seq) = (inbox(), 0);
    let mut group = c.benchmark_group("session");
    group.throughput(Throughput::Elements(READINGS));
    let mut next_frame = || {
        seq += 1;
        data_frame(seq)
    };
    group.bench_function("data", |b| {
        let take_in = |bytes: Vec<u8>| take_in(&mut inbox, &bytes);
        b.iter_batched(&mut next_frame, take_in, BatchSize::SmallInput);
    });
}

/// Collects frames of 200 devices, 12,000 readings, and turns them into rows by series and time.
fn batches(c: &mut Criterion) {
    let mut inbox = inbox();
    let entry = |seq| {
        let mut entry = take_in(&mut inbox, &data_frame(seq));
        if let Content::Readings(readings) = &mut entry.content {
            let device = seq as i64 * 77 % 200;
            readings.series = (0..4)
                .map(|channel| SeriesId(device * 4 + channel))
                .collect();
        }
        entry
    };
    let entries: Vec<Entry> = (1..=200).map(entry).collect();
    let frame = |entry| Frame {
        id: 1,
        item: Appended {
            entry,
            first_seq: entry.seq,
        },
    };
    let frames: Vec<Frame<'_>> = entries.iter().map(frame).collect();
    let mut group = c.benchmark_group("batch");
    group.throughput(Throughput::Elements(200 * READINGS));
    let gather = |entries: Vec<Entry>| {
        let mut batcher = Batcher::new(LIMITS);
        for entry in entries {
            batcher.push(Submission::Entry(entry), ());
        }
        batcher.poll_batch(0)
    };
    group.bench_function("gather", |b| {
        b.iter_batched(|| entries.clone(), gather, BatchSize::LargeInput);
    });
    group.bench_function("rows", |b| {
        b.iter(|| {
            let runs = sorted_runs(black_box(&frames));
            runs.iter().flat_map(Run::readings).for_each(|row| {
                black_box(row);
            });
        });
    });
}

criterion_group!(benches, codec, sessions, batches);
criterion_main!(benches);
