//! Clocks of boots, for every store.

use super::*;

pub(in crate::store) async fn a_login_returns_the_clocks_of_the_latest_boots<H: Harness>() {
    let mut h = H::create().await;
    for boot in 1..=9_u32 {
        let mut login = login("a", 1, 1);
        login.clock = clock(boot, AT_US + i64::from(boot));
        admitted(h.store(), login).await;
    }
    // The device lost its boot count. Its latest boot is number 1 again, measured less precisely than the
    // stored clock of that number, but years later.
    let mut again = login("a", 1, 1);
    again.clock = BootClock {
        offset_us: 6,
        delay_us: 2000,
        ..clock(1, AT_US + 1_000_000_000_000)
    };
    let admission = admitted(h.store(), again.clone()).await;
    let boots: Vec<u32> = admission.clocks.iter().map(|clock| clock.boot).collect();
    assert_eq!(boots, [1, 9, 8, 7, 6, 5, 4, 3]);
    assert_eq!(admission.clocks[0], again.clock);
    // A worse measurement soon after it is not stored, but a clock that a session chose is.
    let mut worse = again.clone();
    worse.clock.delay_us = 50_000;
    assert_eq!(
        admitted(h.store(), worse.clone()).await.clocks[0],
        again.clock
    );
    let batch = Batch {
        clocks: vec![(admission.device, worse.clock)],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
    assert!(h.dump().await.clocks.contains(&("a".into(), 1, 6, 50_000)));
}

/// The gateway's clock was a day ahead for nine boots of a device, and was corrected while the gateway was
/// stopped.
pub(in crate::store) async fn clocks_from_a_wrong_future_do_not_displace_the_right_one<
    H: Harness,
>() {
    let mut h = H::create().await;
    admitted(h.store(), login("a", 1, 1)).await;
    for boot in 2..=10_u32 {
        let mut login = login("a", 1, 1);
        login.at_us = AT_US + DAY_US + i64::from(boot);
        login.clock = clock(boot, login.at_us);
        admitted(h.store(), login).await;
    }
    let mut right = login("a", 1, 1);
    right.at_us = AT_US + 3_600_000_000;
    right.clock = clock(11, right.at_us);
    let admission = admitted(h.store(), right.clone()).await;
    let boots: Vec<u32> = admission.clocks.iter().map(|clock| clock.boot).collect();
    assert_eq!(boots, [11, 1, 10, 9, 8, 7, 6, 5]);
    // A clock that contradicts the stored clock of the same boot replaces it, however precise the stored one
    // is.
    right.clock = BootClock {
        offset_us: 5 - DAY_US,
        delay_us: 900_000,
        ..clock(10, right.at_us)
    };
    assert_eq!(
        admitted(h.store(), right.clone()).await.clocks[0],
        right.clock
    );
}

/// A step corrects earlier measurements on its timeline and nothing else; it is recorded once.
pub(in crate::store) async fn a_clock_step_corrects_earlier_measurements<H: Harness>() {
    let mut h = H::create().await;
    let before = Origin {
        timeline: 7,
        at_us: DAY_US,
    };
    let after = Origin {
        timeline: 7,
        at_us: 0,
    };
    let at = |boot, origin: Origin| {
        let mut login = login("a", 1, 1);
        login.at_us += origin.at_us;
        login.clock = BootClock {
            offset_us: 5 + origin.at_us,
            origin,
            ..clock(boot, login.at_us)
        };
        login
    };
    admitted(h.store(), at(1, before)).await;
    let elsewhere = Origin {
        timeline: 8,
        ..before
    };
    admitted(h.store(), at(2, elsewhere)).await;
    let step = ClockStep {
        origin: after,
        since_us: AT_US,
        before_us: AT_US + DAY_US,
        after_us: AT_US,
    };
    for _ in 0..2 {
        // Repeat the batch, as after a COMMIT with unknown outcome.
        let batch = Batch {
            steps: vec![step],
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap();
    }
    let admission = admitted(h.store(), at(3, after)).await;
    let offsets = admission.clocks.iter();
    let offsets: Vec<(u32, i64)> = offsets.map(|clock| (clock.boot, clock.offset_us)).collect();
    assert_eq!(offsets, [(3, 5), (1, 5), (2, 5 + DAY_US)]);
    // The first boot again: its measurement agrees with the stored clock.
    let again = admitted(h.store(), at(1, after)).await;
    assert_eq!(again.clocks[0], at(1, after).clock);
}

/// The session did not receive the clock of that boot, because there were too many.
pub(in crate::store) async fn a_chosen_clock_never_replaces_a_measured_one<H: Harness>() {
    let mut h = H::create().await;
    let peer = admitted(h.store(), login("a", 1, 1)).await;
    let chosen = BootClock {
        offset_us: 77,
        delay_us: UNMEASURED,
        ..clock(1, AT_US)
    };
    let batch = Batch {
        clocks: vec![
            (peer.device, chosen),
            (peer.device, BootClock { boot: 4, ..chosen }),
        ],
        ..Batch::default()
    };
    h.store().commit(&batch).await.unwrap();
    let chosen = ("a".into(), 4, 77, UNMEASURED);
    assert_eq!(h.dump().await.clocks, [("a".into(), 1, 5, 1000), chosen]);
    // A login receives it like any other clock, and a measurement replaces it.
    let mut measured = login("a", 1, 1);
    measured.clock = clock(4, AT_US);
    let admission = admitted(h.store(), measured.clone()).await;
    assert_eq!(admission.clocks[0], measured.clock);
}
