// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the tests of all layers and prints a summary.

mod kunit;
mod layers;
mod libtest;
mod summary;

use std::fs;
use std::num::NonZeroUsize;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use clap::{Args, ValueEnum};
use harness::process::{Process, Signal, Streams};

use crate::matrix;
use crate::progress::say;
use layers::{Layer, Selection};
use summary::{LayerOutcome, TestRun};

/// The options of `test`.
#[derive(Args)]
pub struct Options {
    /// Only tests that have one of these texts in their names, in whatever layer they are.
    names: Vec<String>,
    /// Only the tests of guests, and of the kernel module in them.
    #[arg(long)]
    guests: bool,
    /// Only the tests of guests, and only with this kernel.
    #[arg(long)]
    kernels: Option<KernelSet>,
    /// Only cells of the matrix of machines: `all`, or those whose names hold this text.
    #[arg(long, value_name = "CELLS")]
    matrix: Option<String>,
    /// Run all of it so many times.
    #[arg(long, value_name = "TIMES", default_value_t = 1)]
    repeat: u32,
    /// Keep the machine busy meanwhile, with a command of the shell that runs until it is killed.
    #[arg(long, value_name = "COMMAND")]
    beside: Option<String>,
    /// Number of tests of guests to run in parallel (default: 3 or 4 for each two processors).
    #[arg(long, value_name = "TESTS")]
    at_once: Option<NonZeroUsize>,
    /// Further names, and then options of the test programs.
    #[arg(last = true)]
    rest: Vec<String>,
}

/// The kernels of guest tests. The guest tests run once with each set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KernelSet {
    /// With the stock kernel in QEMU, and with user-mode Linux.
    Usual,
    /// With the debug kernel wherever they want user-mode Linux; those of QEMU and of the C driver are left out.
    Debug,
}

/// Runs the `test` command. The last line of output is `N passed, N failed`, unless it runs the matrix.
pub fn command(options: &Options) -> Result<ExitCode> {
    if let Some(cells) = &options.matrix {
        return matrix::command(cells).map(|()| ExitCode::SUCCESS);
    }
    let is_name = |word: &&String| !word.starts_with('-');
    let more = options.rest.iter().take_while(is_name).count();
    let (names, further) = options.rest.split_at(more);
    let selection = Selection {
        names: options.names.iter().chain(names).cloned().collect(),
        options: further.to_vec(),
        at_once: options.at_once,
    };
    let layers = layers(options);
    let mut runs = Vec::new();
    for number in 1..=options.repeat {
        if options.repeat > 1 {
            say(format_args!("run {number} of {}", options.repeat));
        }
        let run = run(&layers, &selection, options.beside.as_deref())?;
        if run.is_empty() && !selection.names.is_empty() {
            let names = selection.names.join(" or ");
            println!("\nno test in any layer has {names} in its name");
            println!("0 passed, 0 failed");
            return Ok(ExitCode::FAILURE);
        }
        println!("\n{run}");
        runs.push(run);
        if options.repeat > 1 {
            println!("\n{}", summary::Table(&runs));
        }
    }
    let failed = runs.iter().any(|run| run.failed() > 0);
    let ran = runs.iter().all(|run| run.passed() > 0);
    Ok(if failed || !ran {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Returns the layers to run, in order.
fn layers(options: &Options) -> Vec<Layer> {
    let of = |kernels| [Layer::Kunit(kernels), Layer::Guests(kernels)];
    match options.kernels {
        Some(kernels) => of(kernels).to_vec(),
        None => {
            let crates = (!options.guests).then_some(Layer::Crates);
            let guests = [KernelSet::Usual, KernelSet::Debug]
                .into_iter()
                .flat_map(of);
            crates.into_iter().chain(guests).collect()
        }
    }
}

/// Runs each layer, even if an earlier layer has failed.
fn run(layers: &[Layer], selection: &Selection, load_command: Option<&str>) -> Result<TestRun> {
    let mut background_load = load_command.map(BackgroundLoad::start).transpose()?;
    let start = Instant::now();
    let mut run = TestRun::default();
    for &layer in layers {
        let begun = Instant::now();
        let outcome = layers::run(layer, selection)
            .unwrap_or_else(|error| LayerOutcome::from_error(layer, format!("{error:#}")));
        run.add(layer, outcome, begun.elapsed());
    }
    if let Some(background_load) = &mut background_load {
        background_load.ensure_running()?;
    }
    run.time = start.elapsed();
    run.load = load_average();
    Ok(run)
}

/// Returns the load averages over one, five and fifteen minutes.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let words: Vec<&str> = text.split_whitespace().take(3).collect();
    words.join(" ")
}

/// A command that keeps the machine busy until this value is dropped.
struct BackgroundLoad(Process);

impl BackgroundLoad {
    fn start(script: &str) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("the load", command, Streams::Collected).map(Self)
    }

    /// Fails if the command has ended before the tests: part of the tests then ran without the load.
    fn ensure_running(&mut self) -> Result<()> {
        let ended = self.0.status()?;
        ensure!(
            ended.is_none(),
            "the load ended before the tests\n{}",
            self.0.diagnostics()
        );
        Ok(())
    }
}

impl Drop for BackgroundLoad {
    fn drop(&mut self) {
        // The command may have to end processes of its own, so it gets time. If it does not exit, `Process` kills it on
        // drop.
        let _ = self.0.signal_group(Signal::SIGTERM);
        let _ = self.0.wait(Duration::from_secs(10));
    }
}
