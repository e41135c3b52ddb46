//! The queue between sessions and store, and the tasks that empty it.
//!
//! A connection finds room for a submission before it takes in the next frame, so a slow store is felt
//! by the devices as back pressure. A store that takes several transactions at once has several lanes,
//! each with a task that commits one batch after the other and answers sessions only from what a
//! commit returned. A device always has the same lane, whatever its connection, so what it submits is
//! committed in the order in which it came.
//!
//! Invariants
//! - What waits in all lanes is bounded in readings and in bytes (plus at most one submission for each
//!   connection, held by its task). Each lane has an equal part of that: when one cannot commit, devices of
//!   another find room.
//! - After a transient failure the same batch is tried again; nothing is answered meanwhile.
//! - After a fatal one the task ends without answering.
//! - When the store turns out to be another one, every session of the lane ends, and nothing that carries an
//!   id of the former store is stored or answered.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinError;

use crate::ingest::batcher::{BatchLimits, Batcher, Size, Tagged};
use crate::ingest::mailbox::Mailbox;
use crate::ingest::registry::Registry;
use crate::session::Submission;
use crate::store::{Committed, LoginOutcome, Store, StoreError};
use crate::time::SystemClock;

pub mod batcher;
pub mod mailbox;
pub mod registry;

/// First and longest wait before a batch is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A commit that takes longer is taken for an outage: devices are told to wait, and not left to guess.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Room that a connection gets at once, beyond its submission, when it had to wait for it: what it has
/// received meanwhile then goes into the same batch, and a store that clusters readings by series finds
/// many of one series together.
const TURN: Size = Size {
    readings: 4096,
    bytes: 128 << 10,
};

/// Bounds of the queue. For each lane they must come to what the largest frame takes up.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Readings that may wait.
    pub readings_max: usize,
    /// Bytes of memory that may wait.
    pub bytes_max: usize,
}

/// The way into the queue. Clones share one queue; it closes when the last is gone.
#[derive(Clone, Debug)]
pub struct IngestQueue {
    lanes: Arc<[LaneEnd]>,
    /// Where this clone's submissions go.
    lane: usize,
}

/// The end of a lane at which submissions go in.
#[derive(Debug)]
struct LaneEnd {
    jobs: mpsc::UnboundedSender<Job>,
    room: Arc<Room>,
}

#[derive(Debug)]
struct Job {
    submission: Submission,
    mailbox: Arc<Mailbox>,
}

/// What is left of a lane's bounds. Permits are taken when a job enters and given back when its
/// batch is durable; they bound the channel, which has no bound of its own.
#[derive(Debug)]
struct Room {
    limits: QueueLimits,
    readings: Semaphore,
    bytes: Semaphore,
}

/// What lanes know of each other, so that the log says once what concerns several.
#[derive(Debug, Default)]
struct Neighbours {
    /// How many lanes cannot commit.
    lanes_down: AtomicUsize,
    /// How often the lane that saw it most often has seen the store replaced.
    replacements: AtomicUsize,
}

/// A queue and its tasks' ends, one for each lane.
pub fn queue(limits: QueueLimits, lanes: usize) -> (IngestQueue, Vec<IngestReceiver>) {
    let limits = QueueLimits {
        readings_max: limits.readings_max / lanes,
        bytes_max: limits.bytes_max / lanes,
    };
    let neighbours = Arc::new(Neighbours::default());
    let lane = |lane| {
        let room = Arc::new(Room {
            limits,
            readings: Semaphore::new(limits.readings_max),
            bytes: Semaphore::new(limits.bytes_max),
        });
        let (sender, jobs) = mpsc::unbounded_channel();
        let end = LaneEnd {
            jobs: sender,
            room: Arc::clone(&room),
        };
        let receiver = IngestReceiver {
            lane,
            jobs,
            room,
            neighbours: Arc::clone(&neighbours),
        };
        (end, receiver)
    };
    let (lanes, receivers): (Vec<_>, Vec<_>) = (0..lanes).map(lane).unzip();
    let queue = IngestQueue {
        lanes: lanes.into(),
        lane: 0,
    };
    (queue, receivers)
}

impl IngestQueue {
    /// Chooses the lane of `device` for all that is submitted through this clone from now on.
    pub fn take_lane_of(&mut self, device: &str) {
        let mut hasher = DefaultHasher::new();
        device.hash(&mut hasher);
        self.lane = (hasher.finish() % self.lanes.len() as u64) as usize;
    }

    /// Queues a submission if there is room now, in `turn` or else in the queue; gives it back if not.
    pub fn try_submit(
        &self,
        submission: Submission,
        mailbox: &Arc<Mailbox>,
        turn: Option<&mut Turn>,
    ) -> Option<Submission> {
        let size = Size::of(&submission);
        if !turn.is_some_and(|turn| turn.take(size)) {
            let room = self.room();
            let Ok(readings) = room.readings.try_acquire_many(size.readings as u32) else {
                return Some(submission);
            };
            let Ok(bytes) = room.bytes.try_acquire_many(size.bytes as u32) else {
                return Some(submission);
            };
            readings.forget();
            bytes.forget();
        }
        self.send(submission, mailbox);
        None
    }

    /// Queues a submission as soon as there is room; those who wait are served in order. Gives room for
    /// what comes next, too.
    ///
    /// # Cancel safety
    /// A cancelled call queues nothing and drops the submission.
    pub async fn submit(self, submission: Submission, mailbox: Arc<Mailbox>) -> Turn {
        let size = Size::of(&submission);
        let QueueLimits {
            readings_max,
            bytes_max,
        } = self.room().limits;
        let mut turn = Turn {
            left: Size::default(),
            room: Arc::clone(self.room()),
        };
        let readings = (size.readings + TURN.readings).min(readings_max);
        let bytes = (size.bytes + TURN.bytes).min(bytes_max);
        let readings_room = self.room().readings.acquire_many(readings as u32).await;
        let bytes_room = self.room().bytes.acquire_many(bytes as u32).await;
        if let (Ok(readings_room), Ok(bytes_room)) = (readings_room, bytes_room) {
            readings_room.forget();
            bytes_room.forget();
            turn.left = Size { readings, bytes };
            // It asked for at least that much.
            turn.take(size);
            self.send(submission, &mailbox);
        }
        turn
    }

    fn room(&self) -> &Arc<Room> {
        &self.lanes[self.lane].room
    }

    fn send(&self, submission: Submission, mailbox: &Arc<Mailbox>) {
        // Fails only when the store has failed for good: the whole gateway is ending.
        let _ = self.lanes[self.lane].jobs.send(Job {
            submission,
            mailbox: Arc::clone(mailbox),
        });
    }
}

/// Room for a connection that it has not used yet; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    left: Size,
    room: Arc<Room>,
}

impl Turn {
    /// Uses so much of it, if there is so much.
    fn take(&mut self, size: Size) -> bool {
        let readings = self.left.readings.checked_sub(size.readings);
        let bytes = self.left.bytes.checked_sub(size.bytes);
        let (Some(readings), Some(bytes)) = (readings, bytes) else {
            return false;
        };
        self.left = Size { readings, bytes };
        true
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.room.give_back(self.left);
    }
}

impl Room {
    fn give_back(&self, size: Size) {
        self.readings.add_permits(size.readings);
        self.bytes.add_permits(size.bytes);
    }
}

/// A lane's end of the queue.
#[derive(Debug)]
pub struct IngestReceiver {
    lane: usize,
    jobs: mpsc::UnboundedReceiver<Job>,
    room: Arc<Room>,
    neighbours: Arc<Neighbours>,
}

impl IngestReceiver {
    /// Commits what comes into this lane until every [`IngestQueue`] is gone and all is durable, then
    /// closes the store. Answers what was committed in a task of its own, so that the store has the next
    /// batch meanwhile.
    pub async fn run<S: Store>(
        self,
        store: S,
        limits: BatchLimits,
        registry: Arc<Registry>,
        clock: SystemClock,
    ) -> Result<(), StoreError> {
        let room = self.room.limits;
        let limits = BatchLimits {
            readings_max: limits.readings_max.min(room.readings_max),
            // One batch is committed while the next comes together, both within the bound.
            bytes_max: limits.bytes_max.min(room.bytes_max / 2),
            ..limits
        };
        let (committed, to_answer) = mpsc::unbounded_channel();
        let (lane, room) = (self.lane, Arc::clone(&self.room));
        let mut answering = tokio::spawn(answer_all(lane, to_answer, room, Arc::clone(&registry)));
        let lane = Lane {
            queued: self,
            batcher: Batcher::new(limits),
            committed,
            registry,
            replacements: 0,
        };
        let interval_min = Duration::from_micros(limits.interval_min_us);
        let result = tokio::select! {
            result = lane.run(store, interval_min, clock) => result,
            // It ends after the lane, unless it fails: then nothing would be answered any more.
            ended = &mut answering => return Err(answering_ended(ended)),
        };
        answering
            .await
            .map_err(|error| answering_ended(Err(error)))?;
        result
    }
}

/// A task's work.
struct Lane {
    queued: IngestReceiver,
    batcher: Batcher<Arc<Mailbox>>,
    committed: mpsc::UnboundedSender<ToAnswer>,
    registry: Arc<Registry>,
    /// How often this lane has seen the store replaced.
    replacements: usize,
}

/// Work for the task that answers.
enum ToAnswer {
    Commit {
        tagged: Box<Tagged<Arc<Mailbox>>>,
        committed: Committed,
        /// See [`Mailbox::set_epoch`].
        epoch: usize,
    },
    /// Answered when all before it is.
    Flush(oneshot::Sender<()>),
}

impl Lane {
    async fn run<S: Store>(
        mut self,
        mut store: S,
        interval_min: Duration,
        clock: SystemClock,
    ) -> Result<(), StoreError> {
        loop {
            while !self.batcher.is_full()
                && let Ok(job) = self.queued.jobs.try_recv()
            {
                self.gather(job);
            }
            if let Some(tagged) = self.batcher.poll_batch(clock.now().mono_us) {
                self.commit(&mut store, tagged).await?;
                continue;
            }
            let is_empty = self.batcher.is_empty();
            let due = self.batcher.poll_deadline().filter(|_| !is_empty);
            let tidy_after = store.tidy_after().filter(|_| is_empty);
            tokio::select! {
                job = self.queued.jobs.recv() => match job {
                    Some(job) => self.gather(job),
                    None => break,
                },
                () = sleep_until(due, &clock) => {}
                error = store.failure() => return Err(error),
                () = tokio::time::sleep(tidy_after.unwrap_or_default().max(interval_min)),
                    if tidy_after.is_some() => {
                    self.commit(&mut store, Tagged::default()).await?;
                }
            }
        }
        // The queue is closed: what is left goes at once, whatever the least time between commits.
        if let Some(tagged) = self.batcher.poll_batch(u64::MAX) {
            self.commit(&mut store, tagged).await?;
        }
        store.close().await
    }

    async fn commit<S: Store>(
        &mut self,
        store: &mut S,
        mut tagged: Tagged<Arc<Mailbox>>,
    ) -> Result<(), StoreError> {
        let lane = self.queued.lane;
        let neighbours = Arc::clone(&self.queued.neighbours);
        let registry = Arc::clone(&self.registry);
        let mut retry_after = RETRY_MIN;
        let mut outage = Outage::new(lane, &neighbours.lanes_down, &registry);
        let committed = loop {
            let result = self.attempt(store, &tagged, &mut outage).await;
            match result {
                Ok(committed) => break committed,
                Err(StoreError::Transient(reason)) => {
                    outage.go_on(&reason);
                    tokio::time::sleep(retry_after).await;
                    retry_after = (retry_after * 2).min(RETRY_MAX);
                }
                Err(StoreError::Replaced(reason)) => self.forget_ids(&mut tagged, &reason).await,
                Err(fatal @ StoreError::Fatal(_)) => return Err(fatal),
            }
        };
        outage.is_over = true;
        // Fails only when the other task has panicked, which is told at the end.
        let _ = self.committed.send(ToAnswer::Commit {
            tagged: Box::new(tagged),
            committed,
            epoch: self.replacements,
        });
        Ok(())
    }

    /// Adds a submission to the next batch, unless it carries ids of a store that is not there any more.
    fn gather(&mut self, job: Job) {
        let has_ids = !matches!(
            job.submission,
            Submission::Login(_) | Submission::Refusal(_) | Submission::Step(_)
        );
        if has_ids && job.mailbox.epoch() < self.replacements {
            let size = Size::of(&job.submission);
            return self.queued.room.give_back(size);
        }
        self.batcher.push(job.submission, job.mailbox);
    }

    /// Ends all sessions of the lane, and leaves of what was gathered only what carries no ids.
    async fn forget_ids(&mut self, tagged: &mut Tagged<Arc<Mailbox>>, reason: &str) {
        self.replacements += 1;
        let replacements = &self.queued.neighbours.replacements;
        let seen = replacements.fetch_max(self.replacements, Ordering::Relaxed);
        if seen < self.replacements {
            tracing::error!(
                %reason,
                "the store lacks what this gateway has put into it, as after a restore or the removal of a device; \
                 devices log in again, and acknowledged frames that it has lost are recorded as gaps of reason 254"
            );
        }
        // Sessions that the former store admitted are in the registry once they are answered.
        let (flushed, until_flushed) = oneshot::channel();
        let _ = self.committed.send(ToAnswer::Flush(flushed));
        let _ = until_flushed.await;
        self.registry.expire(self.queued.lane);
        tagged.forget_ids();
        self.batcher.forget_ids();
    }

    /// Meanwhile the next batch is gathered.
    async fn attempt<S: Store>(
        &mut self,
        store: &mut S,
        tagged: &Tagged<Arc<Mailbox>>,
        outage: &mut Outage<'_>,
    ) -> Result<Committed, StoreError> {
        let mut attempt = pin!(store.commit(&tagged.batch));
        let mut stalled = pin!(tokio::time::sleep(STALLED_AFTER));
        let mut is_stalled = false;
        loop {
            tokio::select! {
                biased;
                result = &mut attempt => return result,
                () = &mut stalled, if !is_stalled => {
                    is_stalled = true;
                    outage.go_on("it does not answer");
                }
                Some(job) = self.queued.jobs.recv(), if !self.batcher.is_full() => self.gather(job),
            }
        }
    }
}

fn answering_ended(ended: Result<(), JoinError>) -> StoreError {
    let reason = ended.err().map(|error| error.to_string());
    let reason = reason.unwrap_or_else(|| "it ended".to_owned());
    StoreError::Fatal(format!("the task that answers commits: {reason}"))
}

/// Answers each commit in turn, and gives its room back.
async fn answer_all(
    lane: usize,
    mut to_answer: mpsc::UnboundedReceiver<ToAnswer>,
    room: Arc<Room>,
    registry: Arc<Registry>,
) {
    while let Some(to_answer) = to_answer.recv().await {
        match to_answer {
            ToAnswer::Commit {
                tagged,
                committed,
                epoch,
            } => {
                tagged
                    .logins
                    .iter()
                    .for_each(|mailbox| mailbox.set_epoch(epoch));
                answer(lane, &tagged, committed, &registry);
                room.give_back(tagged.size);
            }
            ToAnswer::Flush(flushed) => drop(flushed.send(())),
        }
    }
}

/// A time in which a lane cannot commit: begins with the first failure, ends when it is dropped.
/// Several lanes that fail together are told in the log as one.
struct Outage<'a> {
    lane: usize,
    lanes_down: &'a AtomicUsize,
    registry: &'a Registry,
    /// `None` before the first failure.
    reason: Option<String>,
    /// Whether the lane has committed, and was not given up.
    is_over: bool,
}

impl<'a> Outage<'a> {
    fn new(lane: usize, lanes_down: &'a AtomicUsize, registry: &'a Registry) -> Self {
        Self {
            lane,
            lanes_down,
            registry,
            reason: None,
            is_over: false,
        }
    }

    /// It begins, or is found to have another reason.
    fn go_on(&mut self, reason: &str) {
        let begins = self.reason.is_none();
        if begins {
            self.registry.announce_store(self.lane, true);
        }
        let is_first = begins && self.lanes_down.fetch_add(1, Ordering::Relaxed) == 0;
        let is_news = self.reason.as_deref().is_some_and(|known| known != reason);
        if is_first || (is_news && self.lane == 0) {
            tracing::warn!(%reason, "the store does not take data; trying again");
        }
        self.reason = Some(reason.to_owned());
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if self.reason.is_none() {
            return;
        }
        self.registry.announce_store(self.lane, false);
        if self.lanes_down.fetch_sub(1, Ordering::Relaxed) == 1 && self.is_over {
            tracing::info!("the store takes data again");
        }
    }
}

async fn sleep_until(due_us: Option<u64>, clock: &SystemClock) {
    match due_us {
        Some(due_us) => tokio::time::sleep_until(clock.instant(due_us).into()).await,
        None => std::future::pending().await,
    }
}

/// Tells every session what became of its submissions; each hears once of a commit.
pub(crate) fn answer(
    lane: usize,
    tagged: &Tagged<Arc<Mailbox>>,
    committed: Committed,
    registry: &Registry,
) {
    for (mailbox, outcome) in tagged.declares.iter().zip(committed.declares) {
        mailbox.put(|mail| mail.declare = Some(outcome));
    }
    let mut through: HashMap<*const Mailbox, usize> = HashMap::new();
    for (i, mailbox) in tagged.entries.iter().enumerate() {
        through.insert(Arc::as_ptr(mailbox), i);
    }
    for i in through.into_values() {
        let entry = &tagged.batch.entries[i];
        let receipt = committed
            .receipts
            .binary_search_by_key(&entry.stream, |receipt| receipt.stream())
            .map(|found| committed.receipts[found])
            .expect("a commit has a receipt for every stream of its batch");
        tagged.entries[i].put(|mail| mail.receipt = Some((receipt, entry.seq)));
    }
    for (mailbox, outcome) in tagged.logins.iter().zip(committed.logins) {
        if let LoginOutcome::Admitted(admission) = &outcome {
            registry.admit(admission.device, lane, mailbox, admission.revision);
        }
        mailbox.put(|mail| mail.login = Some(outcome));
    }
}
