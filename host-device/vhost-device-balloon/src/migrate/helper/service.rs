// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of the helper process.

use std::env;
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use guest_migration::dirty_tracking::PunchedPages;
use guest_migration::precopy::{PrecopyError, Progress, ProgressEvent};
use guest_migration::signals::outlive_parent;
use guest_migration::status::MigrationInfo;
use guest_migration::vm;
use guest_migration::{CancelToken, Layout, Memory};
use qmp_client::JsonLines;
use rustix::io::{fcntl_setfd, FdFlags};
use tracing::{info, warn};

use super::messages::{Command, End, FromHelper, MigrationTask, Task};
use super::remote_device::{RemoteDevice, RemoteHints, RemoteQuiesce};
use crate::broker::HELPER_ARGUMENT;
use crate::migrate::device_access::DeviceAccess;
use crate::migrate::job::migrate;
use crate::migrate::parameters::{MigrationCapabilities, MigrationParameters};
use crate::migrate::setup::MigrationConfig;
use crate::packets::PacketSocket;

/// How often the status is sent at most.
const STATUS_INTERVAL: Duration = Duration::from_millis(20);

/// Returns whether this process was started as a helper process.
#[must_use]
pub fn is_helper_process() -> bool {
    env::args_os()
        .nth(1)
        .is_some_and(|it| it == HELPER_ARGUMENT)
}

/// Runs this process as the helper process of a migration, of the device in the process `device`. Returns at its end.
///
/// # Errors
///
/// If this process was not started as a helper process, or the device process sends an invalid message or ends.
pub fn run(device: u32) -> Result<(), Box<dyn Error>> {
    outlive_parent()?;
    // The connections to the device process are no place for a stream, and no process that this one starts gets them.
    fcntl_setfd(io::stdin(), FdFlags::CLOEXEC)?;
    fcntl_setfd(io::stdout(), FdFlags::CLOEXEC)?;
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let commands = PacketSocket::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut lines = JsonLines::new(stream.try_clone()?, "device process");
    match lines.receive(Duration::MAX)? {
        Some(Task::Migrate(task)) => run_migration(*task, lines, &stream, commands, device),
        Some(Task::Resume(guest)) => {
            let result = vm::resume(&guest).map_err(|error| error.to_string());
            Ok(lines.send(&result)?)
        }
        None => Ok(()),
    }
}

fn run_migration(
    task: MigrationTask,
    lines: JsonLines,
    stream: &UnixStream,
    commands: PacketSocket,
    process: u32,
) -> Result<(), Box<dyn Error>> {
    let layout = Arc::new(Layout::try_from(task.layout)?);
    let files = receive_files(&commands, layout.blocks().len())?;
    let punched = PunchedPages::new(&layout)?;
    let cancel = CancelToken::default();
    let device = RemoteDevice::start(lines, stream, punched.clone(), &cancel, process)?;
    let progress = report_progress(&device)?;
    handle_commands(commands, progress.clone(), cancel.clone(), process)?;
    let (mut parameters, mut capabilities) = (
        MigrationParameters::default(),
        MigrationCapabilities::default(),
    );
    parameters.set(&task.parameters)?;
    let states = task.capabilities.iter();
    capabilities.set(states.map(|(name, state)| (name.as_str(), *state)))?;
    let config = MigrationConfig {
        address: task.uri.parse()?,
        vmm_qmp: task.vmm_qmp,
        parameters,
        capabilities,
    };
    let vm = match Memory::new(layout, files) {
        Ok(memory) => {
            let needing = device.clone();
            let access = DeviceAccess {
                memory,
                punched,
                discards: task.discards,
                hint_availability: task.hints_unavailable.map_or(Ok(()), Err),
                quiesce: Box::new(RemoteQuiesce(device.clone())),
                set_hints_need_discard: Box::new(move |need| {
                    // If the device process has ended, the next request fails.
                    let _ = needing.send(&FromHelper::NeedDiscard(need));
                }),
                hints: Box::new(RemoteHints {
                    device: device.clone(),
                    discards: task.discards,
                }),
            };
            migrate(config, access, &progress, &cancel)
        }
        Err(error) => {
            progress.fail(&PrecopyError::Sink(Box::new(error)));
            None
        }
    };
    let paused = vm.as_ref().map(|vm| (vm.describe(), vm.paused_guest()));
    let status = progress.status();
    // The guest is at the destination now. Dropping the VM might resume it.
    std::mem::forget(vm);
    let was_paused = status.downtime.is_some() && paused.is_none() && !status.guest_paused;
    let sent = device.send(&FromHelper::End(Box::new(End { status, paused })));
    // The device process has ended, so this process says what became of the guest.
    if sent.is_err() && was_paused {
        info!("guest runs again");
    }
    Ok(())
}

fn receive_files(commands: &PacketSocket, count: usize) -> Result<Vec<File>, Box<dyn Error>> {
    let mut files = Vec::new();
    while files.len() < count {
        match commands.receive()? {
            Some((Command::Files, fds)) => files.extend(fds.into_iter().map(File::from)),
            Some(_) => return Err("device process has cancelled the migration".into()),
            None => return Err("device process has ended".into()),
        }
    }
    Ok(files)
}

/// Returns the progress of the migration, which the device process shows.
fn report_progress(device: &Arc<RemoteDevice>) -> io::Result<Progress> {
    let reporting = device.clone();
    let shown: Arc<OnceLock<Progress>> = Arc::default();
    let status = shown.clone();
    let progress = Progress::new(move |event| {
        let Some(progress) = status.get() else { return };
        // If the device process has ended, the migration is cancelled.
        let _ = match event {
            // The message about the end is sent later, when the claim on the device is no longer needed.
            ProgressEvent::State(state) if state.is_over() => Ok(()),
            ProgressEvent::State(state) => reporting.send_now(|| {
                Some(FromHelper::Status(Box::new(MigrationInfo {
                    status: state,
                    ..progress.status()
                })))
            }),
            ProgressEvent::Pass(pass) => reporting.send(&FromHelper::Pass(pass)),
        };
    });
    // Never freed, as this process ends with the migration.
    let _ = shown.set(progress.clone());
    let (device, watched) = (device.clone(), progress.clone());
    thread::Builder::new()
        .name("status".into())
        .spawn(move || {
            let mut seen = 0;
            loop {
                seen = watched.wait_for_change(seen);
                let mut is_over = false;
                let sent = device.send_now(|| {
                    let status = watched.status();
                    is_over = status.status.is_over();
                    (!is_over).then(|| FromHelper::Status(Box::new(status)))
                });
                if is_over || sent.is_err() {
                    return;
                }
                thread::sleep(STATUS_INTERVAL);
            }
        })?;
    Ok(progress)
}

/// Handles the commands of the device process. Its end cancels the migration.
fn handle_commands(
    commands: PacketSocket,
    progress: Progress,
    cancel: CancelToken,
    device: u32,
) -> io::Result<()> {
    let work = move || loop {
        match commands.receive() {
            Ok(Some((Command::Continue, _))) => {
                progress.continue_migration();
            }
            Ok(Some((Command::Cancel, _))) => {
                progress.set_cancelling();
                cancel.cancel();
            }
            _ => {
                if !progress.status().status.is_over() {
                    warn!("process {device} ended during its migration, which is cancelled");
                    cancel.cancel();
                }
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("commands".into());
    thread.spawn(work).map(drop)
}
