//! A device on plain TCP. It sends three temperatures and ends when they are stored:
//!
//! ```text
//! cargo run -p fieldgate-protocol --example device -- 127.0.0.1:7300 pump-7 $(fieldgate device key pump-7)
//! ```
//!
//! Its queue is one frame in memory, so each run is a new stream. Firmware keeps its queue in flash, and
//! reconnects after a fault.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime};

use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
use fieldgate_protocol::device::{Config, Device, Notice, Queue};
use fieldgate_protocol::frame::NoRoom;
use fieldgate_protocol::message::{Channel, Column, Data, Declare, encode};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

#[rustfmt::skip]
fn schema() -> Declare<'static> {
    // Hundredths of a degree Celsius.
    let temperature = Channel { id: 1, name: "temperature", unit: "Cel", kind: Kind::Integer, exp10: -2 };
    Declare { schema: 1, channels: [temperature].into(), ext: &[] }
}

/// Frame 1: 21.57, 21.58 and 21.56 degrees, one second apart.
struct OneFrame {
    start_s: i64,
}

#[rustfmt::skip]
impl Queue for OneFrame {
    fn oldest_seq(&self) -> u64 { 1 }
    fn next_seq(&self) -> u64 { 2 }
    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let mut packed = [0; 32];
        let columns = [Column::integers(1, &[2157, 2158, 2156], &mut packed)?].into();
        let data = Data {
            schema: 1, clock: Clock::Utc, time_unit: TimeUnit::Seconds, boot: 1, t0: self.start_s,
            rows: 3, step: 1, dt: &[], columns, ext: &[],
        };
        encode(&data, seq, out)
    }
    fn write_declare(&mut self, _: u64, out: &mut [u8]) -> Result<usize, NoRoom> { encode(&schema(), 0, out) }
    fn delete_through(&mut self, _: u64) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, name, digits] = args.as_slice() else {
        return Err("usage: device ADDRESS NAME KEY".into());
    };
    let mut key = [0; 32];
    hex::decode_to_slice(digits, &mut key)?;
    send(address, name, key)
}

/// Sends the readings as device `name`; returns when they are stored.
pub fn send(address: &str, name: &str, key: [u8; 32]) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let now_us = || start.elapsed().as_micros() as u64;
    let utc_us = SystemTime::UNIX_EPOCH.elapsed()?.as_micros() as i64;
    // Firmware draws both at random, and keeps the number of the stream with its queue.
    let (stream, nonce) = (utc_us as u64, (utc_us as u128).to_le_bytes());
    let mut device = Device::new(Config::new(name, key, stream, 1, &schema()));
    let start_s = utc_us / 1_000_000 - 2;
    let mut queue = OneFrame { start_s };

    let mut socket = TcpStream::connect(address)?;
    device.connect(nonce, NO_CHANNEL_BINDING, now_us(), utc_us);
    let (mut out, mut input, mut filled) = ([0; 4096], [0; 512], 0);
    loop {
        while let Some(len) = device.poll_transmit(&mut queue, now_us(), &mut out) {
            socket.write_all(&out[..len])?;
        }
        let deadline_us = device.poll_deadline().unwrap_or(u64::MAX);
        let wait_us = deadline_us.saturating_sub(now_us()).max(1);
        socket.set_read_timeout(Some(Duration::from_micros(wait_us)))?;
        match socket.read(&mut input[filled..]) {
            Ok(0) => return Err("the gateway closed the connection".into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        device.handle_timeout(now_us())?;
        while let (used @ 1.., notice) =
            device.handle_input(&input[..filled], &mut queue, now_us())?
        {
            input.copy_within(used..filled, 0);
            filled -= used;
            println!("{notice:?}");
            if notice == Some(Notice::Acked { through_seq: 1 }) {
                return Ok(());
            }
        }
    }
}
