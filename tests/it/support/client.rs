//! A device for tests: blocking, over plain TCP or TLS, and able to violate every rule.
//!
//! Every wait has a deadline, after which the test fails.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;

use fieldgate_protocol::auth::{KEY_BYTES, Transcript, schema_hash};
use fieldgate_protocol::column::encoding;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{
    FRAME_BYTES_MAX, Frame, HEADER_BYTES, Header, OVERHEAD_BYTES, TRAILER_BYTES, VERSION, decode,
    seal, types,
};
use fieldgate_protocol::message::{
    self, Ack, Auth, Bye, Challenge, Channel, Column, Data, Declare, Event, Gap, Hello, Message,
    Nack, Ping, Pong, Welcome,
};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::support::logs::{keep_frame, keep_key};
use crate::support::wire::{Wire, connect};

/// Number of the schema that [`declare`] declares and [`readings`] uses.
pub const SCHEMA: u16 = 1;
/// Channel "temperature": integer, hundredths.
pub const TEMPERATURE: u8 = 1;
/// Channel "level": binary64.
pub const LEVEL: u8 = 2;
/// Channel "open": bool.
pub const OPEN: u8 = 3;
/// Channel "flow": binary32.
pub const FLOW: u8 = 4;

/// 2025-10-09T08:53:20Z.
pub const T0_US: i64 = 1_760_000_000_000_000;

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

/// Returns a header for a frame of `frame_type`, complete except for its length.
pub fn header(frame_type: u8, seq: u64) -> Header {
    Header {
        version: VERSION,
        frame_type,
        flags: 0,
        payload_bytes: 0,
        seq,
    }
}

/// Returns a frame of any header and payload, with correct checksums.
pub fn sealed(header: Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; payload.len() + OVERHEAD_BYTES];
    bytes[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let payload_bytes = u16::try_from(payload.len()).expect("fits a header");
    let header = Header {
        payload_bytes,
        ..header
    };
    seal(header, &mut bytes).expect("fits");
    bytes
}

pub fn frame<'m>(message: &impl Message<'m>, seq: u64) -> Vec<u8> {
    let mut bytes = vec![0; FRAME_BYTES_MAX];
    let count = message::encode(message, seq, &mut bytes).expect("fits");
    bytes.truncate(count);
    bytes
}

/// Returns the bytes between header and trailer.
pub fn payload(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..frame.len() - TRAILER_BYTES]
}

/// Returns `frame` with one bit of its payload flipped and its checksums unchanged.
pub fn damaged(mut frame: Vec<u8>) -> Vec<u8> {
    frame[HEADER_BYTES] ^= 0x10;
    frame
}

/// Returns a message with the header fields changed by `change`.
pub fn reheaded(frame: &[u8], change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let header = decode(frame, FRAME_BYTES_MAX)
        .expect("a frame")
        .expect("whole")
        .header;
    let mut changed = header;
    change(&mut changed);
    sealed(changed, payload(frame))
}

/// Returns the frame with another byte in its payload, for values that no message can have.
pub fn with_byte(frame: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut payload = payload(frame).to_vec();
    payload[at] = byte;
    let header = decode(frame, FRAME_BYTES_MAX)
        .expect("a frame")
        .expect("whole")
        .header;
    sealed(header, &payload)
}

fn channel(
    id: u8,
    name: &'static str,
    unit: &'static str,
    kind: Kind,
    exp10: i8,
) -> Channel<'static> {
    Channel {
        id,
        name,
        unit,
        kind,
        exp10,
    }
}

/// Returns a DECLARE of schema `schema` with any channels.
pub fn declare_channels(schema: u16, channels: &[Channel<'_>]) -> Vec<u8> {
    let channels = channels.iter().copied().collect();
    frame(
        &Declare {
            schema,
            channels,
            ext: &[],
        },
        0,
    )
}

/// Returns a DECLARE of the usual channels.
pub fn declare(schema: u16) -> Vec<u8> {
    let channels = [
        channel(TEMPERATURE, "temperature", "Cel", Kind::Integer, -2),
        channel(LEVEL, "level", "m", Kind::F64, 0),
        channel(OPEN, "open", "", Kind::Bool, 0),
        channel(FLOW, "flow", "l/s", Kind::F32, 0),
    ];
    declare_channels(schema, &channels)
}

/// Returns the hash of the content that [`declare`] declares.
pub fn declared_hash(schema: u16) -> [u8; 8] {
    schema_hash(payload(&declare(schema)))
}

/// Returns a DATA without columns: UTC, microseconds, one row per second.
pub fn no_columns(rows: u16) -> Data<'static> {
    Data {
        schema: SCHEMA,
        clock: Clock::Utc,
        time_unit: TimeUnit::Microseconds,
        boot: 7,
        t0: T0_US,
        rows,
        step: u32::from(rows > 1) * 1_000_000,
        dt: &[],
        columns: std::iter::empty().collect(),
        ext: &[],
    }
}

/// Returns `data` with these columns, as a frame.
pub fn with_columns(data: Data<'_>, seq: u64, columns: &[Column<'_>]) -> Vec<u8> {
    let columns = columns.iter().copied().collect();
    frame(&Data { columns, ..data }, seq)
}

/// Returns a raw column without nulls.
pub fn raw(channel: u8, data: &[u8]) -> Column<'_> {
    Column {
        channel,
        encoding: encoding::RAW,
        nulls: &[],
        data,
    }
}

/// Returns DATA `seq`: temperatures in hundredths, the first at `t0_us`.
pub fn readings_at(seq: u64, t0_us: i64, hundredths: &[i64]) -> Vec<u8> {
    let bytes: Vec<u8> = hundredths.iter().flat_map(|h| h.to_le_bytes()).collect();
    let data = Data {
        t0: t0_us,
        ..no_columns(hundredths.len() as u16)
    };
    with_columns(data, seq, &[raw(TEMPERATURE, &bytes)])
}

/// Returns DATA `seq` with one reading, whose value in hundredths is its number.
pub fn readings(seq: u64) -> Vec<u8> {
    readings_at(seq, T0_US + seq as i64 * 60_000_000, &[seq as i64])
}

pub fn gap(from_seq: u64, seq: u64, reason: u8) -> Vec<u8> {
    frame(
        &Gap {
            from_seq,
            reason,
            ext: &[],
        },
        seq,
    )
}

/// Returns EVENT `seq` with a UTC time.
pub fn event(seq: u64, level: u8, code: u16, text: &str) -> Vec<u8> {
    frame(
        &Event {
            clock: Clock::Utc,
            boot: 7,
            time_us: T0_US,
            level,
            code,
            text,
            ext: &[],
        },
        seq,
    )
}

pub fn ping(mono_us: u64, pong_sent_us: i64, pong_mono_us: u64) -> Vec<u8> {
    frame(
        &Ping {
            mono_us,
            pong_sent_us,
            pong_mono_us,
            ext: &[],
        },
        0,
    )
}

pub fn bye() -> Vec<u8> {
    frame(
        &Bye {
            code: 0,
            retry_after_ms: 0,
            min_version: 0,
            max_version: 0,
            detail: "",
            ext: &[],
        },
        0,
    )
}
