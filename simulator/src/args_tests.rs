//! Tests of the command line, in a separate file because of their length.

use super::*;
use crate::pace::CUT_OFF_US;
use clap::CommandFactory;

fn parse(line: &str) -> Result<Command, String> {
    let words = std::iter::once("fieldgate-sim").chain(line.split_whitespace());
    Cli::try_parse_from(words)
        .map(|cli| cli.command)
        .map_err(|error| error.to_string())
}

fn run(line: &str) -> RunArgs {
    match parse(&format!("run {line}")) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{other:?}"),
    }
}

fn script(line: &str) -> Script {
    run(line).script([11, 22], 1_000_000_000_000_000).unwrap()
}

#[test]
fn the_definition_is_sound_and_every_flag_has_help_and_a_variable() {
    let command = Cli::command();
    command.clone().debug_assert();
    for subcommand in command.get_subcommands() {
        for arg in subcommand
            .get_arguments()
            .filter(|arg| arg.get_long() != Some("help"))
        {
            let long = arg.get_long().unwrap();
            // The options for reading a file are documented with the file.
            if arg.get_help_heading() != Some("CSV format") {
                let variable = format!("FIELDGATE_SIM_{}", long.replace('-', "_").to_uppercase());
                assert_eq!(arg.get_env().unwrap().to_str(), Some(variable.as_str()));
            }
            let help = arg.get_help().unwrap().to_string();
            let default = !arg.get_default_values().is_empty() || help.contains("[default: ");
            assert!(
                default || subcommand.get_name() == "verify",
                "--{long} shows no default"
            );
        }
    }
}

#[test]
fn defaults_work_without_flags() {
    let args = run("");
    let options = args.options();
    assert_eq!(
        (options.gateway.as_str(), options.window),
        ("127.0.0.1:7300", 16)
    );
    assert_eq!(
        options.key_file,
        PathBuf::from("./fieldgate-data/fleet.key")
    );
    assert_eq!(options.duration, Some(Duration::from_secs(30)));
    assert_eq!(options.faults, Faults::default());
    let script = script("");
    let expected = Plan {
        format: plan::FORMAT,
        seed: 11,
        nonce: 22,
        name_prefix: "sim-".into(),
        devices: 10,
        channels: 4,
        interval_us: 100_000,
        batch: 15,
        frames: None,
        clock: Clock::Utc,
        // One frame's worth before now, so that the first frame is due immediately.
        start_us: 1_000_000_000_000_000 - 1_500_000,
        profile: Profile::Steady,
        malformed_billionths: 0,
        replay: None,
    };
    assert_eq!(script.plan(), &expected);
}

/// Returns the environment variable from which each of these flags would be read.
fn variables(subcommand: &str, set: &[(&str, &str)]) -> Vec<Option<String>> {
    let variable = |name: &str| {
        let found = set.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).into())
    };
    let command = with_environment(Cli::command(), variable);
    let subcommand = command.find_subcommand(subcommand).unwrap();
    let args = subcommand.get_arguments();
    let args = args.filter(|arg| ["data_dir", "store"].contains(&arg.get_id().as_str()));
    args.map(|arg| Some(arg.get_env()?.to_str()?.to_owned()))
        .collect()
}

#[test]
fn data_directory_and_store_follow_the_gateways_variables() {
    let gateways = [
        ("FIELDGATE_DATA_DIR", "/a"),
        ("FIELDGATE_STORE", "sqlite:///b"),
    ];
    let found = variables("verify", &gateways);
    let named = |names: &[&str]| -> Vec<Option<String>> {
        names.iter().map(|name| Some((*name).to_owned())).collect()
    };
    assert_eq!(found, named(&["FIELDGATE_DATA_DIR", "FIELDGATE_STORE"]));
    assert_eq!(variables("run", &gateways), named(&["FIELDGATE_DATA_DIR"]));
    // The simulator's own variables take precedence, an empty one counts as unset, and bench never fills a gateway's
    // store.
    let own = [
        ("FIELDGATE_SIM_DATA_DIR", "/c"),
        ("FIELDGATE_SIM_STORE", ""),
        gateways[1],
    ];
    let found = variables("verify", &own);
    assert_eq!(found, named(&["FIELDGATE_SIM_DATA_DIR", "FIELDGATE_STORE"]));
    assert_eq!(variables("verify", &own[1..2])[1], None);
    assert_eq!(
        variables("bench", &gateways),
        named(&["FIELDGATE_SIM_STORE"])
    );
}

#[test]
fn files_default_to_the_data_directory() {
    let options = run("--data-dir /a --tls").options();
    assert_eq!(options.key_file, PathBuf::from("/a/fleet.key"));
    assert_eq!(options.ca, Some(PathBuf::from("/a/tls/ca.pem")));
    assert_eq!(options.data_dir, Some(PathBuf::from("/a")));
    let of_key = run("--key-file /b/fleet.key").options();
    assert_eq!(of_key.data_dir, Some(PathBuf::from("/b")));
    let Ok(Command::Verify(args)) = parse("verify --journal j --data-dir /a") else {
        panic!("not verify")
    };
    assert_eq!(args.store().to_string(), "sqlite:///a/fieldgate.db");
}

#[test]
fn flags_reach_the_plan_and_the_options() {
    let line = "--devices 3 --channels 32 --interval 20ms --batch 60 --frames 9 --seed 5 --clock boot \
                --profile burst --faults malformed=0.01,slow --name-prefix a. --window 1";
    let script = script(line);
    let plan = script.plan();
    assert_eq!(
        (plan.seed, plan.devices, plan.channels, plan.batch),
        (5, 3, 32, 60)
    );
    assert_eq!((plan.interval_us, plan.frames), (20_000, Some(9)));
    assert_eq!((plan.clock, plan.profile), (Clock::Boot, Profile::Burst));
    assert_eq!(
        (plan.name_prefix.as_str(), plan.malformed_billionths),
        ("a.", 10_000_000)
    );
    assert_eq!(plan.start_us, 1_000_000_000_000_000 - CUT_OFF_US as i64);
    let options = run(line).options();
    assert_eq!((options.duration, options.window), (None, 1));
    assert_eq!(
        options.faults.chance(Fault::Slow),
        Fault::Slow.default_chance()
    );
}

#[test]
fn a_replay_ends_by_itself() {
    let line = format!(
        "--replay {}/data/water-flow.csv",
        env!("CARGO_MANIFEST_DIR")
    );
    assert_eq!(run(&line).options().duration, None);
    assert_eq!(script(&line).frames(), Some(10 * 85));
    assert_eq!(
        run(&format!("{line} --duration 5s")).options().duration,
        Some(Duration::from_secs(5))
    );
}

#[test]
fn wrong_values_are_rejected_with_the_valid_ones() {
    let cases = [
        ("run --devices 0", "0 is not in 1..=100000"),
        ("run --devices 100001", "100001 is not in 1..=100000"),
        ("run --channels 33", "33 is not in 1..=32"),
        ("run --channels 0", "0 is not in 1..=32"),
        ("run --batch 1025", "1025 is not in 1..=1024"),
        ("run --window 0", "0 is not in 1..=1024"),
        ("run --frames 0", "0 is not in 1.."),
        ("run --interval 0s", "must be greater than zero"),
        (
            "run --interval 100ns",
            "expected whole microseconds, 1us to 1day",
        ),
        (
            "run --interval 25h",
            "expected whole microseconds, 1us to 1day",
        ),
        (
            "run --duration soon",
            "expected a time such as 500ms, 30s or 2h",
        ),
        ("run --duration 1s --frames 1", "cannot be used with"),
        ("run --channels 2 --replay a.csv", "cannot be used with"),
        ("run --shift-to-now", "--replay <FILE.csv>"),
        ("run --replay a.csv --separator x", "expected , ; |"),
        ("run --gateway 127.0.0.1", "expected host:port"),
        ("run --gateway :7300", "expected host:port"),
        ("run --gateway ::1:7300", "expected host:port"),
        ("run --faults drop", "unknown fault \"drop\""),
        (
            "run --profile slow",
            "possible values: steady, burst, ramp, storm",
        ),
        (
            "run --name-prefix a/b",
            "expected at most 27 letters, digits",
        ),
        ("verify", "--journal <FILE>"),
        ("verify --journal a --store b.db", "write sqlite://b.db"),
        ("verify --journal a --store mysql://b", "is not supported"),
        ("bench --store sqlite://", "has no file"),
    ];
    for (line, expected) in cases {
        let error = parse(line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn verify_and_bench_take_their_flags() {
    let verify = parse("verify --journal a.jsonl --store sqlite://b.db");
    assert!(
        matches!(verify, Ok(Command::Verify(args)) if args.store().to_string() == "sqlite://b.db")
    );
    let verify = parse("verify --journal a.jsonl --store postgres://ann:secret@b/c");
    assert!(
        matches!(verify, Ok(Command::Verify(args)) if args.store().to_string() == "postgres://ann@b:5432/c")
    );
}

#[test]
fn a_benchmark_is_long_by_default() {
    let bench = |line: &str| match parse(&format!("bench {line}")) {
        Ok(Command::Bench(args)) => args,
        other => panic!("{other:?}"),
    };
    let args = bench("");
    assert!(!args.quick && args.json.is_none());
    assert_eq!((args.rounds, args.stored), (None, None));
    let args = bench("--quick --rounds 3 --stored 1000000 --json a.json");
    assert!(args.quick && !args.smoke);
    assert!(bench("--smoke --json a.json").smoke);
    assert_eq!((args.rounds, args.stored), (Some(3), Some(1_000_000)));
    assert_eq!(args.json, Some("a.json".into()));
    for wrong in [
        "--rounds 0",
        "--rounds 101",
        "--stored 0",
        "--stored many",
        "--smoke --quick",
        "--smoke --stored 5",
    ] {
        assert!(parse(&format!("bench {wrong}")).is_err(), "{wrong}");
    }
}
