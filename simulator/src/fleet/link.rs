//! A device's connection, with input and output buffers that use no memory while it is idle.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::BytesMut;
use fieldgate::net::socket::Socket;
use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING};
use fieldgate_protocol::frame::{FRAME_BYTES_MAX, NoRoom};
use fieldgate_protocol::message;
use tokio::io::Interest;
use tokio::net::{TcpSocket, TcpStream};

use super::Terms;

/// Number of devices that connect from one loopback address. An address has about 28,000 ports, and each stays in
/// use for a minute after its connection was closed; in a storm, all connections are closed simultaneously.
const DEVICES_OF_ADDRESS: u32 = 2_000;

thread_local! {
    /// Buffer for a frame whose length is not known yet. Reserving the maximum length in each link's own
    /// buffer would fill 64 KiB with zeros for every frame.
    static ROOM: RefCell<Box<[u8]>> = RefCell::new(vec![0; FRAME_BYTES_MAX].into());
}

const READ_BYTES: usize = 1024;

/// An open connection, with its channel binding and the address of the device's end.
pub(super) struct Connected {
    pub(super) socket: Socket,
    pub(super) binding: [u8; KEY_BYTES],
    pub(super) from: SocketAddr,
}

pub(super) async fn connect(terms: &Terms, number: u32, name: &str) -> io::Result<Connected> {
    let tcp = match source_address(terms.gateway.ip(), number) {
        None => TcpStream::connect(terms.gateway).await?,
        Some(source) => {
            let socket = TcpSocket::new_v4()?;
            socket.bind((source, 0).into())?;
            socket.connect(terms.gateway).await?
        }
    };
    // Fails only if the connection is closed already, which the first read reports.
    let _ = tcp.set_nodelay(true);
    let from = tcp.local_addr()?;
    let Some(tls) = &terms.tls else {
        return Ok(Connected {
            socket: Socket::plain(tcp),
            binding: NO_CHANNEL_BINDING,
            from,
        });
    };
    let connection = tls.connection(name).map_err(io::Error::other)?;
    let mut socket = Socket::tls(tcp, connection);
    let binding = shake_hands(&mut socket).await?;
    Ok(Connected {
        socket,
        binding,
        from,
    })
}

async fn shake_hands(socket: &mut Socket) -> io::Result<[u8; KEY_BYTES]> {
    // A gateway sends nothing before the device does.
    let mut nothing = BytesMut::new();
    loop {
        socket.try_flush()?;
        if let Some(channel) = socket.take_channel() {
            return Ok(channel.binding);
        }
        let interest = match socket.wants_write() {
            true => Interest::READABLE | Interest::WRITABLE,
            false => Interest::READABLE,
        };
        socket.ready(interest).await?;
        match socket.try_read(&mut nothing, 1) {
            Ok(0) => return Err(closed()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Returns the error for a connection that the gateway closed.
fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the gateway")
}

/// Returns the loopback address that a device connects from; `None` if the system chooses. Only Linux
/// provides all of 127.0.0.0/8 without configuration.
fn source_address(gateway: IpAddr, device: u32) -> Option<IpAddr> {
    let is_spread = cfg!(target_os = "linux") && gateway.is_ipv4() && gateway.is_loopback();
    let number = u8::try_from(device / DEVICES_OF_ADDRESS).ok()?;
    (is_spread && number > 0).then_some(IpAddr::V4(Ipv4Addr::new(127, 0, number, 1)))
}

/// A connection's socket with its input and output buffers.
pub(super) struct Link {
    pub(super) socket: Socket,
    pub(super) input: BytesMut,
    pub(super) output: BytesMut,
    pub(super) handshake: Handshake,
    /// Time of the latest PING, in microseconds of the run.
    pub(super) ping_us: Option<u64>,
}

/// Progress of a connection's handshake; times in microseconds of the run.
pub(super) struct Handshake {
    /// Address of the device's end of the connection.
    pub(super) from: SocketAddr,
    pub(super) hello_us: u64,
    /// Time at which the device proved its key.
    pub(super) auth_us: Option<u64>,
    pub(super) is_welcomed: bool,
}

impl Link {
    pub(super) fn new(socket: Socket, from: SocketAddr, now_us: u64) -> Link {
        Link {
            socket,
            input: BytesMut::new(),
            output: BytesMut::new(),
            handshake: Handshake {
                from,
                hello_us: now_us,
                auth_us: None,
                is_welcomed: false,
            },
            ping_us: None,
        }
    }

    /// Appends the frame that `write` writes into the shared buffer.
    pub(super) fn append(
        &mut self,
        write: impl FnOnce(&mut [u8]) -> Result<usize, NoRoom>,
    ) -> Result<usize, NoRoom> {
        ROOM.with_borrow_mut(|buffer| {
            let frame_bytes = write(buffer)?;
            self.output.extend_from_slice(&buffer[..frame_bytes]);
            Ok(frame_bytes)
        })
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        if !self.output.is_empty() {
            self.socket.write_all(&self.output).await?;
            self.output.clear();
        }
        Ok(())
    }

    /// Reads the available bytes without waiting.
    ///
    /// # Errors
    /// The connection is closed or broken.
    pub(super) fn read(&mut self) -> io::Result<()> {
        match self.socket.try_read(&mut self.input, READ_BYTES) {
            Ok(0) => Err(closed()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Frees the buffers before a wait: a fleet is large, and most of it is idle.
    pub(super) fn rest(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        self.output = BytesMut::new();
    }

    /// Sends BYE and closes the connection.
    pub(super) async fn leave(&mut self) {
        let bye = message::Bye {
            code: 0,
            retry_after_ms: 0,
            min_version: 0,
            max_version: 0,
            detail: "done",
            ext: &[],
        };
        let mut frame = [0; 64];
        if let Ok(frame_bytes) = message::encode(&bye, 0, &mut frame) {
            // The gateway may be gone by now; everything is acknowledged.
            let _ = self.socket.write_all(&frame[..frame_bytes]).await;
        }
        let _ = self.socket.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_large_local_fleet_uses_many_source_addresses() {
        let from = |gateway: &str, device| source_address(gateway.parse().unwrap(), device);
        let expected = |address: &str| Some(address.parse().unwrap());
        assert_eq!(from("127.0.0.1", DEVICES_OF_ADDRESS - 1), None);
        assert_eq!(from("127.0.0.1", DEVICES_OF_ADDRESS), expected("127.0.1.1"));
        let last = crate::plan::DEVICES_MAX - 1;
        assert_eq!(from("127.0.0.1", last), expected("127.0.49.1"));
        assert_eq!(from("10.0.0.1", last), None);
        assert_eq!(from("::1", last), None);
    }
}
