// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command `vhost-device-balloon`: see `--help`, and the library of the same name.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use tracing::error;
use vhost_device_balloon::args::Args;
use vhost_device_balloon::log::Log;
use vhost_device_balloon::panics::end_server_on_panic;
use vhost_device_balloon::server::{Server, ServerOptions};
use vhost_device_balloon::signals::handle_signals;

fn main() -> ExitCode {
    let args = Args::parse();
    // Without a log the exit status is all that the program can tell.
    let Ok(_log) = Log::start(args.log_level) else {
        return ExitCode::FAILURE;
    };
    match run(args) {
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
