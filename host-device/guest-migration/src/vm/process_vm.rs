// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtual machine that is paused by stopping its processes.

use std::time::Duration;

use super::{PausedGuest, Vm, VmError};
use crate::guard::ResumeGuard;
use crate::processes::{RamFiles, StopError, StoppedProcesses};
use crate::Memory;

/// Timeout for stopping all processes.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A VM that consists of all processes that map guest memory, but not our own and not that of the device.
///
/// `SIGSTOP` stops these processes. The guest notices the pause only by its clock. User-mode Linux, which has a process
/// for each address space of its guest, supports this. A stopped process does not answer its clients, so the VMM's own
/// pause command is preferable if it has one.
///
/// Dropping a paused VM lets its processes continue. So does a [guard process](crate::guard) if this process is killed.
#[derive(Debug)]
pub struct ProcessVm {
    files: RamFiles,
    guard: ResumeGuard,
    stopped: Option<StoppedProcesses>,
}

impl ProcessVm {
    /// Returns the VM whose processes map `memory`, which the process `device` serves. [`Vm::pause`] searches for the
    /// processes.
    ///
    /// # Errors
    ///
    /// If the files of guest memory cannot be examined.
    pub fn new(memory: &Memory, device: u32) -> Result<Self, VmError> {
        let files = RamFiles::from_memory(memory, device)
            .map_err(|error| VmError(format!("guest memory files cannot be examined: {error}")))?;
        Ok(Self {
            files,
            guard: ResumeGuard::start(),
            stopped: None,
        })
    }

    /// Returns the pids of the stopped processes.
    pub fn paused_pids(&self) -> Vec<u32> {
        let stopped = self.stopped.iter();
        stopped
            .flat_map(StoppedProcesses::processes)
            .map(|it| it.pid)
            .collect()
    }
}

impl Vm for ProcessVm {
    fn describe(&self) -> String {
        "SIGSTOP to the processes that map guest memory".into()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        if self.stopped.is_some() {
            return Ok(());
        }
        let stopped = StoppedProcesses::stop(&self.files, STOP_TIMEOUT, &self.guard);
        let stopped = stopped.map_err(vm_error)?;
        if stopped.processes().next().is_none() {
            let text =
                "no process maps guest memory, or this process may not read its /proc/PID/maps: run as the user of the VMM, or use its QMP socket";
            return Err(VmError(text.into()));
        }
        self.stopped = Some(stopped);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        match self.stopped.take() {
            Some(stopped) => stopped.resume().map(drop).map_err(vm_error),
            None => Ok(()),
        }
    }

    fn keep_paused(&mut self) {
        self.guard.dismiss();
    }

    fn paused_guest(&self) -> PausedGuest {
        let stopped = self.stopped.as_ref();
        PausedGuest::of_processes(stopped.map_or_else(Vec::new, StoppedProcesses::signalled))
    }
}

fn vm_error(error: StopError) -> VmError {
    VmError(error.to_string())
}
