// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that run *inside* a guest of QEMU, because they need soft-dirty bits, which the host's kernel may lack.
//!
//! Linked statically, because the guest has no libraries. Not for use anywhere else.
#![deny(unsafe_code)]

mod live_migration;
mod mapping;
mod soft_dirty_tracker;
mod writer;

use std::process::ExitCode;

use anyhow::{bail, Result};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nested: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["tracker"] => soft_dirty_tracker::check(),
        ["move", driver] => live_migration::check(driver),
        [writer::ARGUMENT, pages] => writer::run(pages.parse()?),
        _ => bail!("not a thing to do: {arguments:?}"),
    }
}
