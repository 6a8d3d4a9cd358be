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
mod paths;
pub mod size;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use args::{Args, Command};
use error::CommandError;
use interrupt::Interrupts;
use output::Output;
use qmp_client::Client;

/// How long the user waits for a connection before a message says what this program waits for.
const SILENCE: Duration = Duration::from_secs(2);

/// Executes the command on the command line.
///
/// # Errors
///
/// See [`CommandError`].
pub fn run(args: Args, output: &mut Output) -> Result<(), CommandError> {
    let Args {
        qmp,
        command,
        timeout,
        ..
    } = args;
    let timeout = Duration::from_secs(timeout);
    // Signals are counted once the connection exists: before, they end this program.
    match command {
        Command::Receive(options) => commands::receive::run(&options, &handle_signals()?, output),
        Command::Status => commands::status::run(&mut daemon(qmp, timeout)?, output),
        Command::Target(options) => {
            let mut daemon = daemon(qmp, timeout)?;
            commands::target::run(&mut daemon, &options, &handle_signals()?, output)
        }
        Command::Hint(what) => commands::hint::run(&mut daemon(qmp, timeout)?, what, output),
        Command::Discard(what) => commands::discard::run(&mut daemon(qmp, timeout)?, what, output),
        Command::Migrate(options) => {
            let mut daemon = daemon(qmp, timeout)?;
            commands::migrate::run(&mut daemon, &options, &handle_signals()?, output)
        }
        Command::MigrateCancel => {
            let mut daemon = daemon(qmp, timeout)?;
            commands::migrate::cancel(&mut daemon, &handle_signals()?, output)
        }
        Command::MigrateVm(options) => {
            let sockets = migrate_vm::Sockets {
                source: options.source_qmp.clone(),
                destination: options.destination_qmp.clone(),
                daemon: daemon_socket(qmp)?,
                timeout,
            };
            let connections = migrate_vm::Connections {
                source: connect(&sockets.source, timeout)?,
                destination: connect(&sockets.destination, timeout)?,
                daemon: connect(&sockets.daemon, timeout)?,
            };
            let interrupts = handle_signals()?;
            migrate_vm::run(connections, sockets, &options, &interrupts, output)
        }
    }
}

fn handle_signals() -> Result<Interrupts, CommandError> {
    Interrupts::from_signals()
        .map_err(|error| CommandError::Io("cannot install signal handlers".into(), error))
}

fn daemon_socket(qmp: Option<PathBuf>) -> Result<PathBuf, CommandError> {
    qmp.ok_or_else(|| {
        let text =
            "no QMP socket was given: set --qmp or BALLOONCTL_QMP to the path of the daemon's --qmp-socket";
        CommandError::Usage(text.into())
    })
}

fn daemon(qmp: Option<PathBuf>, timeout: Duration) -> Result<Client, CommandError> {
    connect(&daemon_socket(qmp)?, timeout)
}

/// Connects to a QMP server. Says so if the server is silent.
fn connect(path: &Path, timeout: Duration) -> Result<Client, CommandError> {
    let (connected, connecting) = channel::<()>();
    let text = format!("waiting for {}, at most {timeout:?}", path.display());
    let begun = Instant::now();
    let waiting = thread::spawn(move || {
        let end = connecting.recv_timeout(SILENCE);
        // On a busy machine this thread may wake after the end of the wait.
        if end == Err(RecvTimeoutError::Timeout) || begun.elapsed() >= SILENCE {
            output::notice(&text);
        }
    });
    let client = Client::connect_timeout(path, timeout);
    drop(connected);
    // It ends at once, and a panic of it is no reason to fail.
    let _ = waiting.join();
    Ok(client?)
}
