//! What the gateway prints when it serves.

use std::io::{self, Write};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::auth::fleet_key::{KEY_FILE, Origin};
use crate::cli::output;
use crate::config::store_url::StoreUrl;
use crate::config::{Config, Registration};
use crate::http::Site;
use crate::server::{Listeners, TlsListener};

/// Maximum wait at startup for a blocked stdout.
const PRINT_TIMEOUT: Duration = Duration::from_secs(1);

/// Prints the gateway's files and addresses on stdout and in the log.
pub async fn announce(
    config: &Config,
    origin: Origin,
    listeners: &Listeners,
    http: Option<&(TcpListener, Site)>,
) -> io::Result<()> {
    let is_new = origin == Origin::Created;
    let key_file = config.location.data_dir.join(KEY_FILE);
    let database = match &config.store {
        StoreUrl::Sqlite(path) => path.display().to_string(),
        StoreUrl::Postgres(url) => url.to_string(),
    };
    let spool = config.spool();
    let spool = spool.map(|path| path.display().to_string());
    let is_closed = config.devices.registration == Registration::Closed;
    let listen = listeners.plain.local_addr()?;
    let tls_listen = match &listeners.tls {
        Some(TlsListener { listener, .. }) => Some(listener.local_addr()?.to_string()),
        None => None,
    };
    let http = match http {
        Some((listener, _)) => Some(listener.local_addr()?.to_string()),
        None => None,
    };
    tracing::info!(
        data_dir = %config.location.data_dir.display(),
        database,
        spool,
        fleet_key = %key_file.display(),
        is_new_fleet_key = is_new,
        is_registration_closed = is_closed,
        %listen,
        tls_listen,
        http,
        "serving"
    );
    let made = match is_new {
        true => " (newly created; install keys derived from it on the devices)",
        false => "",
    };
    let mut lines = format!("data directory  {}\n", config.location.data_dir.display());
    lines += &format!("database        {database}\n");
    if let Some(spool) = spool {
        lines += &format!("spool           {spool}\n");
    }
    lines += &format!("fleet key       {}{made}\n", key_file.display());
    if is_closed {
        lines += "registration    closed: only registered devices may connect\n";
    }
    lines += &format!("listening on    {listen}\n");
    if let Some(tls_listen) = tls_listen {
        lines += &format!("TLS on          {tls_listen}\n");
    }
    if let Some(http) = http {
        lines += &format!("HTTP on         {http}\n");
    }
    // A closed or unread stdout, as a service may have, must not keep the gateway from serving.
    let printed = tokio::task::spawn_blocking(move || {
        let mut out = output::stdout();
        out.write_all(lines.as_bytes())?;
        out.flush()
    });
    let _ = timeout(PRINT_TIMEOUT, printed).await;
    Ok(())
}
