//! Input of a device that exceeds its quota: it is not refused, but read later.

use std::sync::Arc;

use crate::quota::device::DeviceQuota;
use crate::session::Submission;
use crate::store::{Content, Entry};

pub(super) struct Pacing {
    pub quota: Arc<DeviceQuota>,
    /// When input resumes; `None` if it is not paused.
    until_us: Option<u64>,
}

impl Pacing {
    pub(super) fn new(quota: Arc<DeviceQuota>) -> Pacing {
        Pacing {
            quota,
            until_us: None,
        }
    }

    /// Counts a login or a frame, and the readings of an accepted submission. Over either rate,
    /// pauses input for a while.
    pub(super) fn count(&mut self, taken: Option<&Submission>, now_us: u64) {
        let readings = match taken {
            Some(Submission::Entry(Entry {
                content: Content::Readings(readings),
                ..
            })) => readings.values.len() as u64,
            _ => 0,
        };
        let next_us = self.quota.consume(1, readings, now_us);
        self.until_us = (next_us > now_us).then_some(next_us);
    }

    /// Returns the time when input resumes if the device is over its rate.
    pub(super) fn until_us(&self) -> Option<u64> {
        self.until_us
    }

    /// Resumes input if it is time; returns whether it did.
    pub(super) fn resume(&mut self, now_us: u64) -> bool {
        self.until_us
            .take_if(|until_us| now_us >= *until_us)
            .is_some()
    }
}
