//! `fieldgate quarantine show`: shows one frame field by field, up to the byte that breaks a rule.

use std::io::{self, Write};

use crate::config::store_url::StoreUrl;
use crate::decode::explain::{Line, Part, explain};
use crate::store::admin::replay::QuarantinedFrame;
use crate::store::admin::{Access, Connection};
use clap::Args;

use super::select::no_frame;
use crate::cli::Error;
use crate::cli::output::{self, write_facts};
use crate::cli::value::{Value, Written};
use crate::text::{bytes_text, code_text, utc_text};

/// Number of bytes per line of the dump.
const LINE_BYTES: usize = 16;

#[derive(Args, Debug)]
pub struct ShowArgs {
    /// Id of the frame, as in `quarantine list`
    #[arg(value_name = "ID")]
    id: i64,
}

pub async fn show(store: &StoreUrl, args: &ShowArgs) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Read).await?;
    let condition = format!("q.id = {}", args.id);
    let frames = connection
        .quarantined_frames(&condition, &[], i64::MIN, 1)
        .await?;
    let Some(kept) = frames.first() else {
        return Err(no_frame(args.id));
    };
    let mut facts = facts(&mut connection, kept).await?;
    let found = explain(&mut connection, kept).await?;
    let verdict = match &found {
        Some(found) => found.verdict(),
        None => "not a complete frame with a valid header".to_owned(),
    };
    facts.push(("now", verdict.clone()));
    let mut out = output::stdout();
    write_facts(&facts, &mut out)?;
    writeln!(out)?;
    let lines = match found {
        Some(found) => found.lines(kept.bytes.len()),
        None => vec![all(kept.bytes.len())],
    };
    for line in &lines {
        write_line(&kept.bytes, line, &verdict, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

/// Returns all bytes of a frame as one line.
fn all(bytes: usize) -> Line {
    let part = Part {
        name: "bytes".to_owned(),
        bytes: 0..bytes,
        value: String::new(),
    };
    Line {
        part,
        fault_at: None,
    }
}

async fn facts(
    connection: &mut Connection,
    kept: &QuarantinedFrame,
) -> Result<Vec<(&'static str, String)>, Error> {
    let sql = "SELECT code, detail, peer FROM quarantine WHERE id = $1";
    let rows = connection.rows(sql, &[kept.id.into()]).await?;
    let mut facts = vec![
        ("frame", kept.id.to_string()),
        ("device", kept.device_name.clone()),
        ("number", kept.seq.to_string()),
        ("received", utc_text(kept.received_at_us)),
        ("bytes", bytes_text(kept.bytes.len() as u64)),
    ];
    for row in &rows {
        facts.push(("from", row.text(2)?.to_owned()));
        let refused = format!("{}: {}", code_text(row.integer(0)?), row.text(1)?);
        facts.push(("refused as", refused));
    }
    Ok(facts)
}

/// Writes the bytes of a field, with its name and value on the first line, and marks the faulty byte.
fn write_line(bytes: &[u8], line: &Line, verdict: &str, out: &mut impl Write) -> io::Result<()> {
    let Line { part, fault_at } = line;
    let mut start = part.bytes.start;
    while start < part.bytes.end {
        let end = (start + LINE_BYTES).min(part.bytes.end);
        let digits: Vec<String> = { bytes[start..end].iter() }
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let line = format!("{start:5}  {:48}", digits.join(" "));
        if start == part.bytes.start {
            let value = Value::from(part.value.as_str()).shown();
            writeln!(
                out,
                "{}",
                format!("{line} {}  {value}", part.name).trim_end()
            )?;
        } else {
            writeln!(out, "{}", line.trim_end())?;
        }
        if let Some(at) = fault_at.filter(|at| (start..end).contains(at)) {
            let verdict = Value::from(verdict).shown();
            writeln!(
                out,
                "{:indent$}^^ byte {at}: {verdict}",
                "",
                indent = 7 + 3 * (at - start)
            )?;
        }
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_below_the_faulty_byte() {
        let bytes: Vec<u8> = (0..40).collect();
        let part = Part {
            name: "data".to_owned(),
            bytes: 2..30,
            value: "28 bytes".to_owned(),
        };
        let mut out = Vec::new();
        let line = Line {
            part,
            fault_at: Some(20),
        };
        write_line(&bytes, &line, "why (R1)", &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].ends_with("data  28 bytes"), "{text}");
        assert_eq!(lines[2].find("^^"), lines[1].find("14"), "{text}");
        assert!(lines[2].ends_with("byte 20: why (R1)"), "{text}");
    }
}
