//! A history on its way: the device's side of a connection to the gateway, again and again until all of
//! it is stored.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING, NONCE_BYTES};
use fieldgate_protocol::device::{Config, Device, Fault, Notice};
use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX};
use fieldgate_protocol::message::{self, Bye};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::codec::Decoder;

use super::History;
use crate::net::codec::FrameCodec;
use crate::net::socket::Socket;
use crate::time::SystemClock;

/// Frames on their way. Few, so that devices with new readings wait for none of the history.
const WINDOW_FRAMES: u64 = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT_MS: u32 = 10_000;
const RECONNECT_MIN_MS: u32 = 200;
const RECONNECT_MAX_MS: u32 = 5_000;
/// How long to go on without any progress.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
/// What is read at once.
const READ_BYTES: usize = 4 * 1024;
/// Numbers of schemas that are tried.
const SCHEMA_ATTEMPTS: u32 = 16;

/// Where a history goes, and as whose.
#[derive(Clone)]
pub struct Target {
    /// The gateway.
    pub gateway: SocketAddr,
    /// The device.
    pub name: String,
    /// The device's key.
    pub key: [u8; KEY_BYTES],
}

/// How far an import has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Frames through this number are stored; the first time, those that an earlier import stored.
    Stored(u64),
    /// The gateway is not to be had, or takes nothing, for a reason.
    Waiting(String),
}

/// Why an import ended early. What was stored stays, and the next import goes on there.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Nothing listens.
    #[error(
        "could not connect to a gateway at {gateway}: {cause}; start `fieldgate serve`, or give --gateway"
    )]
    Connect {
        /// Where.
        gateway: SocketAddr,
        /// Why not.
        cause: io::Error,
    },
    /// Another connection uses the device's name.
    #[error(
        "another connection of device {0} took over: it is connected itself; give the history another name by \
         --device, or import while the device is off"
    )]
    TakenOver(String),
    /// The gateway does not let the device in.
    #[error("the gateway does not let device {device} in ({reason}); {advice}")]
    Refused {
        /// Which.
        device: String,
        /// The name of the code.
        reason: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The gateway proved another key.
    #[error("the gateway holds another key of device {0}: is --data-dir this gateway's?")]
    OtherKey(String),
    /// Each number that was tried is another schema's.
    #[error("device {0} has no free number for a schema near the ones that were tried")]
    Schemas(String),
    /// Frames were refused for good.
    #[error("the gateway put {0} frames into quarantine; see `fieldgate quarantine list`")]
    Quarantined(u64),
    /// No progress for a long time.
    #[error("gave up after two minutes without progress: {0}; import again to go on")]
    GaveUp(String),
}

/// Why a connection ended.
enum Loss {
    Connection(io::Error),
    Fault(Fault),
}

/// Sends what the gateway does not have yet, and returns when all of it is stored.
///
/// # Errors
/// See [`ImportError`]; nothing is stored twice by an import that follows.
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

/// Why a sender cannot go on.
enum Stop {
    OtherSchema,
    Error(ImportError),
}

struct Sender<'t> {
    target: &'t Target,
    started: Instant,
    progress_at: Instant,
    was_welcomed: bool,
    /// Frames that went into quarantine.
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

    /// Returns what a loss is called, or ends the import if waiting does not help.
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
                "raise `--device-series-max` or `--device-schemas-max` of serve, or take fewer --columns",
            )),
            Fault::Timeout => Ok("no answer in time".to_owned()),
            Fault::Protocol(what) => Ok(format!(
                "against the protocol: {what}; is it another service's port?"
            )),
            Fault::FrameTooLong => Ok("the gateway takes shorter frames only".to_owned()),
            Fault::Bye { code, .. } => match Code::from_wire(code) {
                Some(Code::TakenOver) => Err(Stop::Error(ImportError::TakenOver(device()))),
                Some(Code::Authentication) => Err(refused(
                    "authentication",
                    "is its key another one? With `serve --registration closed`, run `fieldgate device add` first",
                )),
                Some(Code::Disabled) => {
                    Err(refused("disabled", "run `fieldgate device enable` first"))
                }
                Some(code @ Code::StreamBound) => Err(refused(
                    code.name(),
                    "raise `--device-streams-max` of serve, or give another --device",
                )),
                Some(Code::StreamConflict) => Err(refused(
                    "stream conflict",
                    "an import of another version of this program was interrupted; see `fieldgate device show`",
                )),
                Some(code) if Class::of(code as u8) == Class::Operator => {
                    Err(refused(code.name(), "see the gateway's log"))
                }
                code => Ok(format!(
                    "the gateway said {}",
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
        // Fails only where the connection is gone already, which the first read shows.
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
        let mut codec = FrameCodec {
            frame_bytes_max: DEFAULT_FRAME_BYTES_MAX,
        };
        loop {
            let frame = match codec.decode(input) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(_) => return Err(Fault::Protocol("not a frame")),
            };
            match device.handle_frame(&frame.frame(), history, self.now_us())? {
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
                        progress(Progress::Waiting(format!("the gateway said {name}")));
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

/// Says goodbye; all is stored, so that it does not matter if the gateway is gone.
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
