//! Columns.

/// Type of a channel's values on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Integer scaled by a power of ten.
    Integer = 0,
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary64.
    F64 = 2,
    /// False or true.
    Bool = 3,
}
