//! Runs each target over its corpus and over a fixed number of mutations of it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::testing::simulation::random::Random;

/// Number of mutations of each target's corpus: a second or two without optimization.
const MUTATIONS: usize = 100_000;
/// Number for the target `session`, whose inputs take longer.
const SESSION_MUTATIONS: usize = 5_000;
const INPUT_BYTES_MAX: usize = 2_048;

#[test]
fn frame_properties_hold() {
    run("frame", fieldgate_protocol::fuzz::frame, MUTATIONS);
}

#[test]
fn message_properties_hold() {
    run("message", fieldgate_protocol::fuzz::message, MUTATIONS);
}

#[test]
fn column_properties_hold() {
    run("column", fieldgate_protocol::fuzz::column, MUTATIONS);
}

#[test]
fn splitting_a_stream_changes_nothing() {
    run("codec", super::codec, MUTATIONS);
}

#[test]
fn session_properties_hold() {
    run("session", super::session, SESSION_MUTATIONS);
}

/// Takes the seed from FIELDGATE_TEST_SEED, or else from the clock.
fn run(target: &str, check: fn(&[u8]), mutations: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&folder).expect("a corpus");
    let mut paths: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
    // Sorted, because otherwise the meaning of a seed would depend on the file system.
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths
        .iter()
        .map(|path| std::fs::read(path).expect("readable"))
        .collect();
    assert!(!corpus.is_empty());
    let seed = match std::env::var("FIELDGATE_TEST_SEED") {
        Ok(seed) => seed.parse().expect("a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_nanos() as u64,
    };
    eprintln!("FIELDGATE_TEST_SEED={seed}");
    for input in &corpus {
        check_or_print(target, check, input);
    }
    let mut random = Random::new(seed);
    for _ in 0..mutations {
        check_or_print(target, check, &mutated(&corpus, &mut random));
    }
}

fn check_or_print(target: &str, check: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(input))) {
        let hex = hex::encode(input);
        eprintln!("target {target} fails with the input {hex}");
        resume_unwind(panic);
    }
}

fn mutated(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = corpus[random.index(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.index(input.len() + 1);
        match random.below(5) {
            0 => input.truncate(at),
            1 => input.insert(at, random.bits() as u8),
            2 => input.extend_from_slice(&corpus[random.index(corpus.len())]),
            _ if at == input.len() => {}
            3 => input[at] ^= 1 << random.below(8),
            _ => input[at] = random.bits() as u8,
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}
