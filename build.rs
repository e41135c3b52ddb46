//! Makes cargo notice new and changed migration files: `sqlx::migrate!` reads the folders at compile time.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
