//! Vectors of DATA: shapes, times and columns, valid and invalid, in complete frames.

use fieldgate_protocol::frame::types;

use super::*;

const TEMPERATURE: Column<'static> = Column { channel: 1, encoding: 1, nulls: &[], data: &[0xDA, 0x21, 0x02, 0x03] };

pub fn vectors() -> Vec<Vector> {
    [shapes(), times(), columns(), encodings()].concat()
}

fn say(id: &str, data: Data<'_>, expect: Expect, note: &'static str) -> Vector {
    vector(format!("data-{id}"), SERVING, &message_frame(&data, 5), expect, note)
}

fn with<'a>(columns: &[Column<'a>]) -> Data<'a> {
    Data { columns: columns.iter().copied().collect(), ..data() }
}

/// Returns a column for any number of rows in two bytes: the first value, then differences of no
/// bits.
fn constant(channel: u8) -> Column<'static> {
    Column { channel, encoding: 2, nulls: &[], data: &[0, 0] }
}

fn shapes() -> Vec<Vector> {
    let rows = |rows, columns: &[Column<'static>]| Data { rows, ..with(columns) };
    let many = |count: u8| {
        let columns: Vec<Column<'static>> = (0..count).map(constant).collect();
        Data { rows: 1, ..with(&columns) }
    };
    let over = {
        let whole = message_frame(&many(32), 5);
        let payload = payload_of(&whole);
        let count_at = payload.iter().position(|byte| *byte == 32).unwrap();
        let mut more = replaced(payload, count_at, &[32], &[33]);
        more.truncate(more.len() - 1);
        more.extend([32, 2, 0, 2, 0, 0, 0]);
        frame_of(types::DATA, 5, &more)
    };
    vec![
        say("schema-0", Data { schema: 0, ..data() }, refused(20), "R110: no schema has number 0"),
        say("schema-2", Data { schema: 2, ..data() }, refused(20), "R110: not declared"),
        say("schema-before-rows", Data { schema: 2, rows: 0, ..data() }, refused(20), "R44: schema comes before rows"),
        say("rows-0", rows(0, &[TEMPERATURE]), refused(33), "R52"),
        say("rows-1", rows(1, &[constant(1)]), Expect::Taken, "R52"),
        say("rows-4096", rows(4096, &[constant(1)]), Expect::Taken, "R52"),
        say("rows-4097", rows(4097, &[constant(1)]), refused(33), "R52"),
        say("rows-65535", rows(65_535, &[constant(1)]), refused(33), "R52"),
        say("readings-8192", rows(4096, &[constant(1), constant(4)]), Expect::Taken, "R52: 4,096 x 2"),
        say("readings-8193", rows(2731, &[constant(1), constant(4), constant(2)]), refused(33), "R52: 2,731 x 3, before columns are checked"),
        say("columns-0", with(&[]), refused(31), "R53"),
        say("columns-32", many(32), refused(31), "R53: allowed, but channel 0 is not in the schema"),
        vector("data-columns-33", SERVING, &over, refused(30), "R53: a list too long does not decode"),
        say("channel-unknown", with(&[Column { channel: 9, ..TEMPERATURE }]), refused(31), "R53"),
        say("channel-twice", with(&[TEMPERATURE, TEMPERATURE]), refused(31), "R53"),
        say("channels-some", with(&[Column { channel: 4, encoding: 0, nulls: &[], data: &[0, 1, 1] }, TEMPERATURE]), Expect::Taken, "R53: any of the schema's channels, in any order"),
        say("atomic", with(&[TEMPERATURE, Column { channel: 4, encoding: 0, nulls: &[], data: &[0, 1, 2] }]), refused(31), "R59: one bad column refuses all"),
        vector("data-clock-2", SERVING, &with_byte(&message_frame(&data(), 5), 1, 1, 2), refused(33), "R24"),
        vector("data-unit-3", SERVING, &with_byte(&message_frame(&data(), 5), 2, 2, 3), refused(33), "R24"),
        say("ext-even", Data { ext: &[2, 0], ..data() }, refused(34), "R26"),
        say("ext-odd", Data { ext: &[1, 0], ..data() }, Expect::Taken, "R26"),
        say("ext-even-schema-2", Data { schema: 2, ext: &[2, 0], ..data() }, refused(34), "R44: content comes before schema"),
    ]
}

fn times() -> Vec<Vector> {
    let (first, last) = (-62_135_596_800_000_000, 253_402_300_799_999_999);
    let us = |t0, step| Data { time_unit: TimeUnit::Microseconds, t0, step, ..data() };
    let dt = |dt| Data { step: 0, dt, ..data() };
    let boot = |t0, step| Data { clock: Clock::Boot, time_unit: TimeUnit::Microseconds, t0, step, ..data() };
    vec![
        say("dt", dt(&[1, 0xAC, 0x02]), Expect::Taken, "R51: 1 s, then 300 s"),
        say("dt-short", dt(&[1]), refused(31), "R51: a step is missing"),
        say("dt-long", dt(&[1, 1, 1]), refused(31), "R51: a step too many"),
        say("dt-0", dt(&[1, 0]), refused(31), "R51: times must increase"),
        say("dt-long-varint", dt(&[1, 0x81, 0x00]), refused(31), "R22 within dt"),
        say("dt-cut", dt(&[1, 0x81]), refused(31), "R51"),
        say("dt-none", dt(&[]), refused(31), "R51: neither step nor dt"),
        say("dt-and-step", Data { dt: &[1, 1], ..data() }, refused(31), "R51: both"),
        say("dt-none-1-row", Data { rows: 1, step: 0, ..with(&[constant(1)]) }, Expect::Taken, "R51: a single row needs no step"),
        say("dt-top", dt(&[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), refused(33), "R50: a step of 2^64 - 1 seconds"),
        say("step-top", Data { step: u32::MAX, ..data() }, Expect::Taken, "R51: 136 years"),
        say("utc-first", us(first, 1), Expect::Taken, "R50"),
        say("utc-before", us(first - 1, 1), refused(33), "R50"),
        say("utc-last", us(last - 2, 1), Expect::Taken, "R50: the last row is the last microsecond"),
        say("utc-after", us(last - 1, 1), refused(33), "R50: the last row is one later"),
        say("utc-overflow", Data { t0: i64::MAX, ..data() }, refused(33), "R50: seconds that exceed 64-bit microseconds"),
        say("utc-1970", us(0, 1), Expect::Taken, "R75: suspect, not refused"),
        say("boot", boot(0, 1_000_000), Expect::Taken, "R50: from the moment of boot"),
        say("boot-negative", boot(-1, 1), refused(33), "R50"),
        say("boot-last", boot((1 << 53) - 2, 1), Expect::Taken, "R50"),
        say("boot-after", boot((1 << 53) - 1, 1), refused(33), "R50"),
    ]
}

fn columns() -> Vec<Vector> {
    let one = |column| with(&[column]);
    let temperature = |encoding, data| one(Column { encoding, data, ..TEMPERATURE });
    let nulls = |nulls, data| one(Column { nulls, data, ..TEMPERATURE });
    vec![
        say("encoding-3", temperature(3, &[0]), refused(31), "R54: not defined"),
        say("encoding-delta-f32", one(Column { channel: 2, encoding: 1, nulls: &[], data: &[0, 0, 0] }), refused(31), "R54: not for floats"),
        say("encoding-packed-f64", one(Column { channel: 3, encoding: 2, nulls: &[], data: &[0, 0] }), refused(31), "R54"),
        say("raw-short", temperature(0, &[0; 23]), refused(31), "R55: 3 x 8 bytes less one"),
        say("raw-long", temperature(0, &[0; 25]), refused(31), "R55"),
        say("raw-right", temperature(0, &[0; 24]), Expect::Taken, "R55"),
        say("delta-short", temperature(1, &[0, 0]), refused(31), "R55"),
        say("delta-long", temperature(1, &[0, 0, 0, 0]), refused(31), "R55"),
        say("delta-long-varint", temperature(1, &[0x80, 0, 0, 0]), refused(31), "R22 within a column"),
        say("delta-cut", temperature(1, &[0, 0, 0x80]), refused(31), "R55"),
        say("delta-wide", temperature(1, &[0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]), refused(31), "R22: more than 64 bits"),
        say("packed-width-65", temperature(2, &[[0, 65].as_slice(), &[0; 17]].concat()), refused(31), "R55"),
        say("packed-width-64", temperature(2, &[[0, 64].as_slice(), &[0; 16]].concat()), Expect::Taken, "R55"),
        say("packed-no-width", temperature(2, &[0]), refused(31), "R55"),
        say("packed-short", temperature(2, &[0, 5, 0]), refused(31), "R55: 2 x 5 bits are 2 bytes"),
        say("packed-long", temperature(2, &[0, 5, 0, 0, 0]), refused(31), "R55"),
        say("packed-spare-bits", temperature(2, &[0, 5, 0, 0x04]), refused(31), "R55: bit 10 is spare and must be 0"),
        say("packed-last-bit", temperature(2, &[0, 5, 0, 0x02]), Expect::Taken, "R55: bit 9 is not"),
        say("bool-2", one(Column { channel: 4, encoding: 1, nulls: &[], data: &[0, 4, 0] }), refused(31), "R58: a bool that becomes 2"),
        say("bool-minus", one(Column { channel: 4, encoding: 1, nulls: &[], data: &[0, 1, 0] }), refused(31), "R58: a bool that becomes -1"),
        say("nulls-none", nulls(&[0], TEMPERATURE.data), Expect::Taken, "R56: a bitmap that sets nothing"),
        say("nulls-one", nulls(&[2], &[0xDA, 0x21, 0x03]), Expect::Taken, "R56: the second row has no value"),
        say("nulls-all", nulls(&[7], &[]), Expect::Taken, "R56: no row has one"),
        say("nulls-all-data", nulls(&[7], &[0]), refused(31), "R55: data without a row"),
        say("nulls-spare-bit", nulls(&[8], TEMPERATURE.data), refused(31), "R56: bit 3 belongs to no row"),
        say("nulls-long", nulls(&[0, 0], TEMPERATURE.data), refused(31), "R56: a byte too many"),
        say("nulls-short", Data { rows: 9, ..nulls(&[0], &[0; 9]) }, refused(31), "R56: a byte is missing"),
    ]
}

/// Varints of DATA, each made one byte longer in turn. The bytes are `schema clock unit boot t0(5)
/// rows step dt columns channel encoding nulls data... ext`.
fn encodings() -> Vec<Vector> {
    let whole = message_frame(&data(), 5);
    let payload = payload_of(&whole);
    [
        ("schema", 0usize),
        ("boot", 3),
        ("t0", 8),
        ("rows", 9),
        ("step", 10),
        ("dt-length", 11),
        ("columns", 12),
        ("nulls-length", 15),
        ("data-length", 16),
        ("ext-length", payload.len() - 1),
    ]
    .into_iter()
    .map(|(field, at)| {
        let long = replaced(payload, at, &[payload[at]], &[payload[at] | 0x80, 0]);
        vector(format!("data-long-{field}"), SERVING, &frame_of(types::DATA, 5, &long), refused(30), "R22: one byte longer than it must be")
    })
    .collect()
}
