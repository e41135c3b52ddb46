//! `fieldgate tail`: prints readings as a running gateway commits them.

use std::future::poll_fn;
use std::io::{self, Write};
use std::pin::Pin;
use std::time::Duration;

use axum::body::BodyDataStream;
use clap::{Args, ValueEnum};
use futures_core::Stream;
use jiff::Timestamp;
use serde_json::Value as Json;
use tokio::time::{sleep, timeout};

use super::Error;
use super::gateway_http::{GatewayArgs, GatewayHttp, Refused};
use super::value::{Value, Written};
use crate::sys::secret_file::SecretReaders;

/// Maximum time to connect and to receive the header of the answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time without a byte; an idle feed sends some every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Pause before the next connection.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);
/// Maximum size of an event.
const EVENT_BYTES_MAX: usize = 64 << 20;

#[derive(Args, Clone, Debug)]
pub struct TailArgs {
    /// Show only readings of this device
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    device: String,

    /// Show only readings of channels with this name
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    channel: String,

    /// Begin after this frame_id; 0 shows all that is stored. Without it, only new readings are shown
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(i64).range(0..))]
    after: Option<i64>,

    #[command(flatten)]
    gateway: GatewayArgs,

    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Text)]
    format: Format,
}

/// Output format of readings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line for each reading: time, device, channel, value, unit.
    Text,
    /// A line for each frame: a JSON object with its readings.
    Json,
}

/// Prints readings until Ctrl-C, or until the reader of the output has gone.
pub async fn tail(args: TailArgs, readers: SecretReaders) -> Result<(), Error> {
    let tail = Tail {
        cursor: args.after,
        gateway: GatewayHttp::new(&args.gateway, readers)?,
        args,
    };
    // The task may be blocked on its output.
    let running = tokio::spawn(tail.run());
    tokio::select! {
        ended = running => ended.map_err(|error| Error::Failed(error.to_string()))?,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

struct Tail {
    args: TailArgs,
    gateway: GatewayHttp,
    /// Id of the last event.
    cursor: Option<i64>,
}

/// Why a connection ended.
enum End {
    /// Another connection may succeed.
    Lost(String),
    Failed(Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Failed(Error::Output(error))
    }
}

fn lost(error: impl ToString) -> End {
    End::Lost(error.to_string())
}

impl Tail {
    async fn run(mut self) -> Result<(), Error> {
        let mut was_connected = false;
        loop {
            let connected = timeout(CONNECT_TIMEOUT, self.connect()).await;
            let connected = connected.unwrap_or_else(|_| Err(lost("no answer")));
            let end = match connected {
                Ok(answer) => {
                    was_connected = true;
                    self.print(answer).await
                }
                Err(end) => end,
            };
            match end {
                End::Failed(error) => return Err(error),
                End::Lost(reason) if !was_connected => {
                    let url = &self.gateway.url;
                    return Err(Error::Failed(format!(
                        "could not read the feed of {url}: {reason}; use the address of --http of a running gateway \
                         as --url"
                    )));
                }
                End::Lost(reason) => tracing::warn!(reason, "connection lost, reconnecting"),
            }
            sleep(RECONNECT_PAUSE).await;
        }
    }

    async fn connect(&self) -> Result<BodyDataStream, End> {
        let mut path = format!(
            "/v1/feed?device={}&channel={}",
            encoded(&self.args.device),
            encoded(&self.args.channel)
        );
        if let Some(cursor) = self.cursor {
            path += &format!("&after={cursor}");
        }
        match self.gateway.get(&path).await {
            Ok(body) => Ok(body.into_data_stream()),
            Err(Refused::Lost(reason)) => Err(End::Lost(reason)),
            Err(Refused::Failed(error)) => Err(End::Failed(error)),
        }
    }

    /// Prints events until the connection ends.
    async fn print(&mut self, mut answer: BodyDataStream) -> End {
        let mut events = Events::default();
        loop {
            let chunk = poll_fn(|context| Pin::new(&mut answer).poll_next(context));
            let chunk = match timeout(SILENCE_MAX, chunk).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return lost(error),
                Ok(None) => return lost("the gateway closed it"),
                Err(_) => return lost("silence"),
            };
            if let Err(end) = events.take(&chunk, &mut |id, data| self.event(id, data)) {
                return end;
            }
        }
    }

    /// Prints an event, if it has data, and moves the cursor.
    fn event(&mut self, id: i64, data: &str) -> Result<(), End> {
        if !data.is_empty() {
            let mut out = super::output::stdout();
            match self.args.format {
                Format::Json => writeln!(out, "{data}")?,
                Format::Text => {
                    let event: Json = serde_json::from_str(data).map_err(lost)?;
                    for reading in event["readings"].as_array().into_iter().flatten() {
                        writeln!(out, "{}", line(&event["device"], reading))?;
                    }
                }
            }
            out.flush()?;
        }
        self.cursor = Some(id);
        Ok(())
    }
}

/// Returns a reading for people.
fn line(device: &Json, reading: &Json) -> String {
    let ts_us = reading["ts"].as_i64().unwrap_or_default();
    let time = Timestamp::from_microsecond(ts_us);
    let time = time.map_or_else(|_| ts_us.to_string(), |time| format!("{time:.6}"));
    // Text from devices must not control the terminal.
    let text = |json: &Json| Value::from(json.as_str().unwrap_or_default()).shown();
    let value = match &reading["value"] {
        Json::String(value) => value.clone(),
        Json::Null => "NULL".to_owned(),
        value => value.to_string(),
    };
    let (device, channel, unit) = (
        text(device),
        text(&reading["channel"]),
        text(&reading["unit"]),
    );
    format!("{time}  {device}  {channel}  {value} {unit}")
}

/// Returns a text for the query of a URL.
fn encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
            char::from(byte).to_string()
        }
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

/// Cuts a stream of bytes into server-sent events.
#[derive(Default)]
struct Events {
    /// An incomplete line.
    line: Vec<u8>,
    id: Option<i64>,
    data: String,
}

impl Events {
    /// Passes id and data of each event that `bytes` complete to `on_event`. A keepalive has no data.
    fn take(
        &mut self,
        bytes: &[u8],
        on_event: &mut impl FnMut(i64, &str) -> Result<(), End>,
    ) -> Result<(), End> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > EVENT_BYTES_MAX {
                return Err(lost("an event is too large"));
            }
            if !part.ends_with(b"\n") {
                break;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            if let Some(id) = line.strip_prefix("id: ") {
                self.id = id.parse().ok();
            } else if let Some(data) = line.strip_prefix("data: ") {
                self.data = data.to_owned();
            } else if line.is_empty() {
                let data = std::mem::take(&mut self.data);
                if let Some(id) = self.id.take() {
                    on_event(id, &data)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_at_any_byte() {
        let text = ": keepalive\nid: 3\n\nid: 4\ndata: {\"a\":\"ä\"}\n\nid: 5\ndata: b\n\nid: 6\ndata: c\n";
        let wanted =
            [(3, ""), (4, "{\"a\":\"ä\"}"), (5, "b")].map(|(id, data)| (id, data.to_owned()));
        for size in 1..text.len() {
            let mut found = Vec::new();
            let mut events = Events::default();
            for chunk in text.as_bytes().chunks(size) {
                let taken = events.take(chunk, &mut |id, data| {
                    found.push((id, data.to_owned()));
                    Ok(())
                });
                assert!(taken.is_ok());
            }
            assert_eq!(found, wanted, "{size}");
        }
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encoded("a-B_9.&=ä "), "a-B_9.%26%3D%C3%A4%20");
    }

    #[test]
    fn a_line_has_one_reading() {
        let reading = serde_json::json!({"channel": "a\u{1b}", "unit": "Cel", "ts": 1_500_000, "value": 21.5});
        let text = line(&"pump".into(), &reading);
        assert_eq!(
            text,
            "1970-01-01T00:00:01.500000Z  pump  a\\u{1b}  21.5 Cel"
        );
    }
}
