//! Quantities that a simulated device can measure, with the parameters of their signals.
//!
//! This module contains only numbers; [`signal`](crate::signal) generates values from them.
//!
//! Invariants: the first channels are the same for any number of channels; names are distinct. A change
//! of any number here changes the meaning of a plan and requires a new plan format.

use crate::readings::Channel;
use fieldgate_protocol::value::Kind;

/// Maximum number of channels of a device, which is the protocol's limit.
pub const CHANNELS_MAX: usize = 32;

/// Returns the first `count` channels of the catalogue, which every device of a fleet has.
pub fn channels(count: usize) -> Vec<Channel> {
    (0..count)
        .map(|number| {
            let model = &CATALOGUE[number % CATALOGUE.len()];
            let name = match number / CATALOGUE.len() {
                0 => model.name.to_owned(),
                round => format!("{}_{}", model.name, round + 1),
            };
            let exp10 = if model.kind == Kind::Integer {
                model.exp10
            } else {
                0
            };
            Channel {
                name,
                unit: model.unit.to_owned(),
                kind: model.kind,
                exp10,
            }
        })
        .collect()
}

/// Ranges from which a device draws the parameters of a channel, in the channel's smallest step.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) kind: Kind,
    /// Smallest step as a power of ten.
    pub(crate) exp10: i8,
    pub(crate) center: (i64, i64),
    pub(crate) day: (i64, i64),
    /// Range of the drift. For the energy meter, its mean power in watts, from which its `day` is derived.
    pub(crate) drift: (i64, i64),
    pub(crate) noise: (i64, i64),
    /// Maximum height of a step; one interval in eight has one.
    pub(crate) step: i64,
    pub(crate) plateau_s: (i64, i64),
}

#[rustfmt::skip]
pub(crate) const CATALOGUE: [Model; 12] = [
    Model { name: "temperature", unit: "Cel", kind: Kind::Integer, exp10: -2, center: (800, 2_400),
        day: (150, 600), drift: (50, 300), noise: (1, 3), step: 80, plateau_s: (1_200, 7_200) },
    Model { name: "humidity", unit: "%RH", kind: Kind::Integer, exp10: -1, center: (400, 650),
        day: (40, 150), drift: (20, 80), noise: (1, 3), step: 25, plateau_s: (1_200, 7_200) },
    Model { name: "pressure", unit: "hPa", kind: Kind::Integer, exp10: -1, center: (9_900, 10_250),
        day: (4, 15), drift: (40, 150), noise: (1, 2), step: 0, plateau_s: (3_600, 3_600) },
    Model { name: "flow", unit: "l/s", kind: Kind::Integer, exp10: -2, center: (4_000, 12_000),
        day: (300, 900), drift: (100, 500), noise: (4, 12), step: 600, plateau_s: (300, 1_800) },
    Model { name: "voltage", unit: "V", kind: Kind::Integer, exp10: -3, center: (3_500, 4_050),
        day: (5, 40), drift: (10, 60), noise: (1, 4), step: 20, plateau_s: (600, 3_600) },
    Model { name: "level", unit: "m", kind: Kind::Integer, exp10: -3, center: (1_000, 4_000),
        day: (50, 250), drift: (100, 400), noise: (2, 5), step: 60, plateau_s: (1_800, 7_200) },
    Model { name: "vibration", unit: "m/s2", kind: Kind::F32, exp10: -3, center: (1_000, 3_000),
        day: (50, 200), drift: (20, 100), noise: (50, 250), step: 400, plateau_s: (60, 900) },
    Model { name: "energy", unit: "kWh", kind: Kind::F64, exp10: -3, center: (1_000_000, 90_000_000),
        day: (200, 900), drift: (200, 4_000), noise: (0, 0), step: 0, plateau_s: (3_600, 3_600) },
    Model { name: "door", unit: "", kind: Kind::Bool, exp10: 0, center: (0, 0),
        day: (0, 0), drift: (0, 0), noise: (0, 0), step: 0, plateau_s: (20, 120) },
    Model { name: "current", unit: "A", kind: Kind::Integer, exp10: -3, center: (2_000, 8_000),
        day: (200, 900), drift: (50, 300), noise: (3, 10), step: 400, plateau_s: (120, 1_200) },
    Model { name: "illuminance", unit: "lx", kind: Kind::Integer, exp10: 0, center: (6_000, 9_000),
        day: (3_000, 5_000), drift: (100, 500), noise: (3, 10), step: 300, plateau_s: (60, 600) },
    Model { name: "carbon_dioxide", unit: "ppm", kind: Kind::Integer, exp10: 0, center: (500, 900),
        day: (30, 120), drift: (10, 60), noise: (1, 3), step: 50, plateau_s: (600, 3_600) },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn channels_fit_the_protocol_and_have_distinct_names() {
        let channels = channels(CHANNELS_MAX);
        let names: HashSet<&str> = channels
            .iter()
            .map(|channel| channel.name.as_str())
            .collect();
        assert_eq!(names.len(), CHANNELS_MAX);
        assert!(names.contains("temperature_3"));
        assert!(
            channels
                .iter()
                .all(|channel| channel.name.len() <= 32 && channel.unit.len() <= 16)
        );
        assert!(
            channels
                .iter()
                .all(|channel| channel.kind == Kind::Integer || channel.exp10 == 0)
        );
    }
}
