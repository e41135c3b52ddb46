//! Content of a sequenced frame, and its comparison with an entry.

use std::sync::Arc;

use fieldgate_protocol::column::{check_shape, decode_times, decode_values};
use fieldgate_protocol::error::{Code, Violation};
use fieldgate_protocol::frame::{Frame, types};
use fieldgate_protocol::message::{Data, Event, Gap, Message, decode};
use fieldgate_protocol::value::Clock;

use crate::store::{Content, Entry, Schema, SeriesId};

/// A sequenced frame that the session accepted.
#[derive(Clone, Debug)]
pub(super) struct Accepted {
    pub first_seq: u64,
    pub seq: u64,
    pub frame_type: u8,
    pub received_at_us: i64,
    pub made: Made,
}

/// Content of a frame, with the device's own times.
#[derive(Clone, Debug)]
pub(super) enum Made {
    Readings {
        is_utc: bool,
        times_us: Vec<i64>,
        series: Vec<SeriesId>,
        values: Vec<u64>,
    },
    Gap {
        reason: u8,
    },
    Event {
        is_utc: bool,
        time_us: i64,
        level: u8,
        code: u16,
        text: String,
    },
    Refused {
        code: Code,
        bytes: Vec<u8>,
    },
}

pub(super) fn refused(code: Code, frame: &Frame<'_>) -> Made {
    let bytes = frame.bytes.to_vec();
    Made::Refused { code, bytes }
}

/// Returns the content of an intact frame; `None` if its schema is unknown.
pub(super) fn made(frame: &Frame<'_>, schemas: &[Arc<Schema>]) -> Result<Option<Made>, Violation> {
    fn read<'a, M: Message<'a>>(frame: &Frame<'a>) -> Result<M, Violation> {
        decode(frame.payload())
    }
    match frame.header.frame_type {
        _ if frame.header.flags != 0 => Err(Violation::Flags(frame.header.flags)),
        types::DATA => {
            let data: Data<'_> = read(frame)?;
            let schema = schemas.iter().find(|schema| schema.schema == data.schema);
            schema.map(|schema| readings(&data, schema)).transpose()
        }
        types::GAP => {
            let gap: Gap<'_> = read(frame)?;
            let reason = gap.reason;
            let is_forward = gap.from_seq <= frame.header.seq;
            is_forward
                .then_some(Some(Made::Gap { reason }))
                .ok_or(Violation::Range("from_seq"))
        }
        types::EVENT => {
            let event: Event<'_> = read(frame)?;
            Ok(Some(Made::Event {
                is_utc: event.clock == Clock::Utc,
                time_us: event.time_us,
                level: event.level,
                code: event.code,
                text: event.text.to_owned(),
            }))
        }
        other => Err(Violation::UnknownType(other)),
    }
}

fn readings(data: &Data<'_>, schema: &Schema) -> Result<Made, Violation> {
    check_shape(data)?;
    let mut times_us = vec![0; usize::from(data.rows)];
    decode_times(data, &mut times_us)?;
    let (mut series, mut values) = (Vec::new(), Vec::new());
    for column in &data.columns {
        let channel = schema
            .channels
            .iter()
            .find(|channel| channel.id == column.channel);
        let channel = channel.ok_or(Violation::ColumnChannel(column.channel))?;
        let mut decoded = vec![0.0; times_us.len()];
        decode_values(column, channel.kind, channel.exp10, &mut decoded)?;
        series.push(channel.series);
        values.extend(decoded.into_iter().map(f64::to_bits));
    }
    Ok(Made::Readings {
        is_utc: data.clock == Clock::Utc,
        times_us,
        series,
        values,
    })
}

impl Accepted {
    /// Returns the code with which the frame is permanently rejected, and its length in bytes.
    pub(super) fn refusal(&self) -> Option<(u8, usize)> {
        match &self.made {
            Made::Refused { code, bytes } => Some((*code as u8, bytes.len())),
            _ => None,
        }
    }

    pub(super) fn covers(&self, seq: u64) -> bool {
        (self.first_seq..=self.seq).contains(&seq)
    }

    /// Returns whether the entry has the content of the frame.
    pub(super) fn is(&self, entry: &Entry) -> bool {
        let is_head_equal = (self.first_seq, self.seq) == (entry.first_seq, entry.seq)
            && self.frame_type == entry.frame_type
            && self.received_at_us == entry.received_at_us;
        is_head_equal && self.made.is(&entry.content)
    }
}

impl Made {
    fn is(&self, content: &Content) -> bool {
        match (self, content) {
            (
                Made::Readings {
                    is_utc,
                    times_us,
                    series,
                    values,
                },
                Content::Readings(stored),
            ) => {
                let offset_us = stored.time.offset_us;
                let device_times_us = stored.times_us.iter().map(|us| us - offset_us);
                let stored_values = stored.values.iter().map(|value| value.to_bits());
                (!is_utc || offset_us == 0)
                    && device_times_us.eq(times_us.iter().copied())
                    && stored_values.eq(values.iter().copied())
                    && stored.series == *series
            }
            (Made::Gap { reason }, Content::Gap { reason: stored }) => reason == stored,
            (
                Made::Event {
                    is_utc,
                    time_us,
                    level,
                    code,
                    text,
                },
                Content::Event {
                    time,
                    at_us,
                    level: stored_level,
                    code: stored_code,
                    text: stored_text,
                },
            ) => {
                (!is_utc || time.offset_us == 0)
                    && at_us - time.offset_us == *time_us
                    && (level, code, text) == (stored_level, stored_code, stored_text)
            }
            (
                Made::Refused { code, bytes },
                Content::Quarantined {
                    code: stored_code,
                    bytes: stored_bytes,
                    ..
                },
            ) => *code as u8 == *stored_code && bytes == stored_bytes,
            _ => false,
        }
    }
}
