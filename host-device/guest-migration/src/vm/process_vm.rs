// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtual machine that is paused by stopping its processes.

use std::time::Duration;

use super::{Vm, VmError};
use crate::processes::{RamFiles, StopError, StoppedProcesses};
use crate::Memory;

/// How long it may take until all processes stand still.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The virtual machine whose processes are those that map guest memory: all but ours.
///
/// They are stopped by `SIGSTOP`, which no guest notices but by its clock. User-mode Linux has a process for each address
/// space of its guest, and bears it. Whoever talks to one of the processes finds it silent while it is paused: to pause
/// the VMM by its own command is better, if it has one.
///
/// It goes on if this is dropped.
#[derive(Debug)]
pub struct ProcessVm {
    files: RamFiles,
    stopped: Option<StoppedProcesses>,
}

impl ProcessVm {
    /// Those that map `memory`. Which they are is found out when they are to be paused.
    ///
    /// # Errors
    ///
    /// If the files of guest memory cannot be examined.
    pub fn new(memory: &Memory) -> Result<Self, VmError> {
        let files = RamFiles::from_memory(memory)
            .map_err(|error| VmError(format!("guest memory cannot be examined: {error}")))?;
        Ok(Self {
            files,
            stopped: None,
        })
    }

    /// The numbers of the processes that stand still.
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
        "the processes that map guest memory, by SIGSTOP".into()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        if self.stopped.is_some() {
            return Ok(());
        }
        let stopped = StoppedProcesses::stop(&self.files, STOP_TIMEOUT).map_err(vm_error)?;
        if stopped.processes().next().is_none() {
            let text =
                "no process that we may look at maps guest memory: there is nothing to pause";
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
}

fn vm_error(error: StopError) -> VmError {
    VmError(error.to_string())
}
