//! DATA, GAP, EVENT and RESULT, and DECLARE, which DATA needs.

use heapless::Vec;
use serde::{Deserialize, Serialize};
use serde_bytes::Bytes;

use super::{
    CHANNELS_MAX, EVENT_TEXT_BYTES_MAX, Message, NAME_BYTES_MAX, UNIT_BYTES_MAX, check_ext,
    check_range, check_text,
};
use crate::auth::SchemaHasher;
use crate::error::Violation;
use crate::frame::types;
use crate::value::{Clock, Kind, TimeUnit, check_time};

/// DECLARE: the channels of a schema. Immutable for a device and number (R40).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Declare<'a> {
    /// Schema number, at least 1.
    pub schema: u16,
    /// Channels of the schema.
    pub channels: Vec<Channel<'a>, CHANNELS_MAX>,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl Declare<'_> {
    /// Returns the hash that identifies the content (R41), without a buffer.
    pub fn hash(&self) -> [u8; 8] {
        postcard::to_extend(self, SchemaHasher::default())
            .expect("a hash takes any number of bytes")
            .finish()
    }
}

/// One channel of a [`Declare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Channel<'a> {
    /// Id within the schema.
    pub id: u8,
    /// Name, such as `temperature`.
    pub name: &'a str,
    /// SenML unit (RFC 8428), such as `Cel`; may be empty.
    pub unit: &'a str,
    /// Kind of its values.
    pub kind: Kind,
    /// Value = integer * 10^exp10; 0 for kinds other than integer.
    pub exp10: i8,
}

impl<'a> Message<'a> for Declare<'a> {
    const TYPE: u8 = types::DECLARE;
    type Wire = (u16, Vec<ChannelWire<'a>, CHANNELS_MAX>, &'a Bytes);

    fn from_wire((schema, wire, ext): Self::Wire) -> Result<Self, Violation> {
        check_range("schema", schema >= 1)?;
        if wire.is_empty() {
            return Err(Violation::Channels);
        }
        let mut channels = Vec::<Channel<'_>, CHANNELS_MAX>::new();
        for channel in wire {
            let channel = Channel::from_wire(channel)?;
            if { channels.iter() }.any(|other| other.id == channel.id || other.name == channel.name)
            {
                return Err(Violation::Channels);
            }
            channels
                .push(channel)
                .expect("as many channels as on the wire");
        }
        check_ext(ext)?;
        Ok(Declare {
            schema,
            channels,
            ext,
        })
    }
}

type ChannelWire<'a> = (u8, &'a str, &'a str, u8, i8);

impl<'a> Channel<'a> {
    fn from_wire((id, name, unit, kind, exp10): ChannelWire<'a>) -> Result<Self, Violation> {
        if name.is_empty() {
            return Err(Violation::Name);
        }
        check_text(name, NAME_BYTES_MAX)?;
        check_text(unit, UNIT_BYTES_MAX)?;
        let kind = Kind::from_wire(kind)?;
        let exponents = if kind == Kind::Integer {
            -22..=22
        } else {
            0..=0
        };
        if !exponents.contains(&exp10) {
            return Err(Violation::Exponent(exp10));
        }
        Ok(Channel {
            id,
            name,
            unit,
            kind,
            exp10,
        })
    }
}

/// DATA: rows of readings, by column (R50 to R59).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Data<'a> {
    /// Number of the schema that declares the channels.
    pub schema: u16,
    /// Clock of the times.
    pub clock: Clock,
    /// Unit of times and steps.
    pub time_unit: TimeUnit,
    /// The boot that times count from; with UTC, the boot in which the times were recorded.
    pub boot: u32,
    /// Time of the first row.
    pub t0: i64,
    /// Number of rows, 1 to [`crate::column::ROWS_MAX`].
    pub rows: u16,
    /// Time between consecutive rows; 0 if `dt` holds the steps.
    pub step: u32,
    /// Varints, the time from each row to the next, each at least 1; empty if `step` holds it.
    #[serde(with = "serde_bytes")]
    pub dt: &'a [u8],
    /// Columns with values.
    pub columns: Vec<Column<'a>, CHANNELS_MAX>,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

/// One column of a [`Data`]; decoded by [`crate::column`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column<'a> {
    /// Channel id in the schema.
    pub channel: u8,
    /// Encoding of `data`.
    pub encoding: u8,
    /// One bit per row, lowest first, set if the row has no valid value; empty if all rows have
    /// one.
    #[serde(with = "serde_bytes")]
    pub nulls: &'a [u8],
    /// Encoded valid values.
    #[serde(with = "serde_bytes")]
    pub data: &'a [u8],
}

impl<'a> Message<'a> for Data<'a> {
    const TYPE: u8 = types::DATA;
    type Wire = (
        u16,
        u8,
        u8,
        u32,
        i64,
        u16,
        u32,
        &'a Bytes,
        Vec<Column<'a>, CHANNELS_MAX>,
        &'a Bytes,
    );

    fn from_wire(wire: Self::Wire) -> Result<Self, Violation> {
        let (schema, clock, time_unit, boot, t0, rows, step, dt, columns, ext) = wire;
        let clock = Clock::from_wire(clock)?;
        let time_unit = TimeUnit::from_wire(time_unit)?;
        check_ext(ext)?;
        Ok(Data {
            schema,
            clock,
            time_unit,
            boot,
            t0,
            rows,
            step,
            dt,
            columns,
            ext,
        })
    }
}

/// GAP: the content of `from_seq` through the header's seq is lost (R45).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap<'a> {
    /// First lost number.
    pub from_seq: u64,
    /// 0: overwritten by newer frames; 1: queue damaged; 2: erased on request. Others are
    /// device-specific.
    pub reason: u8,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Gap<'a> {
    const TYPE: u8 = types::GAP;
    type Wire = Self;

    fn from_wire(gap: Self) -> Result<Self, Violation> {
        check_range("from_seq", gap.from_seq >= 1)?;
        check_ext(gap.ext)?;
        Ok(gap)
    }
}

/// EVENT: a report by the device about itself (R46).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event<'a> {
    /// Clock of `time_us`.
    pub clock: Clock,
    /// See [`Data::boot`].
    pub boot: u32,
    /// Time of the event, in microseconds.
    pub time_us: i64,
    /// 0 debug, 1 info, 2 warning, 3 error, 4 critical.
    pub level: u8,
    /// Device-specific code.
    pub code: u16,
    /// Human-readable text.
    pub text: &'a str,
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for Event<'a> {
    const TYPE: u8 = types::EVENT;
    type Wire = (u8, u32, i64, u8, u16, &'a str, &'a Bytes);

    fn from_wire(wire: Self::Wire) -> Result<Self, Violation> {
        let (clock, boot, time_us, level, code, text, ext) = wire;
        let clock = Clock::from_wire(clock)?;
        check_time(clock, time_us)?;
        check_range("level", level <= 4)?;
        check_text(text, EVENT_TEXT_BYTES_MAX)?;
        check_ext(ext)?;
        Ok(Event {
            clock,
            boot,
            time_us,
            level,
            code,
            text,
            ext,
        })
    }
}

/// RESULT: outcome of a command (R48). Specified, but not supported by version 0.1 of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult<'a> {
    /// Id of the command.
    pub id: u64,
    /// 0 done, 1 failed, 2 not supported, 3 expired.
    pub status: u8,
    /// Output of the command.
    #[serde(with = "serde_bytes")]
    pub body: &'a [u8],
    /// Extensions for later versions (R25).
    #[serde(with = "serde_bytes")]
    pub ext: &'a [u8],
}

impl<'a> Message<'a> for CommandResult<'a> {
    const TYPE: u8 = types::RESULT;
    type Wire = Self;

    fn from_wire(result: Self) -> Result<Self, Violation> {
        check_range("status", result.status <= 3)?;
        check_ext(result.ext)?;
        Ok(result)
    }
}
