//! A device for tests: blocking, over plain TCP or TLS, and able to violate every rule.
//!
//! Every wait has a deadline, after which the test fails.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;

use fieldgate_protocol::auth::{KEY_BYTES, Transcript};
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{FRAME_BYTES_MAX, Frame, VERSION, decode, types};
use fieldgate_protocol::message::{self, Ack, Auth, Bye, Challenge, Hello, Nack, Pong, Welcome};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::support::logs::{keep_frame, keep_key};
use crate::support::messages::{frame, payload, ping};
use crate::support::wire::{Wire, connect};

/// Content of a HELLO, and the key for the AUTH after it.
#[derive(Clone, Debug)]
pub struct Login {
    pub name: String,
    pub key: [u8; KEY_BYTES],
    pub stream: u64,
    pub oldest_seq: u64,
    pub next_seq: u64,
    pub boot: u32,
    pub mono_us: u64,
    pub firmware: String,
    pub schema: u16,
    pub schema_hash: [u8; 8],
    pub versions: (u8, u8),
    pub binding: [u8; KEY_BYTES],
}

impl Login {
    pub fn hello(&self) -> Vec<u8> {
        let hello = Hello {
            min_version: self.versions.0,
            max_version: self.versions.1,
            name: &self.name,
            stream: self.stream,
            oldest_seq: self.oldest_seq,
            next_seq: self.next_seq,
            boot: self.boot,
            mono_us: self.mono_us,
            utc_us: 0,
            rx_bytes_max: 4096,
            firmware: &self.firmware,
            schema: self.schema,
            schema_hash: self.schema_hash,
            nonce: *b"a test's nonce 1",
            caps: 0,
            ext: &[],
        };
        frame(&hello, 0)
    }

    /// Returns AUTH as a frame, and the transcript including it.
    pub fn auth(&self, mut transcript: Transcript) -> (Vec<u8>, Transcript) {
        let mut auth = Auth {
            mono_us: self.mono_us,
            ext: &[],
            mac: [0; KEY_BYTES],
        };
        let unsigned = frame(&auth, 0);
        let payload = payload(&unsigned);
        transcript.add(&payload[..payload.len() - KEY_BYTES]);
        auth.mac = transcript.device_mac(&self.key, &self.binding);
        transcript.add(&auth.mac);
        (frame(&auth, 0), transcript)
    }
}

/// A WELCOME whose MAC was correct.
#[derive(Clone, Copy, Debug)]
pub struct Welcomed {
    pub durable_seq: u64,
    pub limit_seq: u64,
    pub keepalive_s: u16,
    pub ack_timeout_s: u16,
    pub schema_known: bool,
}

/// A message or action of the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Challenge(Vec<u8>),
    Welcome(Vec<u8>),
    Ack {
        seq: u64,
        limit_seq: u64,
    },
    Nack {
        seq: u64,
        code: u8,
        expected_seq: u64,
        retry_after_ms: u32,
    },
    Pong {
        mono_us: u64,
        received_us: i64,
        sent_us: i64,
    },
    Bye {
        code: u8,
        retry_after_ms: u32,
        versions: (u8, u8),
        detail: String,
    },
    Closed,
}

/// A connection to a gateway.
#[derive(Debug)]
pub struct Link {
    socket: Wire,
    input: Vec<u8>,
    /// All bytes sent, before any encryption.
    pub sent: Vec<u8>,
}

impl Link {
    /// Connects without sending anything.
    pub fn open(addr: SocketAddr) -> Link {
        Link {
            socket: Wire::Plain(connect(addr)),
            input: Vec::new(),
            sent: Vec::new(),
        }
    }

    /// Connects and performs the TLS handshake; also returns the channel binding.
    pub fn open_tls(
        addr: SocketAddr,
        config: &Arc<ClientConfig>,
    ) -> std::io::Result<(Link, [u8; KEY_BYTES])> {
        let host = ServerName::try_from("localhost").expect("a name");
        let mut conn = ClientConnection::new(Arc::clone(config), host).expect("a config");
        let mut socket = connect(addr);
        while conn.is_handshaking() {
            conn.complete_io(&mut socket)?;
        }
        let label = b"EXPORTER-Channel-Binding";
        let binding = conn.export_keying_material([0; KEY_BYTES], label, Some(&[]));
        let link = Link {
            socket: Wire::Tls(Box::new(StreamOwned::new(conn, socket))),
            input: Vec::new(),
            sent: Vec::new(),
        };
        Ok((link, binding.expect("a binding")))
    }

    pub fn certificate(&self) -> CertificateDer<'static> {
        match &self.socket {
            Wire::Plain(_) => panic!("not TLS"),
            Wire::Tls(stream) => stream.conn.peer_certificates().expect("a certificate")[0].clone(),
        }
    }

    /// Connects and performs the whole handshake.
    pub fn login(addr: SocketAddr, login: &Login) -> (Link, Welcomed) {
        let mut link = Link::open(addr);
        let transcript = link.challenge(login);
        let welcomed = link.authenticate(login, transcript);
        (link, welcomed)
    }

    /// Sends HELLO and receives CHALLENGE; returns the transcript.
    pub fn challenge(&mut self, login: &Login) -> Transcript {
        let hello = login.hello();
        self.send(&hello);
        let Heard::Challenge(challenge) = self.hear() else {
            panic!("no CHALLENGE")
        };
        let mut transcript = Transcript::default();
        transcript.add(payload(&hello));
        transcript.add(&challenge);
        transcript
    }

    /// Sends AUTH and receives WELCOME.
    pub fn authenticate(&mut self, login: &Login, transcript: Transcript) -> Welcomed {
        let (auth, mut transcript) = login.auth(transcript);
        keep_key(&login.key);
        self.send(&auth);
        let bytes = match self.hear() {
            Heard::Welcome(bytes) => bytes,
            other => panic!("{other:?} instead of WELCOME"),
        };
        let welcome: Welcome<'_> = message::decode(&bytes).expect("WELCOME");
        transcript.add(&bytes[..bytes.len() - KEY_BYTES]);
        assert!(
            transcript.verify_gateway_mac(&login.key, &login.binding, &welcome.mac),
            "the gateway's proof"
        );
        Welcomed {
            durable_seq: welcome.durable_seq,
            limit_seq: welcome.limit_seq,
            keepalive_s: welcome.keepalive_s,
            ack_timeout_s: welcome.ack_timeout_s,
            schema_known: welcome.schema_known == 1,
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.sent.extend_from_slice(bytes);
        keep_frame(bytes);
        self.socket.write_all(bytes).expect("sends");
    }

    /// Sends, unless the gateway has closed the connection.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends bytes that the gateway may not read completely.
    pub fn send_in_vain(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Closes the sending half; the receiving half stays open.
    pub fn finish(&mut self) {
        let socket = match &mut self.socket {
            Wire::Plain(socket) => socket,
            Wire::Tls(stream) => {
                stream.conn.send_close_notify();
                let _ = stream.flush();
                &mut stream.sock
            }
        };
        // The gateway may have closed first.
        let _ = socket.shutdown(Shutdown::Write);
    }

    /// Receives the gateway's next message.
    pub fn hear(&mut self) -> Heard {
        self.try_hear()
            .unwrap_or_else(|error| panic!("nothing heard: {error}"))
    }

    /// Receives the gateway's next message, unless the connection fails.
    pub fn try_hear(&mut self) -> std::io::Result<Heard> {
        loop {
            if let Some(frame) = decode(&self.input, FRAME_BYTES_MAX).expect("a frame") {
                let (heard, count) = (read(&frame), frame.bytes.len());
                self.input.drain(..count);
                return Ok(heard);
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(0) => {
                    assert!(self.input.is_empty(), "closed within a frame");
                    return Ok(Heard::Closed);
                }
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Ok(Heard::Closed);
                }
                // A machine that was paused interrupts a read that has a timeout (signal(7)).
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Expects an ACK of `seq`, possibly after lower ones.
    pub fn expect_ack(&mut self, seq: u64) {
        loop {
            match self.hear() {
                Heard::Ack { seq: heard, .. } if heard < seq => {}
                Heard::Ack { seq: heard, .. } if heard == seq => return,
                other => panic!("{other:?} instead of ACK {seq}"),
            }
        }
    }

    pub fn expect_nack(&mut self, seq: u64, code: Code, expected_seq: u64) {
        match self.hear() {
            Heard::Nack {
                seq: s,
                code: c,
                expected_seq: e,
                ..
            } if (s, c, e) == (seq, code as u8, expected_seq) => {}
            other => panic!(
                "{other:?} instead of NACK {} of {seq}, expecting {expected_seq}",
                code as u8
            ),
        }
    }

    /// Expects a BYE with `code`, `retry_after_ms` and version 1, then the end.
    pub fn expect_bye_after(&mut self, code: Code, retry_after_ms: u32) {
        match self.hear() {
            Heard::Bye {
                code: c,
                retry_after_ms: r,
                versions,
                detail,
            } if c == code as u8 => {
                assert_eq!((r, versions), (retry_after_ms, (1, 1)), "{detail}");
                assert!(!detail.is_empty());
            }
            other => panic!("{other:?} instead of BYE {}", code as u8),
        }
        self.expect_closed();
    }

    /// Expects a BYE with `code`, then the end.
    pub fn expect_bye(&mut self, code: Code) {
        self.expect_bye_after(code, 0);
    }

    /// Expects the end, and no message before it.
    pub fn expect_closed(&mut self) {
        assert_eq!(self.hear(), Heard::Closed);
    }

    /// Sends PING and receives any ACKs before its PONG: all bytes sent before have been processed. Returns the
    /// highest number acknowledged meanwhile.
    pub fn take_in(&mut self) -> u64 {
        self.send(&ping(77, 0, 0));
        let mut acked = 0;
        loop {
            match self.hear() {
                Heard::Pong { mono_us: 77, .. } => return acked,
                Heard::Ack { seq, .. } => acked = seq,
                other => panic!("{other:?} instead of PONG"),
            }
        }
    }

    /// Sends PING and expects its PONG as the next message: all bytes sent before have been processed, and none of
    /// them was answered immediately.
    pub fn ping(&mut self) {
        self.send(&ping(77, 0, 0));
        match self.hear() {
            Heard::Pong { mono_us: 77, .. } => {}
            other => panic!("{other:?} instead of PONG"),
        }
    }
}

fn read(frame: &Frame<'_>) -> Heard {
    let (header, payload) = (frame.header, frame.payload());
    assert!(frame.intact, "a damaged frame from the gateway");
    assert_eq!((header.version, header.flags), (VERSION, 0));
    match header.frame_type {
        types::CHALLENGE => {
            let challenge: Challenge<'_> = message::decode(payload).expect("CHALLENGE");
            assert_eq!(challenge.version, VERSION);
            Heard::Challenge(payload.to_vec())
        }
        types::WELCOME => Heard::Welcome(payload.to_vec()),
        types::ACK => {
            let ack: Ack<'_> = message::decode(payload).expect("ACK");
            Heard::Ack {
                seq: header.seq,
                limit_seq: ack.limit_seq,
            }
        }
        types::NACK => {
            let nack: Nack<'_> = message::decode(payload).expect("NACK");
            assert!(!nack.detail.is_empty());
            Heard::Nack {
                seq: header.seq,
                code: nack.code,
                expected_seq: nack.expected_seq,
                retry_after_ms: nack.retry_after_ms,
            }
        }
        types::PONG => {
            let pong: Pong<'_> = message::decode(payload).expect("PONG");
            Heard::Pong {
                mono_us: pong.mono_us,
                received_us: pong.received_us,
                sent_us: pong.sent_us,
            }
        }
        types::BYE => {
            let bye: Bye<'_> = message::decode(payload).expect("BYE");
            Heard::Bye {
                code: bye.code,
                retry_after_ms: bye.retry_after_ms,
                versions: (bye.min_version, bye.max_version),
                detail: bye.detail.to_owned(),
            }
        }
        other => panic!("type {other:#04x} from the gateway"),
    }
}
