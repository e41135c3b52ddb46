//! Compares a session with a model of the order rules (SPEC R44, R60 to R66), for any frames from a
//! device and any times of commits.

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
use fieldgate_protocol::column::encoding;
use fieldgate_protocol::device::{Config, Device, Queue};
use fieldgate_protocol::frame::{self, HEADER_BYTES, NoRoom, types};
use fieldgate_protocol::message::{self, Ack, Channel, Event, Gap, Nack};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};
use proptest::prelude::*;

use super::inbox::{Inbox, Mail};
use super::*;
use crate::config::SessionLimits;
use crate::config::retention::ReadingRetention;
use crate::store::memory::MemoryStore;
use crate::store::{Batch, Content, Store};
use crate::time::DAY_US;

mod vectors;

/// Input from a device, with numbers relative to the next expected one.
#[derive(Clone, Copy, Debug)]
enum Input {
    Good(i64),
    Gap(i64, u64),
    Damaged(i64),
    Malformed(i64),
    Commit,
}

/// Reply of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Ack {
        seq: u64,
    },
    Nack {
        code: u8,
        seq: u64,
        expected_seq: u64,
    },
}

fn input() -> impl Strategy<Value = Input> {
    let near = -4i64..4;
    prop_oneof![
        6 => prop_oneof![3 => Just(0), 1 => near.clone()].prop_map(Input::Good),
        1 => (near.clone(), 0u64..3).prop_map(|(from, more)| Input::Gap(from, more)),
        2 => prop_oneof![3 => Just(0), 1 => near.clone()].prop_map(Input::Damaged),
        1 => near.prop_map(Input::Malformed),
        2 => Just(Input::Commit),
    ]
}

/// The rules in their simplest form.
#[derive(Default)]
struct Model {
    durable: u64,
    expected: u64,
    awaits: bool,
    damaged: Option<u64>,
    /// Frames accepted since the last commit, with the code of those that are refused.
    taken: Vec<(u64, Option<Code>)>,
    refusals: usize,
}

impl Model {
    fn frame(&mut self, first: u64, seq: u64, input: Input) -> Vec<Reply> {
        if seq < self.expected {
            let is_durable = seq <= self.durable;
            return is_durable
                .then_some(Reply::Ack { seq: self.durable })
                .into_iter()
                .collect();
        }
        if first > self.expected {
            return self.ask(Code::SeqGap, seq);
        }
        self.awaits = false;
        let code = match input {
            Input::Damaged(_) if self.damaged == Some(seq) => Some(Code::PayloadCrcTwice),
            Input::Damaged(_) => {
                self.damaged = Some(seq);
                return self.ask(Code::PayloadCrc, seq);
            }
            Input::Malformed(_) => Some(Code::Malformed),
            _ => None,
        };
        self.refusals += usize::from(code.is_some());
        self.taken.push((seq, code));
        self.expected = seq + 1;
        Vec::new()
    }

    fn ask(&mut self, code: Code, seq: u64) -> Vec<Reply> {
        let is_asked = std::mem::replace(&mut self.awaits, true);
        let nack = Reply::Nack {
            code: code as u8,
            seq,
            expected_seq: self.expected,
        };
        (!is_asked).then_some(nack).into_iter().collect()
    }

    fn commit(&mut self) -> Vec<Reply> {
        let Some((last, _)) = self.taken.last() else {
            return Vec::new();
        };
        self.durable = *last;
        let expected_seq = self.expected;
        let refused = self.taken.drain(..).filter_map(|(seq, code)| {
            code.map(|code| Reply::Nack {
                code: code as u8,
                seq,
                expected_seq,
            })
        });
        let mut said: Vec<Reply> = refused.collect();
        said.push(Reply::Ack { seq: self.durable });
        said
    }
}

/// A session after WELCOME, with a store in memory.
struct Bench {
    inbox: Inbox,
    store: MemoryStore,
    waiting: Batch,
}

const HOUR_US: i64 = 3_600_000_000;
const NOW: Now = Now {
    mono_us: 1_000_000,
    utc_us: 1_700_000_000_000_000,
    origin: crate::time::Origin::NONE,
};

struct Empty;

impl Queue for Empty {
    fn oldest_seq(&self) -> u64 {
        1
    }
    fn next_seq(&self) -> u64 {
        1_000
    }
    fn write_frame(&mut self, _seq: u64, _out: &mut [u8]) -> Result<usize, NoRoom> {
        Err(NoRoom)
    }
    fn write_declare(&mut self, _seq: u64, _out: &mut [u8]) -> Result<usize, NoRoom> {
        Err(NoRoom)
    }
    fn delete_through(&mut self, _seq: u64) {}
}

impl Bench {
    fn accepted(settings: Arc<SessionSettings>) -> Bench {
        let peer = SocketAddr::from(([127, 0, 0, 1], 9));
        Bench {
            inbox: Inbox::new(Session::new(settings, peer, [7; 16], NOW)),
            store: MemoryStore::new(),
            waiting: Batch::default(),
        }
    }

    async fn welcomed() -> Bench {
        Bench::welcomed_with(SessionSettings::default()).await
    }

    async fn welcomed_with(settings: SessionSettings) -> Bench {
        let settings = Arc::new(settings);
        let key = *settings.credentials.of("pump").key.as_bytes();
        let mut device = Device::new(Config {
            name: "pump",
            key,
            firmware: "1",
            stream: 5,
            boot: 1,
            schema: 0,
            schema_hash: [0; 8],
            rx_bytes_max: 4096,
            window_frames: 1,
            reconnect_min_ms: 1,
            reconnect_max_ms: 1,
            handshake_timeout_ms: 1000,
        });
        let mut bench = Bench::accepted(settings);
        device.connect([9; 16], NO_CHANNEL_BINDING, 0, 0);
        for _ in 0..2 {
            let mut out = [0; 512];
            let sent = device
                .poll_transmit(&mut Empty, 0, &mut out)
                .expect("HELLO, then AUTH");
            bench.take(&out[..sent]);
            bench.commit().await;
            let said = bench.say();
            let heard = frame::decode(&said, 4096)
                .unwrap()
                .expect("CHALLENGE, then WELCOME");
            device
                .handle_frame(&heard, &mut Empty, 0)
                .expect("in order");
        }
        assert!(device.is_ready());
        bench
    }

    fn take(&mut self, bytes: &[u8]) {
        self.inbox.input().extend_from_slice(bytes);
        while let Some(submission) = self.inbox.poll_submission(NOW) {
            self.queue(submission);
        }
    }

    fn queue(&mut self, submission: Submission) {
        match submission {
            Submission::Login(login) => self.waiting.logins.push(login),
            Submission::Declare(declare) => self.waiting.declares.push(declare),
            Submission::Entry(entry) | Submission::Quarantine(entry, _) => {
                self.waiting.entries.push(entry);
            }
            Submission::Repeat(_) | Submission::Event(_) => {}
            other => panic!("unexpected: {other:?}"),
        }
        self.inbox.handle_queued();
    }

    /// Commits what was submitted; returns the answer.
    async fn answer(&mut self) -> Mail {
        let batch = std::mem::take(&mut self.waiting);
        let mut committed = self.store.commit(&batch).await.expect("commits");
        let last = batch.entries.last();
        Mail {
            login: committed.logins.pop(),
            declare: committed.declares.pop(),
            receipt: last.map(|last| (committed.receipts[0], last.seq)),
            ..Mail::default()
        }
    }

    async fn commit(&mut self) {
        let mail = self.answer().await;
        self.inbox.handle_mail(mail, NOW);
    }

    fn say(&mut self) -> Vec<u8> {
        let outbound = self.inbox.session.outbound();
        let said = outbound.bytes().to_vec();
        outbound.consume(said.len());
        said
    }

    fn replies(&mut self) -> Vec<Reply> {
        let said = self.say();
        let (mut rest, mut replies) = (said.as_slice(), Vec::new());
        while let Some(frame) = frame::decode(rest, 4096).unwrap() {
            let seq = frame.header.seq;
            replies.push(match frame.header.frame_type {
                types::ACK => {
                    let ack: Ack<'_> = message::decode(frame.payload()).unwrap();
                    assert_eq!(ack.limit_seq, seq + 64);
                    Reply::Ack { seq }
                }
                types::NACK => {
                    let nack: Nack<'_> = message::decode(frame.payload()).unwrap();
                    Reply::Nack {
                        code: nack.code,
                        seq,
                        expected_seq: nack.expected_seq,
                    }
                }
                other => panic!("unexpected type {other:#04x}"),
            });
            rest = &rest[frame.bytes.len()..];
        }
        replies
    }
}

fn frame_for(input: Input, first: u64, seq: u64) -> Vec<u8> {
    let mut out = vec![0; 512];
    let written = if let Input::Gap(..) = input {
        message::encode(
            &Gap {
                from_seq: first,
                reason: 0,
                ext: &[],
            },
            seq,
            &mut out,
        )
    } else {
        let (clock, boot, time_us) = (Clock::Utc, 1, NOW.utc_us);
        let event = Event {
            clock,
            boot,
            time_us,
            level: 1,
            code: 2,
            text: "x",
            ext: &[],
        };
        message::encode(&event, seq, &mut out)
    };
    out.truncate(written.expect("fits"));
    match input {
        Input::Damaged(_) => out[HEADER_BYTES] ^= 1,
        Input::Malformed(_) => {
            let mut header = frame::decode_header(&out, 4096).unwrap().unwrap();
            header.payload_bytes -= 1;
            frame::seal(header, &mut out).expect("shorter than it was");
            out.truncate(header.frame_bytes());
        }
        _ => {}
    }
    out
}

fn declare() -> Vec<u8> {
    let channel = Channel {
        id: 1,
        name: "level",
        unit: "",
        kind: Kind::F64,
        exp10: 0,
    };
    let declare = message::Declare {
        schema: 1,
        channels: [channel].into_iter().collect(),
        ext: &[],
    };
    let mut out = vec![0; 512];
    let written = message::encode(&declare, 0, &mut out).expect("fits");
    out.truncate(written);
    out
}

/// All frames arrive in one read.
#[tokio::test]
async fn input_waits_for_the_queue_and_for_outcomes() {
    let mut bench = Bench::welcomed().await;
    bench.take(&[]);
    let event = |seq| frame_for(Input::Good(0), seq, seq);
    let input = [event(1), declare(), event(2)].concat();
    bench.inbox.input().reserve(1024);
    bench.inbox.input().extend_from_slice(&input);
    let first = bench.inbox.poll_submission(NOW).expect("the event");
    assert!(bench.inbox.poll_submission(NOW).is_none() && !bench.inbox.wants_input());
    bench.queue(first);
    bench.take(&[]);
    let taken = |bench: &Bench| (bench.waiting.entries.len(), bench.waiting.declares.len());
    assert_eq!(taken(&bench), (1, 1));
    assert!(!bench.inbox.wants_input() && *bench.inbox.input() == event(2));
    bench.commit().await;
    bench.take(&[]);
    assert_eq!(taken(&bench), (1, 0));
    assert!(bench.inbox.wants_input());
    assert_eq!(bench.inbox.input().capacity(), 0);
}

/// A DECLARE takes longer in the store than a device may be silent, and input is paused meanwhile.
#[tokio::test]
async fn a_device_whose_input_is_paused_is_not_silent() {
    let mut bench = Bench::welcomed().await;
    bench.take(&declare());
    let idle_us = SessionLimits::default().idle_timeout_us();
    let later = Now {
        mono_us: NOW.mono_us + 2 * idle_us,
        ..NOW
    };
    let mail = bench.answer().await;
    bench.inbox.handle_mail(mail, later);
    let session = &mut bench.inbox.session;
    session.handle_timeout(later);
    assert_eq!(session.closed(), None);
    assert_eq!(session.poll_deadline(), Some(later.mono_us + idle_us));
}

/// Returns DATA of channel 1 with a row per hour, in UTC.
fn hourly(seq: u64, t0: i64, values: &[f64]) -> Vec<u8> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let column = message::Column {
        channel: 1,
        encoding: encoding::RAW,
        nulls: &[],
        data: &bytes,
    };
    let data = message::Data {
        schema: 1,
        clock: Clock::Utc,
        time_unit: TimeUnit::Microseconds,
        boot: 1,
        t0,
        rows: values.len() as u16,
        step: HOUR_US as u32,
        dt: &[],
        columns: [column].into_iter().collect(),
        ext: &[],
    };
    let mut out = vec![0; 512];
    let written = message::encode(&data, seq, &mut out).expect("fits");
    out.truncate(written);
    out
}

#[tokio::test]
async fn readings_that_arrive_too_old_are_left_out_once_the_clock_is_certain() {
    let retention = ReadingRetention {
        days: Some(30),
        rules: Vec::new(),
    };
    let mut bench = Bench::welcomed_with(SessionSettings {
        retention: Arc::new(retention),
        ..SessionSettings::default()
    })
    .await;
    bench.take(&declare());
    bench.commit().await;
    let later = Now {
        mono_us: 600_000_000,
        ..NOW
    };
    // Two rows are older than 30 days.
    let t0 = NOW.utc_us - 30 * DAY_US - 3 * HOUR_US / 2;
    let mut stored = Vec::new();
    for (seq, t0, now) in [(1, t0, NOW), (2, t0, later), (3, 0, later)] {
        let bytes = hourly(seq, t0, &[1.0, 2.0, 3.0, 4.0]);
        bench.inbox.input().extend_from_slice(&bytes);
        let Some(Submission::Entry(entry)) = bench.inbox.poll_submission(now) else {
            panic!("no entry");
        };
        let Content::Readings(readings) = &entry.content else {
            panic!("{entry:?}");
        };
        stored.push((readings.values.clone(), readings.too_old));
        assert_eq!(readings.times_us.last(), Some(&(t0 + 3 * HOUR_US)));
        bench.inbox.handle_queued();
    }
    assert_eq!(
        stored,
        [
            (vec![1.0, 2.0, 3.0, 4.0], 0),
            (vec![3.0, 4.0], 2),
            // The last row may be the newest of its series.
            (vec![4.0], 3),
        ]
    );
}

/// The second NACK reports more missing frames than the first one.
#[tokio::test]
async fn frames_lost_in_an_outage_are_requested_despite_an_earlier_request() {
    let mut bench = Bench::welcomed().await;
    bench.take(&frame_for(Input::Good(0), 1, 1));
    let mail = bench.answer().await;
    let receipt = mail.receipt.map(|(receipt, _)| (receipt, 2));
    bench.inbox.handle_mail(mail, NOW);
    bench.take(&frame_for(Input::Good(0), 2, 2));
    bench.take(&frame_for(Input::Good(0), 4, 4));
    bench.replies();
    bench.inbox.handle_mail(
        Mail {
            receipt,
            ..Mail::default()
        },
        NOW,
    );
    let nack = Reply::Nack {
        code: Code::SeqGap as u8,
        seq: 2,
        expected_seq: 2,
    };
    assert!(bench.replies().contains(&nack));
    bench.take(&frame_for(Input::Good(0), 2, 2));
    let submitted = bench.waiting.entries.iter().map(|entry| entry.seq);
    assert!(submitted.eq([2, 2]));
}

/// Copies may arrive damaged; the frames are stored as first received.
#[tokio::test]
async fn frames_in_flight_to_an_unavailable_store_are_not_checked_again() {
    let mut bench = Bench::welcomed().await;
    bench.take(&frame_for(Input::Good(0), 1, 1));
    bench.take(&frame_for(Input::Malformed(0), 2, 2));
    for is_down in [true, false] {
        let mail = Mail {
            store_is_down: Some(is_down),
            ..Mail::default()
        };
        bench.inbox.handle_mail(mail, NOW);
    }
    let nack = |code: Code, seq, expected_seq| Reply::Nack {
        code: code as u8,
        seq,
        expected_seq,
    };
    // The ACK has no new number; it signals that the store is back.
    let resume = Reply::Ack { seq: 0 };
    assert_eq!(bench.replies(), [nack(Code::StoreDown, 1, 1), resume]);
    for _ in 0..2 {
        bench.take(&frame_for(Input::Damaged(0), 1, 1));
    }
    bench.take(&frame_for(Input::Malformed(0), 2, 2));
    bench.take(&frame_for(Input::Good(0), 3, 3));
    assert_eq!(bench.replies(), []);
    bench.commit().await;
    let refused = nack(Code::Malformed, 2, 4);
    assert_eq!(bench.replies(), [refused, Reply::Ack { seq: 3 }]);
}

proptest! {
    #[test]
    fn a_session_agrees_with_the_rules(inputs in prop::collection::vec(input(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::welcomed().await;
            let mut model = Model { expected: 1, ..Model::default() };
            for input in inputs {
                let (offset, more) = match input {
                    Input::Good(offset) | Input::Damaged(offset) | Input::Malformed(offset) => {
                        (offset, 0)
                    }
                    Input::Gap(offset, more) => (offset, more),
                    Input::Commit => {
                        bench.commit().await;
                        prop_assert_eq!(bench.replies(), model.commit());
                        continue;
                    }
                };
                let first = model.expected.saturating_add_signed(offset).max(1);
                let is_over = first + more > model.durable + 60 || model.refusals == 8;
                if is_over {
                    break;
                }
                bench.take(&frame_for(input, first, first + more));
                prop_assert_eq!(bench.replies(), model.frame(first, first + more, input));
            }
            // Everything acknowledged is stored.
            let streams = bench.store.streams();
            prop_assert_eq!(bench.store.durable_seq(streams[0].0), model.durable);
            Ok(())
        })?;
    }
}
