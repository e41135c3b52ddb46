//! The Fieldgate Wire Protocol, FWP/1, between a field device and a gateway.
//!
//! `SPEC.md` in this package is the specification; rule numbers such as `R12` refer to it.
//!
//! - [`frame`]: frames with their headers, checksums and limits.
//! - [`message`]: the payload of each frame type.
//! - [`mod@column`]: encoding of readings and their times.
//! - [`auth`]: keys and the MACs of the handshake.
//! - [`error`]: codes of refusals, and how the device must react to each.
//! - [`device`]: the device side as a state machine for firmware.
//!
//! No std, no allocation, no unsafe code, no clock, no I/O: the caller passes in time, random
//! numbers and bytes.
//!
//! # Memory
//!
//! | | 32-bit machine | 64-bit machine |
//! |---|---|---|
//! | [`Device`](device::Device), with its key and the state of a handshake | 408 bytes | 432 bytes |
//! | [`Data`](message::Data), with room for 32 columns | 688 bytes | 1,344 bytes |
//!
//! [`encode`](message::encode) of a [`Data`](message::Data) needs about 350 bytes of stack on a Cortex-M4 at
//! `opt-level = "s"`: the sum of the stack frames on its deepest path, read from the assembly. Without optimization it
//! needs less than 3 KiB on x86-64, which `tests/memory.rs` measures. The caller provides the buffers: one for sending,
//! of the gateway's longest frame (4,096 bytes by default) or as much as the longest frame in the queue, and one for
//! receiving, of [`rx_bytes_max`](device::Config::rx_bytes_max).
//!
//! # A device
//!
//! `examples/device.rs` is a whole device on TCP. This one keeps a queue of 4 frames of up to 128 bytes in
//! arrays. A real queue is in flash and survives power loss.
//!
//! ```
//! use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
//! use fieldgate_protocol::device::{Config, Device, Queue};
//! use fieldgate_protocol::frame::NoRoom;
//! use fieldgate_protocol::message::{Channel, Column, Data, Declare, encode};
//! use fieldgate_protocol::value::{Clock, Kind, TimeUnit};
//!
//! const SLOTS: u64 = 4;
//!
//! struct Ring {
//!     frames: [[u8; 128]; SLOTS as usize],
//!     lens: [usize; SLOTS as usize],
//!     oldest_seq: u64,
//!     next_seq: u64,
//! }
//!
//! impl Ring {
//!     /// Queues 21.57, 21.58 and 21.56 degrees, one second apart; overwrites the oldest frame.
//!     fn push_readings(&mut self, t0: i64) -> Result<(), NoRoom> {
//!         let mut packed = [0; 32];
//!         let column = Column::integers(1, &[2157, 2158, 2156], &mut packed)?;
//!         let data = Data {
//!             schema: 1,
//!             clock: Clock::Boot,
//!             time_unit: TimeUnit::Seconds,
//!             boot: 7,
//!             t0,
//!             rows: 3,
//!             step: 1,
//!             dt: &[],
//!             columns: [column].into(),
//!             ext: &[],
//!         };
//!         let slot = (self.next_seq % SLOTS) as usize;
//!         self.lens[slot] = encode(&data, self.next_seq, &mut self.frames[slot])?;
//!         self.next_seq += 1;
//!         self.oldest_seq = self.oldest_seq.max(self.next_seq.saturating_sub(SLOTS));
//!         Ok(())
//!     }
//! }
//!
//! fn schema() -> Declare<'static> {
//!     let (name, unit, kind) = ("temperature", "Cel", Kind::Integer);
//!     let channel = Channel { id: 1, name, unit, kind, exp10: -2 };
//!     Declare { schema: 1, channels: [channel].into(), ext: &[] }
//! }
//!
//! impl Queue for Ring {
//!     fn oldest_seq(&self) -> u64 {
//!         self.oldest_seq
//!     }
//!     fn next_seq(&self) -> u64 {
//!         self.next_seq
//!     }
//!     fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
//!         let slot = (seq % SLOTS) as usize;
//!         let frame = &self.frames[slot][..self.lens[slot]];
//!         out.get_mut(..frame.len()).ok_or(NoRoom)?.copy_from_slice(frame);
//!         Ok(frame.len())
//!     }
//!     fn write_declare(&mut self, _: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
//!         encode(&schema(), 0, out)
//!     }
//!     fn delete_through(&mut self, seq: u64) {
//!         self.oldest_seq = self.oldest_seq.max(seq + 1);
//!     }
//! }
//!
//! let (key, stream, boot) = ([0x11; 32], 0x1122_3344_5566_7788, 7);
//! let mut device = Device::new(Config::new("pump-07", key, stream, boot, &schema()));
//! let mut ring = Ring { frames: [[0; 128]; 4], lens: [0; 4], oldest_seq: 1, next_seq: 1 };
//! ring.push_readings(5)?;
//!
//! // The connection is established; `now_us` counts from boot. Send all output of `poll_transmit`.
//! let (nonce, now_us, mut out) = ([0x22; 16], 9_000_000, [0; 512]);
//! device.connect(nonce, NO_CHANNEL_BINDING, now_us, 0);
//! let hello = device.poll_transmit(&mut ring, now_us, &mut out).map(|len| &out[..len]);
//! assert_eq!(hello.map(|frame| frame[2]), Some(0x01));
//! // Then pass received bytes to device.handle_input, call poll_transmit again, and call device.handle_timeout
//! // at device.poll_deadline.
//! # Ok::<(), NoRoom>(())
//! ```

#![no_std]

pub mod auth;
pub mod column;
pub mod device;
pub mod error;
pub mod frame;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub mod message;
pub mod value;

// The sizes in the documentation; `tests/no_std` compiles this for a 32-bit machine too.
const _: () = {
    let is_64_bit = cfg!(target_pointer_width = "64");
    let (device_bytes, data_bytes) = if is_64_bit { (432, 1_344) } else { (408, 688) };
    assert!(size_of::<device::Device<'_>>() <= device_bytes);
    assert!(size_of::<message::Data<'_>>() <= data_bytes);
};
