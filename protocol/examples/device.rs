//! A device on plain TCP that sends three temperatures and waits until they are stored:
//!
//! ```text
//! cargo run -p fieldgate-protocol --example device -- 127.0.0.1:7300 pump-7 $(fieldgate device key pump-7)
//! ```
//!
//! The queue is in memory, so each run is a new stream. Firmware keeps it in flash and reconnects after a fault.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, schema_hash};
use fieldgate_protocol::column::encode_integers;
use fieldgate_protocol::device::{Config, Device, Notice, Queue};
use fieldgate_protocol::frame::{self, HEADER_BYTES, NoRoom, TRAILER_BYTES};
use fieldgate_protocol::message::{Channel, Column, Data, Declare, encode};

const SCHEMA: u16 = 1;

/// Frames by number, from 1.
struct Frames(Vec<Vec<u8>>);

impl Queue for Frames {
    fn oldest_seq(&self) -> u64 {
        1
    }
    fn next_seq(&self) -> u64 {
        self.0.len() as u64 + 1
    }
    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let frame = &self.0[seq as usize - 1];
        out.get_mut(..frame.len())
            .ok_or(NoRoom)?
            .copy_from_slice(frame);
        Ok(frame.len())
    }
    fn write_declare(&mut self, _: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        // Hundredths of a degree Celsius.
        let channel = Channel {
            id: 1,
            name: "temperature",
            unit: "Cel",
            kind: 0,
            exp10: -2,
        };
        let channels = [channel].into_iter().collect();
        encode(
            &Declare {
                schema: SCHEMA,
                channels,
                ext: &[],
            },
            0,
            out,
        )
    }
    fn delete_through(&mut self, _: u64) {}
}

/// Returns frame 1: 21.57, 21.58 and 21.56 degrees, one second apart.
fn readings(utc_us: i64) -> Result<Vec<u8>, NoRoom> {
    let (mut packed, mut out) = ([0; 32], [0; 128]);
    let (encoding, len) = encode_integers(&[2157, 2158, 2156], &mut packed)?;
    let column = Column {
        channel: 1,
        encoding,
        nulls: &[],
        data: &packed[..len],
    };
    let columns = [column].into_iter().collect();
    let (clock, time_unit) = (1, 2); // UTC, in seconds
    let t0 = utc_us / 1_000_000 - 2;
    let data = Data {
        schema: SCHEMA,
        clock,
        time_unit,
        boot: 1,
        t0,
        rows: 3,
        step: 1,
        dt: &[],
        columns,
        ext: &[],
    };
    let len = encode(&data, 1, &mut out)?;
    Ok(out[..len].to_vec())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, name, digits] = args.as_slice() else {
        return Err("usage: device ADDRESS NAME KEY".into());
    };
    let digits = Vec::from_iter(
        (0..digits.len())
            .step_by(2)
            .map(|at| digits.get(at..at + 2).unwrap_or("?")),
    );
    let key: Result<Vec<u8>, _> = digits
        .iter()
        .map(|pair| u8::from_str_radix(pair, 16))
        .collect();
    let key = key?
        .try_into()
        .map_err(|_| "a key has 64 hexadecimal digits")?;
    let utc_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as i64;
    let mut queue = Frames(vec![readings(utc_us)?]);
    let mut out = [0; 4096];
    let len = queue.write_declare(1, &mut out)?;
    let mut device = Device::new(Config {
        name,
        key,
        firmware: "example",
        // Random in firmware, and kept with the queue.
        stream: utc_us as u64,
        boot: 1,
        schema: SCHEMA,
        schema_hash: schema_hash(&out[HEADER_BYTES..len - TRAILER_BYTES]),
        rx_bytes_max: 4096,
        window_frames: 4,
        reconnect_min_ms: 1_000,
        reconnect_max_ms: 60_000,
        handshake_timeout_ms: 10_000,
    });
    let start = Instant::now();
    let now_us = || start.elapsed().as_micros() as u64;
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let nonce = (utc_us as u128).to_le_bytes(); // random in firmware
    device.connect(nonce, NO_CHANNEL_BINDING, now_us(), utc_us);
    let mut input = Vec::new();
    loop {
        while let Some(len) = device.poll_transmit(&mut queue, now_us(), &mut out) {
            socket.write_all(&out[..len])?;
        }
        device
            .handle_timeout(now_us())
            .map_err(|fault| format!("{fault:?}"))?;
        let mut bytes = [0; 4096];
        match socket.read(&mut bytes) {
            Ok(0) => return Err("the gateway closed the connection".into()),
            Ok(count) => input.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(frame) = frame::decode(&input, 4096)? {
            let notice = device.handle_frame(&frame, &mut queue, now_us());
            println!("{notice:?}");
            if let Some(Notice::Acked { through_seq: 1 }) =
                notice.map_err(|fault| format!("{fault:?}"))?
            {
                return Ok(());
            }
            let len = frame.bytes.len();
            input.drain(..len);
        }
    }
}
