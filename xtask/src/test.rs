// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs all tests.

use std::fs;

use anyhow::{Context, Result};
use clap::Args;
use tests::artifacts;

use crate::build::{self, Profile};
use crate::progress::say;
use crate::run;
use crate::setup::{self, Kernel};

/// The options of `test`.
#[derive(Args)]
pub struct Options {
    /// Only the tests of guests.
    #[arg(long)]
    guests: bool,
    /// Only tests of guests whose names hold this text, and further options of the test program.
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Does what `test` says.
pub fn command(options: &Options) -> Result<()> {
    let set_up = setup::ensure(&Kernel::ALL)?;
    if !options.guests && options.rest.is_empty() {
        say("tests of the crates");
        run::shown(build::cargo()?.args(["test", "--quiet", "--workspace"]))?;
    }
    let artifacts = build::artifacts(&set_up, &Kernel::ALL, Profile::Dev)?;
    let path = build::target_folder()?.join("guest-artifacts.json");
    let text = serde_json::to_string_pretty(&artifacts).context("cannot encode paths")?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    say("tests of guests");
    let mut command = build::cargo()?;
    command.args([
        "test",
        "--package",
        "tests",
        "--features",
        "guests",
        "--test",
        "*",
    ]);
    // A guest keeps one processor busy, and its VMM and daemon some of another.
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .max(2);
    command
        .args(["--", "--test-threads", &threads.to_string()])
        .args(&options.rest);
    // An error says where it comes from; a trace of the test program would only hide it.
    command
        .env(artifacts::VARIABLE, &path)
        .env("RUST_LIB_BACKTRACE", "0");
    run::shown(&mut command)?;
    say("all tests passed");
    Ok(())
}
