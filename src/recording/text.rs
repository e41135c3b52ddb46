//! Text of a file: its encoding, and the line of a byte offset.

use super::ReadError;

const BYTE_ORDER_MARK: char = '\u{FEFF}';

/// Decodes a file: UTF-8 or UTF-16 with a byte order mark, valid UTF-8, otherwise Windows-1252,
/// which includes Latin-1. The second value names a guessed encoding.
///
/// # Errors
/// The bytes are not text, for example a compressed file.
pub fn decode(bytes: Vec<u8>) -> Result<(String, Option<&'static str>), ReadError> {
    if let Some(kind) = not_text(&bytes) {
        return Err(ReadError::file(kind.to_owned()));
    }
    match bytes.get(..2) {
        Some([0xFF, 0xFE]) => return Ok((utf16(&bytes[2..], u16::from_le_bytes), None)),
        Some([0xFE, 0xFF]) => return Ok((utf16(&bytes[2..], u16::from_be_bytes), None)),
        _ => {}
    }
    match String::from_utf8(bytes) {
        Ok(mut text) => {
            if text.starts_with(BYTE_ORDER_MARK) {
                text.remove(0);
            }
            Ok((text, None))
        }
        Err(error) => {
            let bytes = error.as_bytes();
            if bytes.contains(&0) {
                return Err(ReadError::file(
                    "file contains NUL bytes and is not a text file".to_owned(),
                ));
            }
            let text = bytes.iter().map(|byte| windows_1252(*byte)).collect();
            Ok((text, Some("Windows-1252 (Latin-1)")))
        }
    }
}

/// Returns the probable type of a file that is not a table.
fn not_text(bytes: &[u8]) -> Option<&'static str> {
    let start = bytes.trim_ascii_start();
    let is = |magic: &[u8]| start.starts_with(magic);
    match () {
        () if is(&[0x1F, 0x8B]) => Some("the file is compressed with gzip; unpack it first"),
        () if is(b"PK\x03\x04") => {
            Some("the file is a ZIP archive or a spreadsheet; save it as CSV first")
        }
        () if is(b"BZh") || is(b"\xFD7zXZ") || is(b"\x28\xB5\x2F\xFD") => {
            Some("the file is compressed; unpack it first")
        }
        () if is(b"<!") || is(b"<html") || is(b"<?xml") => {
            Some("the file is HTML or XML, not CSV; was an error page saved?")
        }
        () if is(b"{") || is(b"[{") => Some("the file is JSON, not CSV"),
        () if is(b"version https://git-lfs") => Some("the file is a Git LFS pointer, not the data"),
        () => None,
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]]));
    char::decode_utf16(units)
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// Characters of the bytes 0x80 to 0x9F; all others are the same as in Latin-1.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8D}', 'Ž', '\u{8F}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9D}', 'ž', 'Ÿ',
];

fn windows_1252(byte: u8) -> char {
    match byte {
        0x80..=0x9F => WINDOWS_1252[usize::from(byte - 0x80)],
        byte => char::from(byte),
    }
}

/// Returns the line of the byte `at`, counted from 1. Lines end with LF, CRLF or CR.
pub fn line_of(text: &str, at: usize) -> u64 {
    let bytes = text.as_bytes();
    let ends = (0..at.min(bytes.len())).filter(|&at| match bytes[at] {
        b'\n' => true,
        b'\r' => bytes.get(at + 1) != Some(&b'\n'),
        _ => false,
    });
    1 + ends.count() as u64
}

/// Returns the start of the line after the one with the byte `at`.
pub fn next_line(text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let end = bytes[at.min(bytes.len())..]
        .iter()
        .position(|byte| matches!(byte, b'\n' | b'\r'));
    match end.map(|end| at + end) {
        None => text.len(),
        Some(end) if bytes[end] == b'\r' && bytes.get(end + 1) == Some(&b'\n') => end + 2,
        Some(end) => end + 1,
    }
}

/// Returns the line that begins at `at`, without its line end.
pub fn line_at(text: &str, at: usize) -> &str {
    text[at..next_line(text, at)].trim_end_matches(['\r', '\n'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utf16_of(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        let units = std::iter::once(0xFEFF).chain(text.encode_utf16());
        units.flat_map(bytes).collect()
    }

    #[test]
    fn encodings_are_found() {
        let text = "Zeit;Höhe °C\n";
        for bytes in [
            utf16_of(text, u16::to_le_bytes),
            utf16_of(text, u16::to_be_bytes),
            text.as_bytes().to_vec(),
        ] {
            assert_eq!(decode(bytes).unwrap(), (text.to_owned(), None));
        }
        let latin: Vec<u8> = text.chars().map(|char| char as u8).collect();
        assert_eq!(decode(latin).unwrap().0, text);
        assert_eq!(decode(vec![b'1', 0x80]).unwrap().0, "1€");
    }

    #[test]
    fn other_file_types_are_recognized() {
        let cases: [(&[u8], &str); 5] = [
            (&[0x1F, 0x8B, 8, 0], "gzip"),
            (b"PK\x03\x04rest", "spreadsheet"),
            (b"\n<!DOCTYPE html>", "HTML"),
            (b"{\"a\": 1}", "JSON"),
            (&[0xE9, 0, 1], "NUL"),
        ];
        for (bytes, expected) in cases {
            let error = decode(bytes.to_vec()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn lines_end_in_three_ways() {
        for (text, line) in [("a\nb\nc", 3), ("a\r\nb\r\nc", 3), ("a\rb\rc", 3), ("c", 1)] {
            assert_eq!(line_of(text, text.find('c').unwrap()), line, "{text:?}");
        }
        assert_eq!(line_at("a\r\nbc\r\n", 3), "bc");
        assert_eq!(next_line("a\r\nbc", 3), 5);
    }
}
