//! `fieldgate status`: what is stored, in one screen. It looks at the store alone, so it works beside
//! a running gateway and without one.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use fieldgate::clock::SystemClock;
use fieldgate::store::sqlite::{OpenError, open_reader};
use sqlx::{Row, SqliteConnection};

use super::Error;
use super::output::{self, age, bytes_text, utc_text, write_facts};

/// Shows it.
pub async fn status(path: &Path) -> Result<(), Error> {
    let mut out = output::stdout();
    match open_reader(path).await {
        Ok(mut connection) => {
            let now_us = SystemClock::start().now().utc_us;
            let mut facts = vec![("store", path.display().to_string()), ("size", size(path))];
            facts.extend(counted(&mut connection, now_us).await?);
            write_facts(&facts, &mut out)?;
        }
        // What a new site looks like; nothing has failed.
        Err(OpenError::Missing(path)) => writeln!(
            out,
            "nothing is stored yet: there is no database at {}; `fieldgate serve` makes it",
            path.display()
        )?,
        Err(error) => return Err(error.into()),
    }
    out.flush()?;
    Ok(())
}

fn size(path: &Path) -> String {
    let bytes_of = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let mut wal = OsString::from(path);
    wal.push("-wal");
    format!(
        "{}, and {} of write-ahead log",
        bytes_text(bytes_of(path)),
        bytes_text(bytes_of(wal.as_ref()))
    )
}

async fn counted(
    connection: &mut SqliteConnection,
    now_us: i64,
) -> Result<Vec<(&'static str, String)>, Error> {
    // Streams keep running totals: nothing here counts a large table.
    let row = sqlx::query(
        "SELECT (SELECT count(*) FROM devices),
             count(*), coalesce(sum(frames), 0), coalesce(sum(readings), 0),
             (SELECT received_at FROM frames ORDER BY id DESC LIMIT 1),
             (SELECT count(*) FROM gaps), (SELECT total(to_seq - from_seq + 1) FROM gaps),
             (SELECT count(*) FROM quarantine)
         FROM streams",
    )
    .fetch_one(connection)
    .await?;
    let number = |index| row.try_get::<i64, _>(index).map(|n| n.to_string());
    let last_frame_us: Option<i64> = row.try_get(4)?;
    let last_frame = match last_frame_us {
        Some(us) => format!("{}, {}", utc_text(us), age(us, now_us)),
        None => "none yet".to_owned(),
    };
    let gaps = match row.try_get::<i64, _>(5)? {
        0 => "0".to_owned(),
        gaps => format!("{gaps}, of {} frames in all", row.try_get::<f64, _>(6)?),
    };
    Ok(vec![
        ("devices", number(0)?),
        ("streams", number(1)?),
        ("frames", number(2)?),
        ("readings", number(3)?),
        ("last frame", last_frame),
        ("gaps", gaps),
        ("quarantined", number(7)?),
    ])
}
