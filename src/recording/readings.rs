//! Readings of a device in the shape of one frame: a time axis and one column per channel.
//!
//! Filled by a [`Recording`](super::Recording) or by the simulator's signals; read by the
//! [encoder](super::encode) and by the simulator's verifier. Independent of wire format and SQL.
//!
//! Invariants: every column has exactly `rows` values; times strictly increase from row to row. All
//! buffers keep their capacity between frames, so a warm buffer allocates nothing.

use fieldgate_protocol::value::Kind;

/// One measured quantity of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Name, unique within the device, at most 32 bytes.
    pub name: String,
    /// SenML unit, at most 16 bytes; may be empty.
    pub unit: String,
    /// Kind of the values.
    pub kind: Kind,
    /// For [`Kind::Integer`], the value is `raw * 10^exp10`; 0 for other kinds.
    pub exp10: i8,
}

/// The readings of one frame, one row per sample of the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readings {
    /// Time of the first row on the device's own clock, in microseconds since 1970 or since boot.
    pub t0_us: i64,
    /// Step between rows in microseconds; 0 if it varies, and `offsets_us` is used.
    pub step_us: u64,
    /// If `step_us` is 0: offset of each row from the first, in microseconds. Otherwise empty.
    pub offsets_us: Vec<u64>,
    /// Number of rows.
    pub rows: usize,
    /// One column per channel, in the order of the device's channels.
    pub columns: Vec<Column>,
}

impl Readings {
    /// Returns the number of readings, including those without a valid value.
    pub fn count(&self) -> u64 {
        self.rows as u64 * self.columns.len() as u64
    }

    /// Returns the time of a row on the device's own clock, in microseconds.
    pub fn time_us(&self, row: usize) -> i64 {
        let offset_us = match self.step_us {
            0 => self.offsets_us[row],
            step_us => step_us.wrapping_mul(row as u64),
        };
        self.t0_us.wrapping_add_unsigned(offset_us)
    }

    /// Empties the buffer and creates one column of the right kind per channel.
    pub fn reset(&mut self, channels: &[Channel]) {
        self.rows = 0;
        self.offsets_us.clear();
        self.columns.truncate(channels.len());
        for (column, channel) in self.columns.iter_mut().zip(channels) {
            column.reset(channel.kind);
        }
        let missing = &channels[self.columns.len()..];
        self.columns
            .extend(missing.iter().map(|channel| Column::new(channel.kind)));
    }
}

/// The values of one channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// One value per row. The value of a null row is meaningless and must not be used.
    pub values: Values,
    /// Rows without a valid value.
    pub nulls: Nulls,
}

impl Column {
    /// Creates an empty column.
    pub fn new(kind: Kind) -> Self {
        Self {
            values: Values::new(kind),
            nulls: Nulls::default(),
        }
    }

    fn reset(&mut self, kind: Kind) {
        self.nulls.0.clear();
        match &mut self.values {
            Values::Integer(values) if kind == Kind::Integer => values.clear(),
            Values::F32(values) if kind == Kind::F32 => values.clear(),
            Values::F64(values) if kind == Kind::F64 => values.clear(),
            Values::Bool(values) if kind == Kind::Bool => values.clear(),
            values => *values = Values::new(kind),
        }
    }
}

/// Values of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Raw integers, scaled by the channel's `exp10`.
    Integer(Vec<i64>),
    /// IEEE 754 binary32.
    F32(Vec<f32>),
    /// IEEE 754 binary64.
    F64(Vec<f64>),
    /// False or true.
    Bool(Vec<bool>),
}

impl Values {
    /// Creates an empty list of a kind.
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::Integer => Self::Integer(Vec::new()),
            Kind::F32 => Self::F32(Vec::new()),
            Kind::F64 => Self::F64(Vec::new()),
            Kind::Bool => Self::Bool(Vec::new()),
        }
    }

    /// Returns the number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Integer(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Bool(values) => values.len(),
        }
    }

    /// Returns whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The set of rows without a valid value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nulls(Vec<u8>);

impl Nulls {
    /// Returns one bit per row, lowest bit first, 1 for null. Rows beyond the end are not null.
    pub fn bits(&self) -> &[u8] {
        &self.0
    }

    /// Returns whether a row has no valid value.
    pub fn contains(&self, row: usize) -> bool {
        self.0
            .get(row / 8)
            .is_some_and(|byte| byte >> (row % 8) & 1 == 1)
    }

    /// Marks a row as having no valid value.
    pub fn insert(&mut self, row: usize) {
        if self.0.len() <= row / 8 {
            self.0.resize(row / 8 + 1, 0);
        }
        self.0[row / 8] |= 1 << (row % 8);
    }

    /// Returns the number of rows without a valid value.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(kind: Kind) -> Channel {
        Channel {
            name: "a".into(),
            unit: String::new(),
            kind,
            exp10: 0,
        }
    }

    #[test]
    fn nulls_keep_their_rows() {
        let mut nulls = Nulls::default();
        nulls.insert(0);
        nulls.insert(9);
        assert_eq!(nulls.bits(), [0b1, 0b10]);
        let rows: Vec<usize> = (0..40).filter(|&row| nulls.contains(row)).collect();
        assert_eq!((rows, nulls.count()), (vec![0, 9], 2));
    }

    #[test]
    fn a_reset_buffer_has_the_requested_columns_and_no_values() {
        let mut readings = Readings::default();
        readings.reset(&[channel(Kind::Integer), channel(Kind::Bool)]);
        readings.columns[0].values = Values::Integer(vec![1, 2]);
        readings.columns[0].nulls.insert(1);
        readings.reset(&[
            channel(Kind::Integer),
            channel(Kind::F32),
            channel(Kind::F64),
        ]);
        let kinds: Vec<&Values> = readings
            .columns
            .iter()
            .map(|column| &column.values)
            .collect();
        let empty = [
            Values::new(Kind::Integer),
            Values::new(Kind::F32),
            Values::new(Kind::F64),
        ];
        assert_eq!(kinds, empty.iter().collect::<Vec<_>>());
        assert!(
            readings
                .columns
                .iter()
                .all(|column| column.nulls == Nulls::default())
        );
    }

    #[test]
    fn time_of_a_row_follows_step_or_offsets() {
        let mut readings = Readings {
            t0_us: -5,
            step_us: 10,
            rows: 3,
            ..Readings::default()
        };
        assert_eq!(readings.time_us(2), 15);
        readings.step_us = 0;
        readings.offsets_us = vec![0, 1, 7];
        assert_eq!(readings.time_us(2), 2);
    }
}
