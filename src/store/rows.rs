//! The rows of a batch, for every database.

use super::ledger::Appended;
use super::{Content, DeviceEvent, DeviceEventKind, DeviceId, Entry, Readings, SessionId};
use crate::time::ResolvedTime;

/// An appended entry and the id of its ledger row.
pub struct Frame<'a> {
    /// Id of its row in the ledger.
    pub id: i64,
    pub item: Appended<'a>,
}

/// Values of one series in one frame, in time order.
pub struct Run<'a> {
    pub(super) series: i64,
    pub(super) frame: i64,
    pub(super) times_us: &'a [i64],
    pub(super) values: &'a [f64],
}

/// A row of `device_events`.
pub(super) struct EventRow<'a> {
    pub(super) device: DeviceId,
    pub(super) at_us: i64,
    pub(super) kind: &'static str,
    pub(super) level: Option<u8>,
    pub(super) code: u16,
    pub(super) detail: &'a str,
    /// Frame that reported it.
    pub(super) frame: Option<i64>,
    pub(super) session: Option<i64>,
}

/// Returns how an entry's time was converted to UTC; `None` if its content has no time.
pub(super) fn resolved_time(entry: &Entry) -> Option<ResolvedTime> {
    match &entry.content {
        Content::Readings(readings) => Some(readings.time),
        Content::Event { time, .. } => Some(*time),
        Content::Gap { .. } | Content::Quarantined { .. } => None,
    }
}

/// Returns the times of an entry's first and last reading; `None` if it has none.
pub(super) fn reading_span(entry: &Entry) -> Option<(i64, i64)> {
    match &entry.content {
        Content::Readings(readings) => readings.span(),
        _ => None,
    }
}

/// Returns the readings of frames by series and time. Queries use the same order, so consecutive inserts mostly
/// hit adjacent rows. Runs are sorted, not readings: two runs of a series overlap in time only when a device's
/// clock stepped back.
pub fn sorted_runs<'a: 'f, 'f>(frames: impl IntoIterator<Item = &'f Frame<'a>>) -> Vec<Run<'a>> {
    let mut runs: Vec<Run<'a>> = frames.into_iter().flat_map(runs).collect();
    runs.sort_unstable_by_key(|run| (run.series, run.times_us.first().copied(), run.frame));
    runs
}

fn runs<'a>(frame: &Frame<'a>) -> impl Iterator<Item = Run<'a>> + use<'a> {
    let id = frame.id;
    let readings = match &frame.item.entry.content {
        Content::Readings(readings) => Some(readings),
        _ => None,
    };
    readings
        .into_iter()
        .flat_map(move |readings| Run::of(id, readings))
}

impl<'a> Run<'a> {
    /// Returns the runs of a frame, one per series; none if the frame has no rows.
    pub(super) fn of(frame: i64, readings: &'a Readings) -> impl Iterator<Item = Run<'a>> {
        // A chunk size of 0 would panic.
        let rows = readings.times_us.len().max(1);
        let columns = readings.values.chunks_exact(rows);
        readings
            .series
            .iter()
            .zip(columns)
            .map(move |(series, values)| Run {
                series: series.0,
                frame,
                times_us: &readings.times_us,
                values,
            })
    }
}

impl Run<'_> {
    /// Returns series, time, frame and value of each reading.
    pub fn readings(&self) -> impl Iterator<Item = (i64, i64, i64, Option<f64>)> {
        let rows = self.times_us.iter().zip(self.values);
        rows.map(|(ts_us, value)| {
            (
                self.series,
                *ts_us,
                self.frame,
                (!value.is_nan()).then_some(*value),
            )
        })
    }
}

impl<'a> EventRow<'a> {
    /// Returns the event that a frame reports, if it is an event frame.
    pub(super) fn reported(frame: &Frame<'a>) -> Option<EventRow<'a>> {
        let Content::Event {
            at_us,
            level,
            code,
            text,
            ..
        } = &frame.item.entry.content
        else {
            return None;
        };
        Some(EventRow {
            device: frame.item.entry.device,
            at_us: *at_us,
            kind: "event",
            level: Some(*level),
            code: *code,
            detail: text,
            frame: Some(frame.id),
            session: None,
        })
    }

    pub(super) fn of(event: &'a DeviceEvent) -> EventRow<'a> {
        EventRow {
            device: event.device,
            at_us: event.at_us,
            kind: event.kind.name(),
            level: None,
            code: u16::from(event.code),
            detail: &event.detail,
            frame: None,
            session: event.session.map(|session| session.0),
        }
    }
}

/// Reason recorded for sessions that the gateway's last run left open.
pub(super) const LEFT_OPEN: &str = "the gateway stopped without closing the session";

/// Returns the sessions that began and those that ended.
pub(super) fn sessions<'a>(
    events: &[&'a DeviceEvent],
) -> (Vec<(SessionId, &'a DeviceEvent)>, Vec<SessionId>) {
    let of_kind = |kind| {
        let of_kind = events.iter().filter(move |event| event.kind == kind);
        of_kind.filter_map(|event| Some((event.session?, *event)))
    };
    let ended = of_kind(DeviceEventKind::Disconnected);
    (
        of_kind(DeviceEventKind::Connected).collect(),
        ended.map(|(session, _)| session).collect(),
    )
}
