// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask`: everything that needs more than cargo alone.
#![forbid(unsafe_code)]

mod bench;
mod book;
mod build;
mod check;
mod circles;
mod commands;
mod conformance;
mod demo;
mod extract_vmlinux;
mod fuzz;
mod guest;
mod language;
mod links;
mod matrix;
mod module;
mod paths;
mod progress;
mod reference;
mod rules;
mod run;
mod same_code;
mod sandbox;
mod setup;
mod sources;
mod test;
mod unsafe_count;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Set-up, builds, demonstration and tests of the balloon.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Set up what builds and guests need, in ${XDG_CACHE_HOME:-~/.cache}/virtio-balloon-rs. Other commands run the part that they
    /// need.
    Setup(setup::Options),
    /// Build virtio_balloon_rs.ko, into target/module/KERNEL.
    Module(module::Options),
    /// Show a hint round, inflation and deflation in a QEMU guest with the stock Debian kernel.
    Demo(demo::Options),
    /// Run all tests: of the crates, then of guests.
    Test(test::Options),
    /// Run the fuzz targets, on the stable toolchain.
    Fuzz(fuzz::Options),
    /// Compare our driver's work with the C driver's, in one run.
    Bench(bench::Options),
    /// Open a shell in a guest.
    Guest(guest::Options),
    /// Check formats and lints, of the host's crates and of the kernel module, and where unsafe code stands.
    Check,
    /// Make the documentation as a book, in target/book.
    Book,
    /// Make rustdoc's pages of the crates and of the kernel module.
    Doc,
    /// Show that a change of comments, layout or names has changed no code.
    SameCode(same_code::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Test(options) => return ended(test::command(&options)),
        Command::Setup(options) => setup::command(&options),
        Command::Module(options) => module::command(&options),
        Command::Demo(options) => demo::command(&options),
        Command::Fuzz(options) => fuzz::command(&options),
        Command::Bench(options) => bench::command(&options),
        Command::Guest(options) => guest::command(&options),
        Command::Check => check::command(&Arguments::command()),
        Command::Book => book::book(),
        Command::Doc => book::doc(),
        Command::SameCode(options) => same_code::command(&options),
    };
    ended(outcome.map(|()| ExitCode::SUCCESS))
}

fn ended(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
