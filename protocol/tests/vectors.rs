//! Checks that the files in `vectors/` match the corpus, and the decoders match the vectors.

#[allow(dead_code, missing_docs)]
mod corpus;

use std::collections::HashSet;

use corpus::judge::judge;
use corpus::{columns, files, primitives, render, unhex, vectors};

#[test]
fn files_match_the_corpus() {
    for (name, file) in files() {
        let path = format!("{}/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == render(&file),
            "{name} is out of date: cargo run -p fieldgate-protocol --example vectors"
        );
    }
}

#[test]
fn decoders_match_each_vector() {
    for vector in vectors() {
        let found = judge(vector.state, &unhex(&vector.hex));
        assert_eq!(found, vector.expect, "{}: {}", vector.id, vector.note);
    }
}

#[test]
fn ids_are_unique() {
    let mut seen = HashSet::new();
    for vector in vectors() {
        assert!(seen.insert(vector.id.clone()), "{} twice", vector.id);
    }
}

#[test]
fn primitives_match_their_vectors() {
    let file = primitives::file();
    for vector in file["vectors"].as_array().unwrap() {
        let bytes = unhex(vector["hex"].as_str().unwrap());
        let found = primitives::decodes(vector["type"].as_str().unwrap(), &bytes);
        assert_eq!(found.as_deref(), vector["value"].as_str(), "{vector}");
    }
}

#[test]
fn columns_match_their_vectors() {
    let file = columns::file();
    for case in file["columns"].as_array().unwrap() {
        let expected = match case["values"].as_array() {
            Some(values) => Ok(values.clone()),
            None => Err(case["error"].as_u64().unwrap() as u8),
        };
        assert_eq!(columns::column_outcome(case), expected, "{}", case["id"]);
    }
}

#[test]
fn times_match_their_vectors() {
    let file = columns::file();
    for case in file["times"].as_array().unwrap() {
        let expected = match case["times_us"].as_array() {
            Some(times) => Ok(times.clone()),
            None => Err(case["error"].as_u64().unwrap() as u8),
        };
        assert_eq!(columns::time_outcome(case), expected, "{}", case["id"]);
    }
}
