//! What all sessions share: limits, credentials and quotas.

use std::sync::Arc;

use fieldgate_protocol::auth::KEY_BYTES;

use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::FleetKey;
use crate::config::SessionLimits;
use crate::config::retention::ReadingRetention;
use crate::metrics::Metrics;
use crate::quota::device::DeviceQuotas;
use crate::quota::quarantine::Gauge;

const SECOND_US: u64 = 1_000_000;

/// Settings of sessions.
#[derive(Clone)]
pub struct SessionSettings {
    /// Credentials of devices.
    pub credentials: Arc<Credentials>,
    /// Whether unknown devices may register.
    pub may_register: bool,
    /// Limits of a connection.
    pub limits: SessionLimits,
    /// Data quotas of devices; frames over the quota are not refused but read later.
    pub quotas: Arc<DeviceQuotas>,
    /// Readings older than the longest retention of their device are not stored.
    pub retention: Arc<ReadingRetention>,
    /// Usage of quarantine, which limits what a session may add.
    pub quarantine: Arc<Gauge>,
    /// Counts replies.
    pub metrics: Arc<Metrics>,
}

impl SessionLimits {
    /// Returns the maximum time from the accept to WELCOME.
    pub(crate) fn handshake_timeout_us(&self) -> u64 {
        self.handshake_timeout_s * SECOND_US
    }

    /// Returns the maximum time from a frame's first byte to its last.
    pub(crate) fn frame_timeout_us(&self) -> u64 {
        self.frame_timeout_s * SECOND_US
    }

    /// Returns the maximum time without a whole frame.
    pub(crate) fn idle_timeout_us(&self) -> u64 {
        self.idle_timeout_s * SECOND_US
    }
}

impl Default for SessionSettings {
    fn default() -> Self {
        SessionSettings {
            credentials: Arc::new(Credentials::new(FleetKey::from_bytes([0; KEY_BYTES]))),
            may_register: true,
            limits: SessionLimits::default(),
            quotas: Arc::default(),
            retention: Arc::default(),
            quarantine: Arc::default(),
            metrics: Arc::default(),
        }
    }
}
