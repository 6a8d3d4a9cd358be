// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shell command that starts the destination daemon.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{kill_process_group, test_kill_process_group, Pid, Signal};

use super::connections::POLL_INTERVAL;

/// How long a process group may take to end, after each of two signals.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of bytes of the command's messages in an error.
const LAST_WORDS: u64 = 1000;

/// A running shell command. It has a process group of its own, so that Ctrl-C reaches only this program.
#[derive(Debug)]
pub(super) struct Shell {
    child: Child,
    /// Standard error of the command. It is not that of this program: the daemon that the command starts outlives this
    /// program, and a reader of our standard error would wait for the end of the daemon.
    messages: File,
}

impl Shell {
    /// Starts a command.
    pub(super) fn start(command: &str) -> io::Result<Self> {
        let messages = tempfile::tempfile()?;
        let child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages.try_clone()?)
            .process_group(0)
            .spawn()?;
        Ok(Self { child, messages })
    }

    /// Returns the process group of the command.
    pub(super) fn group(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// Returns why the command failed, if it did. A command that has ended successfully may have started its daemon in
    /// the background.
    pub(super) fn failure(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        (!status.success())
            .then(|| format!("--device-command failed: {status}{}", self.last_words()))
    }

    /// Returns the end of the command's messages, in the form of the end of a sentence.
    pub(super) fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        let length = self.messages.seek(SeekFrom::End(0)).unwrap_or(0);
        let start = length.saturating_sub(LAST_WORDS);
        let read = self
            .messages
            .seek(SeekFrom::Start(start))
            .and_then(|_| (&self.messages).take(LAST_WORDS).read_to_end(&mut bytes));
        let text = String::from_utf8_lossy(&bytes);
        let printable = |letter: char| if letter.is_control() { ' ' } else { letter };
        let text: String = text.trim().chars().map(printable).collect();
        match read {
            Ok(_) if !text.is_empty() => format!("; its last messages: {text}"),
            _ => String::new(),
        }
    }

    /// Terminates the command and the daemon that it has started.
    pub(super) fn terminate(mut self) -> Option<String> {
        let group = self.group()?;
        // The command is a zombie until it is waited for, and keeps the number of its group as long.
        terminate_group(group, || {
            let has_ended = matches!(self.child.try_wait(), Ok(Some(_)) | Err(_));
            has_ended && test_kill_process_group(group).is_err()
        })
    }
}

/// Terminates a process group. `has_ended` returns whether it has no processes left.
pub(super) fn terminate_group(group: Pid, mut has_ended: impl FnMut() -> bool) -> Option<String> {
    for signal in [Signal::TERM, Signal::KILL] {
        // The process group may have ended already.
        let _ = kill_process_group(group, signal);
        let begun = Instant::now();
        while begun.elapsed() < END_TIMEOUT {
            if has_ended() {
                return Some("destination daemon is terminated".into());
            }
            sleep(POLL_INTERVAL);
        }
    }
    Some(format!(
        "destination daemon does not end: check process group {}",
        group.as_raw_pid()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A limit that only a hanging test exceeds.
    const LIMIT: Duration = Duration::from_secs(600);

    #[test]
    fn a_command_that_does_not_end_at_sigterm_is_killed() {
        let mut shell =
            Shell::start("trap '' TERM; echo ready >&2; while :; do sleep 1; done").unwrap();
        let begun = Instant::now();
        // The trap is set once the message is there.
        while shell.last_words().is_empty() {
            assert!(begun.elapsed() < LIMIT);
            sleep(POLL_INTERVAL);
        }
        let group = shell.group().unwrap();
        let text = shell.terminate().unwrap();
        assert_eq!(text, "destination daemon is terminated");
        assert!(test_kill_process_group(group).is_err());
    }

    #[test]
    fn a_command_that_fails_is_quoted() {
        let mut shell = Shell::start("echo no such disk >&2; exit 3").unwrap();
        let begun = Instant::now();
        let failure = loop {
            if let Some(failure) = shell.failure() {
                break failure;
            }
            assert!(begun.elapsed() < LIMIT);
            sleep(POLL_INTERVAL);
        };
        assert_eq!(
            failure,
            "--device-command failed: exit status: 3; its last messages: no such disk"
        );
    }
}
