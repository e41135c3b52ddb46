//! Which sessions are live: at most one for each device, the newest, and none of a device that an operator
//! has disabled or given another key since it was admitted.
//!
//! It is told of admissions in the order of their commits, so "newest" means what the store saw last.
//! Changes by operators come from elsewhere, and may be known here before an admission that was committed
//! before them: so they are remembered, and both have the numbers that the store gives to changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fieldgate_protocol::error::Code;

use crate::ingest::mailbox::Mailbox;
use crate::session::Close;
use crate::store::DeviceId;
use crate::store::lifecycle::Changes;

/// The live sessions by device.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    live: HashMap<DeviceId, Live>,
    /// Of devices that operators have changed while this gateway runs.
    changed: HashMap<DeviceId, Changed>,
}

/// A session that was admitted.
#[derive(Debug)]
struct Live {
    /// Lane of the ingest queue that answers it.
    lane: usize,
    mailbox: Arc<Mailbox>,
    /// The latest change to its device that was known when it was admitted.
    revision: i64,
}

#[derive(Clone, Copy, Debug)]
struct Changed {
    is_enabled: bool,
    revision: i64,
    key_revision: i64,
}

impl Changed {
    /// What it means for a session of the device, if that is to end.
    fn verdict(self, session: &Live) -> Option<Close> {
        if self.revision <= session.revision {
            return None;
        }
        let (code, detail) = if !self.is_enabled {
            (Code::Disabled, "device is disabled")
        } else if self.key_revision > session.revision {
            (Code::Authentication, "the key of this device was replaced")
        } else {
            return None;
        };
        Some(Close {
            code: Some(code),
            retry_after_ms: 0,
            detail: detail.into(),
        })
    }
}

impl Registry {
    /// A session was admitted: an older one of the same device is told to end. `revision` is the latest
    /// change to the device that the store knew.
    pub fn admit(&self, device: DeviceId, lane: usize, mailbox: &Arc<Mailbox>, revision: i64) {
        let live = Live {
            lane,
            mailbox: Arc::clone(mailbox),
            revision,
        };
        let mut sessions = self.lock();
        if let Some(changed) = sessions.changed.get(&device) {
            live.end(changed.verdict(&live));
        }
        let older = sessions.live.insert(device, live);
        drop(sessions);
        if let Some(older) = older.filter(|older| !Arc::ptr_eq(&older.mailbox, mailbox)) {
            older.end(Some(Close {
                code: Some(Code::TakenOver),
                retry_after_ms: 0,
                detail: "a newer connection of this device took over".into(),
            }));
        }
    }

    /// Operators have changed devices: their sessions are told to end, if they may not go on.
    pub fn change(&self, changes: &Changes) {
        let mut sessions = self.lock();
        if changes.is_all {
            sessions.begin_anew();
        }
        for device in &changes.devices {
            let changed = Changed {
                is_enabled: device.is_enabled,
                revision: device.revision,
                key_revision: device.key_revision,
            };
            if let Some(live) = sessions.live.get(&device.device) {
                live.end(changed.verdict(live));
            }
            sessions.changed.insert(device.device, changed);
        }
    }

    /// A session ended; a newer one of the same device stays.
    pub fn leave(&self, device: DeviceId, mailbox: &Arc<Mailbox>) {
        let live = &mut self.lock().live;
        if live
            .get(&device)
            .is_some_and(|current| Arc::ptr_eq(&current.mailbox, mailbox))
        {
            live.remove(&device);
        }
    }

    /// Ends every live session of a lane, without acknowledging anything more: the store that admitted them
    /// is not there any more. What it said of operators' changes does not hold either.
    pub fn expire(&self, lane: usize) {
        let mut sessions = self.lock();
        sessions.changed.clear();
        sessions.live.retain(|_, session| {
            let is_expired = session.lane == lane;
            if is_expired {
                session.mailbox.put(|mail| mail.store_is_replaced = true);
            }
            !is_expired
        });
    }

    /// Tells every live session of a lane whether the store answers.
    pub fn announce_store(&self, lane: usize, is_down: bool) {
        let sessions = self.lock();
        for session in sessions
            .live
            .values()
            .filter(|session| session.lane == lane)
        {
            session
                .mailbox
                .put(|mail| mail.store_is_down = Some(is_down));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sessions {
    /// The store is another one than before, and its numbers have nothing to do with those that are known.
    fn begin_anew(&mut self) {
        self.changed.clear();
        // A device that nobody had changed was admitted with 0, which is below all. With a higher number a
        // session would outlive changes to come, so its device has to log in anew.
        for live in self.live.values().filter(|live| live.revision > 0) {
            live.end(Some(Close {
                code: None,
                retry_after_ms: 0,
                detail: "the store was put back to an earlier state".into(),
            }));
        }
    }
}

impl Live {
    fn end(&self, close: Option<Close>) {
        if let Some(close) = close {
            self.mailbox.put(|mail| mail.close = Some(close));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::lifecycle::{DeviceState, StoredKey};

    const PUMP: DeviceId = DeviceId(1);

    fn change(is_enabled: bool, revision: i64, key_revision: i64) -> Changes {
        let pump = DeviceState {
            device: PUMP,
            name: "pump".to_owned(),
            is_enabled,
            key: StoredKey::default(),
            revision,
            key_revision,
        };
        Changes {
            devices: vec![pump],
            is_all: false,
        }
    }

    async fn closed(mailbox: &Mailbox) -> Option<Close> {
        mailbox.put(|_| ());
        mailbox.take().await.close
    }

    async fn told(mailbox: &Mailbox) -> Option<Code> {
        closed(mailbox).await?.code
    }

    #[tokio::test]
    async fn a_change_ends_sessions_that_were_admitted_before_it() {
        for (device, expected) in [
            (change(false, 5, 0), Some(Code::Disabled)),
            (change(false, 4, 0), None),
            (change(true, 5, 5), Some(Code::Authentication)),
            (change(true, 5, 4), None),
            (change(true, 5, 0), None),
        ] {
            for is_known_first in [false, true] {
                let registry = Registry::default();
                let mailbox = Arc::default();
                if is_known_first {
                    registry.change(&device);
                }
                registry.admit(PUMP, 0, &mailbox, 4);
                if !is_known_first {
                    registry.change(&device);
                }
                assert_eq!(told(&mailbox).await, expected, "{device:?}");
            }
        }
    }
    #[tokio::test]
    async fn what_was_known_of_another_store_does_not_hold() {
        let registry = Registry::default();
        registry.change(&change(false, 7, 0));
        let other_store = Changes {
            devices: vec![],
            is_all: true,
        };
        registry.change(&other_store);
        let mailbox = Arc::default();
        registry.admit(PUMP, 0, &mailbox, 0);
        assert_eq!(told(&mailbox).await, None);
        // It has its first key, and nobody has changed that.
        registry.change(&other_store);
        assert_eq!(told(&mailbox).await, None);
        registry.change(&change(false, 1, 0));
        assert_eq!(told(&mailbox).await, Some(Code::Disabled));
    }

    /// By its number it would outlive whatever is changed next.
    #[tokio::test]
    async fn a_session_that_another_store_admitted_with_a_changed_device_ends() {
        let registry = Registry::default();
        let mailbox = Arc::<Mailbox>::default();
        registry.admit(PUMP, 0, &mailbox, 7);
        registry.change(&Changes {
            is_all: true,
            ..change(true, 3, 3)
        });
        let close = closed(&mailbox).await.expect("ends");
        assert_eq!(close.code, None);
    }
}
