//! A device that declares more than others, as every store sees it.

use super::*;

/// Schemas of as many channels as there may be, no two alike.
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
    // Alike but for unit or kind, and alike but for the device.
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
            DeclareOutcome::Conflict => panic!("conflict"),
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

/// A login with a schema that is known and a declare of one that is new: what is asked of a store when a
/// device comes back and tells something new.
pub(in crate::store) fn comes_back(device: DeviceId, schema: u16) -> (Vec<Login>, Vec<Declare>) {
    let mut known = login("a", 1, 1);
    known.schema = Some((0, [1; 8]));
    (vec![known], very_many(device, schema..schema + 1))
}
