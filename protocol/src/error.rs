//! Codes of NACK and BYE, and how the device must react to each (R60 to R66).

/// Reason why a gateway refuses a frame (NACK, 10 to 35) or ends a connection (BYE, 40 to 53).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Code {
    /// No capacity now.
    Busy = 10,
    /// The store is unavailable.
    StoreDown = 11,
    /// Quarantine is full.
    QuarantineFull = 12,
    /// DATA names a schema that the gateway does not know.
    UnknownSchema = 20,
    /// The sequence number is not the expected one.
    SeqGap = 21,
    /// The payload checksum is wrong.
    PayloadCrc = 22,
    /// The schema number is used for different content.
    SchemaConflict = 23,
    /// The device would exceed its limit of schemas or series.
    SchemaBound = 24,
    /// The payload is not a canonical encoding of its type.
    Malformed = 30,
    /// A column or the times cannot be decoded.
    Column = 31,
    /// The sequenced type is unknown or not supported by this gateway.
    UnknownType = 32,
    /// A value exceeds its limit.
    Limit = 33,
    /// A flag or critical extension is unknown to this gateway.
    Critical = 34,
    /// The payload checksum is wrong for the second time with one sequence number.
    PayloadCrcTwice = 35,
    /// The gateway is shutting down.
    Shutdown = 40,
    /// A newer session of the same device took over.
    TakenOver = 41,
    /// The peer was silent, or stalled within a frame.
    Idle = 42,
    /// The device sent frames beyond the limit.
    Credit = 43,
    /// The frame is not allowed in this state.
    Protocol = 44,
    /// The frame is longer than this state allows.
    TooLarge = 45,
    /// The header checksum is wrong.
    Header = 46,
    /// The stream's numbers were assigned before: the device must start a new stream.
    StreamConflict = 47,
    /// The name, the key or the handshake state is wrong.
    Authentication = 50,
    /// There is no common version.
    Version = 51,
    /// An operator has disabled the device.
    Disabled = 52,
    /// The device would exceed its limit of streams.
    StreamBound = 53,
}

/// How the device must react to a code, including codes of later versions (R61).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// 1x: resend the same frame later.
    RetryLater,
    /// 2x: fix the cause, then resend the same frame.
    Fix,
    /// 3x: the frame is in quarantine and its number is used: do not resend it.
    Refused,
    /// 4x: the connection has ended; reconnect.
    Reconnect,
    /// 5x: the connection has ended and an operator must act; reconnect at the longest interval.
    Operator,
    /// Not a class of this protocol; treated as [`Class::Reconnect`].
    Unknown,
}

impl Class {
    /// Returns the class of a code as received: its tens digit.
    pub const fn of(code: u8) -> Class {
        match code / 10 {
            1 => Class::RetryLater,
            2 => Class::Fix,
            3 => Class::Refused,
            4 => Class::Reconnect,
            5 => Class::Operator,
            _ => Class::Unknown,
        }
    }
}

impl Code {
    /// All codes, in ascending order.
    pub const ALL: [Code; 26] = [
        Code::Busy,
        Code::StoreDown,
        Code::QuarantineFull,
        Code::UnknownSchema,
        Code::SeqGap,
        Code::PayloadCrc,
        Code::SchemaConflict,
        Code::SchemaBound,
        Code::Malformed,
        Code::Column,
        Code::UnknownType,
        Code::Limit,
        Code::Critical,
        Code::PayloadCrcTwice,
        Code::Shutdown,
        Code::TakenOver,
        Code::Idle,
        Code::Credit,
        Code::Protocol,
        Code::TooLarge,
        Code::Header,
        Code::StreamConflict,
        Code::Authentication,
        Code::Version,
        Code::Disabled,
        Code::StreamBound,
    ];

    /// Returns the code for its byte in NACK, BYE or quarantine, or `None` if this version does not
    /// know it.
    pub fn from_wire(code: u8) -> Option<Code> {
        Code::ALL.into_iter().find(|known| *known as u8 == code)
    }

    /// Returns the class, which determines how the device must react.
    pub const fn class(self) -> Class {
        Class::of(self as u8)
    }

    /// Returns a short name for logs and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Code::Busy => "busy",
            Code::StoreDown => "store down",
            Code::QuarantineFull => "quarantine full",
            Code::UnknownSchema => "unknown schema",
            Code::SeqGap => "sequence gap",
            Code::PayloadCrc => "payload checksum",
            Code::SchemaConflict => "schema conflict",
            Code::SchemaBound => "too many schemas or series",
            Code::Malformed => "malformed",
            Code::Column => "column",
            Code::UnknownType => "unknown type",
            Code::Limit => "limit",
            Code::Critical => "critical flag or extension",
            Code::PayloadCrcTwice => "payload checksum twice",
            Code::Shutdown => "shutdown",
            Code::TakenOver => "taken over",
            Code::Idle => "idle",
            Code::Credit => "credit",
            Code::Protocol => "protocol",
            Code::TooLarge => "too large",
            Code::Header => "header checksum",
            Code::StreamConflict => "stream conflict",
            Code::Authentication => "authentication",
            Code::Version => "version",
            Code::Disabled => "disabled",
            Code::StreamBound => "too many streams",
        }
    }
}

/// A rule that a payload violates. [`Violation::code`] assigns each one its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Not a postcard encoding of the type: truncated, invalid UTF-8, or a list that is too long
    /// (R20).
    Encoding,
    /// There are bytes after the message (R21).
    TrailingBytes,
    /// The message has a shorter encoding (R22).
    NotCanonical,
    /// `ext` is not a sequence of tag, length, value (R25).
    ExtSyntax,
    /// `ext` contains an even tag that this version does not know (R26).
    ExtCritical(u8),
    /// A reserved flag is set (R11).
    Flags(u8),
    /// A name is empty, too long or contains an invalid character (R31).
    Name,
    /// A text exceeds its limit (R23).
    TextTooLong,
    /// A channel list is empty or has a duplicate id or name (R42).
    Channels,
    /// A channel's kind is not defined (R43).
    Kind(u8),
    /// `exp10` is outside -22 to 22 (R43).
    Exponent(i8),
    /// The named field is out of range (R24).
    Range(&'static str),
    /// There are no rows, too many rows or too many readings (R52).
    Rows,
    /// A channel is duplicated or not in the schema, or there are no columns (R53).
    ColumnChannel(u8),
    /// An encoding is unknown or does not match the kind (R54).
    ColumnEncoding(u8),
    /// A column's data has the wrong number of values (R55).
    ColumnData(u8),
    /// A null bitmap has the wrong length or spare bits set (R56).
    ColumnNulls(u8),
    /// Times do not strictly increase, or do not match the rows (R51).
    Times,
    /// A time is outside the years 1 to 9999, or before its boot (R50).
    TimeRange,
    /// A sequenced type is not defined or not supported (R14).
    UnknownType(u8),
}

impl Violation {
    /// Returns the NACK code for this violation.
    pub const fn code(self) -> Code {
        match self {
            Violation::Encoding
            | Violation::TrailingBytes
            | Violation::NotCanonical
            | Violation::ExtSyntax
            | Violation::Name
            | Violation::Channels
            | Violation::Kind(_)
            | Violation::Exponent(_) => Code::Malformed,
            Violation::ColumnChannel(_)
            | Violation::ColumnEncoding(_)
            | Violation::ColumnData(_)
            | Violation::ColumnNulls(_)
            | Violation::Times => Code::Column,
            Violation::TextTooLong
            | Violation::Range(_)
            | Violation::Rows
            | Violation::TimeRange => Code::Limit,
            Violation::ExtCritical(_) | Violation::Flags(_) => Code::Critical,
            Violation::UnknownType(_) => Code::UnknownType,
        }
    }
}

impl core::fmt::Display for Violation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Violation::Encoding => f.write_str("payload does not decode (R20)"),
            Violation::TrailingBytes => f.write_str("bytes after the message (R21)"),
            Violation::NotCanonical => f.write_str("not the shortest encoding (R22)"),
            Violation::ExtSyntax => f.write_str("ext is not tag, length, value (R25)"),
            Violation::ExtCritical(tag) => write!(f, "unknown critical extension {tag} (R26)"),
            Violation::Flags(flags) => write!(f, "reserved flags {flags:#04x} (R11)"),
            Violation::Name => {
                f.write_str("name is empty, too long or contains an invalid character (R31)")
            }
            Violation::TextTooLong => f.write_str("text too long (R23)"),
            Violation::Channels => {
                f.write_str("no channels, or duplicate channel id or name (R42)")
            }
            Violation::Kind(kind) => write!(f, "unknown kind {kind} (R43)"),
            Violation::Exponent(exp10) => write!(f, "exponent {exp10} not in -22..=22 (R43)"),
            Violation::Range(field) => write!(f, "{field} out of range (R24)"),
            Violation::Rows => f.write_str("too many rows or none (R52)"),
            Violation::ColumnChannel(id) => {
                write!(
                    f,
                    "channel {id} is duplicated or not in the schema, or there are no columns (R53)"
                )
            }
            Violation::ColumnEncoding(id) => {
                write!(
                    f,
                    "encoding of channel {id} is unknown or does not match its kind (R54)"
                )
            }
            Violation::ColumnData(id) => {
                write!(
                    f,
                    "data of channel {id} has the wrong number of values (R55)"
                )
            }
            Violation::ColumnNulls(id) => write!(f, "invalid null bitmap for channel {id} (R56)"),
            Violation::Times => f.write_str("times do not match the rows or do not increase (R51)"),
            Violation::TimeRange => f.write_str("time out of range (R50)"),
            Violation::UnknownType(kind) => {
                write!(f, "type {kind:#04x} is not supported (R14)")
            }
        }
    }
}

impl core::error::Error for Violation {}
