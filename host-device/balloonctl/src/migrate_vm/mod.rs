// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrates a whole guest from one stock QEMU to another while it runs.
//!
//! Our daemon migrates memory, and QEMU migrates the state of its devices. QEMU cannot migrate a guest that has a
//! generic vhost-user device. The balloon is therefore unplugged before the switchover, and the balloon of a new daemon
//! is plugged in at the destination.
//!
//! [`preflight()`] checks that the migration is possible, and changes nothing. [`plan()`] returns all commands of the
//! migration, which `--dry-run` prints. [`execute()`] executes them. If a command fails before the guest runs at the
//! destination, `execute` undoes the previous ones. If this program is killed, [`rollback_service`] undoes them in a
//! second process.

mod connections;
mod execute;
mod execution;
mod peer;
mod plan;
mod preflight;
mod qmp_command;
mod rollback;
mod rollback_action;
mod rollback_guard;
pub mod rollback_service;
mod shell;
mod sockets;

pub use connections::Connections;
pub use execute::{execute, CompletedStep, MigrationSummary};
pub use peer::Peer;
pub use plan::{plan, Step, WaitCondition};
pub use preflight::{preflight, Preflight};
pub use qmp_command::QmpCommand;
pub use rollback_action::RollbackAction;
pub use rollback_guard::RollbackGuard;
pub use sockets::Sockets;

use serde_json::json;

use crate::args::MigrateVm;
use crate::commands::progress;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::{table, Output};
use crate::paths::{absolute, absolute_uri};

/// Migrates a guest, or prints the plan with `--dry-run`.
///
/// # Errors
///
/// See [`CommandError`].
pub fn run(
    mut connections: Connections,
    sockets: Sockets,
    options: &MigrateVm,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    let options = &with_absolute_paths(options)?;
    let preflight = preflight(&mut connections, options)?;
    // Only this user can read the folder. It is removed on return.
    let folder = tempfile::Builder::new().prefix("balloonctl-").tempdir();
    let folder = folder
        .map_err(|error| CommandError::Io("cannot create a temporary directory".into(), error))?;
    let default = format!("file:{}", folder.path().join("vm-state").display());
    let vm_state = options.vm_state.as_deref().unwrap_or(&default);
    let steps = plan(options, &preflight, vm_state);
    if options.dry_run {
        return output.print_result(&json!({ "steps": steps }), &plan::describe(&steps));
    }
    let guard = RollbackGuard::start(sockets, &preflight, folder.path(), output);
    let summary = execute(
        &mut connections,
        &preflight,
        &steps,
        guard,
        interrupts,
        output,
    )?;
    output.print_result(&summary, &report(&summary))
}

/// Returns options whose paths are valid for the QEMUs and the daemon as well.
fn with_absolute_paths(options: &MigrateVm) -> Result<MigrateVm, CommandError> {
    let mut options = options.clone();
    options.to = absolute_uri(&options.to)?;
    options.device_socket = absolute(&options.device_socket)?;
    let source = options.source_device_socket.as_deref().map(absolute);
    options.source_device_socket = source.transpose()?;
    options.vm_state = options.vm_state.as_deref().map(absolute_uri).transpose()?;
    Ok(options)
}

fn report(summary: &MigrationSummary) -> String {
    let head = ["step", "peer", "ms"].map(str::to_owned).to_vec();
    let mut rows = vec![head];
    for step in &summary.steps {
        rows.push(vec![
            step.what.clone(),
            step.peer.name().to_owned(),
            step.ms.to_string(),
        ]);
    }
    format!(
        "{}\n{}\nguest runs at the destination; it was paused for {} ms",
        table(&rows),
        progress::report(&summary.memory),
        summary.downtime_ms
    )
}
