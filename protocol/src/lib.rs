//! The Fieldgate Wire Protocol, FWP/1: what travels between a field device and a gateway.
//!
//! `SPEC.md` in this package is the specification; rule numbers such as `R12` refer to it.
//!
//! - [`frame`]: header, checksums, limits: bytes in, frames out.
//! - [`message`]: the payload of each frame type.
//! - [`column`]: readings and their times, packed and unpacked.
//! - [`auth`]: keys and the MACs of the handshake.
//! - [`error`]: codes of refusals and what each obliges the device to do.
//! - [`device`]: the device's side as a state machine that firmware links.
//!
//! No std, no allocation, no unsafe code, no clock, no I/O: time, randomness and bytes come in from
//! outside.

#![no_std]

pub mod auth;
pub mod column;
pub mod device;
pub mod error;
pub mod frame;
pub mod message;
