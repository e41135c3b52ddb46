//! `fieldgate completions` and `fieldgate man`: shell completions and man pages, for packages.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Error, command, output};

#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// Shell for which the script is printed
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

#[derive(Args, Debug)]
pub struct ManArgs {
    /// Directory for the pages; created if it does not exist
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Prints a script that completes commands and options.
pub fn completions(args: &CompletionsArgs) -> Result<(), Error> {
    let mut command = command();
    // In memory: the generator panics if its output cannot be written.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "fieldgate", &mut script);
    let mut out = output::stdout();
    out.write_all(&script)?;
    out.flush().map_err(Error::Output)
}

/// Writes a man page for each command.
pub fn man(args: &ManArgs) -> Result<(), Error> {
    let mut command = command().disable_help_subcommand(true);
    command.build();
    fs::create_dir_all(&args.dir)
        .and_then(|()| write_page(&command, &args.dir))
        .map_err(|error| {
            let dir = args.dir.display();
            Error::Failed(format!(
                "could not write man pages into {dir}: {error}; choose a directory that this user may write"
            ))
        })
}

fn write_page(command: &Command, dir: &Path) -> std::io::Result<()> {
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render(&mut page)?;
    fs::write(dir.join(man.get_filename()), page)?;
    for command in command.get_subcommands() {
        write_page(command, dir)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: &Command, pages: &mut Vec<String>) {
        pages.push(command.get_display_name().unwrap_or("fieldgate").to_owned());
        for command in command.get_subcommands() {
            names(command, pages);
        }
    }

    #[test]
    fn every_command_has_a_page_with_its_options() {
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        man(&ManArgs { dir: pages.clone() }).unwrap();
        let mut command = command().disable_help_subcommand(true);
        command.build();
        let mut expected = Vec::new();
        names(&command, &mut expected);
        assert!(expected.contains(&"fieldgate-fleet-key-adopt".to_owned()));
        for name in &expected {
            let page = fs::read_to_string(pages.join(format!("{name}.1"))).expect(name);
            assert!(page.contains(".SH SYNOPSIS"), "{name}");
        }
        assert_eq!(fs::read_dir(&pages).unwrap().count(), expected.len());
        let serve = fs::read_to_string(pages.join("fieldgate-serve.1")).unwrap();
        assert!(serve.contains("tls\\-listen") && serve.contains("FIELDGATE_TLS_LISTEN"));
    }
}
