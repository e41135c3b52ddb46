//! The simulator's command line: reads the arguments, does what they say, gives the exit code.
//!
//! 0 done, 1 failed, 2 wrong usage or configuration.

use anyhow::{Context, anyhow};
use clap::Parser;
use fieldgate_simulator::args::{Cli, Command, RunArgs};
use fieldgate_simulator::journal::Ledger;
use std::process::ExitCode;

fn main() -> ExitCode {
    match carry_out(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { error, code }) => {
            eprintln!("fieldgate-sim: {error:#}");
            code
        }
    }
}

fn carry_out(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run(&args),
        Command::Verify(args) => {
            let ledger = Ledger::read(&args.journal).map_err(configuration)?;
            ledger.plan.open().map_err(configuration)?;
            Err(unbuilt("verify"))
        }
        Command::Bench(_) => Err(unbuilt("bench")),
    }
}

fn run(args: &RunArgs) -> Result<(), Failure> {
    let random = random().map_err(failure)?;
    let now_us = jiff::Timestamp::now().as_microsecond();
    let script = args.script(random, now_us).map_err(configuration)?;
    println!("seed {}", script.plan().seed);
    Err(unbuilt("run"))
}

fn random() -> anyhow::Result<[u64; 2]> {
    let mut random = [0; 2];
    for number in &mut random {
        *number = getrandom::u64().context("the system gives no random numbers")?;
    }
    // 53 bits make a seed that is easier to type, and that any reader of JSON keeps.
    Ok([random[0] >> 11, random[1] >> 11])
}

struct Failure {
    error: anyhow::Error,
    code: ExitCode,
}

fn failure(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        error: error.into(),
        code: ExitCode::from(1),
    }
}

fn configuration(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        error: error.into(),
        code: ExitCode::from(2),
    }
}

fn unbuilt(subcommand: &str) -> Failure {
    failure(anyhow!("{subcommand} is not built in this commit"))
}
