//! Vectors of single columns and times, with their decoded values.

use fieldgate_protocol::column::{decode_times, decode_values};

use super::*;

/// Returns the bits of a double as 16 hex digits; `null` for NULL.
pub fn bits(value: f64) -> Value {
    if value.is_nan() { Value::Null } else { Value::String(format!("{:016x}", value.to_bits())) }
}

struct Case<'a> {
    id: &'a str,
    kind: Kind,
    exp10: i8,
    encoding: u8,
    rows: usize,
    nulls: &'a [u8],
    data: &'a [u8],
    values: &'a [f64],
    note: &'a str,
}

impl Case<'_> {
    fn value(&self) -> Value {
        let mut out = json!({
            "id": self.id, "kind": self.kind as u8, "exp10": self.exp10, "encoding": self.encoding, "rows": self.rows,
            "nulls": hex(self.nulls), "data": hex(self.data), "note": self.note,
        });
        if self.values.is_empty() {
            out["error"] = json!(31);
        } else {
            out["values"] = self.values.iter().copied().map(bits).collect();
            out["shown"] = json!(self.values.iter().map(|value| format!("{value:?}")).collect::<Vec<_>>().join(" "));
        }
        out
    }
}

pub fn file() -> Value {
    json!({
        "about": "Columns and times (SPEC.md R50-R58). values are IEEE 754 binary64 bits; null is NULL",
        "columns": columns(),
        "times": times(),
    })
}

fn columns() -> Vec<Value> {
    use Kind::{Bool, F32, F64, Integer};
    let top = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
    let le = |value: i64| value.to_le_bytes();
    let case = |id, kind, exp10, encoding, nulls, data, values: &'static [f64], note| Case { id, kind, exp10, encoding, rows: values.len(), nulls, data, values, note }.value();
    let wrong = |id, kind, encoding, rows, nulls, data, note| Case { id, kind, exp10: 0, encoding, rows, nulls, data, values: &[], note }.value();
    let floats64: Vec<u8> = [0.1, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, f64::MIN_POSITIVE / 4.0, f64::MAX]
        .iter()
        .flat_map(|v: &f64| v.to_le_bytes())
        .collect();
    let floats32: Vec<u8> = [0.1, -0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE / 4.0, f32::MAX]
        .iter()
        .flat_map(|v: &f32| v.to_le_bytes())
        .collect();
    vec![
        case(
            "integer-delta",
            Integer,
            -2,
            1,
            &[],
            &[0xDA, 0x21, 0x02, 0x03],
            &[21.57, 21.58, 21.56],
            "R57: 2157, +1, -2; divided by 100",
        ),
        case(
            "integer-packed",
            Integer,
            -2,
            2,
            &[],
            &[0xDA, 0x21, 0x02, 0x0E],
            &[21.57, 21.58, 21.56],
            "R55: 2 bits each: 10, 11",
        ),
        case(
            "integer-packed-0-bits",
            Integer,
            0,
            2,
            &[],
            &[0x0A, 0x00],
            &[5.0, 5.0, 5.0, 5.0],
            "R55: all the same",
        ),
        case("integer-packed-one", Integer, 0, 2, &[], &[0x0A, 0x07], &[5.0], "R55: an unused width"),
        case(
            "integer-packed-3-bits",
            Integer,
            0,
            2,
            &[],
            &[0x00, 0x03, 0b10_111_001, 0b0],
            &[0.0, -1.0, -5.0, -4.0],
            "R55: across a byte: 1, 7, 2",
        ),
        case("integer-raw", Integer, 0, 0, &[], &[le(1), le(-1)].concat(), &[1.0, -1.0], "R54: two's complement"),
        case("integer-exp-3", Integer, 3, 1, &[], &[0x0A], &[5000.0], "R57: times 1000"),
        case("integer-exp-22", Integer, 22, 1, &[], &[0x02], &[1e22], "R57"),
        case("integer-exp-minus-22", Integer, -22, 1, &[], &[0x02], &[1e-22], "R57"),
        case("integer-exp-minus-1", Integer, -1, 1, &[], &[0x06], &[0.3], "R57: 3 / 10, not 3 x 0.1"),
        case(
            "integer-2^53+1",
            Integer,
            0,
            0,
            &[],
            &le((1 << 53) + 1),
            &[9_007_199_254_740_992.0],
            "R57: rounded to even once",
        ),
        case(
            "integer-min",
            Integer,
            0,
            1,
            &[],
            &top,
            &[-9_223_372_036_854_775_808.0],
            "R55: the lowest integer in ten bytes",
        ),
        case(
            "integer-wraps",
            Integer,
            0,
            1,
            &[],
            &[&top[..], &[0x01]].concat(),
            &[-9_223_372_036_854_775_808.0, 9_223_372_036_854_775_807.0],
            "R55: differences wrap at 64 bits",
        ),
        case(
            "integer-packed-64-bits",
            Integer,
            0,
            2,
            &[],
            &[&[0x01, 64][..], &[0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]].concat(),
            &[-1.0, 9_223_372_036_854_775_806.0],
            "R55: the widest difference",
        ),
        case(
            "f32",
            F32,
            0,
            0,
            &[],
            &floats32,
            &[
                0.100_000_001_490_116_12,
                -0.0,
                f64::INFINITY,
                f64::NAN,
                2.938_735_877_055_719e-39,
                3.402_823_466_385_288_6e38,
            ],
            "R58: widened exactly, -0.0 keeps its sign, NaN is NULL",
        ),
        case(
            "f64",
            F64,
            0,
            0,
            &[],
            &floats64,
            &[0.1, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, f64::MIN_POSITIVE / 4.0, f64::MAX],
            "R58: unchanged, NaN is NULL",
        ),
        case("bool-raw", Bool, 0, 0, &[], &[0, 1, 1], &[0.0, 1.0, 1.0], "R58"),
        case("bool-delta", Bool, 0, 1, &[], &[0x02, 0x01, 0x02], &[1.0, 0.0, 1.0], "R58: 1, -1, +1"),
        case("bool-packed", Bool, 0, 2, &[], &[0x02, 0x02, 0b10_01], &[1.0, 0.0, 1.0], "R58"),
        case(
            "nulls",
            Integer,
            0,
            1,
            &[0b0101_0010, 0b1],
            &[0x02, 0x02, 0x02, 0x02, 0x02],
            &[1.0, f64::NAN, 2.0, 3.0, f64::NAN, 4.0, f64::NAN, 5.0, f64::NAN],
            "R56: rows 1, 4, 6 and 8 have no data",
        ),
        case(
            "nulls-8-rows",
            Bool,
            0,
            0,
            &[0x80],
            &[1; 7],
            &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, f64::NAN],
            "R56: no spare bits",
        ),
        case("nulls-all", F64, 0, 0, &[0b11], &[], &[f64::NAN, f64::NAN], "R56"),
        case("nulls-all-packed", Integer, 0, 2, &[0b11], &[], &[f64::NAN, f64::NAN], "R56: no first value either"),
        wrong("bool-raw-2", Bool, 0, 1, &[], &[2], "R58"),
        wrong("f32-short", F32, 0, 1, &[], &[0; 3], "R55"),
        wrong("f32-delta", F32, 1, 1, &[], &[0], "R54"),
        wrong("encoding-3", Integer, 3, 1, &[], &[0], "R54"),
        wrong("nulls-spare", Bool, 0, 3, &[0x08], &[1, 1, 1], "R56"),
        wrong("nulls-short", Bool, 0, 9, &[0x01], &[1; 8], "R56"),
        wrong("delta-trailing", Integer, 1, 1, &[], &[0, 0], "R55"),
        wrong("packed-spare", Integer, 2, 3, &[], &[0, 1, 0b100], "R55"),
        wrong("packed-width-65", Integer, 2, 1, &[], &[0, 65], "R55"),
    ]
}

fn times() -> Vec<Value> {
    let case = |id: &str, time_unit: u8, t0: i64, step: u32, dt: &[u8], expect: Result<&[i64], u8>, rows: usize, note: &str| {
        let mut out = json!({ "id": id, "clock": 1, "time_unit": time_unit, "t0": t0.to_string(), "rows": rows, "step": step, "dt": hex(dt), "note": note });
        match expect {
            Ok(times) => out["times_us"] = times.iter().map(ToString::to_string).collect(),
            Err(code) => out["error"] = json!(code),
        }
        out
    };
    vec![
        case("step-s", 2, 1_760_000_000, 60, &[], Ok(&[1_760_000_000_000_000, 1_760_000_060_000_000]), 2, "R51"),
        case(
            "step-ms",
            1,
            1_760_000_000_123,
            1,
            &[],
            Ok(&[1_760_000_000_123_000, 1_760_000_000_124_000]),
            2,
            "R51",
        ),
        case("step-us", 0, -5, 5, &[], Ok(&[-5, 0, 5]), 3, "R51"),
        case("dt", 1, 0, 0, &[0x01, 0xAC, 0x02], Ok(&[0, 1_000, 301_000]), 3, "R51: 1, then 300"),
        case("one-row", 0, 7, 0, &[], Ok(&[7]), 1, "R51"),
        case("one-row-step", 0, 7, 9, &[], Ok(&[7]), 1, "R51: an unused step"),
        case("one-row-dt", 0, 7, 0, &[1], Err(31), 1, "R51: dt for a row that does not exist"),
        case("rows-0", 0, 7, 1, &[], Err(33), 0, "R52"),
        case("last-too-late", 0, 253_402_300_799_999_999, 1, &[], Err(33), 2, "R50"),
    ]
}

/// Returns the crate's result for one of [`columns`].
pub fn column_outcome(case: &Value) -> Result<Vec<Value>, u8> {
    let bytes = |key: &str| unhex(case[key].as_str().unwrap());
    let number = |key: &str| case[key].as_i64().unwrap();
    let (nulls, data) = (bytes("nulls"), bytes("data"));
    let column = Column { channel: 1, encoding: number("encoding") as u8, nulls: &nulls, data: &data };
    let mut out = vec![0.0; number("rows") as usize];
    let kind = Kind::from_wire(number("kind") as u8).unwrap();
    decode_values(&column, kind, number("exp10") as i8, &mut out)
        .map(|()| out.into_iter().map(bits).collect())
        .map_err(|violation| violation.code() as u8)
}

/// Returns the crate's result for one of [`times`].
pub fn time_outcome(case: &Value) -> Result<Vec<Value>, u8> {
    let dt = unhex(case["dt"].as_str().unwrap());
    let data = Data {
        clock: Clock::Utc,
        time_unit: TimeUnit::from_wire(case["time_unit"].as_u64().unwrap() as u8).unwrap(),
        t0: case["t0"].as_str().unwrap().parse().unwrap(),
        step: case["step"].as_u64().unwrap() as u32,
        dt: &dt,
        ..data()
    };
    let mut out = vec![0; case["rows"].as_u64().unwrap() as usize];
    decode_times(&data, &mut out)
        .map(|()| out.into_iter().map(|time| Value::String(time.to_string())).collect())
        .map_err(|violation| violation.code() as u8)
}
