//! Sockets, TLS, and frames on them.

pub mod codec;
pub mod socket;
pub mod tls;
