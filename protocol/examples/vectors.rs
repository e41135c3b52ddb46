//! Writes `vectors/*.json`: `cargo run -p fieldgate-protocol --example vectors`.

#[path = "../tests/corpus/mod.rs"]
#[allow(dead_code, missing_docs)]
mod corpus;

fn main() -> std::io::Result<()> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors");
    std::fs::create_dir_all(dir)?;
    for (name, file) in corpus::files() {
        std::fs::write(format!("{dir}/{name}"), corpus::render(&file))?;
    }
    Ok(())
}
