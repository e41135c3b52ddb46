//! The states before WELCOME (SPEC R30 to R39): one struct for each expected message.
//!
//! All faults in a peer's identity look the same to the peer: it receives BYE 50, after the same
//! time for an unknown device as for a wrong key.

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING, NONCE_BYTES, Transcript};
use fieldgate_protocol::error::{Code, Violation};
use fieldgate_protocol::frame::{Frame, VERSION};
use fieldgate_protocol::message::{Auth, Challenge, Hello, Message, decode};

use super::reply::{Outbound, WelcomeTerms};
use super::stream::Stream;
use super::{Close, SessionSettings};
use crate::auth::credentials::Credential;
use crate::auth::device_key::DeviceKey;
use crate::store::{Login, LoginOutcome};
use crate::time::{BootClock, Now};

/// Longest invalid name that is recorded, in bytes.
const CLAIMED_BYTES_MAX: usize = 64;

/// Properties of a TLS connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secured {
    /// The channel binding (R34).
    pub binding: [u8; KEY_BYTES],
    /// Names in the peer's certificate; `None` if none was requested.
    pub names: Option<Vec<String>>,
}

/// State before HELLO.
pub(super) struct AwaitHello {
    pub nonce: [u8; NONCE_BYTES],
    /// Name that the peer claims; empty before HELLO.
    pub device: String,
}

impl AwaitHello {
    pub(super) fn handle_frame(
        &mut self,
        frame: &Frame<'_>,
        settings: &SessionSettings,
        now: Now,
        outbound: &mut Outbound,
    ) -> Result<AwaitAuth, Close> {
        let hello: Hello<'_> = match expect(frame) {
            Ok(hello) => hello,
            Err(close) => {
                // Recorded so that the operator can find the peer.
                self.device = claimed_name(frame);
                return Err(close);
            }
        };
        self.device = hello.name.to_owned();
        if !(hello.min_version..=hello.max_version).contains(&VERSION) {
            return Err(Close::bye(Code::Version, "this gateway supports version 1"));
        }
        let mut transcript = Transcript::default();
        transcript.add(frame.payload());
        let challenge = Challenge {
            version: VERSION,
            nonce: self.nonce,
            rx_bytes_max: settings.limits.frame_bytes_max,
            caps: 0,
            ext: &[],
        };
        outbound.challenge(&challenge, &mut transcript);
        Ok(AwaitAuth {
            credential: settings.credentials.of(hello.name),
            may_register: settings.may_register,
            transcript,
            device: std::mem::take(&mut self.device),
            stream: hello.stream,
            oldest_seq: hello.oldest_seq,
            next_seq: hello.next_seq,
            firmware: hello.firmware.to_owned(),
            schema: (hello.schema > 0).then_some((hello.schema, hello.schema_hash)),
            boot: hello.boot,
            challenged_at_us: now.mono_us,
        })
    }
}

/// State after HELLO: the peer has identified itself and must authenticate.
pub(super) struct AwaitAuth {
    credential: Credential,
    may_register: bool,
    transcript: Transcript,
    pub device: String,
    stream: u64,
    oldest_seq: u64,
    next_seq: u64,
    firmware: String,
    schema: Option<(u16, [u8; 8])>,
    boot: u32,
    challenged_at_us: u64,
}

impl AwaitAuth {
    pub(super) fn handle_frame(
        &mut self,
        frame: &Frame<'_>,
        peer: SocketAddr,
        secured: Option<&Secured>,
        now: Now,
    ) -> Result<(AwaitAdmission, Login), Close> {
        let auth: Auth<'_> = expect(frame)?;
        let payload = frame.payload();
        self.transcript.add(&payload[..payload.len() - KEY_BYTES]);
        let binding = secured.map_or(&NO_CHANNEL_BINDING, |secured| &secured.binding);
        let is_proved =
            self.transcript
                .verify_device_mac(self.credential.key.as_bytes(), binding, &auth.mac);
        let names = secured.and_then(|secured| secured.names.as_ref());
        let is_certified = names.is_none_or(|names| names.contains(&self.device));
        if !is_proved || !is_certified {
            return Err(Close::bye(Code::Authentication, "authentication failed"));
        }
        self.transcript.add(&auth.mac);
        let login = Login {
            device: self.device.clone(),
            stream: self.stream,
            oldest_seq: self.oldest_seq,
            next_seq: self.next_seq,
            firmware: self.firmware.clone(),
            schema: self.schema,
            clock: self.clock(auth.mono_us, now),
            key_revision: self.credential.revision,
            may_register: self.may_register,
            at_us: now.utc_us,
        };
        let next = AwaitAdmission {
            key: self.credential.key,
            transcript: self.transcript.clone(),
            device: std::mem::take(&mut self.device),
            boot: self.boot,
            peer,
        };
        Ok((next, login))
    }

    /// Returns the device's clock as measured by the gateway over the round trip from CHALLENGE to
    /// AUTH; the device read its clock when it sent AUTH.
    fn clock(&self, mono_us: u64, now: Now) -> BootClock {
        let elapsed_us = now.mono_us.saturating_sub(self.challenged_at_us) as i64;
        BootClock::measure(self.boot, elapsed_us, mono_us, mono_us, now)
            .expect("a round trip that does not end before it begins is valid")
    }
}

/// State after AUTH: the device has authenticated, and the store is looking up its stream.
pub(super) struct AwaitAdmission {
    key: DeviceKey,
    transcript: Transcript,
    pub device: String,
    boot: u32,
    peer: SocketAddr,
}

impl AwaitAdmission {
    pub(super) fn handle_outcome(
        &mut self,
        outcome: LoginOutcome,
        settings: &SessionSettings,
        binding: &[u8; KEY_BYTES],
        now: Now,
        outbound: &mut Outbound,
    ) -> Result<Stream, Close> {
        let admission = match outcome {
            LoginOutcome::Admitted(admission) => *admission,
            LoginOutcome::Disabled => {
                return Err(Close::bye(Code::Disabled, "device is disabled"));
            }
            LoginOutcome::Unregistered => {
                let detail = "this device is not registered";
                return Err(Close::bye(Code::Authentication, detail));
            }
            LoginOutcome::KeyReplaced => {
                let detail = "the key of this device was replaced";
                return Err(Close::bye(Code::Authentication, detail));
            }
            LoginOutcome::StreamConflict => {
                let detail =
                    "the device lost numbers that this stream had assigned: start a new stream";
                return Err(Close::bye(Code::StreamConflict, detail));
            }
            LoginOutcome::OverBound(reached) => {
                return Err(Close::bye(Code::StreamBound, reached.to_string()));
            }
        };
        let terms = WelcomeTerms {
            window_frames: settings.limits.window_frames,
            keepalive_s: settings.limits.keepalive_s,
            ack_timeout_s: settings.limits.ack_timeout_s,
            utc_us: now.utc_us,
            schema_known: admission.schema.is_some(),
        };
        let quota = settings.quotas.of(admission.device, now.mono_us);
        let transcript = std::mem::take(&mut self.transcript);
        let key = self.key.as_bytes();
        outbound.welcome(admission.receipt, terms, transcript, key, binding);
        let retention = settings.retention.longest_of(&self.device);
        Ok(Stream::new(
            self.boot,
            self.peer,
            admission,
            settings.limits.window_frames,
            Arc::clone(&settings.quarantine),
            quota,
            retention,
        ))
    }
}

/// Returns the name in an invalid HELLO, escaped and cut to [`CLAIMED_BYTES_MAX`]; empty if there
/// is none.
fn claimed_name(frame: &Frame<'_>) -> String {
    let payload = frame.payload();
    let name = match payload {
        // Two versions, then the name's length: a single byte for every valid name.
        [_, _, length @ 0..=127, name @ ..] if frame.header.frame_type == Hello::TYPE => {
            &name[..name.len().min(usize::from(*length))]
        }
        _ => return String::new(),
    };
    let name = String::from_utf8_lossy(name).escape_default().to_string();
    name[..name.len().min(CLAIMED_BYTES_MAX)].to_owned()
}

/// Decodes the only message allowed in this state from an intact frame.
fn expect<'a, M: Message<'a>>(frame: &Frame<'a>) -> Result<M, Close> {
    let header = frame.header;
    if header.version != VERSION {
        return Err(Close::bye(Code::Version, "the handshake uses version 1"));
    }
    let refused = |detail: String| Close::bye(Code::Authentication, detail);
    if header.frame_type != M::TYPE || header.seq != 0 {
        let detail = format!("unexpected type {:#04x}", header.frame_type);
        return Err(refused(detail));
    }
    if !frame.intact {
        return Err(refused("payload checksum wrong".into()));
    }
    if header.flags != 0 {
        return Err(refused(Violation::Flags(header.flags).to_string()));
    }
    decode(frame.payload()).map_err(|violation| refused(violation.to_string()))
}
