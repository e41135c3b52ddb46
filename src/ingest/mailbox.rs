//! Carries mail to a session from other tasks.
//!
//! Invariant: a mailbox is bounded, however slow its reader is, because the newest message of a
//! kind replaces all earlier ones.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::session::inbox::Mail;

#[derive(Debug, Default)]
pub struct Mailbox {
    /// Mail since the mailbox was last emptied.
    mail: Mutex<Mail>,
    arrived: Notify,
    /// See [`Mailbox::set_epoch`].
    epoch: AtomicUsize,
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
    /// Mail is removed only if it is returned. If a call that was woken is cancelled, [`Notify`]
    /// keeps the wake-up.
    pub async fn take(&self) -> Mail {
        self.arrived.notified().await;
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        // Safe after a panic: each field is set in one assignment.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
