// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A child process that does not outlive its handle.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
pub use nix::sys::signal::Signal;
use nix::sys::signal::{kill, killpg};
use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use crate::lines::Lines;
use crate::pinned_cpu::PinnedCpu;
pub use crate::sys::die_with_parent;
use crate::HANG_TIMEOUT;

/// The interval between two checks while waiting for the end of a process.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The standard streams of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// No input. Output and errors are collected. The process has its own process group.
    Collected,
    /// The terminal. The process is in the terminal's foreground process group.
    Terminal,
}

/// A child process with its process group, until it is dropped. The process may have ended.
#[derive(Debug)]
pub struct Process {
    name: String,
    command_line: String,
    child: Child,
    own_group: bool,
    ended: Option<ExitStatus>,
    output: Lines,
    pinned_cpu: Option<PinnedCpu>,
}

impl Process {
    /// Starts `command`. The kernel kills the process at the latest when the calling *thread* ends.
    ///
    /// # Errors
    ///
    /// Fails if the program cannot be started.
    pub fn start(name: &str, mut command: Command, streams: Streams) -> Result<Self> {
        let own_group = streams == Streams::Collected;
        if own_group {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
        }
        let command_line = command_line(&command);
        let spawned = die_with_parent(&mut command).spawn();
        let mut child = spawned.with_context(|| format!("cannot start {name}: {command_line}"))?;
        let output = Lines::default();
        if let Some(stdout) = child.stdout.take() {
            output.collect(stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            output.collect(stderr);
        }
        Ok(Self {
            name: name.to_owned(),
            command_line,
            child,
            own_group,
            ended: None,
            output,
            pinned_cpu: None,
        })
    }

    /// Pins the process, and all processes that it starts later, to one processor.
    ///
    /// # Errors
    ///
    /// Same as [`PinnedCpu::reserve`] and [`PinnedCpu::pin`].
    pub fn pin_to_one_cpu(&mut self) -> Result<()> {
        let pinned_cpu = PinnedCpu::reserve()?;
        pinned_cpu.pin(self.pid()?)?;
        self.pinned_cpu = Some(pinned_cpu);
        Ok(())
    }

    /// Returns the name of the process in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the command line, quoted for a shell.
    #[must_use]
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Returns the process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the output and errors. Empty if the process uses the terminal.
    #[must_use]
    pub fn output(&self) -> &Lines {
        &self.output
    }

    /// Returns the exit status, or `None` while the process runs. After the exit, the collected output is complete.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not return the state of the process.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_some() || !self.has_ended()? {
            return Ok(self.ended);
        }
        if self.own_group {
            // Remaining processes of the group would keep the output open. The leader is not reaped yet, so the group
            // id is valid.
            let _ = killpg(self.pid()?, Signal::SIGKILL);
        }
        self.ended = self
            .child
            .try_wait()
            .with_context(|| format!("cannot ask after {}", self.name))?;
        self.output.wait_end(HANG_TIMEOUT);
        Ok(self.ended)
    }

    /// Returns whether the process has exited. Does not reap it.
    fn has_ended(&self) -> Result<bool> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()?), flags);
        let status = status.with_context(|| format!("cannot ask after {}", self.name))?;
        Ok(status != WaitStatus::StillAlive)
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    ///
    /// Fails if the process still runs after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {timeout:?}", self.name);
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    ///
    /// Fails if the process does not exist any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Sends a signal to all processes of the process group. The process must have its own group
    /// ([`Streams::Collected`]).
    ///
    /// # Errors
    ///
    /// Fails if the group has no process any more.
    pub fn signal_group(&self, signal: Signal) -> Result<()> {
        killpg(self.pid()?, signal)
            .with_context(|| format!("cannot send {signal} to the group of {}", self.name))
    }

    /// Stops the process with SIGSTOP, and waits until it has stopped. [`Signal::SIGCONT`] resumes it.
    ///
    /// # Errors
    ///
    /// Fails if the process has ended.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        // WNOWAIT: do not reap a process that has ended.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(self.pid()?), flags) {
            Ok(WaitStatus::Stopped(..)) => Ok(()),
            other => bail!("{} does not stop: {other:?}", self.name),
        }
    }

    /// Returns whether a signal has stopped the process.
    ///
    /// # Errors
    ///
    /// Fails if the process does not exist any more.
    pub fn is_stopped(&self) -> Result<bool> {
        Ok(state(self.id())? == STOPPED)
    }

    /// Kills the process and its process group, and waits until it has ended.
    ///
    /// # Errors
    ///
    /// Fails if the process does not end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.status()? {
            return Ok(status);
        }
        let pid = self.pid()?;
        // An error means that the process has just ended. The wait below reports the status.
        let _ = if self.own_group {
            killpg(pid, Signal::SIGKILL)
        } else {
            kill(pid, Signal::SIGKILL)
        };
        self.wait(HANG_TIMEOUT)
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(
            i32::try_from(self.child.id()).context("no process number")?,
        ))
    }

    /// Returns the name, state, command line and output of the process, for error messages.
    #[must_use]
    pub fn diagnostics(&mut self) -> String {
        let state = match self.status() {
            Ok(None) => "running".to_owned(),
            Ok(Some(status)) => status
                .signal()
                .map_or_else(|| status.to_string(), |signal| format!("signal {signal}")),
            Err(error) => format!("{error:#}"),
        };
        format!(
            "--- {} ({state}): {}\n{}\n",
            self.name,
            self.command_line,
            self.output.text()
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}

/// The state in `/proc/PID/stat` of a process that a signal has stopped.
const STOPPED: &str = "T";

fn state(process: u32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{process}/stat"))
        .with_context(|| format!("no process {process}"))?;
    // The state comes after the name, which may contain any character.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split_whitespace().next())
        .map(str::to_owned)
        .with_context(|| format!("a strange state of process {process}: {text}"))
}

/// Returns a command line, quoted for a shell.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let mut text = quoted(command.get_program());
    for argument in command.get_args() {
        // Writing to a String does not fail.
        let _ = write!(text, " {}", quoted(argument));
    }
    text
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_with_its_handle() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = Process::start("sleep", command, Streams::Collected).unwrap();
        let pid = process.pid().unwrap();
        drop(process);
        assert!(kill(pid, None).is_err());
    }

    #[test]
    fn all_output_is_there_once_a_process_has_ended_whatever_it_has_left() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo one; echo two >&2"]);
        let mut process = Process::start("sh", command, Streams::Collected).unwrap();
        process.wait(HANG_TIMEOUT).unwrap();
        let text = process.output().text();
        assert!(text.contains("one") && text.contains("two"), "{text}");
    }

    #[test]
    fn a_command_line_can_be_typed() {
        let mut command = Command::new("prog");
        command.args(["-a", "two words", "it's"]);
        assert_eq!(command_line(&command), r"prog -a 'two words' 'it'\''s'");
    }
}
