//! Polls device changes made by operators several times a second. Ends a session if its device was
//! disabled or its key was replaced after login.

use std::sync::Arc;

use crate::auth::credentials::Credentials;
use crate::ingest::registry::Registry;
use crate::store::admin::device::{CHANGES_PACE, Position, changes_since};
use crate::store::admin::{Pace, Poll, QueryError, Reconnecting, Source};

/// Applies device changes to credentials and sessions.
pub struct DeviceWatch {
    store: Reconnecting,
    seen: Option<Position>,
    credentials: Arc<Credentials>,
    registry: Arc<Registry>,
}

impl DeviceWatch {
    /// Creates a watch and loads all changes so far, before any device connects.
    ///
    /// # Errors
    /// The store is unavailable, so the device list is unknown.
    pub async fn load(
        source: Source,
        credentials: Arc<Credentials>,
        registry: Arc<Registry>,
    ) -> Result<DeviceWatch, QueryError> {
        let mut watch = DeviceWatch {
            store: Reconnecting::new(source),
            seen: None,
            credentials,
            registry,
        };
        watch.poll().await?;
        Ok(watch)
    }
}

impl Poll for DeviceWatch {
    const TASK: &'static str = "device changes";
    const PACE: Pace = CHANGES_PACE;

    async fn poll(&mut self) -> Result<(), QueryError> {
        let changes = changes_since(&mut self.store, self.seen.as_ref()).await?;
        if let Some(changes) = changes {
            // Credentials first: a session that is ended must not reconnect with the old key.
            self.credentials.take_in(&changes);
            self.registry.change(&changes);
            self.seen = Some(changes.position);
        }
        Ok(())
    }
}
