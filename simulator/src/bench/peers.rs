//! Peers that occupy the gateway's connection slots and CPU time, like those on the open Internet.

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

/// Time within which all peers connect.
const ARRIVAL: Duration = Duration::from_secs(2);
/// Time after which a disconnected peer reconnects.
const RETURN_AFTER: Duration = Duration::from_secs(1);
/// Interval between two bytes of a slow peer.
const BYTE_EVERY: Duration = Duration::from_secs(10);
/// Interval at which a peer that never reads sends requests; the next constant is their number each time.
const ASK_EVERY: Duration = Duration::from_millis(200);
const ASKS: usize = 20;
/// The smallest receive buffer that Linux allows, so that answers have to wait at the gateway.
const NEVER_READS_BUFFER_BYTES: u32 = 2304;
/// Number of peers per loopback address.
const PEERS_OF_ADDRESS: u32 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Attack {
    /// Begins a TLS handshake and stops.
    HalfTls,
    /// Sends nothing, over plain TCP.
    Silence,
    /// Sends HELLO, one byte every ten seconds.
    Slowness,
    /// Logs in as a device, sends time requests repeatedly, and never reads the answers.
    NeverReads,
}

impl Attack {
    pub(super) const ALL: [Attack; 4] = [
        Attack::HalfTls,
        Attack::Silence,
        Attack::Slowness,
        Attack::NeverReads,
    ];

    pub(super) fn peers(self, is_quick: bool) -> u32 {
        let peers = match self {
            Attack::HalfTls | Attack::Silence => 5_000,
            Attack::Slowness => 1_000,
            Attack::NeverReads => 300,
        };
        if is_quick { peers / 5 } else { peers }
    }
}

/// Running peers, which are disconnected on drop.
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
    attack: Attack,
    addr: SocketAddr,
    fleet_key: [u8; KEY_BYTES],
}

impl Peers {
    /// Starts this many peers, which connect one after the other and reconnect when they are disconnected.
    pub(super) fn send(gateway: &Gateway, attack: Attack, peers: u32) -> Peers {
        let target = Arc::new(Target {
            attack,
            addr: match attack {
                Attack::HalfTls => gateway.tls_address,
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
                    // The peer reconnects, however the visit ended.
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

    /// Returns the number of peers that believe they are connected.
    pub(super) fn open(&self) -> u32 {
        self.counts.open.load(Relaxed)
    }

    /// Returns the number of connections that the gateway has closed.
    pub(super) fn closed(&self) -> u64 {
        self.counts.closed.load(Relaxed)
    }
}

impl Target {
    /// Runs one connection until the gateway closes it.
    async fn visit(&self, number: u32, counts: &Counts) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        let block = u8::try_from(1 + number / PEERS_OF_ADDRESS).unwrap_or(u8::MAX);
        socket.bind((IpAddr::V4(Ipv4Addr::new(127, 1, block, 1)), 0).into())?;
        if self.attack == Attack::NeverReads {
            socket.set_recv_buffer_size(NEVER_READS_BUFFER_BYTES)?;
        }
        let mut tcp = socket.connect(self.addr).await?;
        counts.open.fetch_add(1, Relaxed);
        let done = self.misbehave(&mut tcp, number).await;
        counts.open.fetch_sub(1, Relaxed);
        counts.closed.fetch_add(1, Relaxed);
        done
    }

    async fn misbehave(&self, tcp: &mut TcpStream, number: u32) -> io::Result<()> {
        match self.attack {
            Attack::HalfTls => {
                // A record of 512 bytes with a ClientHello, of which the first 64 are sent.
                let mut hello = [0; 64];
                hello[..11].copy_from_slice(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
                tcp.write_all(&hello).await?;
                wait_for_end(tcp).await
            }
            Attack::Silence => wait_for_end(tcp).await,
            Attack::Slowness => {
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
            Attack::NeverReads => {
                self.log_in(tcp, number).await?;
                let ping = framed(&Ping {
                    mono_us: 2_000_000,
                    pong_sent_us: 0,
                    pong_mono_us: 0,
                    ext: &[],
                });
                let asks = ping.repeat(ASKS);
                loop {
                    // Fails when the gateway closes the connection.
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
    format!("never-reads-{number}")
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
    let count = message::encode(message, 0, &mut out).expect("the buffer holds any frame");
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

/// Reads and discards the gateway's output until it closes.
async fn read_to_end(input: &mut (impl AsyncReadExt + Unpin)) -> io::Result<()> {
    let mut said = [0; 256];
    while input.read(&mut said).await? > 0 {}
    Ok(())
}
