//! What stands behind sessions, step by step: queue, batcher, memory store and answers. It does what the tasks of
//! `ingest` do, so that anything can happen in between.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ingest::answer;
use crate::ingest::batcher::{BatchLimits, Batcher, Tagged};
use crate::ingest::mailbox::Mailbox;
use crate::ingest::registry::{Obstacle, Registry};
use crate::session::Submission;
use crate::store::memory::MemoryStore;
use crate::store::{Batch, Committed, Store, StoreError};
use crate::testing::fuzz::poll_once;
use crate::time::Now;

/// The memory store has a single shard.
const SHARD: usize = 0;

/// Progress of the current batch.
enum Work {
    Idle,
    Accepted(Tagged<Arc<Mailbox>>),
    /// Durable, but not answered yet.
    Committed(Tagged<Arc<Mailbox>>, Committed),
}

/// The parts of a gateway between its sessions and its store, with the store.
pub(super) struct Backend {
    pub store: MemoryStore,
    pub registry: Registry,
    queue: VecDeque<(Submission, Arc<Mailbox>)>,
    batcher: Batcher<Arc<Mailbox>>,
    /// Number of submissions in the batcher, and in the current batch.
    gathered: (usize, usize),
    work: Work,
    is_down: bool,
}

impl Backend {
    pub(super) fn new(store: MemoryStore, limits: BatchLimits) -> Backend {
        Backend {
            store,
            registry: Registry::default(),
            queue: VecDeque::new(),
            batcher: Batcher::new(limits),
            gathered: (0, 0),
            work: Work::Idle,
            is_down: false,
        }
    }

    pub(super) fn submit(&mut self, submission: Submission, mailbox: &Arc<Mailbox>) {
        self.queue.push_back((submission, Arc::clone(mailbox)));
    }

    /// Runs one step of the task that drives batcher and store; returns whether there was one. Calls `check` with the
    /// store after each commit.
    pub(super) fn work(
        &mut self,
        now: Now,
        check: impl FnOnce(&MemoryStore, &Batch, &Committed),
    ) -> bool {
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Idle => {
                let queued = self.queue.len();
                while !self.batcher.is_full()
                    && let Some((submission, mailbox)) = self.queue.pop_front()
                {
                    self.batcher.push(submission, mailbox);
                    self.gathered.0 += 1;
                }
                if let Some(tagged) = self.batcher.poll_batch(now.mono_us) {
                    self.gathered = (0, self.gathered.0);
                    self.work = Work::Accepted(tagged);
                    return true;
                }
                return self.queue.len() < queued;
            }
            Work::Accepted(tagged) => {
                let done = poll_once(self.store.commit(&tagged.batch)).expect("ready immediately");
                self.work = match done {
                    Ok(committed) => {
                        check(&self.store, &tagged.batch, &committed);
                        self.announce(false);
                        Work::Committed(tagged, committed)
                    }
                    Err(StoreError::Transient(_)) => {
                        self.announce(true);
                        Work::Accepted(tagged)
                    }
                    Err(StoreError::Fatal(reason) | StoreError::Replaced(reason)) => {
                        panic!("{reason}")
                    }
                };
            }
            Work::Committed(tagged, committed) => {
                answer(SHARD, &tagged, committed, &self.registry);
                self.gathered.1 = 0;
            }
        }
        true
    }

    /// Lets the commit of the current batch take too long, if there is one.
    pub(super) fn stall(&mut self) {
        if matches!(self.work, Work::Accepted(_)) {
            self.announce(true);
        }
    }

    fn announce(&mut self, is_down: bool) {
        if std::mem::replace(&mut self.is_down, is_down) != is_down {
            self.registry.announce(Obstacle::Shard(SHARD), is_down);
        }
    }
}

/// For the simulation.
#[cfg(test)]
impl Backend {
    /// Returns the number of submissions that are not answered yet.
    pub(super) fn pending(&self) -> usize {
        self.queue.len() + self.gathered.0 + self.gathered.1
    }

    pub(super) fn has_commit_unanswered(&self) -> bool {
        matches!(self.work, Work::Committed(..))
    }

    /// Returns when a batch that is being collected is due.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        let deadline = self.batcher.poll_deadline();
        deadline.filter(|_| !self.batcher.is_empty())
    }
}
