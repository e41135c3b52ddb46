//! Which sessions are live: at most one for each device, the newest.
//!
//! It is told of admissions in the order of their commits, so "newest" means what the store saw last.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fieldgate_protocol::error::Code;

use crate::mailbox::Mailbox;
use crate::session::Close;
use crate::store::DeviceId;

/// The live sessions by device.
#[derive(Debug, Default)]
pub struct Registry {
    live: Mutex<HashMap<DeviceId, Live>>,
}

/// A session that was admitted.
#[derive(Debug)]
struct Live {
    /// Lane of the ingest queue that answers it.
    lane: usize,
    mailbox: Arc<Mailbox>,
}

impl Registry {
    /// A session was admitted: an older one of the same device is told to end.
    pub fn admit(&self, device: DeviceId, lane: usize, mailbox: &Arc<Mailbox>) {
        let live = Live {
            lane,
            mailbox: Arc::clone(mailbox),
        };
        let older = self.lock().insert(device, live);
        if let Some(older) = older.filter(|older| !Arc::ptr_eq(&older.mailbox, mailbox)) {
            older.mailbox.put(|mail| {
                mail.close = Some(Close {
                    code: Some(Code::TakenOver),
                    retry_after_ms: 0,
                    detail: "a newer connection of this device took over".into(),
                });
            });
        }
    }

    /// A session ended; a newer one of the same device stays.
    pub fn leave(&self, device: DeviceId, mailbox: &Arc<Mailbox>) {
        let mut live = self.lock();
        if live
            .get(&device)
            .is_some_and(|current| Arc::ptr_eq(&current.mailbox, mailbox))
        {
            live.remove(&device);
        }
    }

    /// Tells every live session of a lane whether the store answers.
    pub fn announce_store(&self, lane: usize, is_down: bool) {
        let live = self.lock();
        for session in live.values().filter(|session| session.lane == lane) {
            session
                .mailbox
                .put(|mail| mail.store_is_down = Some(is_down));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DeviceId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
