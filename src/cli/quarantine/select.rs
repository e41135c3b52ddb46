//! Selects the quarantined frames of a command.

use std::collections::HashSet;

use crate::store::admin::{Argument, Connection, device};
use clap::Args;
use jiff::Timestamp;

use crate::cli::Error;
use crate::cli::nearest::unknown_device;

/// A selection of frames, by id or by criteria.
#[derive(Args, Debug, Default)]
pub struct Selection {
    /// Ids of the frames, as in `quarantine list`
    #[arg(value_name = "ID")]
    pub ids: Vec<i64>,

    /// Only frames of this device
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// Only frames received before this time, such as 2026-05-01T00:00:00Z
    #[arg(long, value_name = "TIME")]
    pub before: Option<Timestamp>,
}

/// A SQL condition on rows of `quarantine AS q`, with its parameters.
pub struct Condition {
    sql: String,
    device: Option<i64>,
    before_us: Option<i64>,
}

impl Selection {
    /// Returns whether the selection has no criteria and so stands for all frames.
    pub fn is_open(&self) -> bool {
        self.ids.is_empty() && self.device.is_none() && self.before.is_none()
    }

    /// Returns the selection as a SQL condition.
    ///
    /// # Errors
    /// A selected device or frame does not exist, or a query fails.
    pub async fn condition(&self, connection: &mut Connection) -> Result<Condition, Error> {
        let device = match &self.device {
            Some(name) => Some(device_id(connection, name).await?),
            None => None,
        };
        let before_us = self.before.map(Timestamp::as_microsecond);
        let mut conditions = vec!["1 = 1".to_owned()];
        if !self.ids.is_empty() {
            let ids: Vec<String> = self.ids.iter().map(i64::to_string).collect();
            let named = format!("q.id IN ({})", ids.join(", "));
            check_ids(connection, &self.ids, &named).await?;
            conditions.push(named);
        }
        let mut count = 0;
        let mut parameter = |condition: &str| {
            count += 1;
            conditions.push(format!("{condition} ${count}"));
        };
        if device.is_some() {
            parameter("q.device_id =");
        }
        if before_us.is_some() {
            parameter("q.received_at <");
        }
        Ok(Condition {
            sql: conditions.join(" AND "),
            device,
            before_us,
        })
    }
}

impl Condition {
    /// Returns the condition for a WHERE clause.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// Returns the condition's parameters, `$1` first.
    pub fn arguments(&self) -> Vec<Argument<'static>> {
        let device = self.device.map(Argument::Integer);
        let before = self.before_us.map(Argument::Time);
        device.into_iter().chain(before).collect()
    }
}

async fn check_ids(connection: &mut Connection, ids: &[i64], named: &str) -> Result<(), Error> {
    let sql = format!("SELECT q.id FROM quarantine AS q WHERE {named}");
    let mut found = HashSet::new();
    for row in connection.rows(&sql, &[]).await? {
        found.insert(row.integer(0)?);
    }
    match ids.iter().find(|id| !found.contains(id)) {
        Some(missing) => Err(no_frame(*missing)),
        None => Ok(()),
    }
}

pub fn no_frame(id: i64) -> Error {
    Error::Failed(format!(
        "no frame {id} in quarantine; `fieldgate quarantine list` lists all frames"
    ))
}

async fn device_id(connection: &mut Connection, name: &str) -> Result<i64, Error> {
    match device::find(connection, name).await? {
        Some(device) => Ok(device.device.0),
        None => Err(unknown_device(connection, name).await?),
    }
}
