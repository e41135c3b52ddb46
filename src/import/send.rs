//! Sends a history to the gateway as a device would, reconnecting until everything is stored.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING, NONCE_BYTES};
use fieldgate_protocol::device::{Config, Device, Fault, Notice};
use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{self, DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX};
use fieldgate_protocol::message::{self, Bye};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

use super::History;
use crate::net::socket::Socket;
use crate::time::SystemClock;

/// Maximum number of frames in flight. Kept small, so that live readings do not wait behind the
/// history.
const WINDOW_FRAMES: u64 = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT_MS: u32 = 10_000;
const RECONNECT_MIN_MS: u32 = 200;
const RECONNECT_MAX_MS: u32 = 5_000;
/// An import fails after this time without progress.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
const READ_BYTES: usize = 4 * 1024;
const SCHEMA_ATTEMPTS: u32 = 16;

#[derive(Clone)]
pub struct Target {
    pub gateway: SocketAddr,
    pub name: String,
    pub key: [u8; KEY_BYTES],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Frames through this number are stored; the first report includes those of earlier imports.
    Stored(u64),
    /// The gateway is unavailable or accepts nothing, with the reason.
    Waiting(String),
}

/// Reason why an import failed. Stored readings remain, and the next import resumes after them.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(
        "could not connect to a gateway at {gateway}: {cause}; start `fieldgate serve`, or set --gateway"
    )]
    Connect {
        gateway: SocketAddr,
        cause: io::Error,
    },
    #[error(
        "device {0} is connected and took over the connection; import under another --device, or while \
         the device is off"
    )]
    TakenOver(String),
    #[error("gateway rejected device {device} ({reason}); {advice}")]
    Refused {
        device: String,
        reason: &'static str,
        advice: &'static str,
    },
    #[error(
        "the gateway has a different key for device {0}; check that --data-dir belongs to this gateway"
    )]
    OtherKey(String),
    #[error("could not find a free schema number for device {0}")]
    Schemas(String),
    #[error("gateway quarantined {0} frames; see `fieldgate quarantine list`")]
    Quarantined(u64),
    #[error("no progress for two minutes: {0}; run the import again to resume")]
    GaveUp(String),
}

enum Loss {
    Connection(io::Error),
    Fault(Fault),
}

/// Sends the frames that the gateway does not have yet; returns when everything is stored.
///
/// # Errors
/// See [`ImportError`]. A later import stores nothing twice.
pub async fn send(
    target: &Target,
    history: &mut History<'_>,
    mut progress: impl FnMut(Progress),
) -> Result<(), ImportError> {
    for _ in 0..SCHEMA_ATTEMPTS {
        let mut sender = Sender::new(target);
        match sender.send(history, &mut progress).await {
            Err(Stop::OtherSchema) => history.renumber_schemas(),
            Err(Stop::Error(error)) => return Err(error),
            Ok(()) if sender.refused > 0 => return Err(ImportError::Quarantined(sender.refused)),
            Ok(()) => return Ok(()),
        }
    }
    Err(ImportError::Schemas(target.name.clone()))
}

enum Stop {
    OtherSchema,
    Error(ImportError),
}

struct Sender<'t> {
    target: &'t Target,
    started: Instant,
    progress_at: Instant,
    was_welcomed: bool,
    /// Number of quarantined frames.
    refused: u64,
    room: Box<[u8]>,
}

impl<'t> Sender<'t> {
    fn new(target: &'t Target) -> Sender<'t> {
        Sender {
            target,
            started: Instant::now(),
            progress_at: Instant::now(),
            was_welcomed: false,
            refused: 0,
            room: vec![0; FRAME_BYTES_MAX].into(),
        }
    }

    async fn send(
        &mut self,
        history: &mut History<'_>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Stop> {
        let (schema, schema_hash) = history.schema();
        let mut device = Device::new(Config {
            name: &self.target.name,
            key: self.target.key,
            firmware: concat!("fieldgate import ", env!("CARGO_PKG_VERSION")),
            stream: history.stream(),
            boot: history.boot(),
            schema,
            schema_hash,
            rx_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
            window_frames: WINDOW_FRAMES,
            reconnect_min_ms: RECONNECT_MIN_MS,
            reconnect_max_ms: RECONNECT_MAX_MS,
            handshake_timeout_ms: HANDSHAKE_TIMEOUT_MS,
        });
        loop {
            let Err(loss) = self.connect_and_serve(&mut device, history, progress).await else {
                return Ok(());
            };
            let fault = match &loss {
                Loss::Connection(_) => None,
                Loss::Fault(fault) => Some(*fault),
            };
            let reason = self.check(loss)?;
            if self.progress_at.elapsed() >= GIVE_UP_AFTER {
                return Err(Stop::Error(ImportError::GaveUp(reason)));
            }
            progress(Progress::Waiting(reason));
            let random = getrandom::u32().unwrap_or(u32::MAX / 2);
            let again_us = device.disconnect(fault, self.now_us(), random);
            sleep_until(self.started + Duration::from_micros(again_us)).await;
        }
    }

    /// Returns a description of a loss, or ends the import if waiting does not help.
    fn check(&self, loss: Loss) -> Result<String, Stop> {
        let device = || self.target.name.clone();
        let refused = |reason, advice| {
            Stop::Error(ImportError::Refused {
                device: device(),
                reason,
                advice,
            })
        };
        let fault = match loss {
            Loss::Connection(cause) if !self.was_welcomed => {
                let gateway = self.target.gateway;
                return Err(Stop::Error(ImportError::Connect { gateway, cause }));
            }
            Loss::Connection(error) => return Ok(error.to_string()),
            Loss::Fault(fault) => fault,
        };
        match fault {
            Fault::SchemaConflict => Err(Stop::OtherSchema),
            Fault::NotOurGateway => Err(Stop::Error(ImportError::OtherKey(device()))),
            Fault::SchemaBound => Err(refused(
                Code::SchemaBound.name(),
                "raise `--device-series-max` or `--device-schemas-max` of serve, or select fewer --columns",
            )),
            Fault::Timeout => Ok("no reply in time".to_owned()),
            Fault::Protocol(what) => Ok(format!(
                "protocol violation: {what}; is another service using this port?"
            )),
            Fault::FrameTooLong => Ok("the gateway's frame limit is too small".to_owned()),
            Fault::Bye { code, .. } => match Code::from_wire(code) {
                Some(Code::TakenOver) => Err(Stop::Error(ImportError::TakenOver(device()))),
                Some(Code::Authentication) => Err(refused(
                    "authentication",
                    "has its key been replaced? With `serve --registration closed`, run `fieldgate device add` first",
                )),
                Some(Code::Disabled) => {
                    Err(refused("disabled", "run `fieldgate device enable` first"))
                }
                Some(code @ Code::StreamBound) => Err(refused(
                    code.name(),
                    "raise `--device-streams-max` of serve, or use another --device",
                )),
                Some(Code::StreamConflict) => Err(refused(
                    "stream conflict",
                    "an import by another version of this program was interrupted; see `fieldgate device show`",
                )),
                Some(code) if Class::of(code as u8) == Class::Operator => {
                    Err(refused(code.name(), "see the gateway's log"))
                }
                code => Ok(format!(
                    "gateway replied: {}",
                    code.map_or("BYE", Code::name)
                )),
            },
        }
    }

    async fn connect_and_serve(
        &mut self,
        device: &mut Device<'_>,
        history: &mut History<'_>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Loss> {
        let connecting = timeout(CONNECT_TIMEOUT, TcpStream::connect(self.target.gateway)).await;
        let tcp = connecting.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let tcp = tcp.map_err(Loss::Connection)?;
        // Fails only if the connection is already closed, which the first read reports.
        let _ = tcp.set_nodelay(true);
        let mut socket = Socket::plain(tcp);
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| Loss::Connection(io::Error::other(error)))?;
        let utc_us = SystemClock::start().now().utc_us;
        device.connect(nonce, NO_CHANNEL_BINDING, self.now_us(), utc_us);
        let mut input = BytesMut::new();
        loop {
            self.transmit(device, history, &mut socket)
                .await
                .map_err(Loss::Connection)?;
            if device.is_ready() && history.is_done() {
                leave(&mut socket).await;
                return Ok(());
            }
            let deadline_us = device.poll_deadline().unwrap_or(u64::MAX >> 1);
            let deadline = self.started + Duration::from_micros(deadline_us);
            tokio::select! {
                ready = socket.ready(Interest::READABLE) => {
                    ready.map_err(Loss::Connection)?;
                    read(&mut socket, &mut input).map_err(Loss::Connection)?;
                    self.receive(device, history, &mut input, progress).map_err(Loss::Fault)?;
                }
                () = sleep_until(deadline) => {
                    device.handle_timeout(self.now_us()).map_err(Loss::Fault)?;
                }
            }
        }
    }

    async fn transmit(
        &mut self,
        device: &mut Device<'_>,
        history: &mut History<'_>,
        socket: &mut Socket,
    ) -> io::Result<()> {
        let now_us = self.now_us();
        while let Some(frame_bytes) = device.poll_transmit(history, now_us, &mut self.room) {
            socket.write_all(&self.room[..frame_bytes]).await?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        device: &mut Device<'_>,
        history: &mut History<'_>,
        input: &mut BytesMut,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Fault> {
        loop {
            let frame = match frame::decode(input, DEFAULT_FRAME_BYTES_MAX) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(_) => return Err(Fault::Protocol("not a frame")),
            };
            let frame_bytes = frame.bytes.len();
            let notice = device.handle_frame(&frame, history, self.now_us())?;
            input.advance(frame_bytes);
            match notice {
                Some(Notice::Welcomed { .. }) => {
                    self.was_welcomed = true;
                    self.progress_at = Instant::now();
                    progress(Progress::Stored(history.durable_seq()));
                }
                Some(Notice::Acked { through_seq }) => {
                    self.progress_at = Instant::now();
                    progress(Progress::Stored(through_seq));
                }
                Some(Notice::Refused { code, .. }) => match Class::of(code) {
                    Class::Refused => self.refused += 1,
                    Class::RetryLater => {
                        let name = Code::from_wire(code).map_or("busy", Code::name);
                        progress(Progress::Waiting(format!("gateway replied: {name}")));
                    }
                    _ => {}
                },
                Some(Notice::Time { .. }) | None => {}
            }
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }
}

fn read(socket: &mut Socket, input: &mut BytesMut) -> io::Result<()> {
    match socket.try_read(input, READ_BYTES) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}

/// Sends BYE. Everything is stored, so a lost gateway does not matter.
async fn leave(socket: &mut Socket) {
    let bye = Bye {
        code: 0,
        retry_after_ms: 0,
        min_version: 0,
        max_version: 0,
        detail: "done",
        ext: &[],
    };
    let mut frame = [0; 64];
    if let Ok(frame_bytes) = message::encode(&bye, 0, &mut frame) {
        let _ = socket.write_all(&frame[..frame_bytes]).await;
    }
    let _ = socket.shutdown().await;
}
