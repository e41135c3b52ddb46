//! Fieldgate: readings from a fleet of field devices into SQL, exactly once.
//!
//! Data flows through these folders: `server` (connections) -> `session` -> `ingest` (queue and
//! batcher) -> `store`; a `store::Receipt` returns. A folder imports only from folders below it in
//! this list, which a test checks.

#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod testing;

pub mod cli;

mod http;

mod server;

mod import;

#[expect(missing_docs, reason = "only `internals` exports it")]
mod ingest;

mod session;

mod decode;

pub mod auth;

mod quota;

pub mod net;

#[expect(missing_docs, reason = "only `internals` exports it")]
mod store;

pub mod recording;

mod metrics;

pub mod config;

#[expect(missing_docs, reason = "only `internals` exports it")]
mod time;

mod text;

pub mod sys;

/// Parts that the benchmarks and tests of this repository use.
#[doc(hidden)]
pub mod internals {
    pub use crate::ingest::batcher::{BatchLimits, Batcher};
    pub use crate::session::inbox::{Inbox, Mail};
    pub use crate::session::{Session, SessionSettings, Submission};
    pub use crate::store::admin::Access;
    pub use crate::store::ledger::Appended;
    pub use crate::store::memory::MemoryStore;
    pub use crate::store::postgres::migrate as migrate_postgres;
    pub use crate::store::rows::{Frame, Run, sorted_runs};
    pub use crate::store::sqlite::{
        Purpose, SqliteSettings, SqliteStore, migrate as migrate_sqlite, open_existing,
    };
    pub use crate::store::{
        Admission, Batch, Content, Declare, DeclareOutcome, DeclaredChannel, DeviceEvent,
        DeviceEventKind, DeviceId, Entry, Login, LoginOutcome, Readings, Receipt, SeriesId, Store,
        StreamId,
    };
    pub use crate::time::{BootClock, Now, Origin, Quality, ResolvedTime};
}
