// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs all tests.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use tests::artifacts;
use tests::vmm::Vmm;

use crate::build::{self, Profile};
use crate::matrix;
use crate::progress::say;
use crate::run;
use crate::setup::{self, Kernel};

/// The options of `test`.
#[derive(Args)]
pub struct Options {
    /// Only the tests of guests.
    #[arg(long)]
    guests: bool,
    /// Only the tests of guests, and only with this kernel.
    #[arg(long)]
    kernels: Option<Kernels>,
    /// Only cells of the matrix of machines: `all`, or those whose names hold this text.
    #[arg(long, value_name = "CELLS")]
    matrix: Option<String>,
    /// Only tests of guests whose names hold this text, and further options of the test program.
    #[arg(last = true)]
    rest: Vec<String>,
}

/// The tests of guests are run twice.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kernels {
    /// With the stock kernel in QEMU, and with user-mode Linux.
    Usual,
    /// With the debug kernel wherever they want user-mode Linux; those of QEMU and of the C driver are left out.
    Debug,
}

/// Part of the name of each test of a guest in QEMU.
const NEEDS_QEMU: &str = "qemu";
/// Part of the name of each test that cannot do without the kernel's own driver, which does not bear the debug kernel.
const NEEDS_C_DRIVER: &str = "c_driver";
/// Parts of the names of tests that show what the host does, or that the tests themselves can fail: another kernel in the guest would
/// show nothing more.
const NOT_OF_GUESTS: [&str; 3] = [
    "migration_faults::",
    "pausing::",
    "that_the_destination_lacks",
];
/// Part of the name of each test that is for the debug kernel alone.
const NEEDS_DEBUG: &str = "debug_kernel";

/// How many guests run at once for each two processors. An emulated one keeps a processor busy, and its VMM and daemon some of
/// another; one in user-mode Linux waits most of the time, for timers of its kernel.
const USUAL_AT_ONCE: usize = 3;
const DEBUG_AT_ONCE: usize = 4;

/// Does what `test` says.
pub fn command(options: &Options) -> Result<()> {
    if let Some(cells) = &options.matrix {
        return matrix::command(cells);
    }
    let kernels: &[Kernel] = match options.kernels {
        None => &Kernel::ALL,
        Some(Kernels::Usual) => &[Kernel::Stock, Kernel::Uml],
        Some(Kernels::Debug) => &[Kernel::Debug],
    };
    let set_up = setup::ensure(kernels)?;
    if !options.guests && options.kernels.is_none() && options.rest.is_empty() {
        say("tests of the crates");
        run::shown(build::cargo()?.args(["test", "--quiet", "--workspace"]))?;
    }
    let mut artifacts = build::artifacts(&set_up, kernels, Profile::Dev)?;
    if artifacts.stock.is_some() {
        artifacts.inside = Some(build::inside()?);
        matrix::prepare(&mut artifacts, None)?;
    }
    let path = build::target_folder()?.join("guest-artifacts.json");
    let text = serde_json::to_string_pretty(&artifacts).context("cannot encode paths")?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    if options.kernels != Some(Kernels::Debug) {
        say("tests of guests");
        run::shown(guests(&path, &options.rest, USUAL_AT_ONCE)?.args(["--skip", NEEDS_DEBUG]))?;
    }
    if options.kernels != Some(Kernels::Usual) {
        say("tests of guests with the debug kernel");
        run::shown(
            guests(&path, &options.rest, DEBUG_AT_ONCE)?
                .args(["--skip", NEEDS_QEMU, "--skip", NEEDS_C_DRIVER])
                .args(NOT_OF_GUESTS.iter().flat_map(|name| ["--skip", name]))
                .env(Vmm::DEBUG_VARIABLE, "1"),
        )?;
    }
    say("all tests passed");
    Ok(())
}

/// The command that runs the tests of guests; more options may follow.
fn guests(artifacts: &Path, rest: &[String], at_once: usize) -> Result<Command> {
    let mut command = build::cargo()?;
    command.args([
        "test",
        "--no-fail-fast",
        "--package",
        "tests",
        "--features",
        "guests",
        "--test",
        "guests",
    ]);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (processors * at_once / 2).max(2);
    command
        .args(["--", "--test-threads", &threads.to_string()])
        .args(rest);
    // An error says where it comes from; a trace of the test program would only hide it.
    command
        .env(artifacts::VARIABLE, artifacts)
        .env("RUST_LIB_BACKTRACE", "0");
    Ok(command)
}
