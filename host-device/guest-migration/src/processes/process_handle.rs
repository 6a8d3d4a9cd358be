// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process to which signals are sent.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

use super::process::{stat, Process};

/// A process, held by a pidfd: a signal never reaches a later process with the same pid.
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    process: Process,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Returns the handle of a process, or `None` if the process has exited.
    pub(crate) fn open(process: Process) -> io::Result<Option<Self>> {
        let pid = process.pid;
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or(Errno::SRCH)?;
        let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The pidfd is that of the process that has the pid now. It may be a later process with the same pid.
        Ok(match stat(pid)? {
            Some(now) if now.process == process => Some(Self { process, pidfd }),
            _ => None,
        })
    }

    /// Returns the process.
    pub(crate) fn process(&self) -> Process {
        self.process
    }

    /// Sends a signal. Does nothing if the process has exited.
    pub(crate) fn send(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
