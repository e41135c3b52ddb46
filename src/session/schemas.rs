//! Schemas that a session knows, and the DECLARE that awaits its outcome.

use std::collections::VecDeque;
use std::sync::Arc;

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::error::{Code, Violation};
use fieldgate_protocol::message::{self, decode};

use crate::store::{Declare, DeclareOutcome, DeclaredChannel, DeviceId, Schema};

/// Maximum number of schemas kept per session. For DATA with an older one, the device is asked to
/// declare it again (R47).
const MAX: usize = 8;

pub(super) struct Schemas {
    /// The latest is last.
    known: VecDeque<Arc<Schema>>,
    /// Whether a DECLARE was submitted and has no outcome yet.
    pub awaits_outcome: bool,
    /// Whether a DECLARE was refused in this session.
    pub had_refusal: bool,
}

impl Schemas {
    pub(super) fn new(known: Option<Arc<Schema>>) -> Schemas {
        Schemas {
            known: known.into_iter().collect(),
            awaits_outcome: false,
            had_refusal: false,
        }
    }

    pub(super) fn find(&self, number: u16) -> Option<&Schema> {
        let known = self.known.iter().find(|known| known.schema == number);
        known.map(Arc::as_ref)
    }

    /// Decodes the payload of a DECLARE, whose outcome is awaited from then on.
    pub(super) fn declare(
        &mut self,
        device: DeviceId,
        payload: &[u8],
    ) -> Result<Declare, Violation> {
        let declare: message::Declare<'_> = decode(payload)?;
        self.awaits_outcome = true;
        Ok(Declare {
            device,
            schema: declare.schema,
            hash: schema_hash(payload),
            channels: declare.channels.iter().map(declared).collect(),
        })
    }

    /// Handles the outcome of a DECLARE; returns why it was refused.
    pub(super) fn handle_outcome(&mut self, outcome: DeclareOutcome) -> Option<(Code, String)> {
        self.awaits_outcome = false;
        match outcome {
            DeclareOutcome::Accepted(schema) => {
                self.known.retain(|known| known.schema != schema.schema);
                if self.known.len() == MAX {
                    self.known.pop_front();
                }
                self.known.push_back(schema);
                None
            }
            DeclareOutcome::Conflict => {
                let detail = "schema number is used for different content; the firmware must use another number";
                Some((Code::SchemaConflict, detail.to_owned()))
            }
            DeclareOutcome::OverBound(reached) => Some((Code::SchemaBound, reached.to_string())),
        }
    }
}

fn declared(channel: &message::Channel<'_>) -> DeclaredChannel {
    DeclaredChannel {
        id: channel.id,
        name: channel.name.to_owned(),
        unit: channel.unit.to_owned(),
        kind: channel.kind,
        exp10: channel.exp10,
    }
}
