//! Makes cargo notice new and changed migration files, because `sqlx::migrate!` reads the folders
//! at compile time. Also records the build time: a correct clock never shows an earlier time.

use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    // Set for reproducible builds.
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let built_s = given
        .and_then(|given| given.parse().ok())
        .unwrap_or_else(|| {
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
            since_epoch.map_or(0, |since| since.as_secs())
        });
    println!("cargo:rustc-env=FIELDGATE_BUILT_S={built_s}");
}
