//! What logins and declares cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::store::contract::{admitted, comes_back, login, very_many};

/// The steps that SQLite's machine takes for a batch.
async fn steps(h: &mut OnDisk, batch: &Batch) -> u64 {
    let taken = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&taken);
    let count = move || {
        counter.fetch_add(1, Ordering::Relaxed);
        true
    };
    let mut handle = h.conn().lock_handle().await.unwrap();
    handle.set_progress_handler(1, count);
    drop(handle);
    h.store.commit(batch).await.unwrap();
    let mut handle = h.conn().lock_handle().await.unwrap();
    handle.remove_progress_handler();
    taken.load(Ordering::Relaxed)
}

#[tokio::test]
async fn what_a_device_has_declared_before_costs_nothing() {
    let mut h = OnDisk::create().await;
    let device = admitted(&mut h.store, login("a", 1, 1)).await.device;
    let batch = |schema| {
        let (logins, declares) = comes_back(device, schema);
        Batch {
            logins,
            declares,
            ..Batch::default()
        }
    };
    // The first one prepares the statements, too.
    for schema in 0..2 {
        h.store.commit(&batch(schema)).await.unwrap();
    }
    let known_before = steps(&mut h, &batch(1)).await;
    let new_before = steps(&mut h, &batch(2)).await;
    let many = Batch {
        declares: very_many(device, 1000..1100),
        ..Batch::default()
    };
    h.store.commit(&many).await.unwrap();
    assert_eq!(steps(&mut h, &batch(1)).await, known_before);
    // One that is new is held against the bounds: what the device has is counted, a few steps for each.
    let counted = 4 * u64::from(DeviceBounds::DEFAULT.series_max);
    let new = steps(&mut h, &batch(3)).await;
    assert!(new <= new_before + counted, "{new} {new_before}");
}
