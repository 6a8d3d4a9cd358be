// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command `vhost-device-balloon`: see `--help`, and the library of the same name.

#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use clap::Parser;
use guest_migration::{guard, resume_service};
use tracing::error;
use tracing::level_filters::LevelFilter;
use vhost_device_balloon::args::Args;
use vhost_device_balloon::broker::{self, Broker};
use vhost_device_balloon::confine::Switch;
use vhost_device_balloon::log::Log;
use vhost_device_balloon::migrate::helper;
use vhost_device_balloon::panics::end_server_on_panic;
use vhost_device_balloon::server::{Server, ServerOptions};
use vhost_device_balloon::signals::handle_signals;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    // The processes that this program starts itself.
    if guard::is_guard_process() {
        return run_with_log(LevelFilter::INFO, |log| {
            log.start_thread()?;
            Ok(resume_service::run()?)
        });
    }
    guard::enable();
    if broker::is_broker_process() {
        let level = argument(2).unwrap_or(LevelFilter::INFO);
        return run_with_log(level, |log| {
            log.start_thread()?;
            Ok(broker::run(level, argument(3).unwrap_or(false))?)
        });
    }
    if helper::is_helper_process() {
        let level = argument(2).unwrap_or(LevelFilter::INFO);
        return run_with_log(level, |log| {
            log.start_thread()?;
            helper::run(argument(3).ok_or("pid of the device process is missing")?)
        });
    }
    let args = Args::parse();
    run_with_log(args.log_level, |log| run(args, log))
}

/// Returns an argument of a process that this program has started.
fn argument<T: FromStr>(index: usize) -> Option<T> {
    env::args().nth(index)?.parse().ok()
}

/// Does `work` with a log, and logs its error.
fn run_with_log(level: LevelFilter, work: impl FnOnce(&mut Log) -> Result<()>) -> ExitCode {
    // Without a log the exit status is all that the program can tell.
    let Ok(mut log) = Log::prepare(level) else {
        return ExitCode::FAILURE;
    };
    match work(&mut log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args, log: &mut Log) -> Result<()> {
    let broker = Broker::start(args.log_level, args.migration == Switch::On)
        .map_err(|error| format!("broker process cannot be started: {error}"))?;
    let confinement = args.confinement();
    let options = ServerOptions {
        features: args.offered_features(),
        suppression: args.suppression(),
        inhibit_discard: args.inhibit_discard,
        socket_path: args.socket_path,
        qmp_socket: args.qmp_socket,
        persistent: args.persistent,
        device_state: args.device_state,
    };
    let server = Server::bind_with_broker(options, Some(Arc::new(broker)), handle_signals)?;
    // There is one thread so far, and others get its rights.
    confinement.apply()?;
    log.start_thread()?;
    end_server_on_panic(server.shutdown_handle()?);
    server.run()?;
    Ok(())
}
