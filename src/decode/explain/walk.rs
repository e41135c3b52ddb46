//! The fields of a frame, according to the grammar in SPEC.md sections 2 to 4.
//!
//! Reads the same fields as the decoder, in the same order, and records their positions. Does not
//! check ranges.

use std::ops::Range;

use fieldgate_protocol::frame::{Frame, HEADER_BYTES, TRAILER_BYTES, types};
use fieldgate_protocol::message::CHANNELS_MAX;
use fieldgate_protocol::value::{Clock, TimeUnit, check_time};

use super::Part;

#[derive(Debug)]
pub(super) struct Walk {
    pub(super) parts: Vec<Part>,
    pub(super) fields: Fields,
    /// Offset at which the payload stops being a valid message: an unreadable field, or bytes after
    /// the last field.
    pub(super) broken_at: Option<usize>,
    /// The last byte of the first varint that is longer than necessary.
    pub(super) overlong_at: Option<usize>,
    /// Content of the field `text`.
    pub(super) text: Range<usize>,
    /// Content of the field `ext`.
    pub(super) ext: Range<usize>,
}

/// Fields whose values can be faulty in combination.
#[derive(Debug)]
pub(super) enum Fields {
    None,
    Data(DataFields),
}

#[derive(Debug, Default)]
pub(super) struct DataFields {
    pub(super) schema: u16,
    pub(super) clock: u8,
    pub(super) time_unit: u8,
    pub(super) t0: i64,
    pub(super) rows: usize,
    pub(super) step: u64,
    pub(super) dt: Range<usize>,
    pub(super) columns: Vec<ColumnFields>,
}

/// Fields of a column; ranges cover the contents.
#[derive(Debug)]
pub(super) struct ColumnFields {
    pub(super) channel_at: usize,
    pub(super) channel: u8,
    pub(super) encoding_at: usize,
    pub(super) encoding: u8,
    pub(super) nulls_at: usize,
    pub(super) nulls: Range<usize>,
    /// Number of rows without a valid value, according to `nulls`.
    pub(super) nulls_set: usize,
    pub(super) data: Range<usize>,
}

impl Fields {
    pub(super) fn schema(&self) -> Option<u16> {
        match self {
            Fields::Data(data) => Some(data.schema),
            Fields::None => None,
        }
    }
}

impl DataFields {
    pub(super) fn unit_us(&self) -> i64 {
        TimeUnit::from_wire(self.time_unit).map_or(1, TimeUnit::us)
    }

    pub(super) fn is_in_range(&self, time_us: i64) -> bool {
        Clock::from_wire(self.clock).is_ok_and(|clock| check_time(clock, time_us).is_ok())
    }

    pub(super) fn column(&self, channel: u8) -> Option<&ColumnFields> {
        self.columns.iter().find(|column| column.channel == channel)
    }
}

/// No field can be read from this offset.
struct Broken(usize);

impl Walk {
    pub(super) fn of(frame: &Frame<'_>) -> Walk {
        let mut walk = Walk {
            parts: Vec::new(),
            fields: Fields::None,
            broken_at: None,
            overlong_at: None,
            text: 0..0,
            ext: 0..0,
        };
        walk.header(frame);
        let mut reader = Reader {
            bytes: frame.bytes,
            at: HEADER_BYTES,
            end: frame.bytes.len() - TRAILER_BYTES,
            walk: &mut walk,
        };
        let read = match frame.header.frame_type {
            types::DATA => reader.data(),
            types::GAP => reader.gap(),
            types::EVENT => reader.event(),
            _ => Ok(()),
        };
        let (at, end) = (reader.at, reader.end);
        walk.broken_at = match read {
            Err(Broken(at)) => Some(at),
            Ok(()) => (at < end).then_some(at),
        };
        let known_end = walk
            .parts
            .last()
            .map_or(HEADER_BYTES, |part| part.bytes.end);
        if known_end < end {
            walk.push(
                "payload",
                known_end..end,
                format!("{} bytes", end - known_end),
            );
        }
        walk.push("checksum", end..frame.bytes.len(), word(frame.intact));
        walk
    }

    pub(super) fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }

    fn header(&mut self, frame: &Frame<'_>) {
        let header = frame.header;
        self.push("magic", 0..1, String::new());
        self.push("version", 1..2, header.version.to_string());
        self.push("type", 2..3, type_name(header.frame_type));
        self.push("flags", 3..4, header.flags.to_string());
        self.push("len", 4..6, header.payload_bytes.to_string());
        self.push("seq", 6..14, header.seq.to_string());
        self.push("header checksum", 14..16, word(true));
    }

    fn push(&mut self, name: &str, bytes: Range<usize>, value: String) {
        let name = name.to_owned();
        self.parts.push(Part { name, bytes, value });
    }
}

fn word(is_right: bool) -> String {
    if is_right { "correct" } else { "wrong" }.to_owned()
}

fn type_name(frame_type: u8) -> String {
    match frame_type {
        types::DATA => "DATA",
        types::GAP => "GAP",
        types::RESULT => "RESULT",
        types::EVENT => "EVENT",
        _ => "unknown",
    }
    .to_owned()
}

struct Reader<'a, 'w> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
    walk: &'w mut Walk,
}

impl Reader<'_, '_> {
    fn data(&mut self) -> Result<(), Broken> {
        let mut data = DataFields {
            schema: self.number("schema", 16)? as u16,
            clock: self.byte("clock")?,
            time_unit: self.byte("time_unit")?,
            ..DataFields::default()
        };
        self.number("boot", 32)?;
        data.t0 = self.signed("t0")?;
        data.rows = self.number("rows", 16)? as usize;
        data.step = self.number("step", 32)?;
        data.dt = self.content("dt")?;
        let columns_at = self.at;
        let count = self.number("columns", 64)?;
        for n in 0..count {
            if n == CHANNELS_MAX as u64 {
                return Err(Broken(columns_at));
            }
            let column = self.column(n)?;
            data.columns.push(column);
        }
        self.walk.ext = self.content("ext")?;
        self.walk.fields = Fields::Data(data);
        Ok(())
    }

    fn column(&mut self, n: u64) -> Result<ColumnFields, Broken> {
        let name = |field: &str| format!("columns[{n}].{field}");
        let channel_at = self.at;
        let channel = self.byte(&name("channel"))?;
        let encoding_at = self.at;
        let encoding = self.byte(&name("encoding"))?;
        let nulls_at = self.at;
        let nulls = self.content(&name("nulls"))?;
        let ones = self.bytes[nulls.clone()].iter();
        let nulls_set = ones.map(|byte| byte.count_ones() as usize).sum();
        let data = self.content(&name("data"))?;
        Ok(ColumnFields {
            channel_at,
            channel,
            encoding_at,
            encoding,
            nulls_at,
            nulls,
            nulls_set,
            data,
        })
    }

    fn gap(&mut self) -> Result<(), Broken> {
        self.number("from_seq", 64)?;
        self.byte("reason")?;
        self.walk.ext = self.content("ext")?;
        Ok(())
    }

    fn event(&mut self) -> Result<(), Broken> {
        self.byte("clock")?;
        self.number("boot", 32)?;
        self.signed("time_us")?;
        self.byte("level")?;
        self.number("code", 16)?;
        let start = self.at;
        let text = self.take()?;
        match std::str::from_utf8(&self.bytes[text.clone()]) {
            Ok(said) => self.walk.push("text", start..text.end, format!("{said:?}")),
            Err(error) => return Err(Broken(text.start + error.valid_up_to())),
        }
        self.walk.text = text;
        self.walk.ext = self.content("ext")?;
        Ok(())
    }

    fn byte(&mut self, name: &str) -> Result<u8, Broken> {
        let start = self.at;
        let byte = self.next()?;
        self.walk.push(name, start..self.at, byte.to_string());
        Ok(byte)
    }

    fn number(&mut self, name: &str, bits: u32) -> Result<u64, Broken> {
        let start = self.at;
        let value = self.varint(bits)?;
        self.walk.push(name, start..self.at, value.to_string());
        Ok(value)
    }

    fn signed(&mut self, name: &str) -> Result<i64, Broken> {
        let start = self.at;
        let value = unzigzag(self.varint(64)?);
        self.walk.push(name, start..self.at, value.to_string());
        Ok(value)
    }

    /// Reads a length and that many bytes; returns their range.
    fn content(&mut self, name: &str) -> Result<Range<usize>, Broken> {
        let start = self.at;
        let content = self.take()?;
        let value = match content.len() {
            0 => "empty".to_owned(),
            1 => "1 byte".to_owned(),
            count => format!("{count} bytes"),
        };
        self.walk.push(name, start..self.at, value);
        Ok(content)
    }

    fn take(&mut self) -> Result<Range<usize>, Broken> {
        let start = self.at;
        let count = self.varint(64)?;
        let content = self.at;
        // The length exceeds the payload.
        let count = usize::try_from(count).map_err(|_| Broken(start))?;
        if count > self.end - content {
            return Err(Broken(start));
        }
        self.at += count;
        Ok(content..self.at)
    }

    fn next(&mut self) -> Result<u8, Broken> {
        if self.at == self.end {
            return Err(Broken(self.at));
        }
        self.at += 1;
        Ok(self.bytes[self.at - 1])
    }

    fn varint(&mut self, bits: u32) -> Result<u64, Broken> {
        let mut value = 0;
        for shift in (0..bits).step_by(7) {
            let byte = self.next()?;
            let group = u64::from(byte & 0x7F);
            let is_last = bits - shift <= 7;
            // More bits than the type has, or one byte too many.
            if is_last && (byte & 0x80 != 0 || group >> (bits - shift) != 0) {
                return Err(Broken(self.at - 1));
            }
            value |= group << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    self.walk.overlong_at.get_or_insert(self.at - 1);
                }
                return Ok(value);
            }
        }
        Err(Broken(self.at))
    }
}

pub(super) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
