// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holds the commands of the documents to the `Makefile` and to `cargo xtask`.
//!
//! Each target of `make` must be in the `Makefile`, and each `cargo xtask` must have a subcommand and options that exist. The table of
//! `xtask/README.md` must have every subcommand.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use clap::error::ErrorKind;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use regex::Regex;

use crate::paths;
use crate::sources;

/// The page with the table of subcommands.
const TABLE: &str = "xtask/README.md";
/// Targets of the kernel's own Makefile that the documents name.
const KERNEL_TARGETS: [&str; 4] = ["deb-pkg", "modules_prepare", "prepare", "rustavailable"];

/// Checks all documents, and prints how many commands they have. `xtask` is the command line of this program.
///
/// # Errors
///
/// If a command does not exist, or the table is not complete.
pub fn check(xtask: &clap::Command) -> Result<()> {
    let repository = paths::repository()?;
    let known = Known {
        targets: targets(&read(&repository.join("Makefile"))?)?,
        xtask,
    };
    let mut names = sources::names(&repository)?;
    names.retain(|name| name.ends_with(".md"));
    let mut count = 0;
    let mut wrong = Vec::new();
    for name in &names {
        for line in code(&read(&repository.join(name))?) {
            for command in commands(&line) {
                count += 1;
                let fault = known.fault(&command);
                wrong.extend(fault.map(|fault| format!("{name}: {}: {fault}", command.join(" "))));
            }
        }
    }
    wrong.extend(known.faults_of_table(&read(&repository.join(TABLE))?));
    println!("{count:>5}  commands of make and cargo xtask");
    ensure!(
        count > 0 && wrong.is_empty(),
        "commands of the documents:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Returns the targets of a Makefile.
fn targets(makefile: &str) -> Result<BTreeSet<String>> {
    let rule = Regex::new(r"(?m)^([a-z_]+):").context("cannot read an expression")?;
    let names = rule.captures_iter(makefile).filter_map(|it| it.get(1));
    Ok(names.map(|name| name.as_str().to_owned()).collect())
}

/// Returns the lines of code of a document: of its blocks, with continued lines joined, and between backquotes.
fn code(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut block = None;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Code(code) => lines.push(code.into_string()),
            Event::Start(Tag::CodeBlock(_)) => block = Some(String::new()),
            Event::Text(part) => {
                if let Some(block) = &mut block {
                    block.push_str(&part);
                }
            }
            Event::End(TagEnd::CodeBlock) => {
                let joined = block.take().unwrap_or_default().replace("\\\n", " ");
                lines.extend(joined.lines().map(str::to_owned));
            }
            _ => {}
        }
    }
    lines
}

/// Returns the words of each `make` and each `cargo xtask` that a line of a shell script runs, without variables before them.
fn commands(line: &str) -> Vec<Vec<String>> {
    let words = shlex::split(line).unwrap_or_default();
    let ends = |word: &String| ["&&", "||", "|", ";", "&"].contains(&word.as_str());
    let parts = words.split(ends).map(|part| {
        let is_variable = |word: &&String| word.contains('=');
        let variables = part.iter().take_while(is_variable).count();
        part.get(variables..).unwrap_or_default()
    });
    let wanted = parts.filter(|part| match part {
        [program, first, ..] => program == "make" || (program == "cargo" && first == "xtask"),
        _ => false,
    });
    wanted.map(<[String]>::to_vec).collect()
}

/// The commands that exist.
struct Known<'a> {
    targets: BTreeSet<String>,
    xtask: &'a clap::Command,
}

impl Known<'_> {
    /// Returns what is wrong with a command: see [`commands`].
    fn fault(&self, command: &[String]) -> Option<String> {
        match command {
            [program, arguments @ ..] if program == "make" => self.fault_of_make(arguments),
            [_, _, arguments @ ..] => self.fault_of_xtask(arguments),
            _ => None,
        }
    }

    fn fault_of_make(&self, arguments: &[String]) -> Option<String> {
        if arguments.iter().any(|word| word == "-C") {
            // It runs another Makefile.
            return None;
        }
        let is_target = |word: &&String| {
            word.chars()
                .all(|it| it.is_ascii_lowercase() || "_-".contains(it))
        };
        let named = || {
            arguments
                .iter()
                .filter(is_target)
                .filter(|word| !word.starts_with('-'))
        };
        let unknown = named().find(|word| {
            !self.targets.contains(word.as_str()) && !KERNEL_TARGETS.contains(&word.as_str())
        });
        if let Some(target) = unknown {
            return Some(format!("the Makefile has no target {target}"));
        }
        // Targets pass ARGS on to the subcommand with their name.
        let options = arguments
            .iter()
            .find_map(|word| word.strip_prefix("ARGS="))?;
        let subcommand = named().next().cloned().into_iter();
        let options = shlex::split(options).unwrap_or_default();
        self.fault_of_xtask(&subcommand.chain(options).collect::<Vec<_>>())
    }

    fn fault_of_xtask(&self, arguments: &[String]) -> Option<String> {
        let is_placeholder = |word: &String| word.chars().all(|it| it.is_ascii_uppercase());
        if arguments.first().is_none_or(is_placeholder) {
            return None;
        }
        let words = ["xtask"]
            .into_iter()
            .chain(arguments.iter().map(String::as_str));
        let error = self.xtask.clone().try_get_matches_from(words).err()?;
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().to_owned();
        (error.kind() != ErrorKind::DisplayHelp).then_some(first)
    }

    /// Returns what is wrong with the table of subcommands and the targets that run them.
    fn faults_of_table(&self, page: &str) -> Vec<String> {
        let rows: Vec<Vec<&str>> = page
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| line.split('|').skip(1).take(2).collect())
            .collect();
        let column = |index: usize| -> BTreeSet<&str> {
            let cells = rows.iter().filter_map(|row| row.get(index));
            cells
                .flat_map(|cell| cell.split('`').skip(1).step_by(2))
                .collect()
        };
        let (named, targets) = (column(0), column(1));
        let known: BTreeSet<&str> = self
            .xtask
            .get_subcommands()
            .map(clap::Command::get_name)
            .collect();
        let missing = known
            .difference(&named)
            .map(|name| format!("{TABLE} lacks {name}"));
        let unknown = named
            .difference(&known)
            .map(|name| format!("{TABLE}: there is no subcommand {name}"));
        let no_targets = targets.iter().filter(|name| !self.targets.contains(**name));
        let no_targets =
            no_targets.map(|name| format!("{TABLE}: the Makefile has no target {name}"));
        missing.chain(unknown).chain(no_targets).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xtask() -> clap::Command {
        let number = clap::Arg::new("number")
            .long("number")
            .value_parser(clap::value_parser!(u32));
        clap::Command::new("xtask")
            .subcommand(clap::Command::new("test").arg(number))
            .subcommand(clap::Command::new("check"))
    }

    fn faults(line: &str) -> Vec<String> {
        let xtask = xtask();
        let known = Known {
            targets: targets("test: ## run\n\t$(XTASK) test\nVARIABLE := x\ncheck:\n").unwrap(),
            xtask: &xtask,
        };
        let found = commands(line);
        assert!(!found.is_empty(), "no command in {line}");
        found
            .iter()
            .filter_map(|command| known.fault(command))
            .collect()
    }

    #[test]
    fn a_command_must_exist_with_its_options() {
        for line in [
            "make check test T=name    # and make no notice of this",
            "A=1 B='x y' make test",
            "make -C KDIR M=. other",
            "make prepare modules_prepare",
            "make test ARGS=\"--number 1\"",
            "cargo xtask test --number 7",
            "cargo xtask COMMAND --help",
            "cargo xtask check --help",
        ] {
            assert_eq!(faults(line), Vec::<String>::new(), "{line}");
        }
        for line in [
            "make tests",
            "cd x && make other",
            "make test ARGS=\"--no-such-option\"",
            "cargo xtask nothing",
            "cargo xtask test --number many",
            "X=1 cargo xtask check --number 1",
        ] {
            assert_eq!(faults(line).len(), 1, "{line}");
        }
    }

    #[test]
    fn commands_are_found_in_blocks_and_between_backquotes_only() {
        let page = "make it so: `make a`, `cargo xtask b\n--c`\n\n```sh\nmake d \\\n    E=1\nmake f\n```\n";
        let found: Vec<_> = code(page).iter().flat_map(|line| commands(line)).collect();
        let found: Vec<_> = found.iter().map(|words| words.join(" ")).collect();
        assert_eq!(
            found,
            ["make a", "cargo xtask b --c", "make d E=1", "make f"]
        );
    }

    #[test]
    fn a_subcommand_that_the_table_lacks_is_found() {
        let xtask = xtask();
        let known = Known {
            targets: BTreeSet::from(["test".to_owned()]),
            xtask: &xtask,
        };
        let table = "| command | make | |\n|---|---|---|\n| `test` | `test` | `x` |\n";
        assert_eq!(
            known.faults_of_table(table),
            ["xtask/README.md lacks check"]
        );
        let table = "| `test` | `tests` | |\n| `check` | | |\n| `other` | | |\n";
        assert_eq!(known.faults_of_table(table).len(), 2);
    }
}
