//! Sockets, TLS and the frame codec.

pub mod codec;
pub mod socket;
pub mod tls;
