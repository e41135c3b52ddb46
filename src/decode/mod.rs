//! Decodes an intact sequenced frame: its payload, its readings by series, and its times in UTC.
//!
//! A session decodes a frame when it arrives, and `fieldgate quarantine` decodes it again from
//! quarantine. Both get the same result if the program supports the same protocol version.

use fieldgate_protocol::column::{check_shape, decode_times, decode_values};
use fieldgate_protocol::error::Violation;
use fieldgate_protocol::frame::{Frame, types};
use fieldgate_protocol::message::{Data, Event, Gap, decode};
use fieldgate_protocol::value::Clock;

use crate::store::{Content, Readings, Schema};
use crate::time::{BootClocks, Origin, Stamp, resolve_utc};

pub mod explain;

/// Information needed to decode a frame.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub clocks: &'a BootClocks,
    /// Time of receipt, microseconds UTC.
    pub received_at_us: i64,
    /// The gateway's clock at receipt.
    pub origin: Origin,
}

/// Content of a frame, and the origin of its time, if it has one.
pub type Read = (Content, Option<Stamp>);

impl Context<'_> {
    /// Decodes an intact frame; returns `None` if `find_schema` does not know its schema.
    ///
    /// # Errors
    /// The first rule that the frame violates, in the order of R44.
    pub fn read<'s>(
        &self,
        frame: &Frame<'_>,
        find_schema: impl FnOnce(u16) -> Option<&'s Schema>,
    ) -> Result<Option<Read>, Violation> {
        if frame.header.flags != 0 {
            return Err(Violation::Flags(frame.header.flags));
        }
        match frame.header.frame_type {
            types::DATA => {
                let data: Data<'_> = decode(frame.payload())?;
                match find_schema(data.schema) {
                    Some(schema) => self.read_data(&data, schema).map(Some),
                    None => Ok(None),
                }
            }
            types::GAP => {
                let gap: Gap<'_> = decode(frame.payload())?;
                if gap.from_seq > frame.header.seq {
                    return Err(Violation::Range("from_seq"));
                }
                Ok(Some((Content::Gap { reason: gap.reason }, None)))
            }
            types::EVENT => {
                let event: Event<'_> = decode(frame.payload())?;
                let stamp = self.stamp(event.clock, event.boot, (event.time_us, event.time_us));
                let content = Content::Event {
                    time: stamp.time,
                    at_us: event.time_us.saturating_add(stamp.time.offset_us),
                    level: event.level,
                    code: event.code,
                    text: event.text.to_owned(),
                };
                Ok(Some((content, Some(stamp))))
            }
            other => Err(Violation::UnknownType(other)),
        }
    }

    fn read_data(&self, data: &Data<'_>, schema: &Schema) -> Result<Read, Violation> {
        // Before anything of that size is allocated.
        check_shape(data)?;
        let rows = usize::from(data.rows);
        let mut times_us = vec![0; rows];
        decode_times(data, &mut times_us)?;
        let mut series = Vec::with_capacity(data.columns.len());
        let mut values = vec![0.0; rows * data.columns.len()];
        for (column, values) in data.columns.iter().zip(values.chunks_exact_mut(rows)) {
            let channel = schema
                .channels
                .iter()
                .find(|channel| channel.id == column.channel)
                .ok_or(Violation::ColumnChannel(column.channel))?;
            series.push(channel.series);
            decode_values(column, channel.kind, channel.exp10, values)?;
        }
        let stamp = self.stamp(data.clock, data.boot, (times_us[0], times_us[rows - 1]));
        for time_us in &mut times_us {
            *time_us = time_us.saturating_add(stamp.time.offset_us);
        }
        let readings = Readings {
            time: stamp.time,
            times_us,
            series,
            values,
            too_old: 0,
        };
        Ok((Content::Readings(readings), Some(stamp)))
    }

    fn stamp(&self, clock: Clock, boot: u32, (oldest_us, newest_us): (i64, i64)) -> Stamp {
        let (boot, (time, chosen)) = match clock {
            Clock::Boot => {
                let rows = (oldest_us, newest_us);
                let clocks = self.clocks;
                let resolved = clocks.resolve_boot(boot, rows, self.received_at_us, self.origin);
                (Some(boot), resolved)
            }
            Clock::Utc => {
                let time = resolve_utc(oldest_us, newest_us, self.received_at_us);
                (None, (time, None))
            }
        };
        Stamp {
            boot,
            newest_us,
            time,
            chosen,
        }
    }
}
