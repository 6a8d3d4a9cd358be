// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command `vhost-device-balloon`: see `--help`, and the library of the same name.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use guest_migration::{guard, resume_service};
use tracing::error;
use tracing::level_filters::LevelFilter;
use vhost_device_balloon::args::Args;
use vhost_device_balloon::log::Log;
use vhost_device_balloon::panics::end_server_on_panic;
use vhost_device_balloon::server::{Server, ServerOptions};
use vhost_device_balloon::signals::handle_signals;

fn main() -> ExitCode {
    if guard::is_guard_process() {
        return run_with_log(LevelFilter::INFO, || {
            resume_service::run().map_err(Into::into)
        });
    }
    guard::enable();
    let args = Args::parse();
    run_with_log(args.log_level, || run(args))
}

/// Does `work` with a log, and logs its error.
fn run_with_log(level: LevelFilter, work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> ExitCode {
    // Without a log the exit status is all that the program can tell.
    let Ok(_log) = Log::start(level) else {
        return ExitCode::FAILURE;
    };
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let options = ServerOptions {
        features: args.offered_features(),
        suppression: args.suppression(),
        inhibit_discard: args.inhibit_discard,
        socket_path: args.socket_path,
        qmp_socket: args.qmp_socket,
        persistent: args.persistent,
        device_state: args.device_state,
    };
    let server = Server::bind_with_shutdown_handle(options, handle_signals)?;
    end_server_on_panic(server.shutdown_handle()?);
    server.run()?;
    Ok(())
}
