//! The cost of logins and declares.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::store::conformance::{admitted, comes_back, login, very_many};

/// Returns the number of virtual machine steps that SQLite takes for a batch.
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
async fn earlier_schemas_add_no_cost() {
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
    // The first one also prepares the statements.
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
    // A new one is checked against the limits: the device's series are counted, at a few steps each.
    let counted = 4 * u64::from(DeviceBounds::default().device_series_max);
    let new = steps(&mut h, &batch(3)).await;
    assert!(new <= new_before + counted, "{new} {new_before}");
}
