//! The program `fieldgate`; see [`fieldgate::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    fieldgate::cli::main()
}
