# Recipes for daily work: `just RECIPE`. Their commands also work without just.

# Build both programs into target/release
build:
    cargo build --release --locked

# Run the quick tests; `tests/run` runs all tests
test *ARGS:
    cargo test --workspace --locked -q {{ ARGS }}

# Run the quick checks: format, spelling, lints
check:
    cargo fmt --all --check
    tests/spelling
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Measure the gateway on this machine, in two to three minutes
bench *ARGS: build
    target/release/fieldgate-sim bench --quick {{ ARGS }}

# Write docs/configuration.md and fieldgate.example.toml from the settings in src/config/groups.rs
reference:
    FIELDGATE_TEST_WRITE=1 cargo test --workspace --lib --locked -q cli::reference

# Build the code's documentation, and check the documents
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked
    cargo build --workspace --locked
    tests/docs target/debug/fieldgate target/debug/fieldgate-sim
