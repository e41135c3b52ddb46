//! Vectors of the encoding of single numbers, texts and lists.

use super::*;

fn good<T: Serialize>(kind: &str, value: T, shown: &str) -> Value {
    let mut out = [0; 64];
    let bytes = postcard::to_slice(&value, &mut out).unwrap();
    json!({ "type": kind, "value": shown, "hex": hex(bytes) })
}

fn bad(kind: &str, bytes: &[u8], note: &str) -> Value {
    json!({ "type": kind, "hex": hex(bytes), "error": note })
}

pub fn file() -> Value {
    let mut vectors = Vec::new();
    for value in [0u8, 1, 127, 128, 255] {
        vectors.push(good("u8", value, &value.to_string()));
    }
    for value in [0u16, 127, 128, 300, 16_383, 16_384, u16::MAX] {
        vectors.push(good("u16", value, &value.to_string()));
    }
    for value in [0u32, 127, 128, 1 << 28, u32::MAX] {
        vectors.push(good("u32", value, &value.to_string()));
    }
    for value in [0u64, 127, 128, 1 << 35, (1 << 63) - 1, 1 << 63, u64::MAX] {
        vectors.push(good("u64", value, &value.to_string()));
    }
    for value in [0i8, 1, -1, 22, -22, i8::MIN, i8::MAX] {
        vectors.push(good("i8", value, &value.to_string()));
    }
    for value in [
        0i64,
        -1,
        1,
        -2,
        63,
        -64,
        64,
        1_760_000_000,
        i64::MAX,
        i64::MIN,
    ] {
        vectors.push(good("i64", value, &value.to_string()));
    }
    for value in ["", "a", "pump-07", "\u{b0}C"] {
        vectors.push(good("text", value, value));
    }
    vectors.push(good("bytes", serde_bytes::Bytes::new(&[]), ""));
    vectors.push(good(
        "bytes",
        serde_bytes::Bytes::new(&[0xDE, 0xAD]),
        "dead",
    ));
    vectors.push(good("array4", [1u8, 128, 255, 0], "0180ff00"));
    vectors.extend([
        bad("u8", &[], "no bytes"),
        bad("u16", &[0x80], "cut short"),
        bad("u16", &[0x80, 0x00], "not the shortest"),
        bad("u16", &[0x80, 0x80, 0x04], "65,536"),
        bad("u16", &[0x80, 0x80, 0x80, 0x00], "too many bytes"),
        bad("u32", &[0xFF, 0xFF, 0xFF, 0xFF, 0x10], "more than 32 bits"),
        bad("u64", &[0xFF; 10], "more than 64 bits"),
        bad(
            "u64",
            &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x02],
            "more than 64 bits",
        ),
        bad("i64", &[0x80, 0x00], "not the shortest"),
        bad("text", &[0x02, b'a'], "cut short"),
        bad("text", &[0x01, 0xFF], "not UTF-8"),
        bad("text", &[0x81, 0x00, b'a'], "length not the shortest"),
        bad("bytes", &[0x03, 1, 2], "cut short"),
        bad("array4", &[1, 2, 3], "cut short"),
    ]);
    json!({ "about": "Numbers, texts and byte strings (SPEC.md section 3)", "vectors": vectors })
}

/// Returns the value if the crate decodes these bytes as exactly one value of this type.
pub fn decodes(kind: &str, bytes: &[u8]) -> Option<String> {
    use serde::Deserialize;
    fn one<'a, T: Deserialize<'a> + Serialize>(bytes: &'a [u8]) -> Option<T> {
        let (value, rest) = postcard::take_from_bytes::<T>(bytes).ok()?;
        let mut out = [0; 64];
        let again = postcard::to_slice(&value, &mut out).unwrap();
        (rest.is_empty() && *again == *bytes).then_some(value)
    }
    Some(match kind {
        "u8" => one::<u8>(bytes)?.to_string(),
        "u16" => one::<u16>(bytes)?.to_string(),
        "u32" => one::<u32>(bytes)?.to_string(),
        "u64" => one::<u64>(bytes)?.to_string(),
        "i8" => one::<i8>(bytes)?.to_string(),
        "i64" => one::<i64>(bytes)?.to_string(),
        "text" => one::<&str>(bytes)?.to_owned(),
        "bytes" => hex(one::<&serde_bytes::Bytes>(bytes)?),
        _ => hex(&one::<[u8; 4]>(bytes)?),
    })
}
