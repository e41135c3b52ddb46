use super::*;
use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection};

const NOW_US: i64 = 1_700_050_000_000_000;

/// Adds devices: one of each state, and one that is being removed.
async fn fill(store: &StoreUrl) {
    let mut connection = Connection::open(store, Access::Write).await.unwrap();
    connection.begin().await.unwrap();
    let names = ["Pump-1", "pump-2", "fan-3", "fan-4", "fan-5", "#6 fan-6"];
    for (index, name) in names.iter().enumerate() {
        let id = "INSERT INTO devices (name, firmware, last_seen_at) VALUES ($1, '1.0', $2) RETURNING id";
        let seen = Argument::Time(NOW_US - index as i64 * 1_000_000);
        let id = connection
            .integer(id, &[(*name).into(), seen])
            .await
            .unwrap();
        if let Some(state) = Presence::ALL.get(index) {
            let insert = "INSERT INTO presence (device_id, state, twin_at) VALUES ($1, $2, $3)";
            let twin = Argument::Time(NOW_US - index as i64 * TWIN_EVERY_US);
            let values = [id.into(), state.name().into(), twin];
            connection.execute(insert, &values).await.unwrap();
        }
        let stream =
            "INSERT INTO streams (device_id, stream, created_at) VALUES ($1, 1, $2) RETURNING id";
        let stream = connection
            .integer(stream, &[id.into(), seen])
            .await
            .unwrap();
        for (from, to, at_us) in [
            (1, index as i64 + 1, NOW_US),
            (100, i64::MAX - 1, NOW_US - DAY_US),
        ] {
            let insert = "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at) VALUES ($1, $2, $3, 0, $4)";
            let values = [stream.into(), from.into(), to.into(), Argument::Time(at_us)];
            connection.execute(insert, &values).await.unwrap();
        }
        // The last frame has no time.
        for (seq, quality) in [(200, "1"), (201, "NULL")] {
            let insert = format!(
                "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, quality)
                VALUES ($1, $2, $3, 17, $4, 0, {quality})"
            );
            let frame = stream * 1000 + seq;
            let values = [
                frame.into(),
                stream.into(),
                seq.into(),
                Argument::Time(NOW_US + index as i64),
            ];
            connection.execute(&insert, &values).await.unwrap();
        }
    }
    let session = "INSERT INTO sessions (id, device_id, gateway, peer, connected_at)
        SELECT 1, id, '', '10.0.0.1:5', $1 FROM devices WHERE name = 'fan-3'";
    connection
        .execute(session, &[Argument::Time(NOW_US)])
        .await
        .unwrap();
    connection.commit().await.unwrap();
}

fn all() -> Selection {
    Selection {
        limit: 10,
        now_us: NOW_US,
        ..Selection::default()
    }
}

async fn names(reader: &mut Reconnecting, wanted: &Selection) -> (i64, Vec<String>) {
    let (total, devices) = devices(reader, wanted).await.unwrap();
    (
        total,
        devices.into_iter().map(|device| device.name).collect(),
    )
}

async fn devices_are_filtered_sorted_and_paged(store: StoreUrl) {
    fill(&store).await;
    let mut reader = Reconnecting::new(&store);
    let numbers = numbers(&mut reader).await.unwrap();
    assert_eq!(
        numbers,
        Numbers {
            devices: [1; 5],
            quarantined: 0
        }
    );
    let by_name = ["Pump-1", "fan-3", "fan-4", "fan-5", "pump-2"];
    assert_eq!(
        names(&mut reader, &all()).await,
        (5, by_name.map(str::to_owned).to_vec())
    );
    let mut check = async |wanted: Selection, expected: (i64, &[&str])| {
        let found = names(&mut reader, &wanted).await;
        let found = (
            found.0,
            found.1.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        assert_eq!((found.0, &found.1[..]), expected, "{wanted:?}");
    };
    let text = |text: &str| Selection {
        text: text.to_owned(),
        ..all()
    };
    check(text("PUMP"), (2, &["Pump-1", "pump-2"])).await;
    check(text("%"), (0, &[])).await;
    check(text("'; DROP"), (0, &[])).await;
    let state = Some(Presence::Late);
    check(Selection { state, ..all() }, (1, &["pump-2"])).await;
    let order = |order, is_descending| Selection {
        order,
        is_descending,
        ..all()
    };
    let by_state = ["fan-3", "pump-2", "fan-4", "Pump-1", "fan-5"];
    check(order(Order::State, false), (5, &by_state)).await;
    let by_age = ["Pump-1", "pump-2", "fan-3", "fan-4", "fan-5"];
    check(order(Order::Seen, false), (5, &by_age)).await;
    check(order(Order::Missing, false), (5, &by_age)).await;
    let newest = ["fan-5", "fan-4", "fan-3", "pump-2", "Pump-1"];
    check(order(Order::Missing, true), (5, &newest)).await;
    let page = Selection {
        limit: 2,
        offset: 2,
        ..order(Order::Seen, true)
    };
    check(page, (5, &newest[2..4])).await;
}

async fn a_device_has_its_facts(store: StoreUrl) {
    fill(&store).await;
    let mut reader = Reconnecting::new(&store);
    let wanted = Selection {
        text: "fan-3".to_owned(),
        ..all()
    };
    let (_, found) = devices(&mut reader, &wanted).await.unwrap();
    let device = Device {
        id: found[0].id,
        name: "fan-3".to_owned(),
        state: "silent".to_owned(),
        seen_at_us: Some(NOW_US + 2),
        missing_today: 3.0,
        quality: Some("anchored"),
        firmware: Some("1.0".to_owned()),
        peer: Some("10.0.0.1:5".to_owned()),
        has_twin: false,
    };
    assert_eq!(found, [device]);
    let (_, all) = devices(&mut reader, &all()).await.unwrap();
    let twins = all.iter().filter(|device| device.has_twin);
    assert_eq!(
        twins.map(|device| &*device.name).collect::<Vec<_>>(),
        ["Pump-1"]
    );
}

in_both_stores! {
    devices_are_filtered_sorted_and_paged
    a_device_has_its_facts
}
