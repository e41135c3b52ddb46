//! Polls device changes made by operators several times a second. Ends a session if its device was
//! disabled or its key was replaced after login.

use std::sync::Arc;
use std::time::Duration;

use crate::auth::credentials::Credentials;
use crate::ingest::registry::Registry;
use crate::store::device_admin::ChangeReader;
use crate::store::steady::SteadyError;

/// Poll interval: a session must end within a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Timeout of one poll.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Loads device changes once, before any device connects.
///
/// # Errors
/// The store is unavailable, so the device list is unknown.
pub async fn load(
    credentials: &Credentials,
    changes: &mut ChangeReader,
) -> Result<(), SteadyError> {
    if let Some(changes) = changes.changes().await? {
        credentials.take_in(&changes);
    }
    Ok(())
}

/// Polls for changes and ends the sessions of affected devices, for as long as the future is
/// polled.
pub async fn watch<T>(
    credentials: Arc<Credentials>,
    registry: Arc<Registry>,
    mut changes: ChangeReader,
) -> T {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        match tokio::time::timeout(LOOK_TIMEOUT, changes.changes()).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(changes))) => {
                // Credentials first: a session that is ended must not reconnect with the old key.
                credentials.take_in(&changes);
                registry.change(&changes);
            }
            // The writers report that the store is unavailable.
            Ok(Err(error)) => tracing::debug!(%error, "could not read device changes"),
            Err(_) => tracing::debug!("reading device changes timed out"),
        }
    }
}
