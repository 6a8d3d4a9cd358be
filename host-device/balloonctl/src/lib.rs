// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands of `balloonctl`, which controls `vhost-device-balloon` over its QMP socket.
//!
//! [`migrate_vm`] migrates a whole guest between two stock QEMUs. `receive` receives the memory of a guest and needs no
//! daemon. All other commands connect only to the daemon.

#![forbid(unsafe_code)]

pub mod args;
mod commands;
pub mod error;
pub mod interrupt;
pub mod migrate_vm;
mod migration_parameters;
pub mod output;
pub mod size;

use std::path::PathBuf;

use args::{Args, Command};
use error::CommandError;
use interrupt::Interrupts;
use output::Output;
use qmp_client::Client;

/// Executes the command on the command line.
///
/// # Errors
///
/// See [`CommandError`].
pub fn run(args: Args, output: &mut Output) -> Result<(), CommandError> {
    let Args { qmp, command, .. } = args;
    match command {
        Command::Receive(options) => commands::receive::run(&options, &handle_signals()?, output),
        Command::Status => commands::status::run(&mut connect(qmp)?, output),
        Command::Target(options) => commands::target::run(&mut connect(qmp)?, &options, output),
        Command::Hint(what) => commands::hint::run(&mut connect(qmp)?, what, output),
        Command::Migrate(options) => {
            let interrupts = handle_signals()?;
            commands::migrate::run(&mut connect(qmp)?, &options, &interrupts, output)
        }
        Command::MigrateCancel => commands::migrate::cancel(&mut connect(qmp)?, output),
        Command::MigrateVm(options) => {
            let interrupts = handle_signals()?;
            migrate_vm::run(connect(qmp)?, &options, &interrupts, output)
        }
    }
}

fn handle_signals() -> Result<Interrupts, CommandError> {
    Interrupts::from_signals()
        .map_err(|error| CommandError::Io("cannot install signal handlers".into(), error))
}

fn connect(qmp: Option<PathBuf>) -> Result<Client, CommandError> {
    let path = qmp.ok_or_else(|| {
        let text =
            "no QMP socket was given: set --qmp or BALLOONCTL_QMP to the path of the daemon's --qmp-socket";
        CommandError::Usage(text.into())
    })?;
    Ok(Client::connect(&path)?)
}
