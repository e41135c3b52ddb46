//! Reload of settings while the gateway runs, on SIGHUP.
//!
//! A reload reads the settings file, the tokens and the TLS files again, checks all of them, and only then applies the
//! settings that can change at run time. A failed reload changes nothing.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

use tokio::signal::unix::Signal;
use tokio::sync::watch;

use super::sockets::load_tokens;
use crate::cli::{Command, Error, SetLevels, SettingValue, parse, valid_config};
use crate::config::{AdmissionLimits, Config, RELOADABLE, Registration};
use crate::http::Guard;
use crate::net::tls::Tls;
use crate::quota::quarantine::Gauge;
use crate::session::SessionSettings;
use crate::sys::disk::Levels;

/// A running gateway's settings, and the parts that use those that can change.
pub struct Reload {
    /// Arguments of the process.
    pub args: Vec<OsString>,
    /// Settings in use.
    pub config: Config,
    /// Values in use, by flag.
    pub values: BTreeMap<String, String>,
    pub set_levels: SetLevels,
    pub tls: Option<Arc<Tls>>,
    pub guard: watch::Sender<Guard>,
    pub session: watch::Sender<Arc<SessionSettings>>,
    pub admission: watch::Sender<AdmissionLimits>,
    pub quarantine: Arc<Gauge>,
    pub disk_levels: watch::Sender<Levels>,
}

/// Settings that differ from those in use.
#[derive(Debug, Default)]
struct Changes {
    applied: Vec<SettingValue>,
    /// Flags of settings that are read only at the start.
    need_restart: Vec<String>,
}

impl Reload {
    /// Reloads at each SIGHUP. Never returns.
    pub async fn run(mut self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            // It reads files, and may resolve host names.
            let reloading = tokio::task::spawn_blocking(move || {
                self.reload_and_log();
                self
            });
            self = reloading.await.expect("it does not panic");
        }
    }

    fn reload_and_log(&mut self) {
        match self.reload() {
            Ok(changes) => {
                let applied: Vec<_> = changes.applied.iter().map(ToString::to_string).collect();
                tracing::info!(changed = applied.join(" "), "settings reloaded");
                if !changes.need_restart.is_empty() {
                    let settings = changes.need_restart.join(" ");
                    tracing::warn!(settings, "changed settings need a restart");
                }
            }
            Err(error) => {
                tracing::error!(%error, "could not reload settings, keeping the old ones")
            }
        }
    }

    fn reload(&mut self) -> Result<Changes, Error> {
        let cli = parse(self.args.clone())?;
        let levels = cli.log_levels();
        let Command::Serve(serve) = cli.command else {
            return Err(Error::Failed("the command is not serve".to_owned()));
        };
        valid_config(serve.settings.clone(), cli.global.location)?;
        // Settings that need a restart keep their values, which must fit the new ones.
        let settings = self.config.reloaded(serve.settings);
        let config = valid_config(settings, self.config.location.clone())?;
        let tokens = load_tokens(&config)?;
        let tls = match (&self.tls, config.tls_files()) {
            (Some(tls), Some(files)) => {
                let record_bytes_max = config.listeners.tls_record_bytes_max;
                Some((tls, tls.prepare(files, record_bytes_max)?))
            }
            _ => None,
        };
        (self.set_levels)(&levels)
            .map_err(|error| Error::Usage(format!("RUST_LOG={levels:?}: {error}")))?;
        // From here on nothing fails.
        if let Some((tls, prepared)) = tls {
            tls.replace(prepared);
        }
        let hosts = config.http.http_host.iter().cloned();
        self.guard.send_replace(Guard::new(hosts, tokens));
        self.quarantine
            .set_bytes_max(config.devices.quarantine_bytes_max);
        self.disk_levels.send_replace(config.disks.levels());
        self.session.send_modify(|session| {
            session.quotas.set_rates(&config.devices.rates);
            *session = Arc::new(SessionSettings {
                may_register: config.devices.registration == Registration::Open,
                limits: config.session.clone(),
                ..SessionSettings::clone(session)
            });
        });
        self.admission.send_replace(config.admission.clone());
        self.config = config;
        Ok(self.note(cli.values))
    }

    /// Returns which values differ, and takes over those that were applied.
    fn note(&mut self, values: Vec<SettingValue>) -> Changes {
        let mut changes = Changes::default();
        for setting in values {
            let Some(known) = self.values.get_mut(&setting.flag) else {
                continue;
            };
            if *known == setting.value {
                continue;
            }
            match RELOADABLE.contains(&setting.flag.as_str()) {
                true => {
                    known.clone_from(&setting.value);
                    changes.applied.push(setting);
                }
                false => changes.need_restart.push(setting.flag),
            }
        }
        changes
    }
}
