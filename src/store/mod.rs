//! The store: where a batch becomes durable, and the only place a [`Receipt`] can come from.
//!
//! It knows readings and SQL, never a frame's bytes on the wire. Everything in a [`Batch`] commits
//! in one transaction: `declares`, then `entries` in their order, then `logins`, then the rest; so a
//! login sees the watermark that the entries before it moved. Where a limit of the database refuses the
//! whole, it commits in several transactions, in the same order (see `cut`).
//!
//! Invariants
//! - A stream's `durable_seq` moves only in the transaction that stores what it covers.
//! - An entry is stored only if it continues its stream (see [`ledger`]): whatever arrives twice, or
//!   from a session that was taken over, is stored once and in order.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fieldgate_protocol::column::Kind;

use self::bounds::Reached;
use self::reuse::Repeat;
use crate::time::{BootClock, ClockStep, ResolvedTime};

mod admission;
pub mod bounds;
#[cfg(test)]
mod contract;
mod cut;
pub mod editor;
mod hours;
pub mod kept;
pub mod ledger;
pub mod lifecycle;
pub mod memory;
pub mod postgres;
pub mod prune;
pub mod reader;
pub mod removal;
pub mod replay;
pub mod reuse;
pub mod rows;
pub mod spool;
pub mod sqlite;
pub mod steady;
pub mod url;
mod value;

/// Row id of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub i64);

/// Row id of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub i64);

/// Row id of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeriesId(pub i64);

/// What is committed in one transaction.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Authenticated devices asking where their stream stands.
    pub logins: Vec<Login>,
    /// Schemas to keep.
    pub declares: Vec<Declare>,
    /// Numbered entries of streams, in order of arrival.
    pub entries: Vec<Entry>,
    /// Numbers that came again and were not submitted as entries.
    pub repeats: Vec<Repeat>,
    /// Device clocks to keep.
    pub clocks: Vec<(DeviceId, BootClock)>,
    /// What happened to devices, for the audit trail.
    pub events: Vec<DeviceEvent>,
    /// Who was refused.
    pub refusals: Vec<Refusal>,
    /// When the gateway's clock was set.
    pub steps: Vec<ClockStep>,
}

impl Batch {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.logins.is_empty()
            && self.declares.is_empty()
            && self.entries.is_empty()
            && self.repeats.is_empty()
            && self.clocks.is_empty()
            && self.events.is_empty()
            && self.refusals.is_empty()
            && self.steps.is_empty()
    }
}

/// A device that proved its key and wants to continue a stream.
#[derive(Clone, Debug)]
pub struct Login {
    /// The device's name.
    pub device: String,
    /// Number of the stream, below 2^63.
    pub stream: u64,
    /// The oldest number that the device still holds; `next_seq` if it holds none.
    pub oldest_seq: u64,
    /// The next sequence number the device will give out.
    pub next_seq: u64,
    /// Firmware version as the device tells it.
    pub firmware: String,
    /// The schema the device will send with, and its hash.
    pub schema: Option<(u16, SchemaHash)>,
    /// The clock of the present boot.
    pub clock: BootClock,
    /// The change by an operator that gave the key which the device proved; 0 for the first one.
    pub key_revision: i64,
    /// Whether it may come in although the store does not know it.
    pub may_register: bool,
    /// When, microseconds UTC.
    pub at_us: i64,
}

/// First 8 bytes of the SHA-256 of a DECLARE's payload.
pub type SchemaHash = [u8; 8];

/// What became of a [`Login`].
#[derive(Clone, Debug)]
pub enum LoginOutcome {
    /// The device may send; boxed because the others are small.
    Admitted(Box<Admission>),
    /// An operator disabled the device.
    Disabled,
    /// The store does not know the device, and nobody may register.
    Unregistered,
    /// An operator has replaced the key that the device proved.
    KeyReplaced,
    /// The device would number frames anew that are stored already: it must start a new stream.
    StreamConflict,
    /// It would be one stream more than the device may have.
    OverBound(Reached),
}

/// Where a device's stream stands.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The device's row.
    pub device: DeviceId,
    /// The latest change to it by an operator; 0 if there was none.
    pub revision: i64,
    /// What of its stream is durable.
    pub receipt: Receipt,
    /// The schema named in the login, if it is stored with that hash.
    pub schema: Option<Arc<Schema>>,
    /// Clocks of the device's latest boots (at most 8), the present one included.
    pub clocks: Vec<BootClock>,
}

/// A schema to keep; immutable for a device once stored.
#[derive(Clone, Debug)]
pub struct Declare {
    /// Who declares.
    pub device: DeviceId,
    /// The schema's number.
    pub schema: u16,
    /// Its hash.
    pub hash: SchemaHash,
    /// Its channels, in declared order, ids and names unique.
    pub channels: Vec<DeclaredChannel>,
}

/// One channel of a [`Declare`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeclaredChannel {
    /// Number within the schema.
    pub id: u8,
    /// Name, such as `temperature`.
    pub name: String,
    /// SenML unit, such as `Cel`; may be empty.
    pub unit: String,
    /// Type of its values.
    pub kind: Kind,
    /// Power of ten for integers.
    pub exp10: i8,
}

/// What became of a [`Declare`].
#[derive(Clone, Debug)]
pub enum DeclareOutcome {
    /// Stored now, or stored before with the same content.
    Accepted(Arc<Schema>),
    /// The number is taken by other content.
    Conflict,
    /// The device would have more than it may; nothing was stored.
    OverBound(Reached),
}

/// A stored schema, with the series its channels write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// The schema's number.
    pub schema: u16,
    /// Its channels, in declared order.
    pub channels: Vec<SchemaChannel>,
}

/// One channel of a [`Schema`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchemaChannel {
    /// Number within the schema.
    pub id: u8,
    /// Type of its values.
    pub kind: Kind,
    /// Power of ten for integers.
    pub exp10: i8,
    /// Where its readings go.
    pub series: SeriesId,
}

/// One numbered entry of a stream: a sequenced frame, decoded.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Whose stream.
    pub device: DeviceId,
    /// Which stream.
    pub stream: StreamId,
    /// First sequence number it covers; differs from `seq` only for a gap.
    pub first_seq: u64,
    /// Its sequence number.
    pub seq: u64,
    /// Type on the wire, kept in the ledger.
    pub frame_type: u8,
    /// CRC-32C of its frame, kept in the ledger; `None` if no frame brought it.
    pub crc: Option<u32>,
    /// When it arrived, microseconds UTC.
    pub received_at_us: i64,
    /// What it carries.
    pub content: Content,
    /// The clock that was chosen for its boot, which has no other: to be kept with it.
    pub clock: Option<BootClock>,
}

/// What an [`Entry`] carries.
#[derive(Clone, Debug)]
pub enum Content {
    /// Readings.
    Readings(Readings),
    /// The device lost what the entry's numbers covered.
    Gap {
        /// The device's reason code.
        reason: u8,
    },
    /// Something the device reports about itself.
    Event {
        /// How its time became UTC.
        time: ResolvedTime,
        /// When, microseconds UTC.
        at_us: i64,
        /// Severity, 0 debug to 4 critical.
        level: u8,
        /// The device's own code.
        code: u16,
        /// Short text.
        text: String,
    },
    /// A frame that was received whole and could not be understood.
    Quarantined {
        /// The NACK code.
        code: u8,
        /// Which rule it broke.
        detail: String,
        /// The frame as received.
        bytes: Vec<u8>,
        /// Address of the peer.
        peer: String,
    },
}

/// The readings of a frame, by column: reading `r` of column `c` has time `times_us[r]`, series
/// `series[c]` and value `values[c * times_us.len() + r]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Readings {
    /// How device time became UTC.
    pub time: ResolvedTime,
    /// Microseconds UTC, strictly increasing.
    pub times_us: Vec<i64>,
    /// One for each column.
    pub series: Vec<SeriesId>,
    /// Column after column; NaN says "sampled, no valid value" and is stored as NULL.
    pub values: Vec<f64>,
}

/// A session's number: random, so that it is unique over gateways and their runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub i64);

/// A line of the audit trail.
#[derive(Clone, Debug)]
pub struct DeviceEvent {
    /// Whom it concerns.
    pub device: DeviceId,
    /// The session that began or ended. What it began is open until it ends.
    pub session: Option<SessionId>,
    /// When, microseconds UTC.
    pub at_us: i64,
    /// What happened.
    pub kind: DeviceEventKind,
    /// BYE code, 0 where none was said.
    pub code: u8,
    /// For people.
    pub detail: String,
}

/// What a [`DeviceEvent`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEventKind {
    /// A session began.
    Connected,
    /// A session ended.
    Disconnected,
    /// Somebody in its name was not let in.
    Refused,
    /// A number came again with other content.
    NumberReused,
}

impl DeviceEventKind {
    /// The kind that stands so in the store, if it is one of these.
    fn of_name(name: &str) -> Option<Self> {
        let kinds = [
            Self::Connected,
            Self::Disconnected,
            Self::Refused,
            Self::NumberReused,
        ];
        kinds.into_iter().find(|kind| kind.name() == name)
    }

    /// As it stands in the store.
    pub fn name(self) -> &'static str {
        match self {
            DeviceEventKind::Connected => "connected",
            DeviceEventKind::Disconnected => "disconnected",
            DeviceEventKind::Refused => "refused",
            DeviceEventKind::NumberReused => "number_reused",
        }
    }
}

/// A peer was not let in, once or several times for one reason. Whether there is a device of the name that it
/// claimed, the store knows.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The peer's address.
    pub peer: IpAddr,
    /// The name that it claimed; empty if none.
    pub device: String,
    /// BYE code; 0 where none was said.
    pub code: u8,
    /// For people.
    pub detail: String,
    /// How often.
    pub count: u64,
    /// When for the first time, microseconds UTC.
    pub first_at_us: i64,
    /// When for the last time, microseconds UTC.
    pub at_us: i64,
    /// Whether it is for the audit trail of the device, too.
    pub is_told: bool,
}

/// How many refusals a store keeps, those of the latest.
pub(crate) const REFUSALS_MAX: i64 = 1000;

impl Refusal {
    /// As a line of the audit trail of `device`.
    fn of(&self, device: DeviceId) -> DeviceEvent {
        DeviceEvent {
            device,
            session: None,
            at_us: self.at_us,
            kind: DeviceEventKind::Refused,
            code: self.code,
            detail: format!("{} ({})", self.detail, self.peer),
        }
    }
}

/// Proof that a stream is durable up to and including `durable_seq`.
///
/// Only a store can make one, and an ACK can be made only from one:
///
/// ```compile_fail
/// use fieldgate::store::{Receipt, StreamId};
/// let forged = Receipt { stream: StreamId(1), durable_seq: 7 };
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    stream: StreamId,
    durable_seq: u64,
}

impl Receipt {
    /// Which stream.
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// The highest sequence number that is durable, with all before it.
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }
}

/// What a commit did.
#[derive(Debug, Default)]
pub struct Committed {
    /// One for each login, in order.
    pub logins: Vec<LoginOutcome>,
    /// One for each declare, in order.
    pub declares: Vec<DeclareOutcome>,
    /// One for each stream that has an entry in the batch, sorted by stream.
    pub receipts: Vec<Receipt>,
}

/// Why nothing of a batch was committed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// May pass (disk full, database locked): try the same batch again.
    #[error("{0}")]
    Transient(String),
    /// The store is not the one that gave out the ids in the batch (it was restored from a backup, or a
    /// standby without the latest commits took over). The ids must not be used again; names may be.
    #[error("{0}")]
    Replaced(String),
    /// The store cannot be trusted any more (I/O or sync error, corruption): stop.
    #[error("{0}")]
    Fatal(String),
}

/// A place where batches become durable.
pub trait Store: Send + 'static {
    /// Commits a batch, synced. A batch that fails is not stored, or in part where it was too large for one
    /// transaction; it does no harm when it comes again.
    fn commit(
        &mut self,
        batch: &Batch,
    ) -> impl Future<Output = Result<Committed, StoreError>> + Send;

    /// Returns how long nothing has to come in before the commit of an empty batch carries on what earlier commits
    /// left over; `None` when nothing is left.
    fn tidy_after(&self) -> Option<Duration> {
        None
    }

    /// Waits until a task of the store has ended that should run as long as the store; that is the error. Most stores
    /// have none.
    fn failure(&mut self) -> impl Future<Output = StoreError> + Send {
        std::future::pending()
    }

    /// Leaves the store tidy for the next start.
    fn close(self) -> impl Future<Output = Result<(), StoreError>> + Send;
}
