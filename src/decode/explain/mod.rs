//! A sequenced frame taken apart for people: its fields with their bytes, and the byte that breaks a rule.
//!
//! The decoders say what is wrong with a frame and not where, because that costs time on every frame.
//! Here the frame is walked again, once somebody asks: `walk` finds the fields, `column` looks into times
//! and columns. What is wrong is always what [`Context::read`] says; where, is found by that.

use std::ops::Range;

use fieldgate_protocol::column::check_time;
use fieldgate_protocol::error::Violation;
use fieldgate_protocol::frame::{Frame, HEADER_BYTES, TRAILER_BYTES, types};
use fieldgate_protocol::message::EVENT_TEXT_BYTES_MAX;

use self::walk::{Fields, Walk};
use crate::decode::Context;
use crate::store::{Content, Schema};

mod column;
#[cfg(test)]
mod tests;
mod walk;

/// A field, or a part of a frame that has no fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// As SPEC.md names it; of a list, with the item's place.
    pub name: String,
    /// Its bytes in the frame, a length before its content included.
    pub bytes: Range<usize>,
    /// What they say.
    pub value: String,
}

/// What a frame is made of.
#[derive(Clone, Debug)]
pub struct Dissection {
    /// The parts in their order, without gaps, as far as they can be told apart.
    pub parts: Vec<Part>,
    /// The first thing that is wrong; `None` if nothing is, or if it cannot be told without a schema
    /// that is not there.
    pub fault: Option<Fault>,
    /// What the frame says, if nothing is wrong and its schema is known.
    pub content: Option<Content>,
}

/// What is wrong with a frame, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The byte that breaks the rule; the frame's checksum, where it is a byte that is missing at the end.
    pub at: usize,
    /// The rule; `None` if the payload's checksum is wrong.
    pub violation: Option<Violation>,
}

/// Takes a sequenced frame apart. `find_schema` is asked for the schema of a DATA.
pub fn dissect<'s>(
    frame: &Frame<'_>,
    context: &Context<'_>,
    find_schema: impl Fn(u16) -> Option<&'s Schema>,
) -> Dissection {
    let walk = Walk::of(frame);
    let mut dissection = Dissection {
        parts: walk.parts.clone(),
        fault: None,
        content: None,
    };
    let end = frame.bytes.len() - TRAILER_BYTES;
    if !frame.intact {
        dissection.fault = Some(Fault {
            at: end,
            violation: None,
        });
        return dissection;
    }
    match context.read(frame, &find_schema) {
        Ok(read) => dissection.content = read.map(|(content, _)| content),
        Err(violation) => {
            let schema = walk.fields.schema().and_then(find_schema);
            let at = locate(frame, &walk, schema, violation);
            dissection.fault = Some(Fault {
                // Were it not found, the payload as a whole is to blame; the tests know of no such case.
                at: at.unwrap_or(HEADER_BYTES),
                violation: Some(violation),
            });
        }
    }
    dissection
}

/// The byte that breaks a rule.
fn locate(
    frame: &Frame<'_>,
    walk: &Walk,
    schema: Option<&Schema>,
    violation: Violation,
) -> Option<usize> {
    let part = |name: &str| walk.part(name).map(|part| part.bytes.start);
    match violation {
        Violation::Flags(_) => Some(3),
        Violation::UnknownType(_) => Some(2),
        Violation::Encoding | Violation::TrailingBytes => walk.broken_at,
        Violation::NotCanonical => walk.overlong_at,
        Violation::Range(field) => part(field),
        Violation::ExtSyntax | Violation::ExtCritical(_) => ext_fault(frame, walk),
        Violation::TextTooLong => Some(walk.text.start + EVENT_TEXT_BYTES_MAX),
        Violation::Name => {
            let text = &frame.bytes[walk.text.clone()];
            Some(walk.text.start + text.iter().position(|byte| *byte == 0)?)
        }
        Violation::Rows => part("rows"),
        Violation::TimeRange if frame.header.frame_type == types::EVENT => part("time_us"),
        _ => {
            let Fields::Data(data) = &walk.fields else {
                return None;
            };
            match violation {
                Violation::TimeRange if check_first_time(data) => part("t0"),
                Violation::TimeRange if data.step > 0 => part("step"),
                Violation::TimeRange | Violation::Times => column::times_fault(frame.bytes, data),
                Violation::ColumnChannel(_) if data.columns.is_empty() => part("columns"),
                Violation::ColumnChannel(id) => {
                    let columns = data.columns.iter().filter(|column| column.channel == id);
                    // The second of two, or one that the schema has not.
                    columns.take(2).last().map(|column| column.channel_at)
                }
                Violation::ColumnEncoding(id) => Some(data.column(id)?.encoding_at),
                Violation::ColumnNulls(id) => Some(column::nulls_fault(data, data.column(id)?)),
                Violation::ColumnData(id) => {
                    let channels = &schema?.channels;
                    let channel = channels.iter().find(|channel| channel.id == id)?;
                    column::data_fault(frame.bytes, data, data.column(id)?, channel.kind)
                }
                _ => None,
            }
        }
    }
}

/// Whether it is the first row's time that is out of range.
fn check_first_time(data: &walk::DataFields) -> bool {
    let first_us = data.t0.checked_mul(data.unit_us());
    first_us.is_none_or(|first_us| check_time(data.clock, first_us).is_err())
}

/// The tag or length in `ext` that breaks a rule.
fn ext_fault(frame: &Frame<'_>, walk: &Walk) -> Option<usize> {
    let mut at = walk.ext.start;
    let ext_end = walk.ext.end;
    while at + 1 < ext_end {
        let (tag, len) = (frame.bytes[at], usize::from(frame.bytes[at + 1]));
        if tag % 2 == 0 {
            return Some(at);
        }
        if at + 2 + len > ext_end {
            return Some(at + 1);
        }
        at += 2 + len;
    }
    (at < ext_end).then_some(at)
}
