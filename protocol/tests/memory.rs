//! Measures the stack that `encode` needs, as the crate's documentation names it.
//!
//! A process overflows its stack and ends, so each attempt is a process: it puts a number of frames of equal size
//! on the stack, and then encodes or does nothing. Fewer frames fit if it encodes; their size is the stack it needs.

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::thread;

use fieldgate_protocol::message::{Column, Data, encode};
use fieldgate_protocol::value::{Clock, TimeUnit};

const STACK_BYTES: usize = 64 * 1024;
/// Compilers use more stack with full debug information: 2560 bytes instead of 1680.
const ENCODE_STACK_BYTES_MAX: usize = 3 * 1024;

/// Calls `work` with `frames` more frames on the stack; returns the address of something in the last one.
#[inline(never)]
fn descend(frames: usize, work: &mut dyn FnMut()) -> usize {
    let local = black_box([0u8; 16]);
    let deepest = match frames {
        0 => {
            work();
            local.as_ptr().addr()
        }
        _ => descend(frames - 1, work),
    };
    black_box(local);
    deepest
}

#[test]
#[ignore = "started by the test below"]
fn attempt() {
    let number = |name| std::env::var(name).map(|number| number.parse::<usize>().unwrap());
    let (Ok(frames), Ok(encodes)) = (number("FRAMES"), number("ENCODES")) else {
        return;
    };
    let run = move || {
        let columns: [Column<'_>; 32] = std::array::from_fn(|channel| Column {
            channel: channel as u8,
            encoding: 1,
            nulls: &[],
            data: &[0xDA, 0x21, 0x02, 0x03],
        });
        let data = Data {
            schema: 1,
            clock: Clock::Boot,
            time_unit: TimeUnit::Seconds,
            boot: 7,
            t0: 5,
            rows: 3,
            step: 1,
            dt: &[],
            columns: columns.into(),
            ext: &[],
        };
        let mut out = [0; 512];
        descend(frames, &mut || {
            if encodes == 1 {
                encode(black_box(&data), 1, &mut out).unwrap();
            }
        });
    };
    let thread = thread::Builder::new().stack_size(STACK_BYTES);
    thread.spawn(run).unwrap().join().unwrap();
}

/// Returns how many frames fit the stack.
fn frames_max(encodes: usize) -> usize {
    let fits = |frames: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "attempt", "--include-ignored"])
            .envs([
                ("FRAMES", frames.to_string()),
                ("ENCODES", encodes.to_string()),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    };
    let (mut fitting, mut too_many) = (0, STACK_BYTES / 16);
    assert!(fits(fitting) && !fits(too_many));
    while too_many - fitting > 1 {
        let middle = fitting.midpoint(too_many);
        if fits(middle) {
            fitting = middle;
        } else {
            too_many = middle;
        }
    }
    fitting
}

#[cfg(unix)]
#[test]
fn encode_needs_no_more_stack_than_documented() {
    let frame_bytes = descend(0, &mut || ()).abs_diff(descend(64, &mut || ())) / 64;
    let encode_bytes = (frames_max(0) - frames_max(1)) * frame_bytes;
    println!("encode needs {encode_bytes} bytes of stack, to within {frame_bytes}");
    assert!(
        (frame_bytes..ENCODE_STACK_BYTES_MAX).contains(&encode_bytes),
        "encode needs {encode_bytes} bytes of stack"
    );
}
