//! Codes of NACK and BYE, and what each obliges the device to do (R60 to R66).

/// Why a gateway refuses a frame (NACK, 10 to 35) or ends a connection (BYE, 40 to 53).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Code {
    /// No room now.
    Busy = 10,
    /// The store does not answer.
    StoreDown = 11,
    /// No room in quarantine.
    QuarantineFull = 12,
    /// DATA names a schema this gateway has not got.
    UnknownSchema = 20,
    /// The sequence number is not the next one.
    SeqGap = 21,
    /// Payload checksum wrong.
    PayloadCrc = 22,
    /// The schema's number is taken by other content.
    SchemaConflict = 23,
    /// The device would have more schemas or series than it may.
    SchemaBound = 24,
    /// The payload is not a canonical encoding of its type.
    Malformed = 30,
    /// A column or the times cannot be decoded.
    Column = 31,
    /// No such sequenced type, or one this gateway does not carry out.
    UnknownType = 32,
    /// A number is beyond its limit.
    Limit = 33,
    /// A flag or critical extension this gateway does not know.
    Critical = 34,
    /// Payload checksum wrong twice for one sequence number.
    PayloadCrcTwice = 35,
    /// The gateway goes down.
    Shutdown = 40,
    /// A newer session of the same device took over.
    TakenOver = 41,
    /// The peer was silent, or stalled within a frame.
    Idle = 42,
    /// Sent beyond the limit.
    Credit = 43,
    /// A frame that this state does not allow.
    Protocol = 44,
    /// Longer than this state allows.
    TooLarge = 45,
    /// Header checksum wrong.
    Header = 46,
    /// The stream's numbers were given out before: start a new stream.
    StreamConflict = 47,
    /// Name, key or state of the handshake is not right.
    Authentication = 50,
    /// No common version.
    Version = 51,
    /// An operator disabled the device.
    Disabled = 52,
    /// The device would have more streams than it may.
    StreamBound = 53,
}

/// What a code obliges the device to do; holds for codes of later versions too (R61).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// 1x: send the same frame again later.
    RetryLater,
    /// 2x: mend the cause, then send the same frame again.
    Mend,
    /// 3x: the frame is in quarantine and its number is used up: do not send it again.
    Refused,
    /// 4x: the connection is over; connect again.
    Reconnect,
    /// 5x: the connection is over; an operator must act. Connect again at the longest interval.
    Operator,
    /// Not a class of this protocol; to be treated as [`Class::Reconnect`].
    Unknown,
}

impl Class {
    /// The class of a code as it came over the wire: its tens digit.
    pub const fn of(code: u8) -> Class {
        match code / 10 {
            1 => Class::RetryLater,
            2 => Class::Mend,
            3 => Class::Refused,
            4 => Class::Reconnect,
            5 => Class::Operator,
            _ => Class::Unknown,
        }
    }
}

impl Code {
    /// Every code, in ascending order.
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

    /// The code that a byte of NACK, BYE or the quarantine stands for, if this version knows it.
    pub fn from_wire(code: u8) -> Option<Code> {
        Code::ALL.into_iter().find(|known| *known as u8 == code)
    }

    /// What it obliges the device to do.
    pub const fn class(self) -> Class {
        Class::of(self as u8)
    }

    /// The code in a few words, for logs and tables.
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

/// What a peer did wrong in a payload. Each has one code, in one place: [`Violation::code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Not a postcard encoding of the type: cut short, bad UTF-8, a list too long (R20).
    Encoding,
    /// Bytes after the message (R21).
    TrailingBytes,
    /// The same message has a shorter encoding (R22).
    NotCanonical,
    /// `ext` is not a sequence of tag, length, value (R25).
    ExtSyntax,
    /// An even tag in `ext` that this version does not know (R26).
    ExtCritical(u8),
    /// A reserved flag is set (R11).
    Flags(u8),
    /// A name that is empty, too long or has a character that is not allowed (R31).
    Name,
    /// A text longer than its limit (R23).
    TextTooLong,
    /// A channel list that is empty or has an id or a name twice (R42).
    Channels,
    /// A channel's kind is not one of those defined (R43).
    Kind(u8),
    /// `exp10` outside -22 to 22 (R43).
    Exponent(i8),
    /// A number outside its range, named by its field (R24).
    Range(&'static str),
    /// No rows, more than allowed, or more readings than allowed (R52).
    Rows,
    /// The same channel twice, none at all, or one that the schema does not have (R53).
    ColumnChannel(u8),
    /// An encoding that this version does not know, or not for this kind (R54).
    ColumnEncoding(u8),
    /// A column's bytes do not hold exactly its values (R55).
    ColumnData(u8),
    /// A null bitmap of the wrong length or with spare bits set (R56).
    ColumnNulls(u8),
    /// Times that do not strictly increase, or whose bytes do not fit the rows (R51).
    Times,
    /// A time outside the years 1 to 9999, or before its boot (R50).
    TimeRange,
    /// A sequenced type that is not defined or not carried out (R14).
    UnknownType(u8),
}

impl Violation {
    /// The NACK code that tells the device.
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
            Violation::Name => f.write_str("name empty, too long or with a bad character (R31)"),
            Violation::TextTooLong => f.write_str("text too long (R23)"),
            Violation::Channels => f.write_str("no channels, or an id or name twice (R42)"),
            Violation::Kind(kind) => write!(f, "unknown kind {kind} (R43)"),
            Violation::Exponent(exp10) => write!(f, "exponent {exp10} not in -22..=22 (R43)"),
            Violation::Range(field) => write!(f, "{field} out of range (R24)"),
            Violation::Rows => f.write_str("too many rows or none (R52)"),
            Violation::ColumnChannel(id) => {
                write!(
                    f,
                    "channel {id} twice or not in the schema, or no column (R53)"
                )
            }
            Violation::ColumnEncoding(id) => {
                write!(
                    f,
                    "encoding of channel {id} unknown or not for its kind (R54)"
                )
            }
            Violation::ColumnData(id) => {
                write!(
                    f,
                    "data of channel {id} does not hold exactly its values (R55)"
                )
            }
            Violation::ColumnNulls(id) => write!(f, "null bitmap of channel {id} (R56)"),
            Violation::Times => f.write_str("times do not fit the rows or do not increase (R51)"),
            Violation::TimeRange => f.write_str("time out of range (R50)"),
            Violation::UnknownType(kind) => {
                write!(f, "type {kind:#04x} is not carried out (R14)")
            }
        }
    }
}

impl core::error::Error for Violation {}
