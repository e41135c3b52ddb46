//! Microseconds UTC, in Postgres's format.

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Encode, Postgres, Type};

/// Postgres counts from 2000-01-01T00:00:00Z.
const EPOCH_US: i64 = 946_684_800_000_000;
/// Earliest Postgres time, from its epoch: 4714-11-24 BC. The protocol's times are later; an earlier one is
/// clamped to it, because a server would reject it on every retry. 64 bits do not reach the latest Postgres
/// time.
const FIRST_US: i64 = -211_813_488_000_000_000;

/// A `timestamptz`: microseconds since 1970-01-01T00:00:00Z.
///
/// Its range covers the protocol's times, years 1 to 9999 (SPEC R50), extended by the lifetime of a device on
/// either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Returns the wire format.
    pub(super) fn to_be_bytes(self) -> [u8; 8] {
        let since_epoch = self.0.saturating_sub(EPOCH_US);
        since_epoch.max(FIRST_US).to_be_bytes()
    }
}

impl Type<Postgres> for Timestamp {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("timestamptz")
    }
}

impl PgHasArrayType for Timestamp {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("_timestamptz")
    }
}

impl Encode<'_, Postgres> for Timestamp {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buffer.extend_from_slice(&self.to_be_bytes());
        Ok(IsNull::No)
    }
}

impl Decode<'_, Postgres> for Timestamp {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
        match value.format() {
            PgValueFormat::Binary => {
                let since_epoch = i64::from_be_bytes(value.as_bytes()?.try_into()?);
                Ok(Self(since_epoch.saturating_add(EPOCH_US)))
            }
            PgValueFormat::Text => Err("unexpected binary timestamp format".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_outside_the_range_of_postgres_is_clamped() {
        let sent = |us| i64::from_be_bytes(Timestamp(us).to_be_bytes());
        assert_eq!(sent(i64::MIN), FIRST_US);
        assert_eq!(sent(i64::MIN + EPOCH_US), FIRST_US);
        assert_eq!(sent(0), -EPOCH_US);
        assert_eq!(sent(FIRST_US + EPOCH_US), FIRST_US);
        assert_eq!(sent(i64::MAX), i64::MAX - EPOCH_US);
    }
}
