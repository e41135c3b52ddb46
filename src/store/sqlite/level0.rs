//! Level 0: recent readings in order of arrival, compacted later.
//!
//! A small commit has only a few readings of each series, and each would rewrite a separate page of
//! `readings_sorted`. So a commit inserts them into `readings_recent`, one row per run, and compacts a slice of
//! earlier readings: a *generation* of level-0 runs is sorted as a whole, in memory, and is written to
//! `readings_sorted` in that table's order, many readings to a page. This keeps commits short, and level 0
//! never exceeds two generations.
//!
//! Invariants
//! - After every commit, the view `readings` shows each reading once: the row of `readings_sorting` moves in
//!   the transaction that compacts.
//! - The cached runs match `readings_recent`; they change only after COMMIT.

use std::iter;
use std::time::{Duration, Instant};

use sqlx::{Row, SqliteConnection};
use tokio::task::JoinHandle;

use super::bulk::Bulk;
use super::rows::{insert_runs, readings_into};
use crate::store::hours::KnownHours;
use crate::store::rows::{Frame, Run, sorted_runs};
use crate::store::{Content, Readings};

/// Number of readings in a generation. A larger one would save page writes, but queries would read more
/// unsorted rows.
const GENERATION_READINGS: usize = 500_000;
/// A generation of at least [`SOME_READINGS`] that takes longer than this to fill is compacted early, because a
/// query reads all of it.
const GENERATION_AGE: Duration = Duration::from_secs(5);
const SOME_READINGS: usize = 10_000;
/// A smaller generation is compacted after this time; each compaction writes a page for each series.
const GENERATION_AGE_MAX: Duration = Duration::from_secs(60);
/// Minimum number of readings that a commit compacts. Above it, a commit compacts five readings for each four
/// that recent commits added, so that a generation is done before the next one is full.
const SLICE_READINGS: usize = 256;
/// Number of recent commits in that average. The commit's own size is not used: a commit that is large because
/// the one before it took long would then also take long.
const LATELY_COMMITS: usize = 16;
/// Number of readings that a commit without readings compacts.
const IDLE_SLICE_READINGS: usize = 20_000;
/// Minimum number of compacted rows that a commit deletes.
const SLICE_DELETED: i64 = 500;

/// Number of samples per series and stream in a batch for which immediate sorting is faster than compaction:
/// they fill a good part of a page.
const DENSE_SAMPLES: usize = 120;

/// Magnitudes, in addition to zero, whose shortest decimal SQLite reads back to the same bits. SQLite
/// multiplies by powers of ten in pairs of doubles, and errs only where these are large. Other values bypass
/// level 0, as do times too far apart for a difference.
const EXACT: std::ops::RangeInclusive<f64> = 1e-9..=1e15;

pub(super) struct Level0 {
    insert: Bulk,
    sort_in: Bulk,
    /// Runs that arrived after the generation that is being compacted.
    gathering: SortedRun,
    gathering_since: Instant,
    sorting: Sorting,
    /// Average readings per recent commit, times [`LATELY_COMMITS`].
    lately_readings: usize,
    position: Position,
    /// Rows up to this id are deleted.
    deleted_id: i64,
    hours: KnownHours,
}

/// Progress of compaction: the row of `readings_sorting`, and the last id in `readings_recent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    last_id: i64,
    sorted_id: i64,
    sorting_id: i64,
    /// Series, time and frame of the last compacted run.
    run: (i64, i64, i64),
}

/// The generation that is being compacted.
enum Sorting {
    Nothing,
    /// Being sorted by another thread, so that no commit waits for it.
    Ordering(JoinHandle<SortedRun>),
    /// Sorted, with the number of compacted runs.
    Ordered(SortedRun, usize),
}

/// Changes that a transaction makes to level 0; they take effect after COMMIT.
pub(super) struct Step<'a> {
    /// Added readings and their frames.
    added: Vec<(i64, &'a Readings)>,
    position: Position,
    deleted_id: i64,
    begins_generation: bool,
    runs_sorted: usize,
    hours: Vec<i64>,
}

impl Level0 {
    pub(super) fn new() -> Self {
        Self {
            insert: Bulk::new(
                "INSERT OR FAIL INTO readings_recent(id, series_id, frame_id, ts, samples)",
                5,
                "",
            )
            .whole(),
            sort_in: readings_into("readings_sorted"),
            gathering: SortedRun::default(),
            gathering_since: Instant::now(),
            sorting: Sorting::Nothing,
            lately_readings: 0,
            position: Position::default(),
            deleted_id: 0,
            hours: KnownHours::default(),
        }
    }

    /// Returns whether nothing is left to compact or to delete.
    pub(super) fn is_tidy(&self) -> bool {
        self.gathering.runs.is_empty()
            && matches!(self.sorting, Sorting::Nothing)
            && self.deleted_id == self.position.sorted_id
    }

    /// Loads the state from the file. If it differs from the cached state, as after a crash, level 0 is
    /// compacted as a whole.
    pub(super) async fn settle(&mut self, conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let in_file = Position::read(conn).await?;
        if in_file == self.position {
            return Ok(());
        }
        for sql in [
            "BEGIN IMMEDIATE",
            "INSERT INTO readings_sorted
             SELECT u.series_id, u.ts + CAST(v.key AS INTEGER), u.frame_id, v.value
             FROM readings_unsorted AS u CROSS JOIN json_each(u.samples) AS v
             ORDER BY 1, 2, 3",
            "DELETE FROM readings_recent",
        ] {
            sqlx::query(sql).execute(&mut *conn).await?;
        }
        let position = Position {
            sorted_id: in_file.last_id,
            sorting_id: in_file.last_id,
            ..in_file
        };
        position.write(conn).await?;
        sqlx::query("COMMIT").execute(&mut *conn).await?;
        self.position = position;
        self.deleted_id = position.last_id;
        self.gathering = SortedRun::default();
        self.sorting = Sorting::Nothing;
        Ok(())
    }

    /// Prepares for a transaction. A transaction that `is_idle` otherwise can wait for a generation to be
    /// sorted.
    pub(super) async fn prepare(&mut self, is_idle: bool) {
        if let Sorting::Ordering(task) = &mut self.sorting
            && (is_idle || task.is_finished())
        {
            let ordered = task.await.expect("sorting does not panic");
            self.sorting = Sorting::Ordered(ordered, 0);
        }
    }

    /// Stores the readings of `frames` within a transaction, and does its share of the compaction, which is
    /// larger if the transaction `is_idle` otherwise.
    pub(super) async fn store<'a>(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'a>],
        is_idle: bool,
    ) -> Result<Step<'a>, sqlx::Error> {
        let (added, at_once) = divide(frames);
        insert_runs(&self.sort_in, conn, &sorted_runs(at_once)).await?;
        let mut step = Step {
            added,
            position: self.position,
            deleted_id: self.deleted_id,
            begins_generation: self.is_generation_due(is_idle),
            runs_sorted: 0,
            hours: self.hours.missing(frames),
        };
        insert_hours(conn, &step.hours).await?;
        if step.begins_generation {
            step.position.sorting_id = self.position.last_id;
            step.position.run = (0, 0, 0);
        }
        self.add(conn, &mut step).await?;
        let slice_readings = match is_idle {
            true => IDLE_SLICE_READINGS,
            false => SLICE_READINGS.max(self.lately_readings / LATELY_COMMITS * 5 / 4),
        };
        self.sort_in(conn, slice_readings, &mut step).await?;
        self.delete_sorted(conn, slice_readings, &mut step).await?;
        if step.position.row() != self.position.row() {
            step.position.write(conn).await?;
        }
        Ok(step)
    }

    /// Applies, after COMMIT, the changes of the transaction.
    pub(super) fn advance(&mut self, step: Step<'_>) {
        if step.begins_generation {
            let mut generation = std::mem::take(&mut self.gathering);
            self.sorting = Sorting::Ordering(tokio::task::spawn_blocking(move || {
                generation.sort();
                generation
            }));
        }
        if let Sorting::Ordered(generation, sorted) = &mut self.sorting {
            *sorted += step.runs_sorted;
            if *sorted == generation.runs.len() {
                self.sorting = Sorting::Nothing;
            }
        }
        if self.gathering.runs.is_empty() {
            self.gathering_since = Instant::now();
        }
        let before = self.gathering.values.len();
        for (frame, readings) in step.added {
            self.gathering.push(frame, readings);
        }
        self.lately_readings -= self.lately_readings / LATELY_COMMITS;
        self.lately_readings += self.gathering.values.len() - before;
        self.position = step.position;
        self.deleted_id = step.deleted_id;
        self.hours.learn(step.hours);
    }

    fn is_generation_due(&self, is_idle: bool) -> bool {
        let readings = self.gathering.values.len();
        let age = self.gathering_since.elapsed();
        let is_due = readings >= GENERATION_READINGS
            || age >= GENERATION_AGE && readings >= SOME_READINGS
            || age >= GENERATION_AGE_MAX;
        matches!(self.sorting, Sorting::Nothing)
            && !self.gathering.runs.is_empty()
            && (is_due || is_idle)
    }

    async fn add(
        &self,
        conn: &mut SqliteConnection,
        step: &mut Step<'_>,
    ) -> Result<(), sqlx::Error> {
        let runs: Vec<(i64, Run<'_>)> = (self.position.last_id + 1..)
            .zip(
                step.added
                    .iter()
                    .flat_map(|(frame, readings)| Run::of(*frame, readings)),
            )
            .collect();
        step.position.last_id += runs.len() as i64;
        self.insert
            .execute(conn, runs.iter(), |params, (id, run)| {
                params
                    .bind(*id)
                    .bind(run.series)
                    .bind(run.frame)
                    .bind(run.times_us[0])
                    .bind(samples(run));
            })
            .await
    }

    async fn sort_in(
        &self,
        conn: &mut SqliteConnection,
        slice_readings: usize,
        step: &mut Step<'_>,
    ) -> Result<(), sqlx::Error> {
        let Sorting::Ordered(generation, sorted) = &self.sorting else {
            return Ok(());
        };
        let slice = generation.slice(*sorted, slice_readings);
        insert_runs(&self.sort_in, conn, &slice).await?;
        step.runs_sorted = slice.len();
        if sorted + slice.len() == generation.runs.len() {
            step.position.sorted_id = step.position.sorting_id;
        } else if let Some(last) = slice.last() {
            step.position.run = (last.series, last.times_us[0], last.frame);
        }
        Ok(())
    }

    async fn delete_sorted(
        &self,
        conn: &mut SqliteConnection,
        slice_readings: usize,
        step: &mut Step<'_>,
    ) -> Result<(), sqlx::Error> {
        if step.deleted_id == self.position.sorted_id {
            return Ok(());
        }
        let rows = SLICE_DELETED.max(slice_readings as i64);
        step.deleted_id = (step.deleted_id + rows).min(self.position.sorted_id);
        sqlx::query("DELETE FROM readings_recent WHERE id <= ?")
            .bind(step.deleted_id)
            .execute(conn)
            .await
            .map(drop)
    }
}

impl Position {
    async fn read(conn: &mut SqliteConnection) -> Result<Self, sqlx::Error> {
        let row = sqlx::query(
            "SELECT sorted_id, sorting_id, series_id, ts, frame_id,
                 max(sorting_id, (SELECT coalesce(max(id), 0) FROM readings_recent))
             FROM readings_sorting",
        )
        .fetch_one(conn)
        .await?;
        Ok(Self {
            sorted_id: row.try_get(0)?,
            sorting_id: row.try_get(1)?,
            run: (row.try_get(2)?, row.try_get(3)?, row.try_get(4)?),
            last_id: row.try_get(5)?,
        })
    }

    async fn write(self, conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let (series, ts_us, frame) = self.run;
        sqlx::query(
            "UPDATE readings_sorting
             SET sorted_id = ?, sorting_id = ?, series_id = ?, ts = ?, frame_id = ?",
        )
        .bind(self.sorted_id)
        .bind(self.sorting_id)
        .bind(series)
        .bind(ts_us)
        .bind(frame)
        .execute(conn)
        .await
        .map(drop)
    }

    /// Returns the columns of `readings_sorting`.
    fn row(self) -> (i64, i64, (i64, i64, i64)) {
        (self.sorted_id, self.sorting_id, self.run)
    }
}

/// Inserts the hours that are missing.
pub(super) async fn insert_hours(
    conn: &mut SqliteConnection,
    hours: &[i64],
) -> Result<(), sqlx::Error> {
    if hours.is_empty() {
        return Ok(());
    }
    let hours = serde_json::to_string(hours).expect("numbers are JSON");
    sqlx::query("INSERT OR IGNORE INTO reading_hours SELECT value FROM json_each(?)")
        .bind(hours)
        .execute(conn)
        .await
        .map(drop)
}

/// Returns the readings for level 0, and the frames whose readings are sorted immediately. `frames` are sorted
/// by stream.
fn divide<'f, 'a>(frames: &'f [Frame<'a>]) -> (Vec<(i64, &'a Readings)>, Vec<&'f Frame<'a>>) {
    let (mut wait, mut at_once) = (Vec::new(), Vec::new());
    for of_stream in frames.chunk_by(|a, b| a.item.entry.stream == b.item.entry.stream) {
        let in_stream = of_stream.iter().filter_map(readings);
        let is_dense = in_stream.map(|one| one.times_us.len()).sum::<usize>() >= DENSE_SAMPLES;
        for frame in of_stream {
            match readings(frame) {
                Some(readings) if !is_dense && can_wait(readings) => {
                    wait.push((frame.id, readings))
                }
                Some(_) => at_once.push(frame),
                None => {}
            }
        }
    }
    (wait, at_once)
}

fn readings<'a>(frame: &Frame<'a>) -> Option<&'a Readings> {
    match &frame.item.entry.content {
        Content::Readings(readings) if !readings.times_us.is_empty() => Some(readings),
        _ => None,
    }
}

/// Returns whether decimal text represents the readings exactly.
fn can_wait(
    Readings {
        times_us, values, ..
    }: &Readings,
) -> bool {
    let mut spans = times_us.iter().map(|ts_us| ts_us.checked_sub(times_us[0]));
    let is_exact = |value: &f64| *value == 0.0 || value.is_nan() || EXACT.contains(&value.abs());
    spans.all(|span| span.is_some()) && values.iter().all(is_exact)
}

/// Returns the samples of a run as JSON, NaN as null.
fn samples(run: &Run<'_>) -> String {
    // An ordinary sample takes 8 digits of time, 6 of value and 4 of JSON.
    let mut text = String::with_capacity(2 + run.times_us.len() * 20);
    let first_us = run.times_us[0];
    let separators = iter::once('{').chain(iter::repeat(','));
    for (separator, (_, ts_us, _, value)) in separators.zip(run.readings()) {
        text.push(separator);
        text.push('"');
        text.push_str(itoa::Buffer::new().format(ts_us - first_us));
        text.push_str("\":");
        match value {
            Some(value) => text.push_str(ryu::Buffer::new().format_finite(value)),
            None => text.push_str("null"),
        }
    }
    text.push('}');
    text
}

/// Runs, stored in shared vectors because a generation is large.
#[derive(Debug, Default)]
struct SortedRun {
    runs: Vec<Piled>,
    times_us: Vec<i64>,
    values: Vec<f64>,
}

/// A run within a [`SortedRun`].
#[derive(Clone, Copy, Debug)]
struct Piled {
    series: i64,
    first_us: i64,
    frame: i64,
    times_at: u32,
    values_at: u32,
    len: u32,
}

impl SortedRun {
    fn push(&mut self, frame: i64, readings: &Readings) {
        let times_at = self.times_us.len() as u32;
        for run in Run::of(frame, readings) {
            self.runs.push(Piled {
                series: run.series,
                first_us: run.times_us[0],
                frame,
                times_at,
                values_at: self.values.len() as u32,
                len: run.times_us.len() as u32,
            });
            self.values.extend_from_slice(run.values);
        }
        self.times_us.extend_from_slice(&readings.times_us);
    }

    fn sort(&mut self) {
        self.runs
            .sort_unstable_by_key(|run| (run.series, run.first_us, run.frame));
    }

    /// Returns runs, starting at index `start`, with `readings` readings in total; at least one run if any is
    /// left.
    fn slice(&self, start: usize, readings: usize) -> Vec<Run<'_>> {
        let mut taken = 0;
        let runs = self.runs[start..].iter().take_while(|run| {
            let fits = taken < readings;
            taken += run.len as usize;
            fits
        });
        runs.map(|run| self.run(run)).collect()
    }

    fn run(&self, run: &Piled) -> Run<'_> {
        let part = |at: u32| at as usize..at as usize + run.len as usize;
        Run {
            series: run.series,
            frame: run.frame,
            times_us: &self.times_us[part(run.times_at)],
            values: &self.values[part(run.values_at)],
        }
    }
}
