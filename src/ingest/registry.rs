//! Live sessions: at most one per device, the newest. A session ends when an operator disables its
//! device or replaces the device's key.
//!
//! Logins arrive in the order of their commits, so "newest" means the last one committed. Changes
//! by operators arrive separately, possibly before a login that was committed earlier. The registry
//! therefore remembers changes, and compares the numbers that the store assigns to changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fieldgate_protocol::error::Code;

use crate::ingest::mailbox::Mailbox;
use crate::session::Close;
use crate::store::DeviceId;
use crate::store::admin::device::Changes;

/// Live sessions by device.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    live: HashMap<DeviceId, Live>,
    /// Devices that operators have changed while this gateway runs.
    changed: HashMap<DeviceId, Changed>,
}

#[derive(Debug)]
struct Live {
    /// Shard of the ingest queue that serves the session.
    shard: usize,
    mailbox: Arc<Mailbox>,
    /// The latest change to its device known at login.
    revision: i64,
}

#[derive(Clone, Copy, Debug)]
struct Changed {
    is_enabled: bool,
    revision: i64,
    key_revision: i64,
}

impl Changed {
    /// Returns the close reason if this change ends `session`.
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
    /// Registers a session after login and ends an older one of the same device. `revision` is the
    /// number of the latest change to the device that the store knew.
    pub fn admit(&self, device: DeviceId, shard: usize, mailbox: &Arc<Mailbox>, revision: i64) {
        let live = Live {
            shard,
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

    /// Handles changes of devices by operators: ends the affected sessions.
    pub fn change(&self, changes: &Changes) {
        let mut sessions = self.lock();
        if changes.is_all {
            sessions.reset();
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

    /// Removes a session that has ended; a newer one of the same device stays.
    pub fn leave(&self, device: DeviceId, mailbox: &Arc<Mailbox>) {
        let live = &mut self.lock().live;
        if live
            .get(&device)
            .is_some_and(|current| Arc::ptr_eq(&current.mailbox, mailbox))
        {
            live.remove(&device);
        }
    }

    /// Ends every live session of a shard without further acknowledgements, because its store was
    /// replaced. Changes read from that store no longer apply either.
    pub fn expire(&self, shard: usize) {
        let mut sessions = self.lock();
        sessions.changed.clear();
        sessions.live.retain(|_, session| {
            let is_expired = session.shard == shard;
            if is_expired {
                session.mailbox.put(|mail| mail.store_is_replaced = true);
            }
            !is_expired
        });
    }

    /// Notifies every live session of a shard whether the store is available.
    pub fn announce_store(&self, shard: usize, is_down: bool) {
        let sessions = self.lock();
        for session in sessions
            .live
            .values()
            .filter(|session| session.shard == shard)
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
    /// Resets the known changes: the store was replaced, and its numbers are unrelated to the known
    /// ones.
    fn reset(&mut self) {
        self.changed.clear();
        // A device without changes logged in with revision 0, which is below all others. A session
        // with a higher number would survive future changes, so its device has to log in again.
        for live in self.live.values().filter(|live| live.revision > 0) {
            live.end(Some(Close {
                code: None,
                retry_after_ms: 0,
                detail: "the store was restored to an earlier state".into(),
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
    use crate::store::admin::device::{DeviceState, Position, StoredKey};

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
            position: Position::default(),
        }
    }

    async fn closed(mailbox: &Mailbox) -> Option<Close> {
        mailbox.put(|_| ());
        mailbox.take().await.close
    }

    async fn close_code(mailbox: &Mailbox) -> Option<Code> {
        closed(mailbox).await?.code
    }

    #[tokio::test]
    async fn a_change_ends_sessions_of_earlier_logins() {
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
                assert_eq!(close_code(&mailbox).await, expected, "{device:?}");
            }
        }
    }
    #[tokio::test]
    async fn changes_of_a_replaced_store_do_not_apply() {
        let registry = Registry::default();
        registry.change(&change(false, 7, 0));
        let other_store = Changes {
            devices: vec![],
            is_all: true,
            position: Position::default(),
        };
        registry.change(&other_store);
        let mailbox = Arc::default();
        registry.admit(PUMP, 0, &mailbox, 0);
        assert_eq!(close_code(&mailbox).await, None);
        // The device has its first key, which was never replaced.
        registry.change(&other_store);
        assert_eq!(close_code(&mailbox).await, None);
        registry.change(&change(false, 1, 0));
        assert_eq!(close_code(&mailbox).await, Some(Code::Disabled));
    }

    /// Its number would let it survive the next change.
    #[tokio::test]
    async fn a_session_of_a_replaced_store_with_a_changed_device_ends() {
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
