// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Resuming a guest that another process has paused.

use rustix::process::Signal;

use super::{PausedGuest, QmpVm, Vm, VmError};
use crate::processes::ProcessHandle;

/// Resumes the guest. The process that was stopped last continues first. A process that has exited is left out.
///
/// # Errors
///
/// If the guest cannot be resumed.
pub fn resume(guest: &PausedGuest) -> Result<(), VmError> {
    for process in guest.processes.iter().rev() {
        let sent = ProcessHandle::open(*process)
            .and_then(|it| it.map_or(Ok(()), |it| it.send(Signal::CONT)));
        sent.map_err(|error| {
            let pid = process.pid;
            VmError(format!("process {pid} cannot continue: {error}"))
        })?;
    }
    match &guest.vmm {
        Some(path) => QmpVm::paused(path).resume(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::processes::stat;

    #[test]
    fn a_stopped_process_continues_and_one_that_has_exited_is_left_out() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = stat(child.id()).unwrap().unwrap().process;
        let handle = ProcessHandle::open(process).unwrap().unwrap();
        handle.send(Signal::STOP).unwrap();
        let is_stopped = || {
            let state = stat(process.pid).unwrap().unwrap().state;
            format!("{state:?}") == "Stopped"
        };
        while !is_stopped() {
            std::thread::yield_now();
        }
        let text = serde_json::to_string(&PausedGuest::of_processes(vec![process])).unwrap();
        let paused: PausedGuest = serde_json::from_str(&text).unwrap();
        resume(&paused).unwrap();
        while is_stopped() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        resume(&paused).unwrap();
    }
}
