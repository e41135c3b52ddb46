//! Explains frames in quarantine.

use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX};
use fieldgate_protocol::message::{Data, decode};

use super::{Dissection, dissect};
use crate::decode::Context;
use crate::store::admin::replay::QuarantinedFrame;
use crate::store::admin::{Connection, QueryError};
use crate::time::Origin;

/// Explains a frame with the clocks and the schema of its device. Returns `None` if its bytes are not a complete frame
/// with a valid header.
///
/// # Errors
/// The store is unavailable, or a row has unexpected content.
pub async fn explain(
    connection: &mut Connection,
    kept: &QuarantinedFrame,
) -> Result<Option<Dissection>, QueryError> {
    let Ok(Some(frame)) = frame::decode(&kept.bytes, FRAME_BYTES_MAX) else {
        return Ok(None);
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
    Ok(Some(found))
}
