// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command `vhost-device-balloon`: see `--help`, and the library of the same name.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tracing::error;
use vhost_device_balloon::args::Args;
use vhost_device_balloon::server::{Server, ServerOptions};

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_max_level(args.log_level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
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
    let server = Server::bind_with_shutdown_handle(options, |shutdown_handle| {
        for signal in [SIGTERM, SIGINT] {
            pipe::register(signal, shutdown_handle.stream()?)?;
        }
        Ok(())
    })?;
    server.run()?;
    Ok(())
}
