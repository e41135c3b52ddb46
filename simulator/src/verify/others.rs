//! Verification of data from other runs: other devices, and other streams of the runs' devices.
//!
//! Excluded data must be consistent: as many frames and readings as its totals state, and no reading without a
//! frame of the same device. With `--others any`, retention may have deleted a part of it.

use super::Verdict;
use super::device::StoredDevice;
use super::ledger::StreamRow;
use super::store::{ReadError, Store};

/// Advice for data that belongs to none of the runs.
const HINT: &str = "if they are from another run, add its journal or use --others any";

impl StoredDevice<'_> {
    /// Verifies a device that belongs to none of the runs.
    pub(super) async fn prove_stranger(
        &self,
        store: &mut Store,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let id = self.row.id;
        let sql = "SELECT id FROM series WHERE device_id = $1";
        let rows = store.rows(sql, &[id]).await?;
        let (mut readings, mut owned) = (0, 0);
        for row in &rows {
            // SQLite would read the whole view `readings` for a join with `series`.
            let sql = "SELECT count(*), count(st.id) FROM readings AS r \
                       LEFT JOIN frames AS f ON f.id = r.frame_id \
                       LEFT JOIN streams AS st ON st.id = f.stream_id AND st.device_id = $2 \
                       WHERE r.series_id = $1";
            let counts = store.row(sql, &[row.integer(0)?, id]).await?;
            readings += counts.integer(0)?;
            owned += counts.integer(1)?;
        }
        let series = rows.len();
        let (mut is_older, mut totals, mut streams) = (true, 0, 0);
        let mut agrees = readings == owned;
        for row in store.rows(StreamRow::SQL, &[id]).await? {
            let row = StreamRow::read(&row)?;
            let state = self.look_at(store, &row).await?;
            is_older &= state.is_older;
            agrees &= state.agrees;
            totals += row.readings;
            streams += 1;
        }
        agrees &= self.others.agree(readings, totals);
        // A device that an operator added may never have connected.
        let is_added = self.row.revision > 0 && streams == 0 && series == 0;
        let is_allowed = is_added || agrees && streams > 0 && self.others.allow(is_older);
        verdict.foreign(is_allowed, || {
            let trouble = match agrees && streams > 0 {
                true => HINT,
                false => "its rows are inconsistent",
            };
            self.say(&format!(
                "a device with {streams} streams, {series} series and {readings} readings: stored but not \
                 sent; {trouble}"
            ))
        });
        Ok(())
    }

    /// Verifies streams that belong to none of the runs. Returns whether any of them are allowed.
    pub(super) async fn prove_strange_streams(
        &self,
        store: &mut Store,
        streams: &[StreamRow],
        verdict: &mut Verdict,
    ) -> Result<bool, ReadError> {
        let mut is_mixed = false;
        for row in streams {
            let state = self.look_at(store, row).await?;
            let is_allowed = state.agrees && self.others.allow(state.is_older);
            is_mixed |= is_allowed;
            verdict.foreign(is_allowed, || {
                let (stream, frames) = (row.stream, row.frames);
                self.say(&format!(
                    "stream {stream} with {frames} frames: stored but not sent; {HINT}"
                ))
            });
        }
        Ok(is_mixed)
    }

    async fn look_at(&self, store: &mut Store, row: &StreamRow) -> Result<State, ReadError> {
        let sql = "SELECT count(*), CAST(coalesce(sum(readings), 0) AS BIGINT), coalesce(max(seq), 0), \
                   max(received_at) FROM frames WHERE stream_id = $1";
        let found = store.row(sql, &[row.id]).await?;
        let agrees = self.others.agree(found.integer(0)?, row.frames)
            && self.others.agree(found.integer(1)?, row.readings)
            && found.integer(2)?.cast_unsigned() == row.durable_seq;
        let received_at_us = found.integer_or_null(3)?.unwrap_or(i64::MIN);
        Ok(State {
            agrees,
            is_older: row.created_at_us < self.began_us && received_at_us < self.began_us,
        })
    }
}

/// State of a stream of another run.
struct State {
    /// Whether its totals match its frames.
    agrees: bool,
    /// Whether all of it was stored before the runs.
    is_older: bool,
}
