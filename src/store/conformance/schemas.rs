//! Devices that exceed the limits, for every store.

use super::*;
use crate::config::DeviceBounds;
use crate::store::bounds::Reached;

/// Returns schemas with the maximum number of channels, all different.
pub(in crate::store) fn very_many(device: DeviceId, schemas: std::ops::Range<u16>) -> Vec<Declare> {
    let declare = |schema| {
        let names: Vec<String> = (0..32).map(|n| format!("channel {schema}.{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        declare(device, schema, 1, &names)
    };
    schemas.map(declare).collect()
}

pub(in crate::store) async fn a_schema_is_found_among_very_many<H: Harness>() {
    let mut h = H::create().await;
    let device = admitted(h.store(), login("a", 1, 1)).await.device;
    let other = admitted(h.store(), login("b", 1, 1)).await.device;
    let mut declares = very_many(device, 0..100);
    // Equal except for unit or kind, and equal except for the device.
    declares[1].channels = declares[0].channels.clone();
    declares[2].channels = declares[0].channels.clone();
    for n in 0..32 {
        declares[1].channels[n].unit = "K".to_owned();
        declares[2].channels[n].kind = Kind::F32;
    }
    declares.push(Declare {
        device: other,
        ..declares[0].clone()
    });
    let batch = Batch {
        declares: declares.clone(),
        ..Batch::default()
    };
    let kept = h.store().commit(&batch).await.unwrap().declares;
    let kept: Vec<Arc<Schema>> = kept
        .into_iter()
        .map(|outcome| match outcome {
            DeclareOutcome::Accepted(schema) => schema,
            other => panic!("{other:?}"),
        })
        .collect();
    let series = kept.iter().flat_map(|schema| &schema.channels);
    let series: std::collections::BTreeSet<SeriesId> = series.map(|c| c.series).collect();
    assert_eq!(series.len(), declares.len() * 32);

    let mut h = h.reopen().await;
    for (declare, kept) in declares.iter().zip(&kept) {
        let mut known = login(if declare.device == other { "b" } else { "a" }, 1, 1);
        known.schema = Some((declare.schema, declare.hash));
        let batch = Batch {
            logins: vec![known],
            declares: vec![declare.clone()],
            ..Batch::default()
        };
        let committed = h.store().commit(&batch).await.unwrap();
        let (LoginOutcome::Admitted(admission), DeclareOutcome::Accepted(again)) =
            (&committed.logins[0], &committed.declares[0])
        else {
            panic!("{committed:?}");
        };
        assert_eq!(again, kept);
        assert_eq!(admission.schema.as_ref(), Some(kept));
    }
}

pub(in crate::store) async fn a_device_cannot_exceed_its_limits<H: Harness>() {
    let DeviceBounds {
        device_series_max: series_max,
        device_schemas_max: schemas_max,
        device_streams_max: streams_max,
    } = DeviceBounds::default();
    let mut h = H::create().await;
    let device = admitted(h.store(), login("a", 1, 1)).await.device;
    // 32 channels each: the maximum number of series, and then one more schema.
    let full = (series_max / 32) as u16;
    let declare_all = async |h: &mut H, declares| {
        let batch = Batch {
            declares,
            ..Batch::default()
        };
        h.store().commit(&batch).await.unwrap().declares
    };
    let found = declare_all(&mut h, very_many(device, 0..full + 1)).await;
    let (last, kept) = found.split_last().unwrap();
    let is_kept = |outcome: &DeclareOutcome| matches!(outcome, DeclareOutcome::Accepted(_));
    assert!(kept.iter().all(is_kept));
    let over = |outcome: &DeclareOutcome, reached| matches!(outcome, DeclareOutcome::OverBound(found) if *found == reached);
    assert!(over(last, Reached::Series(series_max)), "{last:?}");
    // Existing schemas stay usable, and a schema that needs no new series is accepted.
    let again = declared(h.store(), very_many(device, 0..1).remove(0)).await;
    assert!(is_kept(&again));
    let of_same = |schema| Declare {
        schema,
        hash: [9; 8],
        ..very_many(device, 0..1).remove(0)
    };
    let found = declare_all(
        &mut h,
        (full..schemas_max as u16 + 1).map(of_same).collect(),
    )
    .await;
    let (last, kept) = found.split_last().unwrap();
    assert!(kept.iter().all(is_kept));
    assert!(over(last, Reached::Schemas(schemas_max)), "{last:?}");

    let mut h = h.reopen().await;
    let logins = (1..u64::from(streams_max) + 2).map(|stream| login("a", stream, 1));
    let batch = Batch {
        logins: logins.chain([login("a", 1, 1), login("b", 9, 1)]).collect(),
        ..Batch::default()
    };
    let found = h.store().commit(&batch).await.unwrap().logins;
    let is_let_in = |outcome: &LoginOutcome| matches!(outcome, LoginOutcome::Admitted(_));
    let refused = found.iter().position(|outcome| !is_let_in(outcome));
    assert_eq!(refused, Some(streams_max as usize));
    let reached = Reached::Streams(streams_max);
    assert!(
        matches!(&found[streams_max as usize], LoginOutcome::OverBound(found) if *found == reached)
    );
    assert!(found[streams_max as usize + 1..].iter().all(is_let_in));
    // A rejected declaration stores nothing, and a later commit gives the same result.
    let found = declare_all(&mut h, very_many(device, 2000..2001)).await;
    assert!(over(&found[0], Reached::Schemas(schemas_max)));
    let batch = Batch {
        logins: vec![login("a", u64::from(streams_max) + 1, 1)],
        ..Batch::default()
    };
    let found = h.store().commit(&batch).await.unwrap().logins;
    assert!(matches!(found[0], LoginOutcome::OverBound(_)));
}

/// Returns a login with a known schema and a declare of a new one, as a store receives them from a
/// device that reconnects with new firmware.
pub(in crate::store) fn comes_back(device: DeviceId, schema: u16) -> (Vec<Login>, Vec<Declare>) {
    let mut known = login("a", 1, 1);
    known.schema = Some((0, [1; 8]));
    (vec![known], very_many(device, schema..schema + 1))
}
