//! Peers that take a gateway's places and time without being of any use, as the open Internet has them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use fieldgate_protocol::auth::{
    KEY_BYTES, NO_CHANNEL_BINDING, NONCE_BYTES, Transcript, derive_device_key,
};
use fieldgate_protocol::frame::{self, DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX};
use fieldgate_protocol::message::{self, Auth, Hello, Message, Ping};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::gateway::Gateway;

/// All of them come within this time.
const ARRIVAL: Duration = Duration::from_secs(2);
/// One that was closed is back after this time.
const RETURN_AFTER: Duration = Duration::from_secs(1);
/// From byte to byte of a slow one.
const BYTE_EVERY: Duration = Duration::from_secs(10);
/// A deaf one asks so often, so many times at once.
const ASK_EVERY: Duration = Duration::from_millis(200);
const ASKS: usize = 20;
/// The smallest that Linux gives: answers shall wait at the gateway.
const DEAF_RECEIVE_BYTES: u32 = 2304;
/// Peers that come from one address of the loopback.
const PEERS_OF_ADDRESS: u32 = 1_000;

/// What a peer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Misdeed {
    /// Begins a TLS handshake and does not go on.
    HalfTls,
    /// Says nothing at all, in plain text.
    Silence,
    /// Says HELLO, a byte every ten seconds.
    Slowness,
    /// Is a device, asks for the time again and again, and never reads the answers.
    Deafness,
}

impl Misdeed {
    pub(super) const ALL: [Misdeed; 4] = [
        Misdeed::HalfTls,
        Misdeed::Silence,
        Misdeed::Slowness,
        Misdeed::Deafness,
    ];

    /// How many do it.
    pub(super) fn peers(self, is_quick: bool) -> u32 {
        let peers = match self {
            Misdeed::HalfTls | Misdeed::Silence => 5_000,
            Misdeed::Slowness => 1_000,
            Misdeed::Deafness => 300,
        };
        if is_quick { peers / 5 } else { peers }
    }
}

/// Peers at work; dropped, they are gone.
pub(super) struct Peers {
    counts: Arc<Counts>,
    _tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Counts {
    open: AtomicU32,
    closed: AtomicU64,
}

struct Target {
    misdeed: Misdeed,
    addr: SocketAddr,
    fleet_key: [u8; KEY_BYTES],
}

impl Peers {
    /// So many, who come one after the other and come back when they are closed.
    pub(super) fn send(gateway: &Gateway, misdeed: Misdeed, peers: u32) -> Peers {
        let target = Arc::new(Target {
            misdeed,
            addr: match misdeed {
                Misdeed::HalfTls => gateway.tls_address,
                _ => gateway.address,
            },
            fleet_key: gateway.fleet_key,
        });
        let counts = Arc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for number in 0..peers {
            let (target, counts) = (Arc::clone(&target), Arc::clone(&counts));
            tasks.spawn(async move {
                sleep(ARRIVAL * number / peers).await;
                loop {
                    // However it ends, the peer is back.
                    let _ = target.visit(number, &counts).await;
                    sleep(RETURN_AFTER).await;
                }
            });
        }
        Peers {
            counts,
            _tasks: tasks,
        }
    }

    /// How many have a connection now, as far as they know.
    pub(super) fn open(&self) -> u32 {
        self.counts.open.load(Relaxed)
    }

    /// How many connections the gateway has ended.
    pub(super) fn closed(&self) -> u64 {
        self.counts.closed.load(Relaxed)
    }
}

impl Target {
    /// One connection, until the gateway ends it.
    async fn visit(&self, number: u32, counts: &Counts) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        let block = u8::try_from(1 + number / PEERS_OF_ADDRESS).unwrap_or(u8::MAX);
        socket.bind((IpAddr::V4(Ipv4Addr::new(127, 1, block, 1)), 0).into())?;
        if self.misdeed == Misdeed::Deafness {
            socket.set_recv_buffer_size(DEAF_RECEIVE_BYTES)?;
        }
        let mut tcp = socket.connect(self.addr).await?;
        counts.open.fetch_add(1, Relaxed);
        let done = self.misbehave(&mut tcp, number).await;
        counts.open.fetch_sub(1, Relaxed);
        counts.closed.fetch_add(1, Relaxed);
        done
    }

    async fn misbehave(&self, tcp: &mut TcpStream, number: u32) -> io::Result<()> {
        match self.misdeed {
            Misdeed::HalfTls => {
                // A record of 512 bytes with a ClientHello, of which the first 64 come.
                let mut hello = [0; 64];
                hello[..11].copy_from_slice(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
                tcp.write_all(&hello).await?;
                wait_for_end(tcp).await
            }
            Misdeed::Silence => wait_for_end(tcp).await,
            Misdeed::Slowness => {
                let hello = framed(&hello_of(&name_of(number)));
                let (mut input, mut output) = tcp.split();
                tokio::select! {
                    ended = read_to_end(&mut input) => ended,
                    dripped = async {
                        for byte in hello {
                            output.write_all(&[byte]).await?;
                            sleep(BYTE_EVERY).await;
                        }
                        Ok(())
                    } => dripped,
                }
            }
            Misdeed::Deafness => {
                self.log_in(tcp, number).await?;
                let ping = framed(&Ping {
                    mono_us: 2_000_000,
                    pong_sent_us: 0,
                    pong_mono_us: 0,
                    ext: &[],
                });
                let asks = ping.repeat(ASKS);
                loop {
                    // Fails when the gateway has had enough.
                    tcp.write_all(&asks).await?;
                    sleep(ASK_EVERY).await;
                }
            }
        }
    }

    async fn log_in(&self, tcp: &mut TcpStream, number: u32) -> io::Result<()> {
        let name = name_of(number);
        let hello = framed(&hello_of(&name));
        tcp.write_all(&hello).await?;
        let mut transcript = Transcript::default();
        transcript.add(payload(&hello)?);
        let challenge = read_frame(tcp).await?;
        transcript.add(payload(&challenge)?);
        let mut auth = Auth {
            mono_us: 1_000_000,
            ext: &[],
            mac: [0; KEY_BYTES],
        };
        let unsigned = framed(&auth);
        let unsigned = payload(&unsigned)?;
        transcript.add(&unsigned[..unsigned.len() - KEY_BYTES]);
        let key = derive_device_key(&self.fleet_key, &name, 0);
        auth.mac = transcript.device_mac(&key, &NO_CHANNEL_BINDING);
        tcp.write_all(&framed(&auth)).await?;
        read_frame(tcp).await.map(drop)
    }
}

fn name_of(number: u32) -> String {
    format!("deaf-{number}")
}

fn hello_of(name: &str) -> Hello<'_> {
    Hello {
        min_version: 1,
        max_version: 1,
        name,
        stream: 1,
        oldest_seq: 1,
        next_seq: 1,
        boot: 1,
        mono_us: 1_000_000,
        utc_us: 0,
        rx_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
        firmware: "none",
        schema: 0,
        schema_hash: [0; 8],
        nonce: [0; NONCE_BYTES],
        caps: 0,
        ext: &[],
    }
}

fn framed<'m>(message: &impl Message<'m>) -> Vec<u8> {
    let mut out = vec![0; FRAME_BYTES_MAX];
    let count = message::encode(message, 0, &mut out).expect("there is room for any frame");
    out.truncate(count);
    out
}

fn payload(frame: &[u8]) -> io::Result<&[u8]> {
    match frame::decode(frame, FRAME_BYTES_MAX) {
        Ok(Some(frame)) => Ok(frame.payload()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn read_frame(tcp: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    loop {
        if let Ok(Some(frame)) = frame::decode(&input, FRAME_BYTES_MAX) {
            return Ok(frame.bytes.to_vec());
        }
        if tcp.read_buf(&mut input).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn wait_for_end(tcp: &mut TcpStream) -> io::Result<()> {
    let (mut input, _output) = tcp.split();
    read_to_end(&mut input).await
}

/// Whatever the gateway has to say.
async fn read_to_end(input: &mut (impl AsyncReadExt + Unpin)) -> io::Result<()> {
    let mut said = [0; 256];
    while input.read(&mut said).await? > 0 {}
    Ok(())
}
