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
//!   connection, held by its task).
//! - After a transient failure the same batch is tried again; nothing is answered meanwhile.
//! - After a fatal one the task ends without answering.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

use crate::batcher::{BatchLimits, Batcher, Size, Tagged};
use crate::clock::SystemClock;
use crate::mailbox::Mailbox;
use crate::registry::Registry;
use crate::session::Submission;
use crate::store::{Committed, LoginOutcome, Store, StoreError};

/// First and longest wait before a batch is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A commit that takes longer is taken for an outage: devices are told to wait, and not left to guess.
const STALLED_AFTER: Duration = Duration::from_secs(5);
/// After how long without anything to commit the store is tidied.
const TIDY_AFTER: Duration = Duration::from_secs(1);
/// What devices are told to wait while the store is down.
pub const STORE_RETRY_AFTER_MS: u32 = 1000;

/// Bounds of the queue. Each must be at least what the largest frame takes up.
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
    lanes: Arc<[mpsc::UnboundedSender<Job>]>,
    /// Where this clone's submissions go.
    lane: usize,
    room: Arc<Room>,
}

#[derive(Debug)]
struct Job {
    submission: Submission,
    mailbox: Arc<Mailbox>,
}

/// What is left of the queue's bounds. Permits are taken when a job enters and given back when its
/// batch is durable; they bound the channels, which have no bound of their own.
#[derive(Debug)]
struct Room {
    readings: Semaphore,
    bytes: Semaphore,
    /// How many lanes cannot commit.
    lanes_down: AtomicUsize,
}

/// A queue and its tasks' ends, one for each lane.
pub fn queue(limits: QueueLimits, lanes: usize) -> (IngestQueue, Vec<IngestReceiver>) {
    let room = Arc::new(Room {
        readings: Semaphore::new(limits.readings_max),
        bytes: Semaphore::new(limits.bytes_max),
        lanes_down: AtomicUsize::new(0),
    });
    let lane = |lane| {
        let (sender, jobs) = mpsc::unbounded_channel();
        let room = Arc::clone(&room);
        (sender, IngestReceiver { lane, jobs, room })
    };
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..lanes).map(lane).unzip();
    let queue = IngestQueue {
        lanes: senders.into(),
        lane: 0,
        room,
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

    /// Queues a submission if there is room now; gives it back if not.
    pub fn try_submit(&self, submission: Submission, mailbox: &Arc<Mailbox>) -> Option<Submission> {
        let size = Size::of(&submission);
        let Ok(readings) = self.room.readings.try_acquire_many(size.readings as u32) else {
            return Some(submission);
        };
        let Ok(bytes) = self.room.bytes.try_acquire_many(size.bytes as u32) else {
            return Some(submission);
        };
        readings.forget();
        bytes.forget();
        self.send(submission, mailbox);
        None
    }

    /// Queues a submission as soon as there is room; those who wait are served in order.
    ///
    /// # Cancel safety
    /// A cancelled call queues nothing and drops the submission.
    pub async fn submit(self, submission: Submission, mailbox: Arc<Mailbox>) {
        let size = Size::of(&submission);
        let readings = self.room.readings.acquire_many(size.readings as u32).await;
        let bytes = self.room.bytes.acquire_many(size.bytes as u32).await;
        if let (Ok(readings), Ok(bytes)) = (readings, bytes) {
            readings.forget();
            bytes.forget();
            self.send(submission, &mailbox);
        }
    }

    fn send(&self, submission: Submission, mailbox: &Arc<Mailbox>) {
        // Fails only when the store has failed for good: the whole gateway is ending.
        let _ = self.lanes[self.lane].send(Job {
            submission,
            mailbox: Arc::clone(mailbox),
        });
    }
}

/// A task's end of the queue.
#[derive(Debug)]
pub struct IngestReceiver {
    lane: usize,
    jobs: mpsc::UnboundedReceiver<Job>,
    room: Arc<Room>,
}

impl IngestReceiver {
    /// Commits what comes into this lane until every [`IngestQueue`] is gone and all is durable, then
    /// closes the store.
    pub async fn run<S: Store>(
        mut self,
        mut store: S,
        limits: BatchLimits,
        registry: Arc<Registry>,
        clock: SystemClock,
    ) -> Result<(), StoreError> {
        let mut batcher = Batcher::new(limits);
        // Tidying begins after a pause, and goes on until something comes in.
        let interval_min = Duration::from_micros(limits.interval_min_us);
        let mut tidy_after = TIDY_AFTER.max(interval_min);
        loop {
            while !batcher.is_full()
                && let Ok(job) = self.jobs.try_recv()
            {
                batcher.push(job.submission, job.mailbox);
            }
            if let Some(tagged) = batcher.poll_batch(clock.now().mono_us) {
                self.commit(&mut store, tagged, &registry).await?;
                tidy_after = TIDY_AFTER.max(interval_min);
                continue;
            }
            let due = batcher.poll_deadline().filter(|_| !batcher.is_empty());
            tokio::select! {
                job = self.jobs.recv() => match job {
                    Some(job) => batcher.push(job.submission, job.mailbox),
                    None => break,
                },
                () = sleep_until(due, &clock) => {}
                () = tokio::time::sleep(tidy_after), if batcher.is_empty() && !store.is_tidy() => {
                    self.commit(&mut store, Tagged::default(), &registry).await?;
                    tidy_after = interval_min;
                }
            }
        }
        // The queue is closed: what is left goes at once, whatever the least time between commits.
        if let Some(tagged) = batcher.poll_batch(u64::MAX) {
            self.commit(&mut store, tagged, &registry).await?;
        }
        store.close().await
    }

    async fn commit<S: Store>(
        &self,
        store: &mut S,
        tagged: Tagged<Arc<Mailbox>>,
        registry: &Registry,
    ) -> Result<(), StoreError> {
        let mut retry_after = RETRY_MIN;
        let mut outage = Outage::new(self.lane, &self.room.lanes_down, registry);
        let committed = loop {
            let mut attempt = pin!(store.commit(&tagged.batch));
            let result = tokio::select! {
                biased;
                result = &mut attempt => result,
                () = tokio::time::sleep(STALLED_AFTER) => {
                    outage.go_on("it does not answer");
                    attempt.await
                }
            };
            match result {
                Ok(committed) => break committed,
                Err(StoreError::Transient(reason)) => {
                    outage.go_on(&reason);
                    tokio::time::sleep(retry_after).await;
                    retry_after = (retry_after * 2).min(RETRY_MAX);
                }
                Err(fatal @ StoreError::Fatal(_)) => return Err(fatal),
            }
        };
        drop(outage);
        answer(self.lane, &tagged, committed, registry);
        self.room.readings.add_permits(tagged.size.readings);
        self.room.bytes.add_permits(tagged.size.bytes);
        Ok(())
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
}

impl<'a> Outage<'a> {
    fn new(lane: usize, lanes_down: &'a AtomicUsize, registry: &'a Registry) -> Self {
        Self {
            lane,
            lanes_down,
            registry,
            reason: None,
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
        if self.lanes_down.fetch_sub(1, Ordering::Relaxed) == 1 {
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
            registry.admit(admission.device, lane, mailbox);
        }
        mailbox.put(|mail| mail.login = Some(outcome));
    }
}
