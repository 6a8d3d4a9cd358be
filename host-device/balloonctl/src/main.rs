// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `balloonctl`: parses the command line, runs the command, tells the shell.

#![forbid(unsafe_code)]

use std::io::{stderr, Write};
use std::process::ExitCode;

use balloonctl::args::Args;
use balloonctl::output::Output;
use clap::Parser;
use serde_json::json;

fn main() -> ExitCode {
    let args = Args::parse();
    let mut output = Output::new(args.json);
    match balloonctl::run(args, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.end_progress();
            let (status, story) = (failure.exit_status(), failure.story());
            let error = json!({ "error": { "exit-status": status, "desc": story } });
            // Neither can be told if it fails; the status can.
            let _ = output.result(&error, "");
            let _ = writeln!(stderr(), "balloonctl: {story}");
            ExitCode::from(status)
        }
    }
}
