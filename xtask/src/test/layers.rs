// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layers of tests: what each needs, and the command that runs it.

use std::fmt::{self, Display, Formatter};
use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::process::Command;

use ::harness::artifacts;
use ::harness::ktap::CASES_VARIABLE;
use ::harness::process::die_with_parent;
use ::harness::vmm::Vmm;
use anyhow::{Context, Result};

use super::kunit;
use super::libtest::{self, OutputParser};
use super::summary::LayerOutcome;
use super::KernelSet;
use crate::build::{self, Profile};
use crate::matrix;
use crate::progress::say;
use crate::run;
use crate::setup::{self, Kernel};

/// A layer of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Unit, integration and documentation tests of the crates, the models among them.
    Crates,
    /// The KUnit cases of the kernel module.
    Kunit(KernelSet),
    /// The tests that boot guests.
    Guests(KernelSet),
}

impl Display for Layer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crates => "crates",
            Self::Kunit(KernelSet::Usual) => "KUnit",
            Self::Kunit(KernelSet::Debug) => "KUnit, debug kernel",
            Self::Guests(KernelSet::Usual) => "guests",
            Self::Guests(KernelSet::Debug) => "guests, debug kernel",
        })
    }
}

/// The tests of each layer to run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Run only tests with one of these texts in their names; all tests if empty.
    pub names: Vec<String>,
    /// More options for the test programs.
    pub options: Vec<String>,
    /// The number of guest tests to run in parallel; `None`: depends on the number of processors.
    pub at_once: Option<NonZeroUsize>,
}

/// Part of the name of each test of a guest in QEMU.
const NEEDS_QEMU: &str = "qemu";
/// Part of the name of each test that needs the C driver, which fails on the debug kernel.
const NEEDS_C_DRIVER: &str = "c_driver";
/// Part of the name of each test that runs only with the debug kernel.
const NEEDS_DEBUG: &str = "debug_kernel";
/// Part of the name of each test whose guests run in user-mode Linux only, unless the name also contains `qemu`.
const NEEDS_UML_ONLY: &str = "user_mode_linux";
/// The tests that run user-mode Linux inside a guest of QEMU.
const SOFT_DIRTY: &str = "soft_dirty::";
/// The test that has the kernel run the module's KUnit cases.
const KUNIT: &str = "kunit::every_kunit_case_of_the_module_passes";

/// The number of guest tests in parallel for every two processors. An emulated guest keeps a processor busy, and its
/// VMM and daemon need a part of another. A guest in user-mode Linux mostly waits for timers of its kernel.
const USUAL_AT_ONCE: usize = 3;
const DEBUG_AT_ONCE: usize = 4;

/// Runs the selected tests of a layer. Sets up and builds only what they need.
pub fn run(layer: Layer, selection: &Selection) -> Result<LayerOutcome> {
    match layer {
        Layer::Crates => crates(selection),
        Layer::Kunit(kernels) => kunit(kernels, selection),
        Layer::Guests(kernels) => guests(kernels, selection),
    }
}

fn crates(selection: &Selection) -> Result<LayerOutcome> {
    say("tests of the crates");
    let mut command = build::cargo()?;
    command
        .args(["test", "--no-fail-fast", "--workspace", "--"])
        .args(&selection.names)
        .args(&selection.options);
    run_and_report(command, Layer::Crates)
}

fn kunit(kernels: KernelSet, selection: &Selection) -> Result<LayerOutcome> {
    let globs = kunit::globs(&kunit::cases()?, &selection.names, KUNIT);
    if globs.is_empty() {
        return Ok(LayerOutcome::default());
    }
    let kernel = match kernels {
        KernelSet::Usual => Kernel::Uml,
        KernelSet::Debug => Kernel::Debug,
    };
    let mut command = test_program(kernels, &[kernel], false)?;
    say(format_args!("{}", Layer::Kunit(kernels)));
    command
        .args(["--exact", KUNIT, "--nocapture"])
        .env(CASES_VARIABLE, globs.join(" "));
    run_and_report(command, Layer::Kunit(kernels))
}

fn guests(kernels: KernelSet, selection: &Selection) -> Result<LayerOutcome> {
    let names = list_tests(kernels, selection)?;
    if names.is_empty() {
        return Ok(LayerOutcome::default());
    }
    let nested = names.iter().any(|name| name.starts_with(SOFT_DIRTY));
    let mut command = test_program(kernels, needed(kernels, &names), nested)?;
    say(format_args!("tests of {}", Layer::Guests(kernels)));
    let usual = || {
        let at_once = match kernels {
            KernelSet::Usual => USUAL_AT_ONCE,
            KernelSet::Debug => DEBUG_AT_ONCE,
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (processors * at_once / 2).max(2)
    };
    let threads = selection.at_once.map_or_else(usual, usize::from);
    command
        .args(["--test-threads", &threads.to_string()])
        .args(filters(kernels, selection))
        .args(&selection.options);
    run_and_report(command, Layer::Guests(kernels))
}

/// Returns the kernels that the tests with these names need.
fn needed(kernels: KernelSet, names: &[String]) -> &'static [Kernel] {
    let uml_only = |name: &String| name.contains(NEEDS_UML_ONLY) && !name.contains(NEEDS_QEMU);
    match kernels {
        KernelSet::Debug => &[Kernel::Debug],
        KernelSet::Usual if names.iter().all(uml_only) => &[Kernel::Uml],
        KernelSet::Usual => &[Kernel::Stock, Kernel::Uml],
    }
}

/// Returns the arguments with which the guest test program selects the tests to run.
fn filters(kernels: KernelSet, selection: &Selection) -> Vec<String> {
    let skipped: &[&str] = match kernels {
        KernelSet::Usual => &[KUNIT, NEEDS_DEBUG],
        KernelSet::Debug => &[KUNIT, NEEDS_QEMU, NEEDS_C_DRIVER],
    };
    let skipped = skipped.iter().flat_map(|name| ["--skip", name]);
    let names = selection.names.iter().cloned();
    names.chain(skipped.map(str::to_owned)).collect()
}

/// Returns the names of the selected guest tests.
fn list_tests(kernels: KernelSet, selection: &Selection) -> Result<Vec<String>> {
    let mut command = program_of_guests()?;
    command
        .args(["--list", "--format", "terse"])
        .args(filters(kernels, selection));
    Ok(libtest::parse_list(&run::output(&mut command)?))
}

/// Returns the command that runs the guest test program, with the artifacts that these kernels need.
fn test_program(kernels: KernelSet, needed: &[Kernel], nested: bool) -> Result<Command> {
    let build_env = setup::ensure(needed)?;
    let mut artifacts = build::artifacts(&build_env, needed, Profile::Dev)?;
    if nested {
        artifacts.nested = Some(build::nested()?);
    }
    if needed.contains(&Kernel::Stock) {
        matrix::prepare(&mut artifacts, None)?;
    }
    let path = build::write_artifacts(&artifacts)?;
    let mut command = program_of_guests()?;
    // An error names its origin. A backtrace of the test program would hide that.
    command
        .env(artifacts::VARIABLE, path)
        .env("RUST_LIB_BACKTRACE", "0");
    if kernels == KernelSet::Debug {
        command.env(Vmm::DEBUG_VARIABLE, "1");
    }
    Ok(command)
}

/// Returns the command that runs the guest tests. Options of the test program may follow.
fn program_of_guests() -> Result<Command> {
    let mut command = build::cargo()?;
    command.args(["test", "--no-fail-fast", "--package", "e2e"]);
    command.args(["--features", "guests", "--test", "guests", "--"]);
    Ok(command)
}

/// Runs tests with a cargo command, prints its output, and returns the outcome.
fn run_and_report(mut command: Command, layer: Layer) -> Result<LayerOutcome> {
    let shown = format!("{command:?}");
    // Both streams share a pipe, so a line of cargo about a program comes before the output of the program.
    let (output, input) = nix::unistd::pipe().context("cannot make a pipe")?;
    let errors = input.try_clone().context("cannot share a pipe")?;
    die_with_parent(&mut command).stdout(input).stderr(errors);
    let spawned = command.spawn();
    // The command holds the write end of the pipe, so the reader would wait for more output without end.
    drop(command);
    let mut child = spawned.with_context(|| format!("cannot run {shown}"))?;
    let mut parser = OutputParser::default();
    let mut output = BufReader::new(std::fs::File::from(output));
    let mut line = Vec::new();
    while output
        .read_until(b'\n', &mut line)
        .context("cannot read what the tests say")?
        > 0
    {
        let text = String::from_utf8_lossy(&line);
        for text in parser.push_line(text.trim_end()) {
            println!("{text}");
        }
        line.clear();
    }
    let status = child.wait().context("cannot wait for the tests")?;
    Ok(LayerOutcome::from_results(layer, parser.finish(), status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_user_mode_linux_needs_sets_up_nothing_else() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            needed(KernelSet::Usual, &names)
        };
        assert_eq!(of(&["a::b_in_user_mode_linux"]), [Kernel::Uml]);
        let both = [Kernel::Stock, Kernel::Uml];
        assert_eq!(of(&["a::b_in_user_mode_linux", "a::b"]), both);
        assert_eq!(of(&["in_qemu_move_user_mode_linux"]), both);
    }
}
