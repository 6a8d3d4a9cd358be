// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stops all processes that map guest memory, and verifies that they have stopped.
//!
//! `SIGSTOP` stops all threads of a process, each when it next leaves the kernel. Each process is therefore polled
//! until all its threads have stopped. The search for processes is then repeated until it finds no further process. All
//! processes that could create another one were stopped before this last search began.
//!
//! # User-mode Linux
//!
//! The kernel of user-mode Linux (the UML kernel) is a process. For each address space of its guest it creates another
//! process, a *stub*. The signal that may stop a stub depends on the state of the stub:
//!
//! - Traced, as is usual: `SIGSTOP` makes a traced process stop for its tracer. When the UML kernel continues, it
//!   treats an unexpected signal of a stub as a fatal error. It expects `SIGALRM` at any time, because it sends this
//!   signal itself to preempt a guest process. The UML kernel is therefore stopped first. A stub that has then stopped
//!   for its tracer is left alone. A stub that still runs guest code receives `SIGALRM` and stops for its tracer, which
//!   later continues it.
//! - Under a seccomp filter of its own (`seccomp=on`, as with several processors): `SIGSTOP` stops the stub as it stops
//!   other processes.
//! - Neither traced nor filtered: the stub is being set up, and enters one of the two other states soon. A traced stub
//!   that still maps its own program is being set up too. The UML kernel does *not* expect `SIGALRM` of such a stub,
//!   but the stub stops for its tracer without a signal.
//!
//! A stopped UML kernel creates no stubs. While it creates a stub, it waits for the stub, and stops only afterwards.
//! This is another reason not to stop stubs first. Stubs continue first, so that the UML kernel does not see them
//! stopped.

use std::io;
use std::slice;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use thiserror::Error;

use super::process::{active_thread_state, executable, has_mapped_file, status};
use super::process_handle::ProcessHandle;
use super::{MappingProcess, Process, RamFiles};
use crate::guard::ResumeGuard;

/// Part of the path of a stub's program, which is a memfd or a temporary file.
const STUB_NAME: &str = "uml-userspace";

/// The first interval between two polls of a process that has not stopped. It doubles with each poll.
const POLL_INTERVAL_MIN: Duration = Duration::from_micros(20);
/// The longest interval between two polls of a process that has not stopped.
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(2);

/// A search that finds new processes is an error only after this many searches. All processes that could create others
/// are stopped after few of them, however long they take on a busy host.
const MIN_SEARCHES: u32 = 8;

/// Why the processes were not stopped. Those that were stopped continue.
#[derive(Debug, Error)]
pub(crate) enum StopError {
    /// A process still runs.
    #[error("process {pid}, which maps guest memory, did not stop within {timeout:?}: one of its threads is in state {state}")]
    StillRunning {
        pid: u32,
        state: char,
        timeout: Duration,
    },
    /// New processes keep appearing.
    #[error("new processes still map guest memory after {timeout:?}: try again")]
    NewProcesses { timeout: Duration },
    /// A process cannot be stopped or examined.
    #[error("process {pid}, which maps guest memory, cannot be stopped: {source}")]
    Process { pid: u32, source: io::Error },
    /// The processes cannot be found.
    #[error("processes that map guest memory cannot be listed: {0}")]
    Search(io::Error),
}

/// All processes that map guest memory but our own, stopped. Dropping it lets them continue, and a guard lets them
/// continue if this process is killed.
#[derive(Debug)]
pub(crate) struct StoppedProcesses {
    /// In the order in which they were stopped.
    targets: Vec<StopTarget>,
    since: Instant,
    guard: ResumeGuard,
}

#[derive(Debug)]
struct StopTarget {
    handle: ProcessHandle,
    parent: u32,
    /// Whether the process is a stub of user-mode Linux.
    is_stub: bool,
    /// Whether the process was sent a signal that makes it stop.
    is_signalled: bool,
    /// Whether the process needs `SIGCONT` to continue.
    needs_sigcont: bool,
}

impl StoppedProcesses {
    /// Stops all processes that map `files`, but not our own and not that of the device. `guard` is told of each before it is stopped.
    ///
    /// # Errors
    ///
    /// If a process cannot be found or examined, or does not stop within `timeout`, or if new processes keep appearing
    /// for longer than `timeout` after the first was stopped.
    pub(crate) fn stop(
        files: &RamFiles,
        timeout: Duration,
        guard: &ResumeGuard,
    ) -> Result<Self, StopError> {
        let mut stopped = Self {
            targets: Vec::new(),
            since: Instant::now(),
            guard: guard.clone(),
        };
        for search in 0u32.. {
            let known: Vec<Process> = stopped.processes().collect();
            let found = files
                .mapping_processes_except(&known)
                .map_err(StopError::Search)?;
            if found.is_empty() {
                break;
            }
            if search == 0 {
                // Until now nothing was stopped.
                stopped.since = Instant::now();
            } else if search >= MIN_SEARCHES && stopped.since.elapsed() > timeout {
                return Err(StopError::NewProcesses { timeout });
            }
            let before = stopped.targets.len();
            for mapping_process in stopped_first(&found) {
                stopped.targets.extend(StopTarget::new(mapping_process)?);
            }
            let deadline = Instant::now() + timeout;
            let fresh = stopped.targets.get_mut(before..).unwrap_or_default();
            send_stops(fresh, guard)?;
            for target in fresh {
                target.wait(deadline, timeout, guard)?;
            }
        }
        Ok(stopped)
    }

    /// Iterates over the stopped processes.
    pub(crate) fn processes(&self) -> impl Iterator<Item = Process> + '_ {
        self.targets.iter().map(|target| target.handle.process())
    }

    /// Returns the processes that need SIGCONT to continue, in the order in which they were stopped.
    pub(crate) fn signalled(&self) -> Vec<Process> {
        let signalled = self.targets.iter().filter(|target| target.needs_sigcont);
        signalled.map(|target| target.handle.process()).collect()
    }

    /// Lets the processes continue. Returns the time since the first one was stopped.
    pub(crate) fn resume(mut self) -> Result<Duration, StopError> {
        self.resume_all()?;
        Ok(self.since.elapsed())
    }

    /// Lets the processes continue, the last one that was stopped first.
    fn resume_all(&mut self) -> Result<(), StopError> {
        let mut result = Ok(());
        while let Some(target) = self.targets.pop() {
            if target.needs_sigcont {
                result = result.and(target.send(Signal::CONT));
            }
        }
        self.guard.clear();
        result
    }
}

impl Drop for StoppedProcesses {
    fn drop(&mut self) {
        // Drop cannot report an error.
        let _ = self.resume_all();
    }
}

/// Returns the processes to stop before the others: those whose parent and tracer are not in `found`. Returns all
/// processes if there are none.
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

/// Sends each process the signal that makes it stop, unless it was sent already or must wait. `guard` is told of all
/// of them at once, because its answer takes some time.
fn send_stops(targets: &mut [StopTarget], guard: &ResumeGuard) -> Result<(), StopError> {
    let mut signals = Vec::new();
    for target in targets {
        if let Some(signal) = target.stop_signal()? {
            signals.push((target, signal));
        }
    }
    let stopped = signals.iter().filter(|(_, signal)| *signal == Signal::STOP);
    guard.watch_processes(stopped.map(|(target, _)| target.handle.process()).collect());
    for (target, signal) in signals {
        // Before the signal is sent: the process must continue even if stopping fails half-way.
        target.is_signalled = true;
        target.needs_sigcont = signal == Signal::STOP;
        target.send(signal)?;
    }
    Ok(())
}

impl StopTarget {
    /// Returns the target for a process, or `None` if the process has exited.
    fn new(mapping_process: &MappingProcess) -> Result<Option<Self>, StopError> {
        let process = mapping_process.process;
        let pid = process.pid;
        let failed = |source| StopError::Process { pid, source };
        let Some(handle) = ProcessHandle::open(process).map_err(failed)? else {
            return Ok(None);
        };
        let is_stub = executable(pid).map_err(failed)?.contains(STUB_NAME);
        Ok(Some(Self {
            handle,
            parent: mapping_process.parent,
            is_stub,
            is_signalled: false,
            needs_sigcont: false,
        }))
    }

    fn pid(&self) -> u32 {
        self.handle.process().pid
    }

    fn failed(&self, source: io::Error) -> StopError {
        let pid = self.pid();
        StopError::Process { pid, source }
    }

    /// Returns the state of a thread that is not stopped, or `None` if all threads are stopped.
    fn active_thread_state(&self) -> Result<Option<char>, StopError> {
        active_thread_state(self.pid()).map_err(|error| self.failed(error))
    }

    fn send(&self, signal: Signal) -> Result<(), StopError> {
        let sent = self.handle.send(signal);
        sent.map_err(|error| self.failed(error))
    }

    /// Returns the signal that makes the process stop now, or `None` if it was sent already or must wait. Returns none
    /// for a process that has stopped already: another process is then responsible for its continuation.
    fn stop_signal(&self) -> Result<Option<Signal>, StopError> {
        if self.is_signalled || self.active_thread_state()?.is_none() {
            Ok(None)
        } else if self.is_stub {
            self.stub_stop_signal()
        } else {
            Ok(Some(Signal::STOP))
        }
    }

    /// Returns the signal that makes a stub stop now, or `None` if the stub is being set up. See the module
    /// documentation.
    fn stub_stop_signal(&self) -> Result<Option<Signal>, StopError> {
        let pid = self.pid();
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

    fn wait(
        &mut self,
        deadline: Instant,
        timeout: Duration,
        guard: &ResumeGuard,
    ) -> Result<(), StopError> {
        let mut pause = POLL_INTERVAL_MIN;
        while let Some(state) = self.active_thread_state()? {
            if Instant::now() > deadline {
                let pid = self.pid();
                return Err(StopError::StillRunning {
                    pid,
                    state,
                    timeout,
                });
            }
            sleep(pause);
            pause = (pause * 2).min(POLL_INTERVAL_MAX);
            send_stops(slice::from_mut(self), guard)?;
        }
        Ok(())
    }
}
