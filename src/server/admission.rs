//! What strangers may do before they have proved that they are devices: how many may connect, how fast,
//! from where; how long they wait after a failure; how much of it is logged.
//!
//! Invariants
//! - The tables of addresses and refusals are bounded, whatever the number of those who come.
//! - Whoever proves a key is neither refused nor delayed for what others at its address did, but for the
//!   number of connections there.
//! - A place is given back when its [`Visit`] is dropped, however the connection ended.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};

use crate::ingest::mailbox::Mailbox;
use crate::quota::rate::{Meter, Rate};
use crate::session::Close;
use crate::store::Refusal;
use crate::time::SystemClock;

/// A handshake of this age gives way to new ones when there are too many; a younger one may be a device's
/// over a slow link.
const GIVES_WAY_AFTER_US: u64 = 1_000_000;
/// First wait for the answer to a failed authentication.
const FAILURE_DELAY_MIN: Duration = Duration::from_millis(100);
/// After so long nothing of an address is remembered.
const FORGET_AFTER_US: u64 = 60_000_000;
const MINUTE_US: u64 = 60_000_000;
/// Lines of the log in a minute for all addresses, whatever their number.
const LINES_MAX: u32 = 1000;
/// Refusals that wait to be written down.
const REFUSALS_MAX: usize = 1024;
/// Addresses without a connection that are remembered.
const REMEMBERED_MAX: usize = 4096;

/// Bounds on strangers.
#[derive(Clone, Copy, Debug)]
pub struct EntranceLimits {
    /// Connections at once; further ones wait, or the oldest that has not proved a key yet ends.
    pub connections_max: usize,
    /// Of those, from one address; further ones are closed.
    pub connections_per_address_max: usize,
    /// Connections at once that have not proved a key yet; further ones wait, or the oldest ends.
    pub handshakes_max: usize,
    /// Connections that are accepted in a second.
    pub accepts_per_s_max: u64,
    /// Longest wait for the answer to a failed authentication.
    pub failure_delay_max: Duration,
    /// Lines of the log that tell of one address in a minute.
    pub log_lines_per_address_max: u32,
}

/// The entrance that all connections come through.
#[derive(Debug)]
pub struct Entrance {
    limits: EntranceLimits,
    places: Semaphore,
    /// A handshake has ended.
    handshake_ended: Notify,
    tables: Mutex<Tables>,
    refusals: Mutex<Refusals>,
}

/// Refusals to be written down.
#[derive(Debug, Default)]
struct Refusals {
    logged: Vec<Refusal>,
    /// By address, claimed name and code.
    others: HashMap<(IpAddr, String, u8), Refusal>,
}

#[derive(Debug, Default)]
struct Tables {
    accepts: Meter,
    addresses: HashMap<Address, Known>,
    /// The first is the first to give way.
    handshakes: BTreeMap<Rank, Handshake>,
    next_number: u64,
    lines: Lines,
}

/// Who counts as one: an IPv4 address, or an IPv6 network of the size that one customer gets.
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

/// What is known of an address.
#[derive(Debug, Default)]
struct Known {
    connections: usize,
    /// Authentications that failed, the latest less than [`FORGET_AFTER_US`] after the one before it.
    failures: u32,
    lines: Lines,
    lines_not_logged: u32,
    seen_at_us: u64,
}

/// Lines of the log in a minute.
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

/// Those who have failed to prove a key come before those who still may, and then the oldest first.
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

/// A connection's place.
#[derive(Debug)]
pub struct Visit {
    entrance: Arc<Entrance>,
    address: Address,
    /// The handshake's; `None` once a key was proved.
    handshake: Option<Rank>,
}

impl Entrance {
    /// Nobody has come yet.
    pub fn new(limits: EntranceLimits) -> Entrance {
        Entrance {
            limits,
            places: Semaphore::new(limits.connections_max),
            handshake_ended: Notify::new(),
            tables: Mutex::default(),
            refusals: Mutex::default(),
        }
    }

    /// Waits until one more may be accepted.
    ///
    /// # Cancel safety
    /// A cancelled call takes no place.
    pub async fn has_room(&self, clock: &SystemClock) {
        while let Some(wait) = self.handshakes_full(clock.now().mono_us) {
            let _ = timeout(wait, self.handshake_ended.notified()).await;
        }
        let rate = Rate {
            per_s: self.limits.accepts_per_s_max,
            burst: self.limits.accepts_per_s_max,
        };
        let now_us = clock.now().mono_us;
        let next_us = self.lock().accepts.spend(rate, 1, now_us);
        if next_us > now_us {
            sleep(Duration::from_micros(next_us - now_us)).await;
        }
    }

    /// How long until the oldest handshake may be ended, if there are too many.
    fn handshakes_full(&self, now_us: u64) -> Option<Duration> {
        let tables = self.lock();
        let is_full = tables.handshakes.len() >= self.limits.handshakes_max;
        let wait = tables.until_oldest_gives_way(now_us)?;
        (is_full && wait > Duration::ZERO).then_some(wait)
    }

    /// Gives a connection that was accepted its place, as soon as there is one; `None` if there are too many
    /// from its address. Where places or handshakes have run out, the `mailbox` of the oldest handshake is told
    /// to end, if that has taken a while.
    ///
    /// One connection more than there are places is open meanwhile. So nobody is told to end as long as nobody
    /// waits.
    ///
    /// # Cancel safety
    /// A cancelled call takes no place.
    pub async fn enter(
        self: &Arc<Self>,
        peer: IpAddr,
        mailbox: &Arc<Mailbox>,
        clock: &SystemClock,
    ) -> Option<Visit> {
        if self.has_many_from(peer.into()) {
            return None;
        }
        while self.places.available_permits() == 0 {
            let wait = self.make_place(clock.now().mono_us);
            // A place is given back at once: it is taken by `admit`, and nobody else takes one in between.
            match wait {
                Some(wait) => drop(timeout(wait, self.places.acquire()).await),
                None => drop(self.places.acquire().await),
            }
        }
        self.admit(peer, mailbox, clock.now().mono_us)
    }

    fn has_many_from(&self, address: Address) -> bool {
        let max = self.limits.connections_per_address_max;
        let tables = self.lock();
        let known = tables.addresses.get(&address);
        known.is_some_and(|known| known.connections >= max)
    }

    /// Ends the oldest handshake if it has taken a while; gives the time after which it is worth another try,
    /// if there are handshakes.
    fn make_place(&self, now_us: u64) -> Option<Duration> {
        let mut tables = self.lock();
        let wait = tables.until_oldest_gives_way(now_us)?;
        if wait > Duration::ZERO {
            return Some(wait);
        }
        tables.end_oldest();
        Some(Duration::from_micros(GIVES_WAY_AFTER_US))
    }

    fn admit(self: &Arc<Self>, peer: IpAddr, mailbox: &Arc<Mailbox>, now_us: u64) -> Option<Visit> {
        let address = Address::from(peer);
        let mut tables = self.lock();
        let known = tables.known(address, now_us, self.limits.connections_max);
        if known.connections >= self.limits.connections_per_address_max {
            return None;
        }
        self.places.try_acquire().ok()?.forget();
        known.connections += 1;
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
        if tables.handshakes.len() > self.limits.handshakes_max {
            tables.end_oldest();
        }
        Some(Visit {
            entrance: Arc::clone(self),
            address,
            handshake: Some(rank),
        })
    }

    /// Whether a line on `peer` may be logged, and how many were not since the latest one that was.
    pub fn may_log(&self, peer: IpAddr, now_us: u64) -> Option<u32> {
        let mut tables = self.lock();
        let all_have_room = tables.lines.have_room(LINES_MAX, now_us);
        let known = tables.known(peer.into(), now_us, self.limits.connections_max);
        let max = self.limits.log_lines_per_address_max;
        if !known.lines.have_room(max, now_us) || !all_have_room {
            known.lines_not_logged += 1;
            return None;
        }
        known.lines.count += 1;
        let not_logged = std::mem::take(&mut known.lines_not_logged);
        tables.lines.count += 1;
        Some(not_logged)
    }

    /// Keeps a refusal until it is written down: one that was logged as it is, others together with those that
    /// are like them. When there are too many it is not kept.
    pub fn note(&self, refusal: Refusal) {
        let mut refusals = { &self.refusals }
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Refusals { logged, others } = &mut *refusals;
        if logged.len() + others.len() >= REFUSALS_MAX {
            return;
        }
        if refusal.is_told {
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

    /// The refusals that are to be written down.
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
        // Whoever panicked left whole entries behind.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visit {
    /// The peer has proved a key: it is no stranger any more.
    pub fn prove(&mut self) {
        if let Some(rank) = self.handshake.take() {
            self.entrance.lock().handshakes.remove(&rank);
            self.entrance.handshake_ended.notify_one();
        }
    }

    /// Whether the peer has not proved a key.
    pub fn is_stranger(&self) -> bool {
        self.handshake.is_some()
    }

    /// The peer has failed to prove a key: how long it is to wait for the answer. It waits longer with each
    /// failure at its address; one that proves its key waits for nothing. Meanwhile it gives way to all others.
    pub fn fail(&mut self, now_us: u64) -> Duration {
        let mut tables = self.entrance.lock();
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
        let known = tables.known(self.address, now_us, self.entrance.limits.connections_max);
        known.failures = known.failures.saturating_add(1);
        let doublings = (known.failures - 1).min(16);
        (FAILURE_DELAY_MIN * (1 << doublings)).min(self.entrance.limits.failure_delay_max)
    }

    /// The entrance that it came by.
    pub fn entrance(&self) -> &Entrance {
        &self.entrance
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.prove();
        let mut tables = self.entrance.lock();
        if let Some(known) = tables.addresses.get_mut(&self.address) {
            known.connections -= 1;
            if known.connections == 0 && known.failures == 0 && known.lines.count == 0 {
                tables.addresses.remove(&self.address);
            }
        }
        drop(tables);
        self.entrance.places.add_permits(1);
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

    /// How long the oldest handshake has before it must give way, if there is one.
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
                    detail: "its handshake took long, and others waited".into(),
                });
            });
        }
    }

    /// Those who were not seen lately, or all without a connection if that is not enough.
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
mod tests {
    use super::*;

    const LIMITS: EntranceLimits = EntranceLimits {
        connections_max: 100,
        connections_per_address_max: 3,
        handshakes_max: 5,
        accepts_per_s_max: 1_000_000,
        failure_delay_max: Duration::from_secs(5),
        log_lines_per_address_max: 2,
    };

    const NOW_US: u64 = 100_000_000;

    fn entrance(limits: EntranceLimits) -> Arc<Entrance> {
        Arc::new(Entrance::new(limits))
    }

    fn from(entrance: &Arc<Entrance>, address: &str) -> Option<Visit> {
        entrance.admit(address.parse().unwrap(), &Arc::default(), NOW_US)
    }

    #[test]
    fn an_address_has_so_many_places_and_others_have_theirs() {
        let entrance = entrance(LIMITS);
        let mut visits: Vec<_> = (0..3)
            .map(|_| from(&entrance, "10.0.0.1").unwrap())
            .collect();
        assert!(from(&entrance, "10.0.0.1").is_none());
        // The same machine, written otherwise.
        assert!(from(&entrance, "::ffff:10.0.0.1").is_none());
        let other = from(&entrance, "10.0.0.2").unwrap();
        visits.pop();
        visits.push(from(&entrance, "10.0.0.1").unwrap());
        assert!(from(&entrance, "10.0.0.1").is_none());
        drop((visits, other));
        assert!(entrance.lock().addresses.is_empty());
        assert_eq!(entrance.places.available_permits(), 100);
    }

    #[test]
    fn one_customers_ipv6_network_is_one_address() {
        let entrance = entrance(LIMITS);
        let _visits: Vec<_> = ["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff::3"]
            .map(|address| from(&entrance, address).unwrap())
            .into();
        assert!(from(&entrance, "2001:db8:1:2::4").is_none());
        assert!(from(&entrance, "2001:db8:1:3::1").is_some());
    }

    #[tokio::test]
    async fn the_oldest_handshake_gives_way_and_those_who_proved_a_key_do_not() {
        let entrance = entrance(LIMITS);
        let mut visits = Vec::new();
        let mut mailboxes = Vec::new();
        for host in 1..=6_u8 {
            let mailbox: Arc<Mailbox> = Arc::default();
            let peer = IpAddr::from([10, 0, 0, host]);
            let mut visit = entrance.admit(peer, &mailbox, NOW_US).unwrap();
            if host == 1 {
                visit.prove();
            }
            visits.push(visit);
            mailboxes.push(mailbox);
        }
        let wait = entrance.handshakes_full(NOW_US + 400_000);
        assert_eq!(wait, Some(Duration::from_millis(600)), "all are young");
        let later_us = NOW_US + GIVES_WAY_AFTER_US;
        assert_eq!(entrance.handshakes_full(later_us), None);
        let peer = IpAddr::from([10, 0, 0, 7]);
        let _late = entrance.admit(peer, &Arc::default(), NOW_US).unwrap();
        let told = tokio::time::timeout(Duration::ZERO, mailboxes[0].take()).await;
        assert!(told.is_err(), "the first has proved its key");
        assert!(mailboxes[1].take().await.close.is_some());
        let told = tokio::time::timeout(Duration::ZERO, mailboxes[2].take()).await;
        assert!(told.is_err(), "one is enough");
        drop(visits);
        assert!(entrance.handshakes_full(NOW_US).is_none());
        assert_eq!(entrance.lock().handshakes.len(), 1);
    }

    #[tokio::test]
    async fn those_who_failed_give_way_before_those_who_are_slow() {
        let entrance = entrance(LIMITS);
        let admit = |host: u8, mailbox: &Arc<Mailbox>| {
            let peer = IpAddr::from([10, 0, 0, host]);
            entrance.admit(peer, mailbox, NOW_US).unwrap()
        };
        let _slow: Vec<Visit> = (1..5).map(|host| admit(host, &Arc::default())).collect();
        let mailbox = Arc::default();
        let mut failed = admit(5, &mailbox);
        assert!(entrance.handshakes_full(NOW_US).is_some(), "all are young");
        failed.fail(NOW_US);
        assert_eq!(entrance.handshakes_full(NOW_US), None);
        let _next = admit(6, &Arc::default());
        assert!(mailbox.take().await.close.is_some());
        drop(failed);
        assert_eq!(entrance.lock().handshakes.len(), 5);
    }

    #[test]
    fn failures_wait_longer_and_longer() {
        let entrance = entrance(LIMITS);
        let mut visit = from(&entrance, "10.0.0.1").unwrap();
        let mut other = from(&entrance, "10.0.0.2").unwrap();
        let waits: Vec<u128> = (0..8).map(|_| visit.fail(NOW_US).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(other.fail(NOW_US).as_millis(), 100);
        assert_eq!(visit.fail(NOW_US + FORGET_AFTER_US).as_millis(), 100);
    }

    #[test]
    fn lines_of_an_address_are_counted() {
        let entrance = entrance(LIMITS);
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let may = |_| entrance.may_log(one, NOW_US);
        assert_eq!(
            (0..4).map(may).collect::<Vec<_>>(),
            [Some(0), Some(0), None, None]
        );
        assert_eq!(entrance.may_log(other, NOW_US), Some(0));
        let told = entrance.may_log(one, NOW_US + FORGET_AFTER_US);
        assert_eq!(told, Some(2), "it is told how many were left out");
    }

    #[test]
    fn many_addresses_together_cannot_fill_the_log() {
        let entrance = entrance(LIMITS);
        let may = |now_us| {
            let from = |number: u32| entrance.may_log(IpAddr::from(number.to_be_bytes()), now_us);
            (0..5000).filter_map(from).count()
        };
        assert_eq!(may(NOW_US), LINES_MAX as usize);
        assert_eq!(may(NOW_US + MINUTE_US), LINES_MAX as usize);
    }

    #[test]
    fn the_table_is_bounded_whoever_comes() {
        let entrance = entrance(LIMITS);
        let stays = from(&entrance, "192.0.2.1").unwrap();
        for number in 0..20_000_u32 {
            let address = IpAddr::from(number.to_be_bytes());
            entrance.may_log(address, NOW_US);
            let count = entrance.lock().addresses.len();
            assert!(count <= LIMITS.connections_max + REMEMBERED_MAX, "{count}");
        }
        assert_eq!(entrance.lock().addresses[&stays.address].connections, 1);
    }
}
