//! A connection's bytes, plain or through TLS, for loops that wait until a socket is ready.
//!
//! TLS itself is rustls's business: this carries its records to the TCP socket and back, without ever
//! waiting. Gateway and simulator use the same, from either end.
//!
//! Invariant: after [`Socket::try_read`] nothing that the TCP socket gave is left unseen within TLS, so a
//! reader that waits for readiness misses nothing.

use std::io::{self, Read, Write};

use bytes::BytesMut;
use fieldgate_protocol::auth::KEY_BYTES;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncWriteExt, Interest, Ready};
use tokio::net::TcpStream;

/// What names the exporter of a connection's channel binding (RFC 9266).
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
/// Plaintext that is asked for at once.
const CHUNK_BYTES: usize = 4 * 1024;

/// A TCP connection, with or without TLS on it.
#[derive(Debug)]
pub struct Socket {
    tcp: TcpStream,
    /// In a box, since most connections may be without.
    tls: Option<Box<Tls>>,
}

#[derive(Debug)]
struct Tls {
    conn: rustls::Connection,
    /// Whether [`Socket::take_channel`] has told of the handshake's end.
    is_told: bool,
    /// The peer has said that it sends no more.
    has_ended: bool,
    /// What has come through the TCP socket, whatever it held.
    received_bytes: usize,
}

/// What the two ends of a TLS connection agree upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// The same at both ends of this connection, and different for every other.
    pub binding: [u8; KEY_BYTES],
    /// The peer's certificate, if it showed one.
    pub certificate: Option<CertificateDer<'static>>,
}

impl Socket {
    /// Without TLS.
    pub fn plain(tcp: TcpStream) -> Socket {
        Socket { tcp, tls: None }
    }

    /// With TLS, whose handshake is done as the socket is read and written.
    pub fn tls(tcp: TcpStream, conn: impl Into<rustls::Connection>) -> Socket {
        let tls = Tls {
            conn: conn.into(),
            is_told: false,
            has_ended: false,
            received_bytes: 0,
        };
        Socket {
            tcp,
            tls: Some(Box::new(tls)),
        }
    }

    /// Whether the handshake is still under way; never without TLS.
    pub fn is_handshaking(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.conn.is_handshaking())
    }

    /// What the handshake came to, once, as soon as it has ended.
    pub fn take_channel(&mut self) -> Option<Channel> {
        let tls = self.tls.as_mut()?;
        if tls.is_told || tls.conn.is_handshaking() {
            return None;
        }
        let binding = [0; KEY_BYTES];
        // Fails if what came right behind the handshake broke the rules; whoever reads hears of that.
        let exported = tls
            .conn
            .export_keying_material(binding, BINDING_LABEL, Some(&[]));
        let binding = exported.ok()?;
        tls.is_told = true;
        let certificates = tls.conn.peer_certificates();
        Some(Channel {
            binding,
            certificate: certificates
                .and_then(<[_]>::first)
                .map(|certificate| certificate.clone().into_owned()),
        })
    }

    /// How many bytes of TLS have come, whatever they held; 0 without TLS.
    pub fn tls_bytes(&self) -> usize {
        self.tls.as_ref().map_or(0, |tls| tls.received_bytes)
    }

    /// Whether records wait for the TCP socket to take them.
    pub fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.conn.wants_write())
    }

    /// Waits until the TCP socket can be read or written.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        self.tcp.ready(interest).await
    }

    /// Appends what has come to `input`, `bytes_max` bytes at most, or through TLS until at least so many came
    /// with its records, of which not all need to hold something; 0 says that the peer sends no more.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing to append; `InvalidData` if it is not TLS, or breaks its rules.
    pub fn try_read(&mut self, input: &mut BytesMut, bytes_max: usize) -> io::Result<usize> {
        match &mut self.tls {
            None => {
                input.reserve(bytes_max);
                self.tcp.try_read_buf(input)
            }
            Some(tls) => tls.read(&self.tcp, input, bytes_max),
        }
    }

    /// Takes as much of `bytes` as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return self.tcp.try_write(bytes);
        };
        // What was taken before goes first, so that a peer that does not read makes nothing pile up here.
        tls.flush(&self.tcp)?;
        if tls.conn.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = tls.conn.writer().write(bytes)?;
        tls.flush(&self.tcp)?;
        Ok(taken)
    }

    /// Brings records that wait to the TCP socket, as far as it takes them.
    pub fn try_flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.tcp),
        }
    }

    /// Waits until all of `bytes` is on its way.
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

    /// Says that nothing more will be sent, if that can be said at once. Without that word a peer takes the
    /// end of a TLS connection for an attack.
    pub fn try_end(&mut self) {
        if let Some(tls) = &mut self.tls
            && !tls.conn.is_handshaking()
        {
            tls.conn.send_close_notify();
            let _ = tls.flush(&self.tcp);
        }
    }

    /// Says that nothing more will be sent, after what was written before.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        self.try_end();
        self.write_all(&[]).await?;
        self.tcp.shutdown().await
    }

    /// Waits until the peer closes, and passes over what it still sends.
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
        // Records can be empty without end, so it is they that are counted, or a peer could keep this loop busy.
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
        // The handshake's next words.
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
                // The alert that says what was wrong; the connection is lost in any case.
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

/// A TCP socket that never waits, as rustls reads and writes it.
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

    /// The two ends of a connection through TLS, whose handshake is over.
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

    /// Nearly nothing but records that say nothing.
    #[tokio::test]
    async fn a_peer_that_says_little_in_many_records_keeps_nobody_busy() {
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
        // 4 KiB of some 900 bytes each.
        assert!(most <= 10, "{most}");
    }
}
