//! Live sessions: at most one per device, the newest. A session ends when an operator disables its
//! device or replaces the device's key.
//!
//! Logins arrive in the order of their commits, so "newest" means the last one committed. Changes
//! by operators arrive separately, possibly before a login that was committed earlier. The registry
//! therefore remembers changes, and compares the numbers that the store assigns to changes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fieldgate_protocol::error::Code;

use crate::ingest::mailbox::Mailbox;
use crate::session::Close;
use crate::session::inbox::Mail;
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
    /// Why nothing is stored at present.
    obstacles: HashSet<Obstacle>,
}

/// A reason why readings are not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Obstacle {
    /// The shard cannot commit. It affects only its own sessions.
    Shard(usize),
    /// A disk has too little space.
    Disk(&'static str),
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
    /// Registers a session after login, writes the outcome of the login to its mail, and ends an older session of the
    /// same device. `revision` is the number of the latest change to the device that the store knew.
    pub fn admit(
        &self,
        device: DeviceId,
        shard: usize,
        mailbox: &Arc<Mailbox>,
        revision: i64,
        write_outcome: impl FnOnce(&mut Mail),
    ) {
        let live = Live {
            shard,
            mailbox: Arc::clone(mailbox),
            revision,
        };
        let mut sessions = self.lock();
        let is_down = stops(&sessions.obstacles, shard);
        // Under the lock, so that an announcement meanwhile does not get lost.
        mailbox.put(|mail| {
            write_outcome(mail);
            mail.store_is_down = is_down.then_some(true);
        });
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

    /// Records that an obstacle exists or has passed, and notifies the live sessions that it stops or lets continue.
    pub fn announce(&self, obstacle: Obstacle, exists: bool) {
        let mut sessions = self.lock();
        let before = sessions.obstacles.clone();
        match exists {
            true => sessions.obstacles.insert(obstacle),
            false => sessions.obstacles.remove(&obstacle),
        };
        for session in sessions.live.values() {
            let is_down = stops(&sessions.obstacles, session.shard);
            if is_down != stops(&before, session.shard) {
                session
                    .mailbox
                    .put(|mail| mail.store_is_down = Some(is_down));
            }
        }
    }

    /// Returns whether a disk has too little space.
    pub fn is_disk_full(&self) -> bool {
        let is_disk = |obstacle: &Obstacle| matches!(obstacle, Obstacle::Disk(_));
        self.lock().obstacles.iter().any(is_disk)
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether one of the obstacles affects a shard.
fn stops(obstacles: &HashSet<Obstacle>, shard: usize) -> bool {
    obstacles.iter().any(|obstacle| match obstacle {
        Obstacle::Shard(down) => *down == shard,
        Obstacle::Disk(_) => true,
    })
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
                registry.admit(PUMP, 0, &mailbox, 4, |_| ());
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
        registry.admit(PUMP, 0, &mailbox, 0, |_| ());
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
        registry.admit(PUMP, 0, &mailbox, 7, |_| ());
        registry.change(&Changes {
            is_all: true,
            ..change(true, 3, 3)
        });
        let close = closed(&mailbox).await.expect("ends");
        assert_eq!(close.code, None);
    }

    async fn is_down(mailbox: &Mailbox) -> Option<bool> {
        mailbox.put(|_| ());
        mailbox.take().await.store_is_down
    }

    #[tokio::test]
    async fn sessions_continue_only_when_no_obstacle_is_left() {
        let registry = Registry::default();
        let (first, second) = (Arc::default(), Arc::default());
        let both = async || (is_down(&first).await, is_down(&second).await);
        registry.admit(PUMP, 0, &first, 0, |_| ());
        registry.admit(DeviceId(2), 1, &second, 0, |_| ());
        let (shard, disk) = (Obstacle::Shard(0), Obstacle::Disk("store"));
        for (obstacle, exists, expected) in [
            (shard, true, (Some(true), None)),
            (disk, true, (None, Some(true))),
            (disk, true, (None, None)),
            (shard, false, (None, None)),
            (disk, false, (Some(false), Some(false))),
        ] {
            registry.announce(obstacle, exists);
            assert_eq!(both().await, expected, "{obstacle:?} {exists}");
        }
    }

    #[tokio::test]
    async fn a_session_that_logs_in_on_a_full_disk_learns_of_it_with_its_login() {
        let registry = Registry::default();
        registry.announce(Obstacle::Disk("store"), true);
        let mailbox = Arc::default();
        registry.admit(PUMP, 0, &mailbox, 0, |_| ());
        assert_eq!(is_down(&mailbox).await, Some(true));
    }
}
