//! A device with a frame to send, and the inbox of the session that serves it.

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate::config::SessionLimits;
use fieldgate::internals::{
    Batcher, Inbox, Mail, MemoryStore, Now, Origin, Session, SessionSettings, Store,
};
use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
use fieldgate_protocol::column::encode_integers;
use fieldgate_protocol::device::{Config, Device, Queue};
use fieldgate_protocol::frame::{self, NoRoom};
use fieldgate_protocol::message::{Channel, Column, Data, Declare, encode};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

use crate::LIMITS;

/// Channels of a frame.
pub const CHANNELS: [u8; 4] = [1, 2, 3, 4];
/// Samples of each channel.
pub const ROWS: usize = 15;
/// Constant time of all frames and calls.
pub const NOW: Now = Now {
    mono_us: 1_000_000,
    utc_us: 1_760_000_000_000_000,
    origin: Origin::NONE,
};

/// Returns a DATA frame whose values change by a few of their smallest steps per second.
pub fn data_frame(seq: u64) -> Vec<u8> {
    let values: Vec<i64> = (0..ROWS as i64)
        .map(|row| 2157 + row * row * 7 % 5)
        .collect();
    let mut packed = [0; 64];
    let (encoding, len) = encode_integers(&values, &mut packed).unwrap();
    let data = &packed[..len];
    let column = |channel| Column {
        channel,
        encoding,
        nulls: &[],
        data,
    };
    let data = Data {
        schema: 1,
        clock: Clock::Utc,
        time_unit: TimeUnit::Seconds,
        boot: 1,
        t0: NOW.utc_us / 1_000_000,
        rows: ROWS as u16,
        step: 1,
        dt: &[],
        columns: CHANNELS.into_iter().map(column).collect(),
        ext: &[],
    };
    let mut out = vec![0; 512];
    let len = encode(&data, seq, &mut out).unwrap();
    out.truncate(len);
    out
}

/// A queue whose frames are all the same.
struct Alike;

impl Queue for Alike {
    fn oldest_seq(&self) -> u64 {
        1
    }
    fn next_seq(&self) -> u64 {
        1_000
    }
    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let frame = data_frame(seq);
        out.get_mut(..frame.len())
            .ok_or(NoRoom)?
            .copy_from_slice(&frame);
        Ok(frame.len())
    }
    fn write_declare(&mut self, _seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let names = ["temperature", "humidity", "pressure", "flow"];
        let channels = CHANNELS.into_iter().zip(names);
        let channel = |(id, name)| Channel {
            id,
            name,
            unit: "",
            kind: Kind::Integer,
            exp10: -2,
        };
        encode(
            &Declare {
                schema: 1,
                channels: channels.map(channel).collect(),
                ext: &[],
            },
            0,
            out,
        )
    }
    fn delete_through(&mut self, _seq: u64) {}
}

/// Returns the inbox of a session that was welcomed and knows the schema. It accepts any number of
/// frames without receipts.
pub fn inbox() -> Inbox {
    let settings = SessionSettings {
        limits: SessionLimits {
            window_frames: 1 << 60,
            ..SessionLimits::default()
        },
        ..SessionSettings::default()
    };
    let key = *settings.credentials.of("pump").key.as_bytes();
    let peer = SocketAddr::from(([127, 0, 0, 1], 9));
    let mut inbox = Inbox::new(Session::new(Arc::new(settings), peer, [7; 16], NOW));
    let mut device = Device::new(Config {
        name: "pump",
        key,
        firmware: "1",
        stream: 5,
        boot: 1,
        schema: 1,
        schema_hash: [0; 8],
        rx_bytes_max: 4096,
        window_frames: 1,
        reconnect_min_ms: 1,
        reconnect_max_ms: 1,
        handshake_timeout_ms: 1000,
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut store = MemoryStore::new();
    device.connect([9; 16], NO_CHANNEL_BINDING, 0, 0);
    for _step in ["HELLO", "AUTH", "DECLARE"] {
        let mut out = [0; 512];
        let len = device.poll_transmit(&mut Alike, 0, &mut out).unwrap();
        inbox.input().extend_from_slice(&out[..len]);
        while let Some(submission) = inbox.poll_submission(NOW) {
            inbox.handle_queued();
            let mut batcher = Batcher::new(LIMITS);
            batcher.push(submission, ());
            let batch = batcher.poll_batch(0).unwrap().batch;
            let mut committed = runtime.block_on(store.commit(&batch)).unwrap();
            let mail = Mail {
                login: committed.logins.pop(),
                declare: committed.declares.pop(),
                ..Mail::default()
            };
            inbox.handle_mail(mail, NOW);
        }
        let said = inbox.session.outbound().bytes().to_vec();
        inbox.session.outbound().consume(said.len());
        if let Some(frame) = frame::decode(&said, 512).unwrap() {
            device.handle_frame(&frame, &mut Alike, 0).unwrap();
        }
    }
    inbox
}
