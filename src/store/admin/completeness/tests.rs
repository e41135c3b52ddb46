use super::*;
use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection};

const BEGIN_US: i64 = 1_700_006_400_000_000;
const HOUR_US: i64 = 3_600_000_000;
const DAYS: usize = 4;

/// A row of the ledger. Its number is that of its last frame if it is a gap.
#[derive(Clone, Copy, Debug)]
struct Numbered {
    seq: i64,
    /// First number of a gap.
    gap_from: Option<i64>,
    arrived_us: i64,
    data_us: Option<i64>,
    is_suspect: bool,
}

/// Writes a device with a stream; returns the id of the device.
async fn write(store: &StoreUrl, name: &str, ledger: &[Numbered]) -> i64 {
    let mut connection = Connection::open(store, Access::Write).await.unwrap();
    connection.begin().await.unwrap();
    let id = "INSERT INTO devices (name) VALUES ($1) RETURNING id";
    let device = connection.integer(id, &[name.into()]).await.unwrap();
    let id = "INSERT INTO streams (device_id, stream, created_at) VALUES ($1, 1, $2) RETURNING id";
    let at = Argument::Time(BEGIN_US);
    let stream = connection.integer(id, &[device.into(), at]).await.unwrap();
    for (index, row) in ledger.iter().enumerate() {
        let quality = if row.is_suspect { 3 } else { 0 };
        let insert = match row.data_us {
            None => "INSERT INTO frames (id, stream_id, seq, type, received_at, readings) VALUES ($1, $2, $3, 19, $4, 0)",
            Some(_) => {
                "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, quality, last_ts)
                    VALUES ($1, $2, $3, 17, $4, 1, $5, $6)"
            }
        };
        let mut values = vec![
            (stream * 1_000_000 + index as i64).into(),
            stream.into(),
            row.seq.into(),
            Argument::Time(row.arrived_us),
        ];
        if let Some(data_us) = row.data_us {
            values.extend([Argument::Integer(quality), Argument::Time(data_us)]);
        }
        connection.execute(insert, &values).await.unwrap();
        if let Some(from) = row.gap_from {
            let insert = "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
                VALUES ($1, $2, $3, 0, $4)";
            let values = [
                stream.into(),
                from.into(),
                row.seq.into(),
                Argument::Time(row.arrived_us),
            ];
            connection.execute(insert, &values).await.unwrap();
        }
    }
    connection.commit().await.unwrap();
    device
}

/// Counts every number of the ledger.
fn counted(ledger: &[Numbered]) -> Days {
    let mut days: Days = vec![None; DAYS];
    let day_of = |us: i64| us.max(BEGIN_US - 1);
    let mut latest_us = i64::MIN;
    for (index, row) in ledger.iter().enumerate() {
        let timed = ledger[index..]
            .iter()
            .take(ROWS_SEARCHED as usize)
            .find(|row| row.data_us.is_some());
        let data_us = timed.and_then(|row| match row.is_suspect {
            true => Some(row.arrived_us),
            false => row.data_us,
        });
        latest_us = latest_us.max(day_of(data_us.unwrap_or(row.arrived_us)));
        let day = (latest_us - BEGIN_US).div_euclid(DAY_US);
        let Some(found) = usize::try_from(day).ok().and_then(|day| days.get_mut(day)) else {
            continue;
        };
        let found = found.get_or_insert_default();
        match row.gap_from {
            Some(from) => found.missing += row.seq - from + 1,
            None => {
                found.received += 1;
                let end_us = BEGIN_US + (day + 1) * DAY_US;
                found.late += i64::from(row.arrived_us >= end_us + LATE_AFTER_US);
            }
        }
    }
    days
}

/// Makes a ledger of some days whose times rise, with gaps, late frames, frames without a time, and outages.
fn ledger(seed: u64, rows: usize) -> Vec<Numbered> {
    let mut state = seed;
    let mut random = |limit: i64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as i64 % limit
    };
    let (mut seq, mut data_us, mut arrived_us) = (0, BEGIN_US - DAY_US, 0);
    let step_us = 6 * DAY_US / rows as i64;
    let mut ledger = Vec::new();
    for _ in 0..rows {
        data_us += random(2 * step_us) + 1;
        // Some frames wait for a day.
        let delay_us = if random(10) == 0 {
            random(30) * HOUR_US
        } else {
            1000
        };
        arrived_us = (data_us + delay_us).max(arrived_us + 1);
        let from = seq + 1;
        let is_gap = random(12) == 0;
        seq += if is_gap { 1 + random(40) } else { 1 };
        let has_time = !is_gap && random(5) > 0;
        ledger.push(Numbered {
            seq,
            gap_from: is_gap.then_some(from),
            arrived_us,
            data_us: has_time.then_some(data_us),
            is_suspect: false,
        });
    }
    ledger
}

async fn every_number_is_counted_on_its_day(store: StoreUrl) {
    let ledgers: Vec<Vec<Numbered>> = (1..=30u64)
        .map(|seed| ledger(seed, 1 + 17 * seed as usize))
        .collect();
    let mut devices = Vec::new();
    for (index, ledger) in ledgers.iter().enumerate() {
        devices.push(write(&store, &format!("d{index}"), ledger).await);
    }
    let mut reader = Reconnecting::new(&store);
    let found = days(&mut reader, &devices, BEGIN_US, DAYS).await.unwrap();
    for (device, ledger) in devices.iter().zip(&ledgers) {
        assert_eq!(found[device], counted(ledger), "{ledger:?}");
    }
    let sum = found
        .values()
        .flatten()
        .flatten()
        .fold(Day::default(), |mut sum, day| {
            sum.add(*day);
            sum
        });
    assert!(
        sum.received > 1000 && sum.missing > 1000 && sum.late > 50,
        "{sum:?}"
    );
}

async fn times_that_cannot_be_trusted_do_not_count(store: StoreUrl) {
    let row = |seq, hour: i64, data_us: Option<i64>, is_suspect| Numbered {
        seq,
        gap_from: None,
        arrived_us: BEGIN_US + hour * HOUR_US,
        data_us,
        is_suspect,
    };
    // A clock in the year 1970, and one far in the future, are suspect.
    let ledger = [
        row(1, 1, Some(0), true),
        row(2, 2, Some(i64::MAX / 4), true),
        row(3, 26, None, false),
    ];
    let device = write(&store, "a", &ledger).await;
    let mut reader = Reconnecting::new(&store);
    let found = days(&mut reader, &[device], BEGIN_US, DAYS).await.unwrap();
    let of_day = |received| {
        Some(Day {
            received,
            ..Day::default()
        })
    };
    assert_eq!(found[&device], [of_day(2), of_day(1), None, None]);
    // A device without frames, and none at all.
    let empty = write(&store, "b", &[]).await;
    let found = days(&mut reader, &[empty], BEGIN_US, DAYS).await.unwrap();
    assert_eq!(found[&empty], vec![None; DAYS]);
    assert_eq!(
        days(&mut reader, &[], BEGIN_US, DAYS).await.unwrap(),
        BTreeMap::new()
    );
}

async fn the_longest_gap_is_counted(store: StoreUrl) {
    let at = |seq, gap_from| Numbered {
        seq,
        gap_from,
        arrived_us: BEGIN_US + HOUR_US,
        data_us: None,
        is_suspect: false,
    };
    let last = i64::MAX - 1;
    let device = write(&store, "a", &[at(1, None), at(last, Some(2))]).await;
    let mut reader = Reconnecting::new(&store);
    let found = days(&mut reader, &[device], BEGIN_US, 1).await.unwrap();
    let day = found[&device][0].unwrap();
    assert_eq!((day.received, day.missing), (1, last - 1));
}

in_both_stores! {
    every_number_is_counted_on_its_day
    times_that_cannot_be_trusted_do_not_count
    the_longest_gap_is_counted
}
