//! Labels of metrics.

use fieldgate_protocol::error::Code;
use prometheus_client::encoding::EncodeLabelSet;

use crate::sys::disk::Place;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByCode {
    pub(super) code: u8,
    pub(super) name: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByReason {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByState {
    pub(super) state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPlace {
    pub(super) place: &'static str,
}

impl From<Place> for ByPlace {
    fn from(place: Place) -> ByPlace {
        let place = place.name();
        ByPlace { place }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByQuality {
    pub(super) quality: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByAge {
    pub(super) age: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByContent {
    pub(super) content: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByResult {
    pub(super) result: &'static str,
}

/// Returns the label of a code.
pub(super) fn by_code(code: u8) -> ByCode {
    let name = Code::from_wire(code).map_or("unknown", Code::name);
    ByCode { code, name }
}
