// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processes made to stand still, all of them, and seen to.
//!
//! `SIGSTOP` stops all threads of a process, each when it next leaves the kernel: so each is looked at until it has. Then
//! the processes are looked for again, until a search finds none that does not stand still already: whoever makes new
//! ones was stopped before that search began.
//!
//! # User-mode Linux
//!
//! Its kernel is a process, and each address space of a process in it is another one, a *stub*, which the kernel has made.
//! How a stub may be stopped depends on how it is governed:
//!
//! - Traced, as is usual: `SIGSTOP` never gets to a traced process but makes it stop for its tracer, and the kernel, when it
//!   goes on, takes a signal that it does not expect from a stub for the end of the world. One signal it does expect at any
//!   time, because it sends it itself, to get a processor back that a process keeps: `SIGALRM`. So the kernel is stopped first.
//!   Then a stub either stands still for its tracer already, and is left alone, or runs on in its process; then `SIGALRM`
//!   makes it stop for its tracer, which will let it go on itself.
//! - With a filter of system calls of its own (`seccomp=on`, as with several processors): it is a process like others.
//! - Neither yet: it is being set up, and soon one or the other. A traced stub that still maps its own program is being
//!   set up too: then `SIGALRM` is *not* expected, but it stops by itself.
//!
//! The kernel can make no stubs while it stands still. While it makes one it waits for it, and cannot be stopped before
//! that is done: another reason why stubs must not be stopped first. They go on first, so that the kernel does not see
//! them stopped.

use std::io;
use std::os::fd::OwnedFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use thiserror::Error;

use super::process::{active_thread_state, executable, has_mapped_file, stat, status};
use super::{MappingProcess, Process, RamFiles};

/// In the path of the program of a stub, which is a memfd or a temporary file.
const STUB_NAME: &str = "uml-userspace";

/// The first and the longest time between two looks at a process that does not stand still yet.
const POLL_INTERVAL_MIN: Duration = Duration::from_micros(20);
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(2);

/// Why processes do not stand still. Those that did go on.
#[derive(Debug, Error)]
pub(crate) enum StopError {
    /// It goes on working.
    #[error("process {pid}, which maps guest memory, did not stop within {timeout:?}: a thread of it is in state {state}")]
    StillRunning {
        pid: u32,
        state: char,
        timeout: Duration,
    },
    /// New ones keep appearing.
    #[error("after {timeout:?} there still are new processes that map guest memory")]
    NewProcesses { timeout: Duration },
    /// It cannot be stopped or looked at.
    #[error("process {pid}, which maps guest memory, cannot be stopped: {source}")]
    Process { pid: u32, source: io::Error },
    /// The processes cannot be found.
    #[error("the processes that map guest memory cannot be found: {0}")]
    Search(io::Error),
}

/// All processes but ours that map guest memory, standing still. They go on when this is dropped.
#[derive(Debug)]
pub(crate) struct StoppedProcesses {
    /// In the order in which they were stopped.
    targets: Vec<StopTarget>,
    since: Instant,
}

#[derive(Debug)]
struct StopTarget {
    process: Process,
    parent: u32,
    handle: OwnedFd,
    /// Whether it is a stub of user-mode Linux.
    is_stub: bool,
    /// Whether it has been sent what makes it stop.
    is_signalled: bool,
    /// Whether it is to be told to go on.
    needs_sigcont: bool,
}

impl StoppedProcesses {
    /// Stops all processes but ours that map `files`.
    ///
    /// # Errors
    ///
    /// If one does not stand still, or new ones keep appearing, for longer than `timeout`.
    pub(crate) fn stop(files: &RamFiles, timeout: Duration) -> Result<Self, StopError> {
        let mut stopped = Self {
            targets: Vec::new(),
            since: Instant::now(),
        };
        loop {
            let known: Vec<Process> = stopped.processes().collect();
            let found = files
                .mapping_processes_except(&known)
                .map_err(StopError::Search)?;
            if found.is_empty() {
                return Ok(stopped);
            }
            if stopped.since.elapsed() > timeout {
                return Err(StopError::NewProcesses { timeout });
            }
            let before = stopped.targets.len();
            for mapping_process in stopped_first(&found) {
                stopped.targets.extend(StopTarget::new(mapping_process)?);
            }
            let deadline = stopped.since + timeout;
            for target in stopped.targets.iter_mut().skip(before) {
                target.send_stop()?;
            }
            for target in stopped.targets.iter_mut().skip(before) {
                target.wait(deadline, timeout)?;
            }
        }
    }

    /// The processes.
    pub(crate) fn processes(&self) -> impl Iterator<Item = Process> + '_ {
        self.targets.iter().map(|target| target.process)
    }

    /// Lets them go on, and says how long they have been standing still.
    pub(crate) fn resume(mut self) -> Result<Duration, StopError> {
        self.resume_all()?;
        Ok(self.since.elapsed())
    }

    /// Those that were stopped last go on first.
    fn resume_all(&mut self) -> Result<(), StopError> {
        let mut result = Ok(());
        while let Some(target) = self.targets.pop() {
            if target.needs_sigcont {
                result = result.and(target.send(Signal::CONT));
            }
        }
        result
    }
}

impl Drop for StoppedProcesses {
    fn drop(&mut self) {
        // What cannot be told to go on cannot be helped.
        let _ = self.resume_all();
    }
}

/// Those that must be stopped before the others: whose parents and tracers are not among those found.
fn stopped_first(found: &[MappingProcess]) -> Vec<&MappingProcess> {
    let among = |pid: u32| found.iter().any(|it| it.process.pid == pid);
    let first: Vec<_> = found
        .iter()
        .filter(|it| !among(it.parent) && !among(it.tracer))
        .collect();
    if first.is_empty() {
        found.iter().collect()
    } else {
        first
    }
}

impl StopTarget {
    /// Nothing if it is no more.
    fn new(mapping_process: &MappingProcess) -> Result<Option<Self>, StopError> {
        let (process, parent) = (mapping_process.process, mapping_process.parent);
        let pid = process.pid;
        let failed = |source| StopError::Process { pid, source };
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| failed(Errno::SRCH.into()))?;
        let handle = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(failed(error.into())),
        };
        // The handle is of the process with that number now.
        match stat(pid).map_err(failed)? {
            Some(now) if now.process == process => {}
            _ => return Ok(None),
        }
        let is_stub = executable(pid).map_err(failed)?.contains(STUB_NAME);
        Ok(Some(Self {
            process,
            parent,
            handle,
            is_stub,
            is_signalled: false,
            needs_sigcont: false,
        }))
    }

    fn failed(&self, source: io::Error) -> StopError {
        let pid = self.process.pid;
        StopError::Process { pid, source }
    }

    /// What one of its threads does; nothing if they all stand still.
    fn active_thread_state(&self) -> Result<Option<char>, StopError> {
        active_thread_state(self.process.pid).map_err(|error| self.failed(error))
    }

    fn send(&self, signal: Signal) -> Result<(), StopError> {
        match pidfd_send_signal(&self.handle, signal) {
            // It is no more.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// Tells it to stop, unless that is to wait, or it stands still already: then it is someone else's to let it go on.
    fn send_stop(&mut self) -> Result<(), StopError> {
        if self.is_signalled || self.active_thread_state()?.is_none() {
            return Ok(());
        }
        let signal = if self.is_stub {
            self.stub_stop_signal()?
        } else {
            Some(Signal::STOP)
        };
        if let Some(signal) = signal {
            // Before it is sent: it must go on also if this fails half way.
            self.is_signalled = true;
            self.needs_sigcont = signal == Signal::STOP;
            self.send(signal)?;
        }
        Ok(())
    }

    /// What makes a stub stop now; nothing if it is being set up. See the module's description.
    fn stub_stop_signal(&self) -> Result<Option<Signal>, StopError> {
        let pid = self.process.pid;
        let failed = |error| self.failed(error);
        let Some(now) = status(pid).map_err(failed)? else {
            return Ok(None);
        };
        if now.tracer != 0 {
            let being_set_up = has_mapped_file(pid, STUB_NAME).map_err(failed)?;
            return Ok((!being_set_up).then_some(Signal::ALARM));
        }
        let inherited = status(self.parent).map_err(failed)?;
        let own_filter =
            inherited.is_some_and(|parent| now.seccomp_filters > parent.seccomp_filters);
        Ok(own_filter.then_some(Signal::STOP))
    }

    fn wait(&mut self, deadline: Instant, timeout: Duration) -> Result<(), StopError> {
        let mut pause = POLL_INTERVAL_MIN;
        while let Some(state) = self.active_thread_state()? {
            if Instant::now() > deadline {
                let pid = self.process.pid;
                return Err(StopError::StillRunning {
                    pid,
                    state,
                    timeout,
                });
            }
            sleep(pause);
            pause = (pause * 2).min(POLL_INTERVAL_MAX);
            self.send_stop()?;
        }
        Ok(())
    }
}
