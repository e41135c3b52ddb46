//! Messages to a session from outside its connection: receipts, outcomes from the store, requests
//! to close.
//!
//! Invariant: bounded however slow its reader is, because the newest message of a kind replaces all
//! earlier ones.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::session::Close;
use crate::store::{DeclareOutcome, LoginOutcome, Receipt};

/// A session's mailbox.
#[derive(Debug, Default)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    arrived: Notify,
    /// See [`Mailbox::set_epoch`].
    epoch: AtomicUsize,
}

/// Messages since the mailbox was last emptied.
#[derive(Debug, Default)]
pub struct Mail {
    /// Outcome of the session's login.
    pub login: Option<LoginOutcome>,
    /// Outcome of the session's DECLARE.
    pub declare: Option<DeclareOutcome>,
    /// The latest commit, and the last number of this session that it covered.
    pub receipt: Option<(Receipt, u64)>,
    /// Change of the store's availability.
    pub store_is_down: Option<bool>,
    /// Whether the store that the session logged in to was replaced.
    pub store_is_replaced: bool,
    /// Request to end the session.
    pub close: Option<Close>,
}

impl Mailbox {
    /// Updates the mail and wakes the session.
    pub fn put(&self, write: impl FnOnce(&mut Mail)) {
        write(&mut self.lock());
        self.arrived.notify_one();
    }

    /// Records which store the session logged in to, counted from 0 by its shard. Ids of one store
    /// mean nothing to another.
    pub fn set_epoch(&self, epoch: usize) {
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Returns the number set by [`Mailbox::set_epoch`], 0 before the login is answered.
    pub fn epoch(&self) -> usize {
        self.epoch.load(Ordering::Acquire)
    }

    /// Waits for mail, and takes all of it.
    ///
    /// # Cancel safety
    /// Mail is removed only if it is returned; a wake-up consumed by a cancelled call is kept by
    /// [`Notify`].
    pub async fn take(&self) -> Mail {
        self.arrived.notified().await;
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        // A writer that panicked left complete fields behind: each is set in one assignment.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
