// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of the guard process of a migration: it resumes a paused guest when its parent has not.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{getppid, Pid, Signal};
use tracing::{info, warn};

use crate::guard::{connect_to_parent, Message};
use crate::processes::{Process, ProcessHandle};
use crate::vm::QmpVm;

/// What is resumed at the end of the parent.
#[derive(Debug, Default)]
struct Paused {
    /// Stopped processes, in the order in which they were stopped.
    processes: Vec<ProcessHandle>,
    /// QMP socket of the VMM.
    vmm: Option<PathBuf>,
}

/// Runs this process as the guard process of a migration. Returns after the end of its parent, when the guest runs.
///
/// # Errors
///
/// If this process was not started as a guard process, or if a guest cannot be resumed. The log says what to do.
pub fn run() -> io::Result<()> {
    let mut parent = connect_to_parent()?;
    let pid = getppid().map_or(0, Pid::as_raw_pid);
    let mut paused = Paused::default();
    // The connection ends with the parent. Messages before its end still arrive.
    while let Ok(message) = parent.receive::<Message>(Duration::MAX) {
        let Some(message) = message else { continue };
        let result = paused.update(message);
        if let Err(error) = &result {
            warn!("guard process cannot watch a process: {error}");
        }
        // If the parent has ended, the next `receive` says so.
        let _ = parent.send(&result.is_ok());
    }
    if paused.processes.is_empty() && paused.vmm.is_none() {
        return Ok(());
    }
    warn!("process {pid} ended, or gave up, while the guest was paused for its migration; the guest is resumed");
    paused.resume()
}

impl Paused {
    fn update(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Processes(processes) => {
                for process in processes {
                    self.watch(process)?;
                }
            }
            Message::Vmm(path) => self.vmm = Some(path),
            Message::Clear => *self = Self::default(),
        }
        Ok(())
    }

    fn watch(&mut self, process: Process) -> io::Result<()> {
        self.processes.extend(ProcessHandle::open(process)?);
        Ok(())
    }

    /// Resumes the guest. The process that was stopped last continues first, as in
    /// [`StoppedProcesses`](crate::processes::StoppedProcesses).
    fn resume(mut self) -> io::Result<()> {
        let mut result = Ok(());
        while let Some(process) = self.processes.pop() {
            if let Err(error) = process.send(Signal::CONT) {
                let pid = process.process().pid;
                warn!("process {pid} cannot continue: {error}; resume it with 'kill -CONT {pid}'");
                result = Err(error);
            }
        }
        if let Some(path) = self.vmm {
            if let Err(error) = QmpVm::resume_of_ended_process(&path) {
                warn!("guest is paused and cannot be resumed: {error}; resume it with 'cont' at the VMM");
                return Err(io::Error::other(error));
            }
        }
        if result.is_ok() {
            info!("guest runs again");
        }
        result
    }
}
