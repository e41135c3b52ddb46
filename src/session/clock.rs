//! The device's clocks as a session knows them, measured again by every PING.

use fieldgate_protocol::message::Ping;

use crate::time::{BootClock, BootClocks, Now};

pub(super) struct DeviceClock {
    boot: u32,
    pub known: BootClocks,
    /// The latest PONG: its UTC, and the time it was sent on the monotonic clock.
    pong: Option<(i64, u64)>,
}

impl DeviceClock {
    pub(super) fn new(boot: u32, clocks: Vec<BootClock>) -> DeviceClock {
        DeviceClock {
            boot,
            known: BootClocks::new(clocks).of_session(boot),
            pong: None,
        }
    }

    /// Handles a PING, whose PONG is sent now. Returns the device's clock if the round trip of the
    /// previous PONG gives a better measurement.
    pub(super) fn handle_ping(&mut self, ping: &Ping<'_>, now: Now) -> Option<BootClock> {
        let pong = self.pong.replace((now.utc_us, now.mono_us));
        if ping.pong_sent_us == 0 {
            return None;
        }
        // The wall clock may have been set during the round trip.
        let elapsed_us = match pong {
            Some((utc_us, mono_us)) if utc_us == ping.pong_sent_us => {
                now.mono_us.saturating_sub(mono_us) as i64
            }
            _ => now.utc_us.saturating_sub(ping.pong_sent_us),
        };
        let (pong_mono_us, mono_us) = (ping.pong_mono_us, ping.mono_us);
        let measured = BootClock::measure(self.boot, elapsed_us, pong_mono_us, mono_us, now)?;
        self.known.improve(measured)
    }
}
