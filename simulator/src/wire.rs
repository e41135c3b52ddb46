//! The frames of a script byte for byte: what a device sends, and what the verifier expects
//! in quarantine.

use fieldgate_protocol::frame::{DEFAULT_FRAME_BYTES_MAX, NoRoom};
use fieldgate_protocol::{message, value};

use crate::encode::{DataTerms, Encoder, data_frame, declare};
use crate::plan::{Clock, DeviceScript, FrameContent};
use crate::readings::{Channel, Readings};

/// Returns the schema number for these channels. The number is derived from the channels: a device with other
/// channels in an earlier run used another number, because schemas are immutable.
pub fn schema_number(channels: &[Channel]) -> u16 {
    let [low, high, ..] = declare(channels, 1).hash();
    u16::from_le_bytes([low, high]).max(1)
}

/// Returns the DECLARE frame that every device of the fleet sends.
pub fn declare_frame(channels: &[Channel], schema: u16) -> Vec<u8> {
    let mut frame = vec![0; DEFAULT_FRAME_BYTES_MAX];
    let frame_bytes = message::encode(&declare(channels, schema), 0, &mut frame)
        .expect("32 channels with names and units of at most 48 bytes fit a frame");
    frame.truncate(frame_bytes);
    frame
}

/// Returns the fields of a device's DATA frames other than the readings.
pub fn terms(device: &DeviceScript, schema: u16) -> DataTerms {
    let clock = match device.clock() {
        Clock::Boot => value::Clock::Boot,
        Clock::Utc => value::Clock::Utc,
    };
    DataTerms {
        schema,
        clock,
        boot: device.boot(),
    }
}

/// Reusable buffers for generating frames.
#[derive(Debug, Default)]
pub struct Workbench {
    encoder: Encoder,
    readings: Readings,
}

impl Workbench {
    /// Writes frame `seq` of a device; returns its length and its number of readings to be stored.
    ///
    /// # Errors
    /// The device sends no such frame, or the buffer is too small.
    pub fn frame(
        &mut self,
        device: &DeviceScript,
        seq: u64,
        schema: u16,
        out: &mut [u8],
    ) -> Result<(usize, u64), NoRoom> {
        let content = device.frame(seq, &mut self.readings).ok_or(NoRoom)?;
        let (readings, malformed, count) = match content {
            FrameContent::Readings(readings) => (readings, None, readings.count()),
            FrameContent::Malformed { variant, readings } => (readings, Some(variant), 0),
        };
        let terms = terms(device, schema);
        let bytes = data_frame(&mut self.encoder, seq, terms, readings, malformed, out)?;
        Ok((bytes, count))
    }
}
