//! Explains a sequenced frame: lists its fields with their bytes, and the byte that violates a
//! rule.
//!
//! The decoders report what is wrong with a frame but not where, because that costs time on every
//! frame. This module walks the frame again on request: `walk` finds the fields, `column` examines
//! times and columns. The fault is always the one reported by [`Context::read`]; this module finds
//! its position.

use std::ops::Range;

use fieldgate_protocol::error::Violation;
use fieldgate_protocol::frame::{Frame, HEADER_BYTES, TRAILER_BYTES, types};
use fieldgate_protocol::message::EVENT_TEXT_BYTES_MAX;

use self::walk::{Fields, Walk};
use crate::decode::Context;
use crate::store::{Content, Schema};

mod column;
mod quarantined;
#[cfg(test)]
mod tests;
mod walk;

pub use self::quarantined::explain;

/// A field, or a part of a frame that has no fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Name as in SPEC.md, with the index for a list item.
    pub name: String,
    /// Its bytes in the frame, including a preceding length.
    pub bytes: Range<usize>,
    pub value: String,
}

#[derive(Clone, Debug)]
pub struct Dissection {
    /// All parts in order and without gaps, as far as the fields can be parsed.
    pub parts: Vec<Part>,
    /// The first fault; `None` if there is none, or if it cannot be determined without the schema.
    pub fault: Option<Fault>,
    /// Content of the frame, if it has no fault and its schema is known.
    pub content: Option<Content>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Offset of the faulty byte; if bytes are missing at the end, that of the frame's checksum.
    pub at: usize,
    /// The violated rule; `None` if the payload's checksum is wrong.
    pub violation: Option<Violation>,
}

/// A part of a frame as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub part: Part,
    /// Offset of the faulty byte, if it is in this part.
    pub fault_at: Option<usize>,
}

impl Dissection {
    /// Returns the result of decoding the frame with this version.
    pub fn verdict(&self) -> String {
        match (&self.fault, &self.content) {
            (Some(fault), _) => match fault.violation {
                Some(violation) => violation.to_string(),
                None => "payload checksum wrong (R6)".to_owned(),
            },
            (None, Some(_)) => "valid: `quarantine replay` stores it".to_owned(),
            (None, None) => "schema not declared (R47)".to_owned(),
        }
    }

    /// Returns the parts up to the fault, and the rest of the frame's `bytes`, which was not decoded, as one part.
    pub fn lines(&self, bytes: usize) -> Vec<Line> {
        let fault_at = self.fault.as_ref().map(|fault| fault.at);
        let mut lines = Vec::new();
        for part in &self.parts {
            // A field without bytes cannot hold the fault.
            let fault_at = fault_at.filter(|at| part.bytes.contains(at));
            let end = part.bytes.end;
            let part = part.clone();
            lines.push(Line { part, fault_at });
            if fault_at.is_some() {
                if end < bytes {
                    let part = Part {
                        name: "the rest".to_owned(),
                        bytes: end..bytes,
                        value: "not decoded".to_owned(),
                    };
                    lines.push(Line {
                        part,
                        fault_at: None,
                    });
                }
                break;
            }
        }
        lines
    }
}

/// Explains a sequenced frame. `find_schema` looks up the schema of a DATA.
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
                // If no position is found, report the payload as a whole. The tests find no such
                // case.
                at: at.unwrap_or(HEADER_BYTES),
                violation: Some(violation),
            });
        }
    }
    dissection
}

/// Returns the byte that violates a rule.
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
                    // The second of two duplicates, or one that is not in the schema.
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

/// Returns whether the time of the first row is out of range.
fn check_first_time(data: &walk::DataFields) -> bool {
    let first_us = data.t0.checked_mul(data.unit_us());
    !first_us.is_some_and(|first_us| data.is_in_range(first_us))
}

/// Returns the tag or length in `ext` that violates a rule.
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
