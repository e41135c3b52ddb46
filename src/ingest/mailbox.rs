//! What reaches a session from outside its connection: receipts, the store's answers, orders to close.
//!
//! Invariant: bounded however slow its reader is, for the newest of a kind stands for all before it.

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

/// What has arrived since the mailbox was last emptied.
#[derive(Debug, Default)]
pub struct Mail {
    /// Answer to the session's login.
    pub login: Option<LoginOutcome>,
    /// Answer to the session's DECLARE.
    pub declare: Option<DeclareOutcome>,
    /// The latest commit, and the last number of this session's that it covered.
    pub receipt: Option<(Receipt, u64)>,
    /// Whether the store went down or came up.
    pub store_is_down: Option<bool>,
    /// Whether the store that admitted the session is not there any more.
    pub store_is_replaced: bool,
    /// An order to end.
    pub close: Option<Close>,
}

impl Mailbox {
    /// Puts something in and wakes the session.
    pub fn put(&self, write: impl FnOnce(&mut Mail)) {
        write(&mut self.lock());
        self.arrived.notify_one();
    }

    /// Records which store admitted the session, counted from 0 by its lane. Ids of one mean nothing to another.
    pub fn set_epoch(&self, epoch: usize) {
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Returns what [`Mailbox::set_epoch`] recorded, 0 before the login is answered.
    pub fn epoch(&self) -> usize {
        self.epoch.load(Ordering::Acquire)
    }

    /// Waits until something is in, and takes it all out.
    ///
    /// # Cancel safety
    /// Nothing is taken out unless it is returned; a wake-up that was consumed by a cancelled call is
    /// kept by [`Notify`].
    pub async fn take(&self) -> Mail {
        self.arrived.notified().await;
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        // A writer that panicked left whole fields behind: each is set in one assignment.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
