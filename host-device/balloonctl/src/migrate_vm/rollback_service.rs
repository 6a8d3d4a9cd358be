// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of the guard process: it rolls the migration back after the end of its parent.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_migration::guard::connect_to_parent;
use qmp_client::{Client, Error};
use rustix::process::{test_kill_process_group, Pid};

use super::connections::RunState;
use super::preflight::Preflight;
use super::rollback::{rollback, RollbackContext};
use super::rollback_action::RollbackAction;
use super::rollback_guard::{Begin, Message};
use super::shell::terminate_group;
use super::sockets::Sockets;
use crate::output::notice;

/// How long a connection is tried. A QEMU accepts it once it has noticed the end of the parent's.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval between two attempts.
const CONNECT_INTERVAL: Duration = Duration::from_millis(50);

/// What the parent has done so far.
#[derive(Debug, Default)]
struct Progress {
    begin: Option<Begin>,
    actions: Vec<RollbackAction>,
    shell: Option<Pid>,
    is_committing: bool,
}

/// Runs this process as a guard process. Returns after the end of its parent, and after a rollback if one is needed.
///
/// The exit status is 0 if the guest runs, and 7 if the user must check it.
#[must_use]
pub fn run() -> ExitCode {
    let progress = match watch() {
        Ok(progress) => progress,
        Err(error) => {
            notice(&format!("guard process has no parent: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let Some(begin) = progress.begin else {
        return ExitCode::SUCCESS;
    };
    let is_whole = roll_back(
        &begin.sockets,
        &begin.preflight,
        &progress.actions,
        progress.shell,
        progress.is_committing,
    );
    // QEMU's migration to it is over, or the guest runs at the destination.
    let _ = fs::remove_dir_all(&begin.folder);
    if is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(7)
    }
}

/// Notes what the parent does, until its end.
fn watch() -> std::io::Result<Progress> {
    let mut parent = connect_to_parent()?;
    let mut progress = Progress::default();
    // The connection ends with the parent. Messages before its end still arrive.
    while let Ok(message) = parent.receive::<Message>(Duration::MAX) {
        match message {
            Some(Message::Begin(begin)) => progress.begin = Some(*begin),
            Some(Message::Add(action)) => progress.actions.push(action),
            Some(Message::Shell(group)) => progress.shell = Pid::from_raw(group),
            Some(Message::Commit) => progress.is_committing = true,
            Some(Message::Clear) => progress = Progress::default(),
            None => continue,
        }
        // If the parent has ended, the next `receive` says so.
        let _ = parent.send(&true);
    }
    Ok(progress)
}

/// Rolls the migration back, unless the guest runs at the destination. Returns whether the guest is known to run.
fn roll_back(
    sockets: &Sockets,
    preflight: &Preflight,
    actions: &[RollbackAction],
    shell: Option<Pid>,
    is_committing: bool,
) -> bool {
    notice("the program ended during migrate-vm; its guard process continues");
    let mut destination = connect(&sockets.destination, sockets.timeout);
    if is_committing {
        // The destination has executed the last command of the parent, or never will: it serves this connection only
        // after it has closed the parent's.
        let state = match &mut destination {
            Ok(destination) => {
                let state = destination.query::<RunState>("query-status");
                state.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match state {
            Ok(state) if state.running => {
                notice("guest runs at the destination; the source stays paused");
                return true;
            }
            Ok(_) => {}
            Err(error) => {
                notice(&format!(
                    "{error}; it is unknown whether the guest runs at the destination, and the source stays paused: if the \
                     guest does not run at the destination, resume it at the source with 'cont'"
                ));
                return false;
            }
        }
    }
    let mut source = connect(&sockets.source, sockets.timeout);
    let mut daemon = connect(&sockets.daemon, sockets.timeout);
    let mut terminate = || {
        let group = shell.filter(|group| test_kill_process_group(*group).is_ok())?;
        terminate_group(group, || test_kill_process_group(group).is_err())
    };
    let mut context = RollbackContext {
        source: source.as_mut().ok(),
        destination: destination.as_mut().ok(),
        daemon: daemon.as_mut().ok(),
        preflight,
        terminate_shell: &mut terminate,
    };
    let (done, failed) = rollback(&mut context, actions);
    for what in done {
        notice(&what);
    }
    for what in &failed {
        notice(&format!("rollback failed: {what}"));
    }
    notice("destination still waits: quit it, and start a new one before the next attempt");
    failed.is_empty()
}

fn connect(path: &Path, timeout: Duration) -> Result<Client, Error> {
    let begun = Instant::now();
    loop {
        match Client::connect_timeout(path, timeout) {
            // Its program has ended.
            Err(error @ Error::Connect { .. }) => return Err(error),
            Err(_) if begun.elapsed() < CONNECT_TIMEOUT => sleep(CONNECT_INTERVAL),
            result => return result,
        }
    }
}
