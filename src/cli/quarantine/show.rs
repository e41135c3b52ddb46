//! `fieldgate quarantine show`: shows one frame field by field, up to the byte that breaks a rule.

use std::io::{self, Write};

use crate::config::store_url::StoreUrl;
use crate::decode::Context;
use crate::decode::explain::{Dissection, Part, dissect};
use crate::store::admin::replay::QuarantinedFrame;
use crate::store::admin::{Access, Connection};
use crate::time::Origin;
use clap::Args;
use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX};
use fieldgate_protocol::message::{Data, decode};

use super::select::no_frame;
use crate::cli::Error;
use crate::cli::output::{self, bytes_text, code_text, utc_text, write_facts};
use crate::cli::value::{Value, Written};

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
    let mut out = output::stdout();
    let Ok(Some(frame)) = frame::decode(&kept.bytes, FRAME_BYTES_MAX) else {
        facts.push(("now", "not a complete frame with a valid header".to_owned()));
        write_facts(&facts, &mut out)?;
        writeln!(out)?;
        let all = Part {
            name: "bytes".to_owned(),
            bytes: 0..kept.bytes.len(),
            value: String::new(),
        };
        write_part(&kept.bytes, &all, None, &mut out)?;
        out.flush()?;
        return Ok(());
    };
    let clocks = connection.clocks(kept.device).await?;
    let wanted = decode::<Data<'_>>(frame.payload()).map_or(0, |data| data.schema);
    let schema = connection.schema(kept.device, wanted).await?;
    let context = Context {
        clocks: &clocks,
        received_at_us: kept.received_at_us,
        origin: Origin::default(),
    };
    let found = dissect(&frame, &context, |number| {
        schema.as_ref().filter(|schema| schema.schema == number)
    });
    let verdict = verdict(&found);
    facts.push(("now", verdict.clone()));
    write_facts(&facts, &mut out)?;
    writeln!(out)?;
    write_parts(&kept.bytes, &found, &verdict, &mut out)?;
    out.flush()?;
    Ok(())
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
        let text = |column| row.text_or_null(column).map(Option::unwrap_or_default);
        facts.push(("from", text(2)?.to_owned()));
        let refused = format!("{}: {}", code_text(row.integer(0)?), text(1)?);
        facts.push(("refused as", refused));
    }
    Ok(facts)
}

/// Returns the result of decoding the frame with this version.
fn verdict(found: &Dissection) -> String {
    match (&found.fault, &found.content) {
        (Some(fault), _) => match fault.violation {
            Some(violation) => violation.to_string(),
            None => "payload checksum wrong (R6)".to_owned(),
        },
        (None, Some(_)) => "valid: `quarantine replay` stores it".to_owned(),
        (None, None) => "schema not declared (R47)".to_owned(),
    }
}

/// Writes the fields up to the fault, then the remaining bytes, which were not decoded.
fn write_parts(
    bytes: &[u8],
    found: &Dissection,
    verdict: &str,
    out: &mut impl Write,
) -> io::Result<()> {
    let fault_at = found.fault.as_ref().map(|fault| fault.at);
    // A field without bytes cannot hold the fault.
    let is_meant = |part: &&Part| fault_at.is_some_and(|at| part.bytes.contains(&at));
    let Some(last) = found.parts.iter().position(|part| is_meant(&part)) else {
        for part in &found.parts {
            write_part(bytes, part, None, out)?;
        }
        return Ok(());
    };
    for part in &found.parts[..last] {
        write_part(bytes, part, None, out)?;
    }
    let broken = &found.parts[last];
    write_part(bytes, broken, fault_at.map(|at| (at, verdict)), out)?;
    let rest = broken.bytes.end..bytes.len();
    if !rest.is_empty() {
        let rest = Part {
            name: "the rest".to_owned(),
            bytes: rest,
            value: "not decoded".to_owned(),
        };
        write_part(bytes, &rest, None, out)?;
    }
    Ok(())
}

/// Writes the bytes of a field, with its name and value on the first line, and marks the faulty byte.
fn write_part(
    bytes: &[u8],
    part: &Part,
    fault: Option<(usize, &str)>,
    out: &mut impl Write,
) -> io::Result<()> {
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
        if let Some((at, verdict)) = fault
            && (start..end).contains(&at)
        {
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
        write_part(&bytes, &part, Some((20, "why (R1)")), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].ends_with("data  28 bytes"), "{text}");
        assert_eq!(lines[2].find("^^"), lines[1].find("14"), "{text}");
        assert!(lines[2].ends_with("byte 20: why (R1)"), "{text}");
    }
}
