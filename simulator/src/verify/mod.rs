//! Verification: compares the journals of one or more runs with the whole store, row by row.
//!
//! [`verify`] regenerates every frame from its plan. Acknowledged frames must be stored, once and unchanged. Frames
//! that were sent but not acknowledged may be stored, and must then be unchanged. The store must contain nothing else:
//! no other device, stream, series, schema, frame, reading, gap, quarantined frame, clock or event. Data from before
//! the runs is excluded and counted, see [`Others`].
//!
//! Equal means: the same stream, number, channel, time and double, bit for bit. The time of a device that knows UTC
//! is stored exactly. The time of a device that only counts from its boot may be off by the error of its clock
//! measurement: half of the longest handshake that the device itself observed.
//!
//! The verifier has its own connection and its own queries ([`store`]). It compares values from the tables themselves;
//! on SQLite, counts of readings come from the view `readings`. Its memory grows with the frames of one device, not with the store.
//!
//! This file covers the store as a whole; [`device`] verifies one device, [`ledger`] one of its streams, [`readings`]
//! one of its series, [`others`] data of other runs, and [`rest`] rows without a parent.

mod device;
mod ledger;
mod others;
mod readings;
mod rest;
mod store;

use std::fmt;
use std::sync::Arc;

use fieldgate::config::store_url::StoreUrl;

use self::device::{DeviceRow, StoredDevice};
use self::store::{OpenError, ReadError, Store};
use crate::encode::declare;
use crate::journal::{DeviceLedger, Ledger};
use crate::pace::Pace;
use crate::plan::{DeviceScript, PlanError, Script};
use crate::report::grouped;
use crate::wire;

/// Maximum drift of a clock measurement after login: one microsecond per this many microseconds of the run (R72).
const DRIFT_DIVISOR: i64 = 20_000;
/// Precision of the journal's times, including the drift between two clocks during a run.
const CLOCK_SLACK_US: i64 = 10_000;
/// Of this many addresses of a proxy, at most one is assumed to equal a device's address by chance.
const BY_CHANCE: u64 = 10;
/// Number of differences that are shown individually.
const SHOWN_MAX: usize = 10;

/// The comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The journal's plan cannot be carried out here.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The store could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store could not be read.
    #[error("could not read the store: {0}")]
    Read(#[from] ReadError),
}

/// Result of the comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Devices compared.
    pub devices: u64,
    /// Frames acknowledged according to the journals.
    pub frames_acked: u64,
    /// Frames in the store.
    pub frames_stored: u64,
    /// Readings of acked frames.
    pub readings_acked: u64,
    /// Readings in the store.
    pub readings_stored: u64,
    /// Quarantined frames that were sent malformed.
    pub quarantined: u64,
    /// Quarantined frames whose payload was damaged in transit twice (code 35).
    pub damaged: u64,
    /// Number of differences.
    pub differences: u64,
    /// The first differences, as text.
    pub shown: Vec<String>,
    /// Data that was not compared, with the reason.
    pub left_out: Vec<String>,
    /// Devices, streams, series and schemas of other runs that are allowed.
    others: u64,
    /// Logins and frames from an address that the device used, and from other addresses.
    from_device: u64,
    from_elsewhere: u64,
    /// The first from other addresses. They are differences unless the gateway did not see the devices' own
    /// addresses.
    elsewhere: Vec<String>,
    operator_events: u64,
}

impl Verdict {
    /// Returns whether everything acknowledged is stored once and unchanged, and nothing else is.
    pub fn is_equal(&self) -> bool {
        self.differences == 0
    }

    fn differ(&mut self, what: impl FnOnce() -> String) {
        self.differences += 1;
        if self.shown.len() < SHOWN_MAX {
            self.shown.push(what());
        }
    }

    /// Records data in the store that belongs to none of the runs.
    fn foreign(&mut self, is_left_out: bool, what: impl FnOnce() -> String) {
        match is_left_out {
            true => self.others += 1,
            false => self.differ(what),
        }
    }

    /// Records the address of a login or frame, and whether the device ever used it.
    fn came_from(&mut self, is_device: bool, what: impl FnOnce() -> String) {
        if is_device {
            self.from_device += 1;
            return;
        }
        self.from_elsewhere += 1;
        if self.elsewhere.len() < SHOWN_MAX {
            self.elsewhere.push(what());
        }
    }

    /// Lists what was not compared.
    fn finish(&mut self, runs: &[Run]) {
        // Behind a proxy, the gateway sees the proxy's addresses, and one of them may equal a device's by chance.
        let is_direct = self.from_device > self.from_elsewhere / BY_CHANCE;
        if is_direct {
            self.differences += self.from_elsewhere;
            let space = SHOWN_MAX.saturating_sub(self.shown.len());
            self.shown.extend(self.elsewhere.drain(..).take(space));
        }
        let mut left_out = |is_so: bool, what: String| {
            if is_so {
                self.left_out.push(what);
            }
        };
        left_out(
            runs.iter().any(|run| !run.ledger.complete),
            "logins and damaged quarantined frames, because a journal is incomplete".to_owned(),
        );
        left_out(
            !is_direct && self.from_elsewhere > 0,
            "login addresses, because the gateway did not see the devices' own addresses"
                .to_owned(),
        );
        let others = grouped(self.others);
        left_out(
            self.others > 0,
            format!("{others} devices, streams, series and schemas of other runs"),
        );
        let events = grouped(self.operator_events);
        left_out(
            self.operator_events > 0,
            format!("{events} events of operator changes"),
        );
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} devices: {} frames acknowledged, {} stored; in quarantine: {} sent malformed, {} \
            damaged in transit twice",
            self.devices, self.frames_acked, self.frames_stored, self.quarantined, self.damaged
        )?;
        writeln!(
            f,
            "{} readings acknowledged, {} stored",
            self.readings_acked, self.readings_stored
        )?;
        for left_out in &self.left_out {
            writeln!(f, "not compared: {left_out}")?;
        }
        for difference in &self.shown {
            writeln!(f, "  {difference}")?;
        }
        let more = self.differences - self.shown.len() as u64;
        if more > 0 {
            writeln!(f, "  and {more} more")?;
        }
        if self.is_equal() {
            write!(
                f,
                "equal: every acknowledged reading is stored once, bit for bit, and nothing else"
            )
        } else {
            write!(f, "NOT EQUAL: {} differences", self.differences)
        }
    }
}

/// Data that a store may contain in addition to that of the runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Others {
    /// Nothing.
    None,
    /// Data stored before the first run, if its frames, totals and readings are consistent.
    #[default]
    Older,
    /// In addition, data that other devices and runs stored during or after the run; retention may have deleted a part
    /// of it.
    Any,
}

impl Others {
    /// Returns whether data that belongs to none of the runs is allowed.
    fn allow(self, is_older: bool) -> bool {
        match self {
            Others::None => false,
            Others::Older => is_older,
            Others::Any => true,
        }
    }

    /// Returns whether the number of rows that data of others has agrees with its total.
    fn agree(self, rows: i64, total: i64) -> bool {
        match self {
            Others::None | Others::Older => rows == total,
            Others::Any => rows <= total,
        }
    }
}

struct Run {
    script: Arc<Script>,
    ledger: Ledger,
    pace: Pace,
    schema: u16,
    declare_hash: [u8; 8],
}

impl Run {
    fn open(ledger: Ledger) -> Result<Run, PlanError> {
        let script = Arc::new(ledger.plan.clone().open()?);
        let schema = wire::schema_number(script.channels());
        let declare_hash = declare(script.channels(), schema).hash();
        Ok(Run {
            // In a ramp, devices joined later than this, never earlier.
            pace: Pace::new(script.plan(), 0),
            declare_hash,
            script,
            ledger,
            schema,
        })
    }

    /// Returns the index of the device with that name, if the run has one.
    fn index_of(&self, name: &str) -> Option<u32> {
        self.script.index_of(name)
    }

    fn own(&self, index: u32) -> Own<'_> {
        Own {
            run: self,
            device: self.script.device(index),
            journaled: &self.ledger.devices[index as usize],
        }
    }

    /// Returns the latest possible start of the run on the gateway's clock; data stored before is older.
    fn began_us(&self) -> Option<i64> {
        let (_, most_us) = self.ledger.clock_us?;
        Some(self.ledger.started_us? + most_us)
    }

    /// Returns the time of the run on the gateway's clock, from its start to its last line; `None` if no device was
    /// ever welcomed.
    fn span_us(&self) -> Option<(i64, i64)> {
        let (least_us, most_us) = self.ledger.clock_us?;
        let started_us = self.ledger.started_us?;
        let ended_us = started_us + self.ledger.elapsed_ms as i64 * 1_000;
        Some((
            started_us + least_us - CLOCK_SLACK_US,
            ended_us + most_us + CLOCK_SLACK_US,
        ))
    }
}

/// A device in one of the runs.
struct Own<'a> {
    run: &'a Run,
    device: DeviceScript,
    journaled: &'a DeviceLedger,
}

/// Compares journals with the store. `others` selects the data of other runs that is allowed.
/// Calls `progress` with the number of devices of the runs that have been compared, after each device of the store.
pub async fn verify(
    ledgers: Vec<Ledger>,
    store: &StoreUrl,
    others: Others,
    mut progress: impl FnMut(u64),
) -> Result<Verdict, VerifyError> {
    let runs: Result<Vec<Run>, PlanError> = ledgers.into_iter().map(Run::open).collect();
    let runs = runs?;
    let began_us = runs.iter().filter_map(Run::began_us).min();
    let began_us = began_us.unwrap_or(i64::MAX);
    let mut store = Store::open(store).await?;
    let mut verdict = Verdict::default();
    rest::look_for_orphans(&mut store, &mut verdict).await?;
    rest::prove_quarantine_usage(&mut store, &mut verdict).await?;
    rest::prove_clock_steps(&mut store, &runs, &mut verdict).await?;
    let mut missing: Vec<Vec<bool>> = runs
        .iter()
        .map(|run| vec![true; run.ledger.devices.len()])
        .collect();
    let rows = store.rows(device::DEVICES, &[]).await?;
    let mut done = 0;
    for row in &rows {
        let row = DeviceRow::read(row)?;
        let mut owns = Vec::new();
        for (run, missing) in runs.iter().zip(&mut missing) {
            if let Some(index) = run.index_of(&row.name) {
                missing[index as usize] = false;
                owns.push(run.own(index));
            }
        }
        done += owns.len() as u64;
        let stored = StoredDevice {
            row,
            owns,
            others,
            began_us,
        };
        stored.prove(&mut store, &mut verdict).await?;
        progress(done);
    }
    for (run, missing) in runs.iter().zip(&missing) {
        for (index, _) in (0..).zip(missing).filter(|(_, is_missing)| **is_missing) {
            let own = run.own(index);
            let acked = own.journaled.acked;
            verdict.devices += 1;
            verdict.frames_acked += acked;
            if acked > 0 {
                verdict.differ(|| {
                    format!(
                        "{}: not in the store, but {acked} of its frames were acknowledged",
                        own.name()
                    )
                });
            }
        }
    }
    verdict.finish(&runs);
    Ok(verdict)
}

impl Own<'_> {
    fn name(&self) -> &str {
        self.device.name()
    }

    /// Returns the range of offsets that the gateway may have added to times since boot: the true offset on its clock,
    /// and half of a round trip. The gateway's round trip lies within the device's handshake.
    fn offsets_us(&self) -> Option<(i64, i64)> {
        let (least_us, most_us) = self.run.ledger.clock_us?;
        let logins = self.journaled.logins.iter();
        let took_us = logins.map(|login| login.took_us as i64).max()?;
        let drift_us = self.run.ledger.elapsed_ms as i64 * 1_000 / DRIFT_DIVISOR;
        let off_us = (took_us + drift_us) / 2 + CLOCK_SLACK_US;
        let true_us = -self.device.uptime_us(0);
        Some((true_us + least_us - off_us, true_us + most_us + off_us))
    }

    /// Returns whether this is a possible clock measurement for the device's boot.
    fn is_offset(&self, offset_us: i64) -> bool {
        self.offsets_us()
            .is_none_or(|(least_us, most_us)| (least_us..=most_us).contains(&offset_us))
    }
}
