//! The Fieldgate Wire Protocol.
#![no_std]
#![warn(missing_docs)]

pub mod column;
