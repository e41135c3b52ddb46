//! Reads committed readings in the order of `frames.id`, in pages.
//!
//! Invariant: after a page has been read, no frame appears with an id up to the end of the page, so a reader that
//! continues there misses nothing. On Postgres, `settled_frame_id` ensures this; SQLite commits ids in their order.

use serde::Serialize;

use super::{Argument, QueryError, Reconnecting, Row};

/// Maximum number of frames that a page covers, with and without readings.
pub const PAGE_FRAMES: i64 = 2000;
/// Maximum number of readings in a page, unless a single frame has more.
const PAGE_READINGS: i64 = 5000;

/// Selects readings; an empty text matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub device: String,
    pub channel: String,
}

impl Filter {
    pub fn is_all(&self) -> bool {
        self.device.is_empty() && self.channel.is_empty()
    }
}

/// The readings of a frame. Times are microseconds UTC.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    pub frame_id: i64,
    pub device: String,
    pub stream: i64,
    pub seq: i64,
    pub received_at: i64,
    pub quality: Option<&'static str>,
    pub readings: Vec<Reading>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reading {
    pub channel: String,
    pub unit: String,
    pub ts: i64,
    pub value: Number,
}

/// A value. JSON has no infinite numbers, so they become texts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Number {
    Missing,
    Finite(f64),
    Infinite(&'static str),
}

impl From<Option<f64>> for Number {
    fn from(value: Option<f64>) -> Self {
        match value {
            None => Number::Missing,
            Some(f64::INFINITY) => Number::Infinite("Infinity"),
            Some(f64::NEG_INFINITY) => Number::Infinite("-Infinity"),
            Some(value) => Number::Finite(value),
        }
    }
}

/// Consecutive events.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// Cursor at which the page begins.
    pub after: i64,
    /// Cursor at which the next page begins.
    pub to: i64,
    pub events: Vec<Event>,
}

/// The end of the feed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Highest id up to which pages can be read now.
    pub settled: i64,
    /// Highest id that may have been given to a frame. It only decreases when the store is restored to an earlier
    /// state, so a cursor beyond it is one of another store.
    pub newest: i64,
}

/// Returns the present end of the feed.
pub async fn head(store: &mut Reconnecting) -> Result<Head, QueryError> {
    let sql = match store.is_sqlite() {
        true => "SELECT (SELECT coalesce(max(id), 0) FROM frames), last_removed FROM store_identity",
        false => "SELECT settled_frame_id(),
            (SELECT CASE WHEN is_called THEN last_value + 1 ELSE 1 END * 1024 - 1 FROM frame_id_blocks)",
    };
    let rows = store.rows(sql, &[]).await?;
    let Some(row) = rows.first() else {
        return Ok(Head::default());
    };
    let settled = row.integer(0)?;
    let newest = row.integer(1)?.max(settled);
    Ok(Head { settled, newest })
}

/// Returns the events that match `filter` after the cursor `after`, from at most `frames_max` frames; `settled` is
/// that of an earlier [`head`].
pub async fn page(
    store: &mut Reconnecting,
    frames_max: i64,
    after: i64,
    settled: i64,
    filter: &Filter,
) -> Result<Page, QueryError> {
    let range = [after.into(), settled.into(), frames_max.into()];
    let frames = store.rows(FRAMES, &range).await?;
    let mut page = Page {
        after,
        to: settled,
        events: Vec::new(),
    };
    // Numbers of readings: in the events of the page, and in all frames up to `page.to`.
    let (mut readings, mut covered) = (0, 0);
    let is_whole = (frames.len() as i64) < frames_max;
    for row in &frames {
        let event = event(row)?;
        let is_wanted = filter.device.is_empty() || event.device == filter.device;
        let of_frame = if is_wanted { row.integer(6)? } else { 0 };
        if readings > 0 && readings + of_frame > PAGE_READINGS {
            break;
        }
        readings += of_frame;
        covered += row.integer(6)?;
        page.to = event.frame_id;
        if of_frame > 0 {
            page.events.push(event);
        }
        if is_whole && frames.last() == Some(row) {
            page.to = settled;
        }
    }
    if !page.events.is_empty() {
        fill(store, &mut page, filter, covered).await?;
    }
    page.events.retain(|event| !event.readings.is_empty());
    Ok(page)
}

/// Reads the readings of a page and adds them to its events.
async fn fill(
    store: &mut Reconnecting,
    page: &mut Page,
    filter: &Filter,
    covered: i64,
) -> Result<(), QueryError> {
    let (device, channel) = (filter.device.as_str(), filter.channel.as_str());
    let range: [Argument<'_>; 4] = [
        page.after.into(),
        page.to.into(),
        device.into(),
        channel.into(),
    ];
    let rows = match store.is_sqlite() {
        true => {
            let first = store.rows(FIRST_RECENT, &[page.after.into()]).await?;
            let first = first.first().map_or(Ok(0), |row| row.integer(0))?;
            // A row of level 0 has at least one reading.
            let arguments = [&range[..], &[first.into(), covered.into()]].concat();
            store.rows(READINGS_SQLITE, &arguments).await?
        }
        false => store.rows(READINGS_POSTGRES, &range).await?,
    };
    let mut events = page.events.iter_mut().peekable();
    for row in rows {
        let frame = row.integer(0)?;
        while events.next_if(|event| event.frame_id < frame).is_some() {}
        if let Some(event) = events.peek_mut()
            && event.frame_id == frame
        {
            event.readings.push(Reading {
                channel: row.text(1)?.to_owned(),
                unit: row.text(2)?.to_owned(),
                ts: row.integer(3)?,
                value: row.sample(4)?.into(),
            });
        }
    }
    Ok(())
}

fn event(row: &Row) -> Result<Event, QueryError> {
    Ok(Event {
        frame_id: row.integer(0)?,
        device: row.text(1)?.to_owned(),
        stream: row.integer_or_null(2)?.unwrap_or_default(),
        seq: row.integer(3)?,
        received_at: row.integer(4)?,
        quality: row.quality(5)?,
        readings: Vec::new(),
    })
}

/// LEFT JOIN returns a row for every frame: fewer rows than the limit mean that there are no more frames.
const FRAMES: &str = "SELECT f.id, d.name, st.stream, f.seq, f.received_at, f.quality, f.readings
     FROM (SELECT id, stream_id, seq, received_at, quality, readings FROM frames
         WHERE id > $1 AND id <= $2 ORDER BY id LIMIT $3) AS f
     LEFT JOIN streams AS st ON st.id = f.stream_id
     LEFT JOIN devices AS d ON d.id = st.device_id
     ORDER BY f.id";

/// Finds the first row of level 0 of a later frame by binary search: frames are in order there.
const FIRST_RECENT: &str = "WITH RECURSIVE
     search(low, high) AS (
         SELECT coalesce(min(id), 0), coalesce(max(id), -1) + 1 FROM readings_recent
         UNION ALL
         SELECT
             iif((SELECT u.frame_id > $1 FROM readings_recent AS u
                     WHERE u.id >= (low + high) / 2 ORDER BY u.id LIMIT 1), low, (low + high) / 2 + 1),
             iif((SELECT u.frame_id > $1 FROM readings_recent AS u
                     WHERE u.id >= (low + high) / 2 ORDER BY u.id LIMIT 1), (low + high) / 2, high)
         FROM search WHERE low < high
     )
     SELECT low FROM search WHERE low >= high";

/// CROSS JOIN keeps the written order of the tables. Rows of level 0 are included only while they are not in
/// `readings_sorted`, as in the view `readings_unsorted`.
const READINGS_SQLITE: &str = "SELECT f.id AS frame, s.channel AS channel, s.unit, r.ts AS ts, r.value
     FROM frames AS f
     CROSS JOIN streams AS st ON st.id = f.stream_id
     CROSS JOIN devices AS d ON d.id = st.device_id
     CROSS JOIN series AS s ON s.device_id = d.id
     CROSS JOIN readings_sorted AS r ON r.series_id = s.id AND r.frame_id = f.id
         AND r.ts >= coalesce(f.first_ts, f.last_ts) AND r.ts <= f.last_ts
     WHERE f.id > $1 AND f.id <= $2 AND f.readings > 0
         AND ($3 = '' OR d.name = $3) AND ($4 = '' OR s.channel = $4)
     UNION ALL
     SELECT u.frame_id, s.channel, s.unit, u.ts + CAST(v.key AS INTEGER), v.value
     FROM readings_sorting AS m
     CROSS JOIN (SELECT id, series_id, ts, frame_id, samples FROM readings_recent
         WHERE id >= $5 ORDER BY id LIMIT $6) AS u
     CROSS JOIN series AS s ON s.id = u.series_id
     CROSS JOIN devices AS d ON d.id = s.device_id
     CROSS JOIN json_each(u.samples) AS v
     WHERE u.frame_id > $1 AND u.frame_id <= $2
         AND u.id > m.sorted_id
         AND (u.id > m.sorting_id OR (u.series_id, u.ts, u.frame_id) > (m.series_id, m.ts, m.frame_id))
         AND ($3 = '' OR d.name = $3) AND ($4 = '' OR s.channel = $4)
     ORDER BY frame, ts, channel";

const READINGS_POSTGRES: &str = "SELECT f.id, s.channel, s.unit, r.ts, r.value
     FROM frames AS f
     JOIN streams AS st ON st.id = f.stream_id
     JOIN devices AS d ON d.id = st.device_id
     JOIN series AS s ON s.device_id = d.id
     JOIN readings AS r ON r.series_id = s.id AND r.ts >= f.first_ts AND r.ts <= f.last_ts
         AND r.frame_id = f.id
     WHERE f.id > $1 AND f.id <= $2 AND f.readings > 0
         AND ($3 = '' OR d.name = $3) AND ($4 = '' OR s.channel = $4)
     ORDER BY f.id, r.ts, s.channel COLLATE \"C\"";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::store_url::StoreUrl;
    use crate::store::admin::{Access, Connection};
    use crate::store::conformance::{Peer, peer};
    use crate::store::postgres::{PostgresStore, tests::Database};
    use crate::store::sqlite::{SqliteSettings, SqliteStore};
    use crate::store::{Batch, Entry, Store};

    async fn store_all(store: &mut impl Store, entries: Vec<Entry>) {
        let batch = Batch {
            entries,
            ..Batch::default()
        };
        store.commit(&batch).await.unwrap();
    }

    /// Returns all events after a cursor, and the cursor at their end.
    async fn read(store: &mut Reconnecting, mut after: i64, filter: &Filter) -> (Vec<Event>, i64) {
        let settled = head(store).await.unwrap().settled;
        let mut events = Vec::new();
        while after < settled {
            let page = page(store, PAGE_FRAMES, after, settled, filter)
                .await
                .unwrap();
            assert!(page.to > after && page.to <= settled, "{page:?}");
            after = page.to;
            events.extend(page.events);
        }
        (events, after)
    }

    /// Returns the entries of `count` frames from `first_seq` on, with `readings` readings each.
    fn frames(peer: &Peer, first_seq: u64, count: u64, readings: u64) -> Vec<Entry> {
        let frame = |seq: u64| {
            let rows = (0..readings).map(|row| ((seq * 1000 + row) as i64 * 7, seq as f64 / 3.0));
            peer.readings(seq, &rows.collect::<Vec<_>>())
        };
        (first_seq..first_seq + count).map(frame).collect()
    }

    async fn every_reading_is_in_one_page<S: Store>(url: &StoreUrl, mut writer: S) {
        let (a, b) = (peer(&mut writer, "a").await, peer(&mut writer, "b").await);
        let mut store = Reconnecting::new(url);
        let all = Filter::default();
        let mut cursor = head(&mut store).await.unwrap().settled;
        let begin = cursor;
        let mut events = Vec::new();
        // Few and many readings of a stream are stored in different tables of SQLite; empty commits compact.
        let mut seq = 1;
        for (count, readings) in [(3, 2), (2500, 3), (1, 200), (40, 1), (5, 1)] {
            let batch = [frames(&a, seq, count, readings), frames(&b, seq, 1, 1)].concat();
            store_all(&mut writer, batch).await;
            let (more, to) = read(&mut store, cursor, &all).await;
            events.extend(more);
            cursor = to;
            store_all(&mut writer, Vec::new()).await;
            store_all(&mut writer, vec![b.gap(seq + 1, seq + count - 1)]).await;
            seq += count;
        }
        assert!(events.iter().map(|event| event.frame_id).is_sorted());
        let count = |device: &str| {
            let events = events.iter().filter(|event| event.device == device);
            events.map(|event| event.readings.len()).sum::<usize>()
        };
        assert_eq!((count("a"), count("b")), (6 + 7500 + 200 + 40 + 5, 5));
        let first = &events.iter().find(|event| event.device == "a").unwrap();
        assert_eq!((first.seq, first.quality), (1, Some("anchored")));
        assert_eq!(
            (first.readings[1].ts, first.readings[1].value),
            (7007, Number::Finite(1.0 / 3.0))
        );
        assert_eq!(first.readings[0].channel, "temperature");
        // The same from the start, and with filters.
        assert_eq!(read(&mut store, begin, &all).await.0, events);
        let filtered = |device: &str, channel: &str| Filter {
            device: device.to_owned(),
            channel: channel.to_owned(),
        };
        let of_b = read(&mut store, begin, &filtered("b", "temperature"))
            .await
            .0;
        assert_eq!(of_b.len(), 5);
        assert!(of_b.iter().all(|event| events.contains(event)));
        assert_eq!(read(&mut store, begin, &filtered("", "x")).await.0, []);
        assert_eq!(read(&mut store, begin, &filtered("c", "")).await.0, []);
    }

    #[tokio::test]
    async fn every_reading_is_in_one_page_of_sqlite() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
        every_reading_is_in_one_page(&StoreUrl::Sqlite(path), store.unwrap()).await;
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn every_reading_is_in_one_page_of_postgres() {
        let database = Database::create().await;
        let store = PostgresStore::open(database.settings()).await.unwrap();
        let url = StoreUrl::Postgres(database.settings().url);
        every_reading_is_in_one_page(&url, { store }.remove(0)).await;
    }

    #[tokio::test]
    async fn ids_of_removed_frames_are_not_reused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let open = async || {
            let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
            store.unwrap()
        };
        let mut writer = open().await;
        let device = peer(&mut writer, "a").await;
        store_all(&mut writer, frames(&device, 1, 3, 1)).await;
        writer.close().await.unwrap();
        let url = StoreUrl::Sqlite(path.clone());
        let mut connection = Connection::open(&url, Access::Write).await.unwrap();
        connection
            .step("DELETE FROM frames WHERE id > 1", &[])
            .await
            .unwrap();
        drop(connection);
        // A cursor after the removed frames is not one of another store.
        let (settled, newest) = (1, 3);
        let found = head(&mut Reconnecting::new(&url)).await.unwrap();
        assert_eq!(found, Head { settled, newest });
        let mut writer = open().await;
        store_all(&mut writer, frames(&device, 4, 1, 1)).await;
        let mut store = Reconnecting::new(&url);
        let found = head(&mut store).await.unwrap();
        let (settled, newest) = (4, 4);
        assert_eq!(found, Head { settled, newest });
        let (events, _) = read(&mut store, 3, &Filter::default()).await;
        assert_eq!(events.len(), 1);
    }

    #[tokio::test]
    #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
    async fn frames_of_an_open_transaction_hold_back_later_ones() {
        let database = Database::create().await;
        let store = PostgresStore::open(database.settings()).await.unwrap();
        let mut writer = { store }.remove(0);
        let (a, b) = (peer(&mut writer, "a").await, peer(&mut writer, "b").await);
        let url = StoreUrl::Postgres(database.settings().url);
        let mut store = Reconnecting::new(&url);
        let mut early = Connection::open(&url, Access::Write).await.unwrap();
        early.begin().await.unwrap();
        let take = "SELECT take_frame_id_blocks(1) * 1024";
        let id = early.integer(take, &[]).await.unwrap();
        store_all(&mut writer, frames(&b, 1, 1, 1)).await;
        let found = head(&mut store).await.unwrap();
        assert!(found.settled < id && id < found.newest, "{found:?}");
        let (events, cursor) = read(&mut store, 0, &Filter::default()).await;
        assert_eq!(events, []);
        assert!(cursor < id);
        let insert = "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, first_ts, last_ts)
            VALUES ($1, $2, 1, 17, $3, 1, $3, $3)";
        let at = Argument::Time(1_700_000_000_000_000);
        let values = [id.into(), a.stream.0.into(), at];
        early.execute(insert, &values).await.unwrap();
        let insert =
            "INSERT INTO readings (series_id, ts, frame_id, value) VALUES ($1, $2, $3, 1.5)";
        let values = [a.series.0.into(), at, id.into()];
        early.execute(insert, &values).await.unwrap();
        early.commit().await.unwrap();
        let (events, after) = read(&mut store, cursor, &Filter::default()).await;
        let devices: Vec<_> = events.iter().map(|event| event.device.as_str()).collect();
        assert_eq!(devices, ["a", "b"]);
        assert_eq!(read(&mut store, after, &Filter::default()).await.0, []);
        // The next frame has a higher id.
        store_all(&mut writer, frames(&b, 2, 1, 1)).await;
        let (events, _) = read(&mut store, after, &Filter::default()).await;
        assert_eq!(events.len(), 1);
    }
}
