// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks formats, lints, names and prose, circles between files, links and commands of the documents, the places of unsafe code, and
//! the tests that the documents name and the rules need.

use anyhow::Result;

use crate::build;
use crate::circles;
use crate::commands;
use crate::conformance;
use crate::language;
use crate::links;
use crate::module;
use crate::progress::say;
use crate::reference;
use crate::rules;
use crate::run;
use crate::setup::{self, Kernel};
use crate::unsafe_count;

/// Runs the `check` command. `xtask` is the command line of this program.
pub fn command(xtask: &clap::Command) -> Result<()> {
    say("format of the crates");
    run::inherit_output(build::cargo()?.args(["fmt", "--all", "--check"]))?;
    say("names and prose");
    language::check()?;
    say("circles between files");
    circles::check()?;
    say("links of the documents");
    links::check()?;
    say("commands of the documents");
    commands::check(xtask)?;
    say("names of the module in docs/driver.md");
    reference::check()?;
    say("places of unsafe code");
    unsafe_count::check()?;
    say("the tests that docs/conformance.md names");
    conformance::check()?;
    say("the tests named after rules");
    rules::check()?;
    say("lints of the crates");
    run::inherit_output(build::cargo()?.args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--",
        "--deny",
        "warnings",
    ]))?;
    let build_env = setup::ensure(&[Kernel::Stock])?;
    say("format of the kernel module");
    module::check_format(&build_env)?;
    say("lints of the kernel module");
    module::make(&build_env, Kernel::Stock, true)?;
    module::sample(&build_env, true)?;
    say("all in order");
    Ok(())
}
