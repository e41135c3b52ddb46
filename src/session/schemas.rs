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

/// Schemas of a session.
pub(super) struct Schemas {
    /// The latest is last.
    known: VecDeque<Arc<Schema>>,
    awaits_outcome: bool,
    /// Whether a DECLARE was refused in this session.
    had_refusal: bool,
}

/// A refused DECLARE.
pub(super) struct RefusedDeclare {
    pub code: Code,
    pub detail: String,
    /// Whether it is the first one of this session.
    pub is_first: bool,
}

impl Schemas {
    pub(super) fn new(known: Option<Arc<Schema>>) -> Schemas {
        Schemas {
            known: known.into_iter().collect(),
            awaits_outcome: false,
            had_refusal: false,
        }
    }

    pub(super) fn awaits_outcome(&self) -> bool {
        self.awaits_outcome
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

    /// Handles the outcome of a DECLARE.
    pub(super) fn handle_outcome(&mut self, outcome: DeclareOutcome) -> Result<(), RefusedDeclare> {
        self.awaits_outcome = false;
        let (code, detail) = match outcome {
            DeclareOutcome::Accepted(schema) => {
                self.known.retain(|known| known.schema != schema.schema);
                if self.known.len() == MAX {
                    self.known.pop_front();
                }
                self.known.push_back(schema);
                return Ok(());
            }
            DeclareOutcome::Conflict => {
                let detail = "schema number is used for different content; the firmware must use another number";
                (Code::SchemaConflict, detail.to_owned())
            }
            DeclareOutcome::OverBound(reached) => (Code::SchemaBound, reached.to_string()),
        };
        Err(RefusedDeclare {
            code,
            detail,
            is_first: !std::mem::replace(&mut self.had_refusal, true),
        })
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
