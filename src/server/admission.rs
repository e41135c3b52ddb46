//! Admission control for connections: limits how many peers connect, how fast and from where,
//! before they have authenticated. Also delays replies after failed authentication, and limits
//! logging.
//!
//! Invariants
//! - The tables of addresses and refusals are bounded, however many peers connect.
//! - A peer that proves a key is neither rejected nor delayed because of other peers at its
//!   address, except by the limit of connections per address.
//! - A slot is released when its [`ConnectionPermit`] is dropped, however the connection ended.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::config::AdmissionLimits;
use crate::ingest::mailbox::Mailbox;
use crate::metrics::{Metrics, Phase};
use crate::quota::rate::{Gcra, Rate};
use crate::session::Close;
use crate::store::Refusal;
use crate::time::SystemClock;

/// A handshake of this age is evicted for a new one when there are too many. A younger one may
/// belong to a device on a slow link.
const GIVES_WAY_AFTER_US: u64 = 1_000_000;
/// Delay before the reply to a first failed authentication.
const FAILURE_DELAY_MIN: Duration = Duration::from_millis(100);
/// An address without failures for this long is forgotten.
const FORGET_AFTER_US: u64 = 60_000_000;
const MINUTE_US: u64 = 60_000_000;
/// Maximum number of log lines per minute, over all addresses.
const LINES_MAX: u32 = 1000;
/// Maximum number of refusals waiting to be stored.
const REFUSALS_MAX: usize = 1024;
/// Maximum number of addresses remembered without a connection.
const REMEMBERED_MAX: usize = 4096;

#[derive(Debug)]
pub struct AdmissionControl {
    limits: watch::Receiver<AdmissionLimits>,
    connections_max: usize,
    metrics: Arc<Metrics>,
    places: Semaphore,
    handshake_ended: Notify,
    tables: Mutex<Tables>,
    refusals: Mutex<Refusals>,
}

/// Refusals waiting to be stored.
#[derive(Debug, Default)]
struct Refusals {
    logged: Vec<Refusal>,
    /// Refusals that were not logged individually, by address, claimed name and code.
    others: HashMap<(IpAddr, String, u8), Refusal>,
}

#[derive(Debug, Default)]
struct Tables {
    accepts: Gcra,
    addresses: HashMap<Address, Known>,
    /// Unauthenticated connections in the order of eviction.
    handshakes: BTreeMap<Rank, Handshake>,
    next_number: u64,
    lines: Lines,
}

/// The unit that limits apply to: an IPv4 address, or an IPv6 network of the size assigned to one
/// customer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Address {
    V4([u8; 4]),
    V6([u8; 8]),
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Address::V4(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Address::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    connections: usize,
    /// Number of failed authentications, each within [`FORGET_AFTER_US`] of the previous one.
    failures: u32,
    lines: Lines,
    lines_not_logged: u32,
    seen_at_us: u64,
}

/// Number of log lines in the current minute.
#[derive(Debug, Default)]
struct Lines {
    count: u32,
    since_us: u64,
}

impl Lines {
    fn have_room(&mut self, max: u32, now_us: u64) -> bool {
        if now_us >= self.since_us + MINUTE_US {
            (self.count, self.since_us) = (0, now_us);
        }
        self.count < max
    }
}

/// Order of eviction: peers that failed authentication first, then the oldest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    is_open: bool,
    number: u64,
}

#[derive(Debug)]
struct Handshake {
    begun_at_us: u64,
    mailbox: Arc<Mailbox>,
}

/// Permission for one connection. Holds its slot until it is dropped.
#[derive(Debug)]
pub struct ConnectionPermit {
    admission: Arc<AdmissionControl>,
    address: Address,
    /// Rank of the handshake; `None` once the peer has proved a key.
    handshake: Option<Rank>,
}

impl AdmissionControl {
    /// The limits may change, except for the number of connections.
    pub fn new(
        limits: watch::Receiver<AdmissionLimits>,
        metrics: Arc<Metrics>,
    ) -> AdmissionControl {
        let connections_max = limits.borrow().connections_max;
        AdmissionControl {
            places: Semaphore::new(connections_max),
            connections_max,
            limits,
            metrics,
            handshake_ended: Notify::new(),
            tables: Mutex::default(),
            refusals: Mutex::default(),
        }
    }

    /// Waits until another connection may be accepted.
    ///
    /// # Cancel safety
    /// A cancelled call takes no slot.
    pub async fn has_room(&self, clock: &SystemClock) {
        while let Some(wait) = self.handshakes_full(clock.now().mono_us) {
            let _ = timeout(wait, self.handshake_ended.notified()).await;
        }
        let per_s = self.limits.borrow().accepts_per_s_max;
        let rate = Rate {
            per_s,
            burst: per_s,
        };
        let now_us = clock.now().mono_us;
        let next_us = self.lock().accepts.consume(rate, 1, now_us);
        if next_us > now_us {
            sleep(Duration::from_micros(next_us - now_us)).await;
        }
    }

    /// Returns how long until the oldest handshake may be evicted, if there are too many
    /// handshakes.
    fn handshakes_full(&self, now_us: u64) -> Option<Duration> {
        let tables = self.lock();
        let is_full = tables.handshakes.len() >= self.limits.borrow().handshakes_max;
        let wait = tables.until_oldest_gives_way(now_us)?;
        (is_full && wait > Duration::ZERO).then_some(wait)
    }

    /// Waits for a slot for an accepted connection, or returns `None` if its address has too many.
    /// If no slot is free, the `mailbox` of the oldest handshake receives a request to end, once
    /// that handshake has lasted a while.
    ///
    /// Meanwhile, one more connection is open than there are slots. A handshake is evicted only
    /// while a connection waits.
    ///
    /// # Cancel safety
    /// A cancelled call takes no slot.
    pub async fn enter(
        self: &Arc<Self>,
        peer: IpAddr,
        mailbox: &Arc<Mailbox>,
        clock: &SystemClock,
    ) -> Option<ConnectionPermit> {
        if self.has_many_from(peer.into()) {
            return None;
        }
        while self.places.available_permits() == 0 {
            let wait = self.make_place(clock.now().mono_us);
            // Returned immediately: `accept` has taken the slot, and no other caller takes one in
            // between.
            match wait {
                Some(wait) => drop(timeout(wait, self.places.acquire()).await),
                None => drop(self.places.acquire().await),
            }
        }
        self.accept(peer, mailbox, clock.now().mono_us)
    }

    fn has_many_from(&self, address: Address) -> bool {
        let max = self.limits.borrow().connections_per_address_max;
        let tables = self.lock();
        let known = tables.addresses.get(&address);
        known.is_some_and(|known| known.connections >= max)
    }

    /// Evicts the oldest handshake if it has lasted a while. Returns the time until the next
    /// attempt makes sense, if there are handshakes.
    fn make_place(&self, now_us: u64) -> Option<Duration> {
        let mut tables = self.lock();
        let wait = tables.until_oldest_gives_way(now_us)?;
        if wait > Duration::ZERO {
            return Some(wait);
        }
        tables.end_oldest();
        Some(Duration::from_micros(GIVES_WAY_AFTER_US))
    }

    fn accept(
        self: &Arc<Self>,
        peer: IpAddr,
        mailbox: &Arc<Mailbox>,
        now_us: u64,
    ) -> Option<ConnectionPermit> {
        let address = Address::from(peer);
        let mut tables = self.lock();
        let known = tables.known(address, now_us, self.connections_max);
        if known.connections >= self.limits.borrow().connections_per_address_max {
            return None;
        }
        self.places.try_acquire().ok()?.forget();
        known.connections += 1;
        self.metrics.accepted();
        let rank = Rank {
            is_open: true,
            number: tables.next_number,
        };
        tables.next_number += 1;
        let handshake = Handshake {
            begun_at_us: now_us,
            mailbox: Arc::clone(mailbox),
        };
        tables.handshakes.insert(rank, handshake);
        if tables.handshakes.len() > self.limits.borrow().handshakes_max {
            tables.end_oldest();
        }
        Some(ConnectionPermit {
            admission: Arc::clone(self),
            address,
            handshake: Some(rank),
        })
    }

    /// Returns the number of lines suppressed since the last one if a line about `peer` may be
    /// logged now, otherwise `None`.
    pub fn may_log(&self, peer: IpAddr, now_us: u64) -> Option<u32> {
        let mut tables = self.lock();
        let all_have_room = tables.lines.have_room(LINES_MAX, now_us);
        let known = tables.known(peer.into(), now_us, self.connections_max);
        let max = self.limits.borrow().log_lines_per_address_max;
        if !known.lines.have_room(max, now_us) || !all_have_room {
            known.lines_not_logged += 1;
            return None;
        }
        known.lines.count += 1;
        let not_logged = std::mem::take(&mut known.lines_not_logged);
        tables.lines.count += 1;
        Some(not_logged)
    }

    /// Keeps a refusal until it is stored. A logged refusal is kept as it is; others are merged
    /// with similar ones. Excess refusals are dropped.
    pub fn note(&self, refusal: Refusal) {
        let mut refusals = { &self.refusals }
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Refusals { logged, others } = &mut *refusals;
        if logged.len() + others.len() >= REFUSALS_MAX {
            return;
        }
        if refusal.is_audited {
            return logged.push(refusal);
        }
        let key = (refusal.peer, refusal.device.clone(), refusal.code);
        let noted = others.entry(key).or_insert_with(|| Refusal {
            count: 0,
            ..refusal.clone()
        });
        noted.count += refusal.count;
        noted.at_us = refusal.at_us;
        noted.detail = refusal.detail;
    }

    pub fn take_refusals(&self) -> Vec<Refusal> {
        let mut refusals = { &self.refusals }
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Refusals { mut logged, others } = std::mem::take(&mut *refusals);
        logged.extend(others.into_values());
        logged.sort_by_key(|refusal| refusal.at_us);
        logged
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        // Safe after a panic: no thread leaves an incomplete entry.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionPermit {
    /// Marks the peer as authenticated.
    pub fn prove(&mut self, now_us: u64) {
        if let Some(begun_at_us) = self.end_handshake() {
            let took_us = now_us.saturating_sub(begun_at_us);
            // The time of one that was evicted or failed is not known any more.
            let took = (begun_at_us > 0).then(|| Duration::from_micros(took_us));
            self.admission.metrics.proved(took);
        }
    }

    /// Returns when the handshake began, or 0, unless it had ended before.
    fn end_handshake(&mut self) -> Option<u64> {
        let rank = self.handshake.take()?;
        let ended = self.admission.lock().handshakes.remove(&rank);
        self.admission.handshake_ended.notify_one();
        Some(ended.map_or(0, |handshake| handshake.begun_at_us))
    }

    pub fn is_preauth(&self) -> bool {
        self.handshake.is_some()
    }

    /// Records a failed authentication; returns the delay before the reply. The delay grows with
    /// each failure at the address; a peer that proves its key has no delay. Until then the peer is
    /// the first to be evicted.
    pub fn fail(&mut self, now_us: u64) -> Duration {
        let mut tables = self.admission.lock();
        if let Some(rank) = &mut self.handshake
            && let Some(failed) = tables.handshakes.remove(rank)
        {
            rank.is_open = false;
            let begun_at_us = 0;
            tables.handshakes.insert(
                *rank,
                Handshake {
                    begun_at_us,
                    ..failed
                },
            );
        }
        let known = tables.known(self.address, now_us, self.admission.connections_max);
        known.failures = known.failures.saturating_add(1);
        let doublings = (known.failures - 1).min(16);
        (FAILURE_DELAY_MIN * (1 << doublings)).min(Duration::from_millis(
            self.admission.limits.borrow().failure_delay_max_ms,
        ))
    }

    pub fn admission(&self) -> &AdmissionControl {
        &self.admission
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let phase = match self.end_handshake() {
            Some(_) => Phase::Handshake,
            None => Phase::Session,
        };
        self.admission.metrics.disconnected(phase);
        let mut tables = self.admission.lock();
        if let Some(known) = tables.addresses.get_mut(&self.address) {
            known.connections -= 1;
            if known.connections == 0 && known.failures == 0 && known.lines.count == 0 {
                tables.addresses.remove(&self.address);
            }
        }
        drop(tables);
        self.admission.places.add_permits(1);
    }
}

impl Tables {
    fn known(&mut self, address: Address, now_us: u64, connections_max: usize) -> &mut Known {
        if self.addresses.len() >= connections_max + REMEMBERED_MAX {
            self.forget(now_us);
        }
        let known = self.addresses.entry(address).or_default();
        if now_us >= known.seen_at_us + FORGET_AFTER_US {
            known.failures = 0;
        }
        known.seen_at_us = now_us;
        known
    }

    /// Returns the time until the oldest handshake may be evicted, if there is one.
    fn until_oldest_gives_way(&self, now_us: u64) -> Option<Duration> {
        let (_, oldest) = self.handshakes.first_key_value()?;
        let gives_way_us = oldest.begun_at_us + GIVES_WAY_AFTER_US;
        Some(Duration::from_micros(gives_way_us.saturating_sub(now_us)))
    }

    fn end_oldest(&mut self) {
        if let Some((_, oldest)) = self.handshakes.pop_first() {
            oldest.mailbox.put(|mail| {
                mail.close = Some(Close {
                    code: None,
                    retry_after_ms: 0,
                    detail: "handshake too slow while others waited".into(),
                });
            });
        }
    }

    /// Removes addresses without recent activity; if that is not enough, all addresses without a
    /// connection.
    fn forget(&mut self, now_us: u64) {
        let full = self.addresses.len();
        self.addresses.retain(|_, known| {
            known.connections > 0 || now_us < known.seen_at_us + FORGET_AFTER_US
        });
        if self.addresses.len() == full {
            self.addresses.retain(|_, known| known.connections > 0);
        }
    }
}

#[cfg(test)]
mod tests;
