use super::*;

const LIMITS: AdmissionLimits = AdmissionLimits {
    connections_max: 100,
    connections_per_address_max: 3,
    handshakes_max: 5,
    accepts_per_s_max: 1_000_000,
    failure_delay_max_ms: 5000,
    log_lines_per_address_max: 2,
};

const NOW_US: u64 = 100_000_000;

fn admission(limits: AdmissionLimits) -> Arc<AdmissionControl> {
    let (_, limits) = watch::channel(limits);
    Arc::new(AdmissionControl::new(limits, Arc::default()))
}

fn from(admission: &Arc<AdmissionControl>, address: &str) -> Option<ConnectionPermit> {
    admission.accept(address.parse().unwrap(), &Arc::default(), NOW_US)
}

#[test]
fn an_address_has_its_own_number_of_slots() {
    let admission = admission(LIMITS);
    let mut visits: Vec<_> = (0..3)
        .map(|_| from(&admission, "10.0.0.1").unwrap())
        .collect();
    assert!(from(&admission, "10.0.0.1").is_none());
    // The same address in IPv4-mapped form.
    assert!(from(&admission, "::ffff:10.0.0.1").is_none());
    let other = from(&admission, "10.0.0.2").unwrap();
    visits.pop();
    visits.push(from(&admission, "10.0.0.1").unwrap());
    assert!(from(&admission, "10.0.0.1").is_none());
    drop((visits, other));
    assert!(admission.lock().addresses.is_empty());
    assert_eq!(admission.places.available_permits(), 100);
}

#[test]
fn one_customers_ipv6_network_is_one_address() {
    let admission = admission(LIMITS);
    let _visits: Vec<_> = ["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff::3"]
        .map(|address| from(&admission, address).unwrap())
        .into();
    assert!(from(&admission, "2001:db8:1:2::4").is_none());
    assert!(from(&admission, "2001:db8:1:3::1").is_some());
}

#[tokio::test]
async fn the_oldest_handshake_is_evicted_but_no_authenticated_connection() {
    let admission = admission(LIMITS);
    let mut visits = Vec::new();
    let mut mailboxes = Vec::new();
    for host in 1..=6_u8 {
        let mailbox: Arc<Mailbox> = Arc::default();
        let peer = IpAddr::from([10, 0, 0, host]);
        let mut permit = admission.accept(peer, &mailbox, NOW_US).unwrap();
        if host == 1 {
            permit.prove(1);
        }
        visits.push(permit);
        mailboxes.push(mailbox);
    }
    let wait = admission.handshakes_full(NOW_US + 400_000);
    assert_eq!(wait, Some(Duration::from_millis(600)), "all are recent");
    let later_us = NOW_US + GIVES_WAY_AFTER_US;
    assert_eq!(admission.handshakes_full(later_us), None);
    let peer = IpAddr::from([10, 0, 0, 7]);
    let _late = admission.accept(peer, &Arc::default(), NOW_US).unwrap();
    let mail = tokio::time::timeout(Duration::ZERO, mailboxes[0].take()).await;
    assert!(mail.is_err(), "the first has proved its key");
    assert!(mailboxes[1].take().await.close.is_some());
    let mail = tokio::time::timeout(Duration::ZERO, mailboxes[2].take()).await;
    assert!(mail.is_err(), "one eviction is enough");
    drop(visits);
    assert!(admission.handshakes_full(NOW_US).is_none());
    assert_eq!(admission.lock().handshakes.len(), 1);
}

#[tokio::test]
async fn failed_handshakes_are_evicted_before_slow_ones() {
    let admission = admission(LIMITS);
    let accept = |host: u8, mailbox: &Arc<Mailbox>| {
        let peer = IpAddr::from([10, 0, 0, host]);
        admission.accept(peer, mailbox, NOW_US).unwrap()
    };
    let _slow: Vec<ConnectionPermit> = (1..5).map(|host| accept(host, &Arc::default())).collect();
    let mailbox = Arc::default();
    let mut failed = accept(5, &mailbox);
    assert!(
        admission.handshakes_full(NOW_US).is_some(),
        "all are recent"
    );
    failed.fail(NOW_US);
    assert_eq!(admission.handshakes_full(NOW_US), None);
    let _next = accept(6, &Arc::default());
    assert!(mailbox.take().await.close.is_some());
    drop(failed);
    assert_eq!(admission.lock().handshakes.len(), 5);
}

#[test]
fn each_failure_delays_the_reply_longer() {
    let admission = admission(LIMITS);
    let mut permit = from(&admission, "10.0.0.1").unwrap();
    let mut other = from(&admission, "10.0.0.2").unwrap();
    let waits: Vec<u128> = (0..8).map(|_| permit.fail(NOW_US).as_millis()).collect();
    assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(other.fail(NOW_US).as_millis(), 100);
    assert_eq!(permit.fail(NOW_US + FORGET_AFTER_US).as_millis(), 100);
}

#[test]
fn log_lines_about_an_address_are_limited_and_counted() {
    let admission = admission(LIMITS);
    let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
    let may = |_| admission.may_log(one, NOW_US);
    assert_eq!(
        (0..4).map(may).collect::<Vec<_>>(),
        [Some(0), Some(0), None, None]
    );
    assert_eq!(admission.may_log(other, NOW_US), Some(0));
    let suppressed = admission.may_log(one, NOW_US + FORGET_AFTER_US);
    assert_eq!(
        suppressed,
        Some(2),
        "the number of suppressed lines is reported"
    );
}

#[test]
fn many_addresses_together_cannot_fill_the_log() {
    let admission = admission(LIMITS);
    let may = |now_us| {
        let from = |number: u32| admission.may_log(IpAddr::from(number.to_be_bytes()), now_us);
        (0..5000).filter_map(from).count()
    };
    assert_eq!(may(NOW_US), LINES_MAX as usize);
    assert_eq!(may(NOW_US + MINUTE_US), LINES_MAX as usize);
}

#[test]
fn the_table_is_bounded_for_any_number_of_addresses() {
    let admission = admission(LIMITS);
    let stays = from(&admission, "192.0.2.1").unwrap();
    for number in 0..20_000_u32 {
        let address = IpAddr::from(number.to_be_bytes());
        admission.may_log(address, NOW_US);
        let count = admission.lock().addresses.len();
        assert!(count <= LIMITS.connections_max + REMEMBERED_MAX, "{count}");
    }
    assert_eq!(admission.lock().addresses[&stays.address].connections, 1);
}
