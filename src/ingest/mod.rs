//! The queue between sessions and the store, and the tasks that empty it.
//!
//! A connection waits for queue capacity for a submission before it accepts the next frame, so
//! devices experience a slow store as back pressure. A store that runs several transactions
//! concurrently has several shards, each with a task that commits one batch after another and
//! answers sessions only from the result of a commit. A device always uses the same shard, whatever
//! its connection, so its submissions are committed in order.
//!
//! Invariants
//! - The submissions waiting in all shards are bounded in readings and in bytes (plus at most one
//!   submission per connection, held by its task). Each shard has an equal part, so that devices of
//!   other shards can continue when one cannot commit.
//! - After a transient failure the same batch is retried; nothing is answered meanwhile.
//! - After a fatal failure the task ends without answering.
//! - When the store is replaced, every session of the shard ends, and nothing with an id of the former store is
//!   stored or answered.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinError;

use self::capacity::Capacity;
pub use self::capacity::Space;
use crate::config::IngestSettings;
use crate::ingest::batcher::{BatchLimits, Batcher, Size, Tagged};
use crate::ingest::mailbox::Mailbox;
use crate::ingest::registry::{Obstacle, Registry};
use crate::metrics::Metrics;
use crate::session::Submission;
use crate::session::inbox::Mail;
use crate::store::{Committed, LoginOutcome, Store, StoreError};
use crate::time::{SystemClock, utc_now};

pub mod batcher;
mod capacity;
pub mod mailbox;
pub mod registry;

/// First and longest delay before a batch is retried.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A commit that takes longer counts as an outage: devices are asked to wait.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Extra capacity granted to a connection that had to wait for its submission. Frames that it has
/// received meanwhile then go into the same batch, and a store that clusters readings by series
/// finds many of one series together.
const BURST_GRANT: Size = Size {
    readings: 4096,
    bytes: 128 << 10,
};

/// Maximum number of frames of a commit whose delay is counted.
const DELAYS_MAX: usize = 64;

/// Sender of the queue. Clones share one queue; it closes when the last is dropped.
#[derive(Clone, Debug)]
pub struct IngestQueue {
    shards: Arc<[ShardEnd]>,
    /// The shard that this clone submits to.
    shard: usize,
}

/// The sending end of a shard.
#[derive(Debug)]
struct ShardEnd {
    jobs: mpsc::UnboundedSender<Job>,
    capacity: Capacity,
}

/// A submission with its space in the queue, which is released when the batch is answered. The space bounds the
/// channel, which has no bound of its own.
#[derive(Debug)]
struct Job {
    submission: Submission,
    mailbox: Arc<Mailbox>,
    space: Space,
}

/// State shared by all shards, so that an event that affects several is logged once.
#[derive(Debug, Default)]
struct Neighbours {
    /// Number of shards that cannot commit.
    shards_down: AtomicUsize,
    /// Highest number of store replacements that any shard has seen.
    replacements: AtomicUsize,
}

/// Creates a queue and the receivers of its shards. Each shard has an equal part of the limits.
pub fn queue(
    settings: &IngestSettings,
    shards: usize,
    metrics: &Arc<Metrics>,
) -> (IngestQueue, Vec<IngestReceiver>) {
    let queued_max = Size {
        readings: settings.queue_readings_max / shards,
        bytes: settings.queue_bytes_max / shards,
    };
    let limits = BatchLimits {
        readings_max: settings.batch_readings_max.min(queued_max.readings),
        // One batch is committed while the next is collected, both within the limit.
        bytes_max: queued_max.bytes / 2,
        interval_min_us: settings.commit_interval_min_ms * 1000,
        interval_quiet_us: settings.commit_interval_quiet_ms * 1000,
    };
    let neighbours = Arc::new(Neighbours::default());
    let shard = |shard| {
        let capacity = Capacity::new(queued_max, Arc::clone(metrics));
        let (sender, jobs) = mpsc::unbounded_channel();
        let end = ShardEnd {
            jobs: sender,
            capacity: capacity.clone(),
        };
        let receiver = IngestReceiver {
            shard,
            jobs,
            limits,
            neighbours: Arc::clone(&neighbours),
            metrics: Arc::clone(metrics),
        };
        (end, receiver)
    };
    let (shards, receivers): (Vec<_>, Vec<_>) = (0..shards).map(shard).unzip();
    let queue = IngestQueue {
        shards: shards.into(),
        shard: 0,
    };
    (queue, receivers)
}

impl IngestQueue {
    /// Selects the shard of `device` for all further submissions through this clone.
    pub fn pin_to_shard_of(&mut self, device: &str) {
        let mut hasher = DefaultHasher::new();
        device.hash(&mut hasher);
        self.shard = (hasher.finish() % self.shards.len() as u64) as usize;
    }

    /// Queues a submission if there is capacity now, in `grant` or in the queue; otherwise returns
    /// it.
    pub fn try_submit(
        &self,
        submission: Submission,
        mailbox: &Arc<Mailbox>,
        grant: Option<&mut Space>,
    ) -> Option<Submission> {
        let size = Size::of(&submission);
        let granted = grant.and_then(|grant| grant.split(size));
        match granted.or_else(|| self.capacity().try_acquire(size)) {
            Some(space) => self.send(submission, mailbox, space),
            None => return Some(submission),
        }
        None
    }

    /// Queues a submission as soon as there is capacity; waiting callers are served in order. Returns
    /// the burst grant: space for further submissions.
    ///
    /// # Cancel safety
    /// A cancelled call queues nothing and drops the submission.
    pub async fn submit(self, submission: Submission, mailbox: Arc<Mailbox>) -> Space {
        let size = Size::of(&submission);
        let mut grant = BURST_GRANT;
        grant += size;
        let mut grant = self.capacity().acquire(grant).await;
        let space = grant.split(size).expect("a grant holds its submission");
        self.send(submission, &mailbox, space);
        grant
    }

    fn capacity(&self) -> &Capacity {
        &self.shards[self.shard].capacity
    }

    fn send(&self, submission: Submission, mailbox: &Arc<Mailbox>, space: Space) {
        // Fails only after a fatal failure of the store: the whole gateway is ending.
        let _ = self.shards[self.shard].jobs.send(Job {
            submission,
            mailbox: Arc::clone(mailbox),
            space,
        });
    }
}

/// Receiver of a shard.
#[derive(Debug)]
pub struct IngestReceiver {
    shard: usize,
    jobs: mpsc::UnboundedReceiver<Job>,
    limits: BatchLimits,
    neighbours: Arc<Neighbours>,
    metrics: Arc<Metrics>,
}

impl IngestReceiver {
    /// Commits the submissions of this shard until every [`IngestQueue`] is dropped and everything
    /// is durable, then closes the store. A separate task answers each commit, so that the store
    /// receives the next batch meanwhile.
    pub async fn run<S: Store>(
        self,
        store: S,
        registry: Arc<Registry>,
        clock: SystemClock,
    ) -> Result<(), StoreError> {
        let limits = self.limits;
        let (committed, to_answer) = mpsc::unbounded_channel();
        let mut answering = tokio::spawn(answer_all(
            self.shard,
            to_answer,
            Arc::clone(&registry),
            Arc::clone(&self.metrics),
        ));
        let shard = Shard {
            queued: self,
            batcher: Batcher::new(limits),
            space: None,
            committed,
            registry,
            replacements: 0,
        };
        let interval_min = Duration::from_micros(limits.interval_min_us);
        let result = tokio::select! {
            result = shard.run(store, interval_min, clock) => result,
            // Ends after the shard, unless it fails: then no commit would be answered any more.
            ended = &mut answering => return Err(answering_ended(ended)),
        };
        answering
            .await
            .map_err(|error| answering_ended(Err(error)))?;
        result
    }
}

/// State of a shard's task.
struct Shard {
    queued: IngestReceiver,
    batcher: Batcher<Arc<Mailbox>>,
    /// Space of the batch that is being collected.
    space: Option<Space>,
    committed: mpsc::UnboundedSender<ToAnswer>,
    registry: Arc<Registry>,
    /// Number of store replacements that this shard has seen.
    replacements: usize,
}

/// A request to the task that answers commits.
enum ToAnswer {
    Commit {
        tagged: Box<Tagged<Arc<Mailbox>>>,
        committed: Committed,
        /// See [`Mailbox::set_epoch`].
        epoch: usize,
        /// Released once the commit is answered.
        space: Option<Space>,
    },
    /// Answered after all earlier requests.
    Flush(oneshot::Sender<()>),
}

impl Shard {
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
        // The queue is closed: commit the rest immediately, ignoring the minimum interval.
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
        let shard = self.queued.shard;
        let neighbours = Arc::clone(&self.queued.neighbours);
        let registry = Arc::clone(&self.registry);
        let space = self.space.take();
        let mut retry_after = RETRY_MIN;
        let metrics = Arc::clone(&self.queued.metrics);
        let mut outage = Outage::new(shard, &neighbours.shards_down, &registry, &metrics);
        let began = Instant::now();
        let received_us = tagged
            .batch
            .entries
            .iter()
            .map(|entry| entry.received_at_us);
        metrics.set_committing(shard, received_us.min());
        let mut committed = loop {
            let result = self.attempt(store, &tagged, &mut outage).await;
            match result {
                Ok(committed) => break committed,
                Err(StoreError::Transient(reason)) => {
                    metrics.store_failed();
                    outage.go_on(&reason);
                    tokio::time::sleep(retry_after).await;
                    retry_after = (retry_after * 2).min(RETRY_MAX);
                }
                Err(StoreError::Replaced(reason)) => self.forget_ids(&mut tagged, &reason).await,
                Err(fatal @ StoreError::Fatal(_)) => return Err(fatal),
            }
        };
        outage.is_over = true;
        metrics.set_committing(shard, None);
        drop(outage);
        metrics.set_store_up(neighbours.shards_down.load(Ordering::Relaxed) == 0);
        // Sessions have recognized these frames, so they are not among the frames of the batch.
        committed.stored.duplicates += tagged.batch.repeats.len() as u64;
        metrics.committed(&committed.stored, began.elapsed());
        // Fails only if the other task has panicked, which is reported at the end.
        let _ = self.committed.send(ToAnswer::Commit {
            tagged: Box::new(tagged),
            committed,
            epoch: self.replacements,
            space,
        });
        Ok(())
    }

    /// Adds a submission to the next batch, unless it has ids of a replaced store.
    fn gather(&mut self, job: Job) {
        let has_ids = !matches!(
            job.submission,
            Submission::Login(_) | Submission::Refusal(_) | Submission::Step(_)
        );
        if has_ids && job.mailbox.epoch() < self.replacements {
            return;
        }
        self.batcher.push(job.submission, job.mailbox);
        match &mut self.space {
            Some(space) => space.merge(job.space),
            none => *none = Some(job.space),
        }
    }

    /// Ends all sessions of the shard, and keeps only collected submissions without ids.
    async fn forget_ids(&mut self, tagged: &mut Tagged<Arc<Mailbox>>, reason: &str) {
        self.replacements += 1;
        let replacements = &self.queued.neighbours.replacements;
        let seen = replacements.fetch_max(self.replacements, Ordering::Relaxed);
        if seen < self.replacements {
            tracing::error!(
                %reason,
                "store was restored to an earlier state or a device was removed; ending sessions"
            );
        }
        // Flush first: a session of the former store is in the registry only after its login is answered.
        let (flushed, until_flushed) = oneshot::channel();
        let _ = self.committed.send(ToAnswer::Flush(flushed));
        let _ = until_flushed.await;
        self.registry.expire(self.queued.shard);
        tagged.forget_ids();
        self.batcher.forget_ids();
    }

    /// Commits a batch, collecting the next one meanwhile.
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
                    outage.go_on("not responding");
                }
                Some(job) = self.queued.jobs.recv(), if !self.batcher.is_full() => self.gather(job),
            }
        }
    }
}

fn answering_ended(ended: Result<(), JoinError>) -> StoreError {
    let reason = ended.err().map(|error| error.to_string());
    let reason = reason.unwrap_or_else(|| "task ended".to_owned());
    StoreError::Fatal(format!("receipt task: {reason}"))
}

/// Answers commits in order, and releases their capacity.
async fn answer_all(
    shard: usize,
    mut to_answer: mpsc::UnboundedReceiver<ToAnswer>,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
) {
    while let Some(to_answer) = to_answer.recv().await {
        match to_answer {
            ToAnswer::Commit {
                tagged,
                committed,
                epoch,
                space,
            } => {
                tagged
                    .logins
                    .iter()
                    .for_each(|mailbox| mailbox.set_epoch(epoch));
                count(&tagged, &committed, &metrics);
                answer(shard, &tagged, committed, &registry);
                drop(space);
            }
            ToAnswer::Flush(flushed) => drop(flushed.send(())),
        }
    }
}

/// Counts logins, and the delay of some of the frames that are acknowledged.
fn count(tagged: &Tagged<Arc<Mailbox>>, committed: &Committed, metrics: &Metrics) {
    for outcome in &committed.logins {
        metrics.login(outcome.name());
    }
    let entries = &tagged.batch.entries;
    let now_us = utc_now().as_microsecond();
    for entry in entries.iter().step_by(entries.len() / DELAYS_MAX + 1) {
        let delay_us = now_us.saturating_sub(entry.received_at_us).max(0);
        metrics.acknowledged(Duration::from_micros(delay_us.unsigned_abs()));
    }
}

/// A period in which a shard cannot commit: begins with the first failure and ends on drop. Several
/// shards that fail together are logged as one outage.
struct Outage<'a> {
    shard: usize,
    shards_down: &'a AtomicUsize,
    registry: &'a Registry,
    metrics: &'a Metrics,
    /// `None` before the first failure.
    reason: Option<String>,
    /// Whether the outage ended with a commit; the shard may also have given up.
    is_over: bool,
}

impl<'a> Outage<'a> {
    fn new(
        shard: usize,
        shards_down: &'a AtomicUsize,
        registry: &'a Registry,
        metrics: &'a Metrics,
    ) -> Self {
        Self {
            shard,
            shards_down,
            registry,
            metrics,
            reason: None,
            is_over: false,
        }
    }

    /// Records the start of an outage, or a new reason for it.
    fn go_on(&mut self, reason: &str) {
        let begins = self.reason.is_none();
        if begins {
            self.registry.announce(Obstacle::Shard(self.shard), true);
            self.metrics.set_store_up(false);
        }
        let is_first = begins && self.shards_down.fetch_add(1, Ordering::Relaxed) == 0;
        let is_news = self.reason.as_deref().is_some_and(|known| known != reason);
        if is_first || (is_news && self.shard == 0) {
            tracing::warn!(%reason, "store unavailable, retrying");
        }
        self.reason = Some(reason.to_owned());
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if self.reason.is_none() {
            return;
        }
        self.registry.announce(Obstacle::Shard(self.shard), false);
        if self.shards_down.fetch_sub(1, Ordering::Relaxed) == 1 && self.is_over {
            tracing::info!("store available again");
        }
    }
}

async fn sleep_until(due_us: Option<u64>, clock: &SystemClock) {
    match due_us {
        Some(due_us) => tokio::time::sleep_until(clock.instant(due_us).into()).await,
        None => std::future::pending().await,
    }
}

/// Sends each session the outcomes of its submissions, one message per commit.
pub(crate) fn answer(
    shard: usize,
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
        let admitted = match &outcome {
            LoginOutcome::Admitted(admission) => Some((admission.device, admission.revision)),
            _ => None,
        };
        let write = |mail: &mut Mail| mail.login = Some(outcome);
        match admitted {
            Some((device, revision)) => registry.admit(device, shard, mailbox, revision, write),
            None => mailbox.put(write),
        }
    }
}
