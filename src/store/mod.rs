//! The store: makes batches durable, and is the only source of [`Receipt`]s.
//!
//! A store handles readings and SQL, never the bytes of a frame. A [`Batch`] commits in one transaction:
//! `declares`, then `entries` in order, then `logins`, then the rest. So a login sees the watermark that the
//! preceding entries moved. A batch that exceeds a limit of the database commits in several transactions, in the
//! same order (see `cut`).
//!
//! Invariants
//! - A stream's `durable_seq` moves only in the transaction that stores the frames it covers.
//! - An entry is stored only if it continues its stream (see [`ledger`]): entries that arrive twice, or from a
//!   session that was taken over, are stored once and in order.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fieldgate_protocol::value::Kind;

use self::bounds::Reached;
use self::reuse::Repeat;
use crate::metrics::Stored;
use crate::time::{BootClock, ClockStep, ResolvedTime};

pub mod admin;
mod admission;
pub mod bounds;
#[cfg(test)]
mod conformance;
mod cut;
mod hours;
pub mod ledger;
pub mod memory;
pub mod postgres;
pub mod reuse;
pub mod rows;
mod schemas;
pub mod spool;
pub mod sqlite;

/// Row id of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub i64);

/// Row id of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub i64);

/// Row id of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeriesId(pub i64);

/// Content of one transaction.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Logins of authenticated devices, which need the position of their stream.
    pub logins: Vec<Login>,
    pub declares: Vec<Declare>,
    /// Numbered entries of streams, in order of arrival.
    pub entries: Vec<Entry>,
    /// Repeated sequence numbers that were not submitted as entries.
    pub repeats: Vec<Repeat>,
    pub clocks: Vec<(DeviceId, BootClock)>,
    pub events: Vec<DeviceEvent>,
    pub refusals: Vec<Refusal>,
    pub steps: Vec<ClockStep>,
}

impl Batch {
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
    pub device: String,
    /// Number of the stream, below 2^63.
    pub stream: u64,
    /// Oldest sequence number that the device still holds; `next_seq` if it holds none.
    pub oldest_seq: u64,
    /// Next sequence number that the device will assign.
    pub next_seq: u64,
    pub firmware: String,
    /// Schema that the device will use, and its hash.
    pub schema: Option<(u16, SchemaHash)>,
    /// Clock of the current boot.
    pub clock: BootClock,
    /// Number of the operator's change that set the proved key; 0 for the first key.
    pub key_revision: i64,
    /// Whether an unknown device may register.
    pub may_register: bool,
    /// Microseconds UTC.
    pub at_us: i64,
}

/// First 8 bytes of the SHA-256 of a DECLARE's payload.
pub type SchemaHash = [u8; 8];

#[derive(Clone, Debug)]
pub enum LoginOutcome {
    /// The device may send; boxed because the other variants are small.
    Admitted(Box<Admission>),
    /// An operator disabled the device.
    Disabled,
    /// The store does not know the device, and it may not register.
    Unregistered,
    /// An operator has replaced the key that the device proved.
    KeyReplaced,
    /// The device would reuse sequence numbers that are already stored: it must start a new stream.
    StreamConflict,
    /// The device has reached its limit of streams.
    OverBound(Reached),
}

impl LoginOutcome {
    /// Returns the name of the outcome in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            LoginOutcome::Admitted(_) => "admitted",
            LoginOutcome::Disabled => "disabled",
            LoginOutcome::Unregistered => "unregistered",
            LoginOutcome::KeyReplaced => "key_replaced",
            LoginOutcome::StreamConflict => "stream_conflict",
            LoginOutcome::OverBound(_) => "stream_bound",
        }
    }
}

/// Position of a device's stream.
#[derive(Clone, Debug)]
pub struct Admission {
    pub device: DeviceId,
    /// Number of an operator's latest change to the device; 0 if there was none.
    pub revision: i64,
    /// Durable part of its stream.
    pub receipt: Receipt,
    /// Schema named in the login, if it is stored with the same hash.
    pub schema: Option<Arc<Schema>>,
    /// Clocks of the device's latest boots (at most 8), including the current one.
    pub clocks: Vec<BootClock>,
}

/// A schema to store; immutable once stored.
#[derive(Clone, Debug)]
pub struct Declare {
    pub device: DeviceId,
    pub schema: u16,
    pub hash: SchemaHash,
    /// Channels in declared order, with unique ids and names.
    pub channels: Vec<DeclaredChannel>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeclaredChannel {
    /// Number within the schema.
    pub id: u8,
    /// Name, such as `temperature`.
    pub name: String,
    /// SenML unit, such as `Cel`; may be empty.
    pub unit: String,
    pub kind: Kind,
    /// Power of ten for integers.
    pub exp10: i8,
}

#[derive(Clone, Debug)]
pub enum DeclareOutcome {
    /// Stored now, or earlier with the same content.
    Accepted(Arc<Schema>),
    /// The number is stored with different content.
    Conflict,
    /// The device would exceed a limit; nothing was stored.
    OverBound(Reached),
}

/// A stored schema, with the series of its channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    pub schema: u16,
    /// Channels in declared order.
    pub channels: Vec<SchemaChannel>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchemaChannel {
    /// Number within the schema.
    pub id: u8,
    pub kind: Kind,
    /// Power of ten for integers.
    pub exp10: i8,
    pub series: SeriesId,
}

/// A decoded, sequenced frame of a stream.
#[derive(Clone, Debug)]
pub struct Entry {
    pub device: DeviceId,
    pub stream: StreamId,
    /// First sequence number it covers; differs from `seq` only for a gap.
    pub first_seq: u64,
    pub seq: u64,
    /// Type on the wire, stored in the ledger.
    pub frame_type: u8,
    /// CRC-32C of its frame, stored in the ledger; `None` if it has no frame.
    pub crc: Option<u32>,
    /// Time of arrival, microseconds UTC.
    pub received_at_us: i64,
    pub content: Content,
    /// Clock chosen for its boot if there is no measured one; stored with the entry.
    pub clock: Option<BootClock>,
}

#[derive(Clone, Debug)]
pub enum Content {
    Readings(Readings),
    /// The device lost the frames that the entry's numbers cover.
    Gap {
        /// Reason code from the device.
        reason: u8,
    },
    /// An event that the device reports.
    Event {
        /// How device time was converted to UTC.
        time: ResolvedTime,
        /// Time of the event, microseconds UTC.
        at_us: i64,
        /// Severity, from 0 (debug) to 4 (critical).
        level: u8,
        /// Code defined by the device.
        code: u16,
        text: String,
    },
    /// An intact frame that could not be decoded.
    Quarantined {
        /// NACK code.
        code: u8,
        /// Rule that the frame violates.
        detail: String,
        /// Frame as received.
        bytes: Vec<u8>,
        peer: String,
    },
}

/// Readings of a frame, by column: reading `r` of column `c` has time `times_us[r]`, series `series[c]` and
/// value `values[c * times_us.len() + r]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Readings {
    /// How device time was converted to UTC.
    pub time: ResolvedTime,
    /// Microseconds UTC, strictly increasing.
    pub times_us: Vec<i64>,
    /// Series of each column.
    pub series: Vec<SeriesId>,
    /// Values, column after column; NaN means "sampled, no valid value" and is stored as NULL.
    pub values: Vec<f64>,
    /// Number of readings of the frame that are left out because they are older than their retention.
    pub too_old: u64,
}

impl Readings {
    /// Leaves out the rows before `before_us`, except for the last row, whose readings may be the newest of their
    /// series.
    pub fn leave_out_before(&mut self, before_us: i64) {
        let rows = self.times_us.len();
        let old = self.times_us.partition_point(|us| *us < before_us);
        let left_out = old.min(rows.saturating_sub(1));
        if left_out == 0 {
            return;
        }
        self.too_old += (left_out * self.series.len()) as u64;
        self.times_us.drain(..left_out);
        let columns = self.values.chunks_exact(rows);
        self.values = columns
            .flat_map(|column| &column[left_out..])
            .copied()
            .collect();
    }

    /// Returns the times of the first and the last row; `None` without rows.
    fn span(&self) -> Option<(i64, i64)> {
        Some((*self.times_us.first()?, *self.times_us.last()?))
    }
}

/// Random number of a session, unique over all gateways and their runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub i64);

/// An audit event.
#[derive(Clone, Debug)]
pub struct DeviceEvent {
    pub device: DeviceId,
    /// Session that began or ended; a session is open between the two.
    pub session: Option<SessionId>,
    /// Time of the event, microseconds UTC.
    pub at_us: i64,
    pub kind: DeviceEventKind,
    /// BYE code; 0 if none was sent.
    pub code: u8,
    /// Text for display.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEventKind {
    Connected,
    Disconnected,
    /// A peer that claimed the device's name was refused.
    Refused,
    /// A sequence number was reused with different content.
    NumberReused,
}

impl DeviceEventKind {
    /// Returns the kind with this stored name, if there is one.
    fn of_name(name: &str) -> Option<Self> {
        let kinds = [
            Self::Connected,
            Self::Disconnected,
            Self::Refused,
            Self::NumberReused,
        ];
        kinds.into_iter().find(|kind| kind.name() == name)
    }

    /// Returns the name as stored.
    pub fn name(self) -> &'static str {
        match self {
            DeviceEventKind::Connected => "connected",
            DeviceEventKind::Disconnected => "disconnected",
            DeviceEventKind::Refused => "refused",
            DeviceEventKind::NumberReused => "number_reused",
        }
    }
}

/// A refused peer, with one or more refusals for the same reason. The store determines whether the claimed
/// device exists.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub peer: IpAddr,
    /// Claimed device name; empty if none.
    pub device: String,
    /// BYE code; 0 if none was sent.
    pub code: u8,
    /// Text for display.
    pub detail: String,
    pub count: u64,
    /// Time of the first refusal, microseconds UTC.
    pub first_at_us: i64,
    /// Time of the latest refusal, microseconds UTC.
    pub at_us: i64,
    /// Whether to add it to the device's audit trail as well.
    pub is_audited: bool,
}

/// Maximum number of refusals that a store keeps; the oldest are deleted first.
pub(crate) const REFUSALS_MAX: i64 = 1000;

impl Refusal {
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
/// Only a store can create one, and an ACK can be created only from one:
///
/// ```compile_fail
/// use fieldgate::internals::{Receipt, StreamId};
/// let forged = Receipt { stream: StreamId(1), durable_seq: 7 };
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    stream: StreamId,
    durable_seq: u64,
}

impl Receipt {
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// Returns the highest sequence number up to which the stream is durable.
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }
}

#[derive(Debug, Default)]
pub struct Committed {
    /// One result per login, in order.
    pub logins: Vec<LoginOutcome>,
    /// One result per declare, in order.
    pub declares: Vec<DeclareOutcome>,
    /// One receipt per stream with an entry in the batch, sorted by stream.
    pub receipts: Vec<Receipt>,
    /// What the batch added to the store.
    pub stored: Stored,
}

/// Reason why a commit failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// May be temporary (disk full, database locked): retry the same batch.
    #[error("{0}")]
    Transient(String),
    /// The store is not the one that assigned the ids in the batch (it was restored, or a standby without the
    /// latest commits took over). The ids are invalid; names remain valid.
    #[error("{0}")]
    Replaced(String),
    /// The store can no longer be trusted (I/O or sync error, corruption): stop.
    #[error("{0}")]
    Fatal(String),
}

/// Commits batches durably.
pub trait Store: Send + 'static {
    /// Commits and syncs a batch. A failed batch is not stored, or stored in part if it was too large for one
    /// transaction. Committing it again does no harm.
    fn commit(
        &mut self,
        batch: &Batch,
    ) -> impl Future<Output = Result<Committed, StoreError>> + Send;

    /// Returns the idle time after which the commit of an empty batch continues work left from earlier commits;
    /// `None` if no work is left.
    fn tidy_after(&self) -> Option<Duration> {
        None
    }

    /// Waits until a background task of the store fails, and returns the error. Most stores have no such task.
    fn failure(&mut self) -> impl Future<Output = StoreError> + Send {
        std::future::pending()
    }

    /// Finishes the remaining work, so that the next start is fast, and releases the store.
    fn close(self) -> impl Future<Output = Result<(), StoreError>> + Send;
}
