//! Messages to the service manager that started this process, such as systemd, and sockets that it opened.
//!
//! Without a service manager, messages are discarded and there are no sockets.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;

/// Reports that the service is ready, and its status.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports the status of the service.
pub fn status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Resets the watchdog, and reports the status of the service.
pub fn alive(status: &str) {
    notify(&[NotifyState::Watchdog, NotifyState::Status(status)]);
}

/// Reports that the service is stopping, and its status.
pub fn stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "could not notify the service manager");
    }
}

/// Returns the time without [`alive`] after which the service manager restarts the service; `None` if it never does.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Listening sockets that the service manager opened.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    listeners: Vec<TcpListener>,
    /// Reason why a descriptor is not a TCP listener.
    fault: Option<io::Error>,
}

impl InheritedSockets {
    /// Takes all sockets. Must be called before threads exist, because it changes the environment.
    pub fn take() -> InheritedSockets {
        let mut inherited = InheritedSockets::default();
        let mut sockets = ListenFd::from_env();
        for index in 0..sockets.len() {
            match sockets.take_tcp_listener(index) {
                Ok(listener) => inherited.listeners.extend(listener),
                Err(error) => inherited.fault = Some(error),
            }
        }
        inherited
    }

    /// Returns the listener for an address, in non-blocking mode, if there is one.
    ///
    /// # Errors
    /// A descriptor is not a TCP listener.
    pub fn find(&mut self, address: SocketAddr) -> io::Result<Option<TcpListener>> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let is_it = |listener: &TcpListener| listener.local_addr().is_ok_and(|it| it == address);
        let Some(index) = self.listeners.iter().position(is_it) else {
            return Ok(None);
        };
        let listener = self.listeners.swap_remove(index);
        listener.set_nonblocking(true)?;
        Ok(Some(listener))
    }

    /// Returns the addresses of the listeners that [`Self::find`] has not returned.
    pub fn unused(&self) -> Vec<SocketAddr> {
        let addresses = self.listeners.iter().map(TcpListener::local_addr);
        addresses.filter_map(Result::ok).collect()
    }
}
