//! Fleet simulator of Fieldgate, as a library under a thin `main.rs`.
//!
//! ```text
//! args -> Plan -> Script -> frame(device, seq) -> the fleet -> gateway
//!                    |                                |
//!                    +---- the verifier <- journal <--+-> report, progress
//! ```
//! The content of every frame is a pure function of the plan. The journal therefore holds only the plan and the
//! progress of each device, and the verifier computes what must be stored.

pub mod args;
pub mod bench;
pub mod catalogue;
pub mod descriptors;
pub mod encode;
pub mod faults;
pub mod fleet;
pub mod hash;
pub mod journal;
pub mod pace;
pub mod plan;
pub mod progress;
pub use fieldgate::recording::readings;
pub mod replay;
pub mod report;
pub mod say;
pub mod signal;
pub mod verify;
pub mod wire;
