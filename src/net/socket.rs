//! A TCP connection with optional TLS, for loops that wait until a socket is ready.
//!
//! rustls implements TLS; this module moves its records to and from the TCP socket without ever
//! blocking. It serves both ends of a connection: the gateway, and its clients `fieldgate import`
//! and the simulator.
//!
//! Invariant: after [`Socket::try_read`] no received data is left unread within TLS, so a reader
//! that waits for readiness misses nothing.

use std::io::{self, Read, Write};

use bytes::BytesMut;
use fieldgate_protocol::auth::KEY_BYTES;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncWriteExt, Interest, Ready};
use tokio::net::TcpStream;

/// Label of the channel binding exporter (RFC 9266).
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
/// Maximum plaintext requested per read, in bytes.
const CHUNK_BYTES: usize = 4 * 1024;

/// A TCP connection with optional TLS.
#[derive(Debug)]
pub struct Socket {
    tcp: TcpStream,
    /// Boxed, since most connections may not use TLS.
    tls: Option<Box<Tls>>,
}

#[derive(Debug)]
struct Tls {
    conn: rustls::Connection,
    /// Whether [`Socket::take_channel`] has reported the end of the handshake.
    is_channel_taken: bool,
    /// Whether the peer has announced the end of its data.
    has_ended: bool,
    /// Number of bytes received from the TCP socket.
    received_bytes: usize,
}

/// Result of a TLS handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Channel binding: the same at both ends of this connection, and unique to it.
    pub binding: [u8; KEY_BYTES],
    /// The peer's certificate, if it sent one.
    pub certificate: Option<CertificateDer<'static>>,
}

impl Socket {
    /// Creates a connection without TLS.
    pub fn plain(tcp: TcpStream) -> Socket {
        Socket { tcp, tls: None }
    }

    /// Creates a connection with TLS; reading and writing perform the handshake.
    pub fn tls(tcp: TcpStream, conn: impl Into<rustls::Connection>) -> Socket {
        let tls = Tls {
            conn: conn.into(),
            is_channel_taken: false,
            has_ended: false,
            received_bytes: 0,
        };
        Socket {
            tcp,
            tls: Some(Box::new(tls)),
        }
    }

    /// Returns whether the handshake is in progress; always false without TLS.
    pub fn is_handshaking(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.conn.is_handshaking())
    }

    /// Returns the result of the handshake, once, as soon as it has ended.
    pub fn take_channel(&mut self) -> Option<Channel> {
        let tls = self.tls.as_mut()?;
        if tls.is_channel_taken || tls.conn.is_handshaking() {
            return None;
        }
        let binding = [0; KEY_BYTES];
        // Fails if data after the handshake violated the protocol; the next read reports that.
        let exported = tls
            .conn
            .export_keying_material(binding, BINDING_LABEL, Some(&[]));
        let binding = exported.ok()?;
        tls.is_channel_taken = true;
        let certificates = tls.conn.peer_certificates();
        Some(Channel {
            binding,
            certificate: certificates
                .and_then(<[_]>::first)
                .map(|certificate| certificate.clone().into_owned()),
        })
    }

    /// Returns the number of TLS bytes received, including overhead; 0 without TLS.
    pub fn tls_bytes(&self) -> usize {
        self.tls.as_ref().map_or(0, |tls| tls.received_bytes)
    }

    /// Returns whether records are waiting to be written to the TCP socket.
    pub fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.conn.wants_write())
    }

    /// Waits until the TCP socket is readable or writable.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        self.tcp.ready(interest).await
    }

    /// Appends received data to `input`: at most `bytes_max` bytes without TLS. With TLS, reads
    /// until at least that many bytes of records were received, which may contain less data.
    /// Returns 0 at the end of the peer's data.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing to append; `InvalidData` if the data is not valid TLS.
    pub fn try_read(&mut self, input: &mut BytesMut, bytes_max: usize) -> io::Result<usize> {
        match &mut self.tls {
            None => {
                input.reserve(bytes_max);
                self.tcp.try_read_buf(input)
            }
            Some(tls) => tls.read(&self.tcp, input, bytes_max),
        }
    }

    /// Writes as many of `bytes` as the buffers accept; returns their number.
    ///
    /// # Errors
    /// `WouldBlock` if the buffers are full.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return self.tcp.try_write(bytes);
        };
        // Earlier records go first, so that nothing accumulates here if the peer does not read.
        tls.flush(&self.tcp)?;
        if tls.conn.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = tls.conn.writer().write(bytes)?;
        tls.flush(&self.tcp)?;
        Ok(taken)
    }

    /// Writes waiting records to the TCP socket, as far as it accepts them.
    pub fn try_flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.tcp),
        }
    }

    /// Waits until all of `bytes` is written to the TCP socket.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() || self.wants_write() {
            let written = match bytes.is_empty() {
                true => self.try_flush().map(|()| 0),
                false => self.try_write(bytes),
            };
            match written {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if !bytes.is_empty() || self.wants_write() {
                self.ready(Interest::WRITABLE).await?;
            }
        }
        Ok(())
    }

    /// Announces the end of the data, if that is possible without waiting. Without this notice, a
    /// peer treats the end of a TLS connection as a truncation attack.
    pub fn try_end(&mut self) {
        if let Some(tls) = &mut self.tls
            && !tls.conn.is_handshaking()
        {
            tls.conn.send_close_notify();
            let _ = tls.flush(&self.tcp);
        }
    }

    /// Announces the end of the data, after everything written before.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        self.try_end();
        self.write_all(&[]).await?;
        self.tcp.shutdown().await
    }

    /// Waits until the peer closes, discarding any further data.
    pub async fn wait_for_end(&mut self) -> io::Result<()> {
        let mut rest = BytesMut::new();
        loop {
            self.ready(Interest::READABLE).await?;
            match self.try_read(&mut rest, CHUNK_BYTES) {
                Ok(0) => return Ok(()),
                Ok(_) => rest.clear(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Tls {
    fn read(
        &mut self,
        tcp: &TcpStream,
        input: &mut BytesMut,
        bytes_max: usize,
    ) -> io::Result<usize> {
        let before = input.len();
        // Counts the bytes of records, because records can be empty: otherwise a peer could keep
        // this loop busy.
        let mut received = 0;
        while !self.has_ended && received < bytes_max {
            match self.conn.read_tls(&mut TryIo(tcp)) {
                Ok(0) => self.has_ended = true,
                Ok(count) => {
                    received += count;
                    self.received_bytes = self.received_bytes.saturating_add(count);
                    self.take_in(tcp, input)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        // Continues the handshake.
        self.flush(tcp)?;
        match input.len() - before {
            0 if !self.has_ended => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    fn take_in(&mut self, tcp: &TcpStream, input: &mut BytesMut) -> io::Result<()> {
        let state = match self.conn.process_new_packets() {
            Ok(state) => state,
            Err(error) => {
                // Sends the alert with the reason; the connection is lost in any case.
                let _ = self.flush(tcp);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        };
        let (from, count) = (input.len(), state.plaintext_bytes_to_read());
        input.resize(from + count, 0);
        self.conn.reader().read_exact(&mut input[from..])?;
        self.has_ended |= state.peer_has_closed();
        Ok(())
    }

    fn flush(&mut self, tcp: &TcpStream) -> io::Result<()> {
        while self.conn.wants_write() {
            match self.conn.write_tls(&mut TryIo(tcp)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A non-blocking TCP socket in the form that rustls requires.
struct TryIo<'a>(&'a TcpStream);

impl Read for TryIo<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(into)
    }
}

impl Write for TryIo<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, bytes: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rcgen::CertifiedKey;
    use rustls::crypto::ring;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
    use tokio::net::TcpListener;

    use super::*;

    /// Returns both ends of a TLS connection after the handshake.
    async fn pair() -> (Socket, Socket) {
        let CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der()).into();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key);
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let host = "localhost".try_into().unwrap();
        let client = ClientConnection::new(Arc::new(client), host).unwrap();
        let mut near = Socket::tls(tcp, client);
        let server = ServerConnection::new(Arc::new(server.unwrap())).unwrap();
        let mut far = Socket::tls(listener.accept().await.unwrap().0, server);
        let mut nothing = BytesMut::new();
        while near.is_handshaking() || far.is_handshaking() {
            for socket in [&mut near, &mut far] {
                socket.try_flush().unwrap();
                match socket.try_read(&mut nothing, 1) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => assert_eq!(read.unwrap(), 0),
                }
            }
            tokio::task::yield_now().await;
        }
        (near, far)
    }

    /// The peer sends almost only empty records.
    #[tokio::test]
    async fn many_nearly_empty_records_do_not_block_a_read() {
        let (mut peer, mut socket) = pair().await;
        let said: Vec<u8> = (0..50).collect();
        for byte in &said {
            let conn = &mut peer.tls.as_mut().unwrap().conn;
            for _ in 0..30 {
                conn.refresh_traffic_keys().unwrap();
            }
            peer.write_all(&[*byte]).await.unwrap();
        }
        let mut input = BytesMut::new();
        let mut most = 0;
        while input.len() < said.len() {
            socket.ready(Interest::READABLE).await.unwrap();
            match socket.try_read(&mut input, 1024) {
                Ok(count) => most = most.max(count),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert_eq!(input, said);
        // 4 KiB in records of some 900 bytes.
        assert!(most <= 10, "{most}");
    }
}
