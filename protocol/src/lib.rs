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
//! # A device
//!
//! This example keeps a queue of 4 frames of up to 128 bytes in arrays. A real queue is in flash and survives
//! power loss.
//!
//! ```
//! use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, schema_hash};
//! use fieldgate_protocol::column::encode_integers;
//! use fieldgate_protocol::device::{Config, Device, Queue};
//! use fieldgate_protocol::frame::{HEADER_BYTES, NoRoom, TRAILER_BYTES};
//! use fieldgate_protocol::message::{Channel, Column, Data, Declare, encode};
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
//!         let (encoding, len) = encode_integers(&[2157, 2158, 2156], &mut packed)?;
//!         let column = Column { channel: 1, encoding, nulls: &[], data: &packed[..len] };
//!         let data = Data {
//!             schema: 1,
//!             clock: 0,
//!             time_unit: 2,
//!             boot: 7,
//!             t0,
//!             rows: 3,
//!             step: 1,
//!             dt: &[],
//!             columns: [column].into_iter().collect(),
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
//! fn write_schema(out: &mut [u8]) -> Result<usize, NoRoom> {
//!     let channel = Channel { id: 1, name: "temperature", unit: "Cel", kind: 0, exp10: -2 };
//!     let channels = [channel].into_iter().collect();
//!     encode(&Declare { schema: 1, channels, ext: &[] }, 0, out)
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
//!         write_schema(out)
//!     }
//!     fn delete_through(&mut self, seq: u64) {
//!         self.oldest_seq = self.oldest_seq.max(seq + 1);
//!     }
//! }
//!
//! let mut out = [0; 512];
//! let len = write_schema(&mut out)?;
//! let hash = schema_hash(&out[HEADER_BYTES..len - TRAILER_BYTES]);
//! let mut device = Device::new(Config {
//!     name: "pump-07",
//!     key: [0x11; 32],
//!     firmware: "2.4.1",
//!     stream: 0x1122_3344_5566_7788,
//!     boot: 7,
//!     schema: 1,
//!     schema_hash: hash,
//!     rx_bytes_max: 512,
//!     window_frames: 4,
//!     reconnect_min_ms: 1_000,
//!     reconnect_max_ms: 300_000,
//!     handshake_timeout_ms: 10_000,
//! });
//! let mut ring = Ring { frames: [[0; 128]; 4], lens: [0; 4], oldest_seq: 1, next_seq: 1 };
//! ring.push_readings(5)?;
//!
//! // The connection is established; `now_us` counts from boot. Send all output of `poll_transmit`.
//! let (nonce, now_us) = ([0x22; 16], 9_000_000);
//! device.connect(nonce, NO_CHANNEL_BINDING, now_us, 0);
//! let hello = device.poll_transmit(&mut ring, now_us, &mut out).map(|len| &out[..len]);
//! assert_eq!(hello.map(|frame| frame[2]), Some(0x01));
//! // Then decode the input with frame::decode, call device.handle_frame and poll_transmit, and call
//! // device.handle_timeout at device.poll_deadline.
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
