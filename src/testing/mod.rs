//! Test harnesses that drive sessions and stores; never part of the product.

use fieldgate_protocol::message::{Channel, Declare};
use fieldgate_protocol::value::Kind;

mod backend;
pub mod fuzz;
#[cfg(test)]
mod simulation;

/// Returns the DECLARE of channels by name, kind and exponent; their ids are counted from 1.
fn declare<'a>(schema: u16, channels: &[(&'a str, Kind, i8)]) -> Declare<'a> {
    let channel = |(&(name, kind, exp10), id)| Channel {
        id,
        name,
        unit: "1",
        kind,
        exp10,
    };
    Declare {
        schema,
        channels: channels.iter().zip(1..).map(channel).collect(),
        ext: &[],
    }
}
