//! The gateway without its sockets, tasks and disk: real sessions with their inboxes and mailboxes, and
//! what stands behind them. This module carries bytes, mail and submissions step by step, as
//! `connection` does, so that anything can happen in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldgate_protocol::error::Code;

use super::device::FLEET_KEY;
use super::link::LinkId;
use super::random::Random;
use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::FleetKey;
use crate::config::SessionLimits;
use crate::ingest::batcher::BatchLimits;
use crate::ingest::mailbox::Mailbox;
use crate::session::inbox::Inbox;
use crate::session::{Session, SessionSettings, Submission};
use crate::store::memory::MemoryStore;
use crate::testing::backend::Backend;
use crate::testing::fuzz::poll_once;
use crate::time::Now;

/// Maximum number of submissions that wait for the store.
const ROOM: usize = 12;

pub(super) struct Served {
    pub inbox: Inbox,
    mailbox: Arc<Mailbox>,
    waiting: Option<Submission>,
}

pub(super) struct Gateway {
    pub backend: Backend,
    pub served: BTreeMap<LinkId, Served>,
    settings: Arc<SessionSettings>,
    limits: BatchLimits,
}

impl Gateway {
    pub(super) fn new(random: &mut Random) -> Gateway {
        let settings = SessionSettings {
            credentials: Arc::new(Credentials::new(FleetKey::from_bytes(FLEET_KEY))),
            limits: SessionLimits {
                window_frames: 1 + random.below(16),
                ..SessionLimits::default()
            },
            ..SessionSettings::default()
        };
        let limits = BatchLimits {
            readings_max: 1 + random.index(60),
            bytes_max: 1 << 20,
            interval_min_us: if random.takes(50) { 0 } else { 50_000 },
            interval_quiet_us: if random.takes(50) { 0 } else { 200_000 },
        };
        Gateway::open(MemoryStore::default(), Arc::new(settings), limits)
    }

    fn open(store: MemoryStore, settings: Arc<SessionSettings>, limits: BatchLimits) -> Gateway {
        Gateway {
            backend: Backend::new(store, limits),
            served: BTreeMap::new(),
            settings,
            limits,
        }
    }

    /// Crashes the gateway: only the store survives; commits remain, whether answered or not.
    pub(super) fn crash(&mut self) {
        let store = std::mem::take(&mut self.backend.store);
        *self = Gateway::open(store, Arc::clone(&self.settings), self.limits);
    }

    pub(super) fn accept(&mut self, link: LinkId, nonce: [u8; 16], now: Now) {
        let peer = ([127, 0, 0, 1], 1000).into();
        let session = Session::new(Arc::clone(&self.settings), peer, nonce, now);
        let served = Served {
            inbox: Inbox::new(session),
            mailbox: Arc::default(),
            waiting: None,
        };
        self.served.insert(link, served);
    }

    fn has_room(&self) -> bool {
        self.backend.pending() < ROOM
    }

    /// Queues a session's submissions until there is none or one must wait for room.
    pub(super) fn submit_all(&mut self, link: LinkId, now: Now) {
        loop {
            let has_room = self.has_room();
            let Some(served) = self.served.get_mut(&link) else {
                return;
            };
            match served.inbox.poll_submission(now) {
                None => return,
                Some(submission) if has_room => self.queue(link, submission),
                waiting => served.waiting = waiting,
            }
        }
    }

    fn queue(&mut self, link: LinkId, submission: Submission) {
        let served = self.served.get_mut(&link).expect("still served");
        served.inbox.handle_queued();
        self.backend.submit(submission, &served.mailbox);
    }

    /// Gives room to a submission that waits for it; returns whether there was one.
    pub(super) fn grant(&mut self, link: LinkId) -> bool {
        let has_room = self.has_room();
        let served = self.served.get_mut(&link).filter(|_| has_room);
        match served.and_then(|served| served.waiting.take()) {
            Some(submission) => self.queue(link, submission),
            None => return false,
        }
        true
    }

    /// Delivers a session's mail; returns whether there was any.
    pub(super) fn take_mail(&mut self, link: LinkId, now: Now) -> bool {
        let served = self.served.get_mut(&link);
        let mail = served.and_then(|served| Some((poll_once(served.mailbox.take())?, served)));
        let Some((mail, served)) = mail else {
            return false;
        };
        served.inbox.handle_mail(mail, now);
        true
    }

    /// Returns the session's output and whether it has ended; an ended session is removed.
    pub(super) fn write(&mut self, link: LinkId, now: Now) -> (Vec<u8>, bool) {
        let Some(served) = self.served.get_mut(&link) else {
            return (Vec::new(), true);
        };
        let outbound = served.inbox.session.outbound();
        let said = outbound.bytes().to_vec();
        outbound.consume(said.len());
        if served.inbox.session.closed().is_none() {
            return (said, false);
        }
        let mut served = self.served.remove(&link).expect("found above");
        if let Some(device) = served.inbox.session.device() {
            self.backend.registry.leave(device, &served.mailbox);
        }
        let code = served.inbox.session.closed().and_then(|close| close.code);
        let is_refused = code.is_some_and(|code| code >= Code::Protocol);
        if let Some(event) = served
            .inbox
            .session
            .handle_disconnect(is_refused, true, now)
        {
            self.backend.submit(event, &served.mailbox);
        }
        (said, true)
    }

    pub(super) fn deadline_us(&self) -> Option<u64> {
        let sessions = self
            .served
            .values()
            .filter_map(|served| served.inbox.session.poll_deadline());
        sessions.chain(self.backend.deadline_us()).min()
    }
}
