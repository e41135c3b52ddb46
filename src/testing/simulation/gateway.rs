//! The gateway without its sockets, tasks and disk: real sessions, mailboxes, registry, batcher
//! and answers. This module does step by step what `connection` and `ingest` do around them, so that
//! anything can happen in between.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::BytesMut;
use fieldgate_protocol::error::Code;
use tokio_util::codec::Decoder;

use super::LinkId;
use super::device::FLEET_KEY;
use super::random::Random;
use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::FleetKey;
use crate::config::SessionLimits;
use crate::ingest::answer;
use crate::ingest::batcher::{BatchLimits, Batcher, Tagged};
use crate::ingest::mailbox::Mailbox;
use crate::ingest::registry::Registry;
use crate::net::codec::{CodecError, FrameCodec};
use crate::session::{Session, SessionSettings, Submission};
use crate::store::memory::MemoryStore;
use crate::store::{Committed, Store, StoreError};
use crate::testing::fuzz::poll_once;
use crate::time::Now;

/// The memory store has a single shard.
const LANE: usize = 0;
/// Maximum number of submissions that wait for the store.
const ROOM: usize = 12;

/// Progress of the current batch.
enum Work {
    Idle,
    Taken(Tagged<Arc<Mailbox>>),
    /// Durable, but not answered yet.
    Committed(Tagged<Arc<Mailbox>>, Committed),
}

pub(super) struct Served {
    pub session: Session,
    mailbox: Arc<Mailbox>,
    input: BytesMut,
    waiting: Option<Submission>,
}

impl Served {
    pub(super) fn reads(&self) -> bool {
        self.waiting.is_none() && self.session.wants_input()
    }
}

pub(super) struct Gateway {
    pub store: MemoryStore,
    pub served: BTreeMap<LinkId, Served>,
    settings: Arc<SessionSettings>,
    limits: BatchLimits,
    queue: VecDeque<(Submission, Arc<Mailbox>)>,
    batcher: Batcher<Arc<Mailbox>>,
    in_batcher: usize,
    in_work: usize,
    work: Work,
    is_down: bool,
    registry: Registry,
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
            store,
            served: BTreeMap::new(),
            settings,
            limits,
            queue: VecDeque::new(),
            batcher: Batcher::new(limits),
            in_batcher: 0,
            in_work: 0,
            work: Work::Idle,
            is_down: false,
            registry: Registry::default(),
        }
    }

    /// Crashes the gateway: only the store survives; commits remain, whether answered or not.
    pub(super) fn crash(&mut self) {
        let store = std::mem::take(&mut self.store);
        *self = Gateway::open(store, Arc::clone(&self.settings), self.limits);
    }

    pub(super) fn accept(&mut self, link: LinkId, nonce: [u8; 16], now: Now) {
        let peer = ([127, 0, 0, 1], 1000).into();
        let served = Served {
            session: Session::new(Arc::clone(&self.settings), peer, nonce, now),
            mailbox: Arc::default(),
            input: BytesMut::new(),
            waiting: None,
        };
        self.served.insert(link, served);
    }

    fn has_room(&self) -> bool {
        self.queue.len() + self.in_batcher + self.in_work < ROOM
    }

    pub(super) fn read(&mut self, link: LinkId, bytes: &[u8], now: Now) {
        self.served
            .get_mut(&link)
            .expect("still served")
            .input
            .extend_from_slice(bytes);
        self.take_frames(link, now);
    }

    fn take_frames(&mut self, link: LinkId, now: Now) {
        loop {
            let has_room = self.has_room();
            let served = self.served.get_mut(&link).expect("still served");
            if !served.reads() {
                return;
            }
            let frame_bytes_max = served.session.frame_bytes_max();
            match (FrameCodec { frame_bytes_max }).decode(&mut served.input) {
                Ok(Some(frame)) => {
                    let submitted = served.session.handle_frame(&frame.frame(), now);
                    if let Some(submission) = submitted {
                        if has_room {
                            self.queue
                                .push_back((submission, Arc::clone(&served.mailbox)));
                        } else {
                            served.waiting = Some(submission);
                        }
                    }
                }
                Ok(None) => {
                    let is_partial = !served.input.is_empty();
                    return served.session.handle_partial_frame(is_partial, now);
                }
                Err(CodecError::Frame(error)) => return served.session.handle_frame_error(error),
                Err(CodecError::Io(error)) => panic!("{error}"),
            }
        }
    }

    /// Gives capacity to a submission that waits for it; returns whether there was one.
    pub(super) fn grant(&mut self, link: LinkId, now: Now) -> bool {
        let has_room = self.has_room();
        let Some(served) = self.served.get_mut(&link) else {
            return false;
        };
        let Some(submission) = served.waiting.take_if(|_| has_room) else {
            return false;
        };
        self.queue
            .push_back((submission, Arc::clone(&served.mailbox)));
        self.take_frames(link, now);
        true
    }

    /// Delivers a session's mail; returns whether there was any.
    pub(super) fn take_mail(&mut self, link: LinkId, now: Now) -> bool {
        let Some(served) = self.served.get_mut(&link) else {
            return false;
        };
        let Some(mail) = poll_once(served.mailbox.take()) else {
            return false;
        };
        if let Some(outcome) = mail.login
            && let Some(submission) = served.session.handle_login_outcome(outcome, now)
        {
            self.queue
                .push_back((submission, Arc::clone(&served.mailbox)));
        }
        if let Some(outcome) = mail.declare
            && let Some(submission) = served.session.handle_declare_outcome(outcome, now)
        {
            self.queue
                .push_back((submission, Arc::clone(&served.mailbox)));
        }
        if let Some((receipt, through_seq)) = mail.receipt {
            served.session.handle_receipt(receipt, through_seq);
        }
        if let Some(is_down) = mail.store_is_down {
            served.session.handle_store_down(is_down, now);
        }
        if let Some(close) = mail.close {
            served.session.close(close);
        }
        self.take_frames(link, now);
        true
    }

    /// Returns the session's output and whether it has ended; an ended session is removed.
    pub(super) fn write(&mut self, link: LinkId, now: Now) -> (Vec<u8>, bool) {
        let Some(served) = self.served.get_mut(&link) else {
            return (Vec::new(), true);
        };
        let outbound = served.session.outbound();
        let said = outbound.bytes().to_vec();
        outbound.consume(said.len());
        if served.session.closed().is_none() {
            return (said, false);
        }
        let mut served = self.served.remove(&link).expect("found above");
        if let Some(device) = served.session.device() {
            self.registry.leave(device, &served.mailbox);
        }
        let code = served.session.closed().and_then(|close| close.code);
        let is_refused = code.is_some_and(|code| code >= Code::Protocol);
        if let Some(event) = served.session.handle_disconnect(is_refused, true, now) {
            self.queue.push_back((event, served.mailbox));
        }
        (said, true)
    }

    /// Runs one step of the task that drives batcher and store; returns whether there was one.
    pub(super) fn work(&mut self, now: Now) -> bool {
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Idle => {
                let queued = self.queue.len();
                while !self.batcher.is_full()
                    && let Some((submission, mailbox)) = self.queue.pop_front()
                {
                    self.batcher.push(submission, mailbox);
                    self.in_batcher += 1;
                }
                if let Some(tagged) = self.batcher.poll_batch(now.mono_us) {
                    self.in_work = std::mem::take(&mut self.in_batcher);
                    self.work = Work::Taken(tagged);
                    return true;
                }
                self.queue.len() < queued
            }
            Work::Taken(tagged) => {
                let done = poll_once(self.store.commit(&tagged.batch)).expect("ready immediately");
                self.work = match done {
                    Ok(committed) => Work::Committed(tagged, committed),
                    Err(StoreError::Transient(_)) => {
                        if !std::mem::replace(&mut self.is_down, true) {
                            self.registry.announce_store(LANE, true);
                        }
                        Work::Taken(tagged)
                    }
                    Err(StoreError::Fatal(reason) | StoreError::Replaced(reason)) => {
                        panic!("{reason}")
                    }
                };
                true
            }
            Work::Committed(tagged, committed) => {
                if std::mem::take(&mut self.is_down) {
                    self.registry.announce_store(LANE, false);
                }
                answer(LANE, &tagged, committed, &self.registry);
                self.in_work = 0;
                true
            }
        }
    }

    pub(super) fn has_commit_unanswered(&self) -> bool {
        matches!(self.work, Work::Committed(..))
    }

    /// Returns the next deadline of the gateway.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        let sessions = self
            .served
            .values()
            .filter_map(|served| served.session.poll_deadline());
        let batch = self
            .batcher
            .poll_deadline()
            .filter(|_| !self.batcher.is_empty());
        sessions.chain(batch).min()
    }
}
