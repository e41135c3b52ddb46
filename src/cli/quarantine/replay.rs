//! `fieldgate quarantine replay`: stores frames that this version can decode, but the version that received them
//! could not.

use std::io::Write;

use crate::config::store_url::StoreUrl;
use crate::decode::Context;
use crate::store::Content;
use crate::store::admin::replay::{DecodeCache, QuarantinedFrame, Understood};
use crate::store::admin::{Access, Connection};
use crate::time::Origin;
use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX};
use fieldgate_protocol::message::first_seq;

use super::select::Selection;
use crate::cli::Error;
use crate::cli::output::{self, Grid, count};

/// Number of frames per read.
const CHUNK_FRAMES: u32 = 64;

/// Counts of replayed and remaining frames.
#[derive(Default)]
struct Outcome {
    frames: u64,
    readings: u64,
    stayed: u64,
}

/// Stores the frames that this version can decode, and lists the others with the reason.
pub async fn replay(store: &StoreUrl, selection: &Selection) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Write).await?;
    let condition = selection.condition(&mut connection).await?;
    let mut cache = DecodeCache::default();
    let mut outcome = Outcome::default();
    let mut stayed = Grid::new(["id", "device", "seq", "reason"]);
    let mut after = 0;
    loop {
        let frames = connection
            .quarantined_frames(condition.sql(), &condition.arguments(), after, CHUNK_FRAMES)
            .await?;
        let Some(last) = frames.last() else {
            break;
        };
        after = last.id;
        for frame in &frames {
            match understand(&mut connection, &mut cache, frame).await? {
                Ok(understood) if connection.replay(frame, &understood).await? => {
                    outcome.frames += 1;
                    if let Some(stamp) = &understood.stamp {
                        cache.advance(frame.device, stamp);
                    }
                    if let Content::Readings(readings) = &understood.content {
                        outcome.readings += readings.values.len() as u64;
                    }
                }
                // Another command has replayed or purged the frame meanwhile.
                Ok(_) => {}
                Err(reason) => {
                    outcome.stayed += 1;
                    stayed.push(vec![
                        frame.id.into(),
                        frame.device_name.as_str().into(),
                        frame.seq.cast_signed().into(),
                        reason.into(),
                    ]);
                }
            }
        }
    }
    let written = print_outcome(&outcome, &stayed);
    match outcome.stayed {
        0 => written,
        stayed => Err(Error::Failed(format!(
            "{} could not be decoded by this version either, kept in quarantine",
            count(stayed, "frame")
        ))),
    }
}

fn print_outcome(outcome: &Outcome, stayed: &Grid) -> Result<(), Error> {
    let mut out = output::stdout();
    if outcome.stayed > 0 {
        stayed.write(&mut out)?;
    }
    let frames = count(outcome.frames, "frame");
    let readings = count(outcome.readings, "reading");
    writeln!(out, "replayed {frames} with {readings}")?;
    out.flush().map_err(Error::Output)
}

/// Decodes a frame with the code that decodes received frames. Returns the content, or the reason why the frame
/// cannot be decoded.
pub async fn understand(
    connection: &mut Connection,
    cache: &mut DecodeCache,
    kept: &QuarantinedFrame,
) -> Result<Result<Understood, String>, Error> {
    let frame = match frame::decode(&kept.bytes, FRAME_BYTES_MAX) {
        Ok(Some(frame)) if frame.intact => frame,
        Ok(Some(_)) => return Ok(Err("payload checksum wrong (R6)".to_owned())),
        Ok(None) => return Ok(Err("truncated (R7)".to_owned())),
        Err(error) => return Ok(Err(error.to_string())),
    };
    let clocks = cache.clocks(connection, kept.device).await?;
    let context = Context {
        clocks: &clocks,
        received_at_us: kept.received_at_us,
        // The clocks from the store are already corrected.
        origin: Origin::default(),
    };
    // Decode once to find the required schema, then again with the schema.
    let mut wanted = None;
    let first = context.read(&frame, |schema| {
        wanted = Some(schema);
        None
    });
    let read = match wanted {
        None => first,
        Some(wanted) => {
            let schema = cache.schema(connection, kept.device, wanted).await?;
            context.read(&frame, |_| schema)
        }
    };
    Ok(match read {
        Ok(Some((content, stamp))) => Ok(Understood {
            frame_type: frame.header.frame_type,
            first_seq: first_seq(&frame),
            content,
            stamp,
        }),
        Ok(None) => Err("schema not declared (R47)".to_owned()),
        Err(violation) => Err(violation.to_string()),
    })
}
