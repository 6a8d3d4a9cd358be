// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `balloonctl`: parses the command line, executes the command, and returns its exit status.

#![forbid(unsafe_code)]

use std::io::{stderr, Write};
use std::process::ExitCode;

use balloonctl::args::Args;
use balloonctl::output::Output;
use clap::Parser;
use guest_migration::guard;
use serde_json::json;

fn main() -> ExitCode {
    if guard::is_guard_process() {
        return balloonctl::migrate_vm::rollback_service::run();
    }
    guard::enable();
    let args = Args::parse();
    let mut output = Output::new(args.json);
    match balloonctl::run(args, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.clear_progress();
            let (status, full_message) = (error.exit_status(), error.full_message());
            let error = json!({ "error": { "exit-status": status, "desc": full_message } });
            // A failure to write is ignored. The exit status still reports the error.
            let _ = output.print_result(&error, "");
            let _ = writeln!(stderr(), "balloonctl: {full_message}");
            ExitCode::from(status)
        }
    }
}
