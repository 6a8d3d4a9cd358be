// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program as a child process.

use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{getrlimit, kill_process, prlimit, Pid, Resource, Rlimit, Signal};

use super::HANG_TIMEOUT;

/// A running program, with its sockets in a given directory. Dropping it kills the program. A test that fails prints its
/// log.
pub struct Program {
    child: Option<Child>,
    pub socket: PathBuf,
    pub qmp: PathBuf,
}

impl Program {
    /// Starts the program with the default actions of all signals: the test itself may have been started by `nohup`.
    pub fn start(directory: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("env");
        command
            .arg("--default-signal=HUP,INT,QUIT,TERM")
            .arg(env!("CARGO_BIN_EXE_vhost-device-balloon"));
        Self::start_with(command, directory, arguments, Stdio::piped())
    }

    /// As [`Program::start`], with a command that runs the program, and another log.
    pub fn start_with(
        mut command: Command,
        directory: &Path,
        arguments: &[&str],
        log: impl Into<Stdio>,
    ) -> Self {
        let (socket, qmp) = (directory.join("vhost"), directory.join("qmp"));
        let child = command
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .args(["--qmp-socket".as_ref(), qmp.as_os_str()])
            .args(arguments)
            .stderr(log)
            .spawn()
            .unwrap();
        Self {
            child: Some(child),
            socket,
            qmp,
        }
    }

    /// Takes the read end of the log.
    pub fn take_log(&mut self) -> ChildStderr {
        self.child.as_mut().unwrap().stderr.take().unwrap()
    }

    /// Returns the number of descriptors and the number of threads.
    pub fn descriptors_and_threads(&self) -> (usize, usize) {
        let count = |name: &str| {
            let entries = std::fs::read_dir(format!("/proc/{}/{name}", self.id())).unwrap();
            entries.count()
        };
        (count("fd"), count("task"))
    }

    /// Sets the most descriptors that the program may have.
    pub fn limit_descriptors(&self, limit: u64) {
        self.limit(Resource::Nofile, limit);
    }

    /// Sets a resource limit of the program.
    pub fn limit(&self, resource: Resource, limit: u64) {
        Self::limit_process(self.id(), resource, limit);
    }

    /// Sets a resource limit of the program and of the processes that it has started.
    pub fn limit_all(&self, resource: Resource, limit: u64) {
        self.limit(resource, limit);
        for child in children(self.id()) {
            Self::limit_process(child, resource, limit);
        }
    }

    fn limit_process(id: u32, resource: Resource, limit: u64) {
        let id = Pid::from_raw(i32::try_from(id).unwrap());
        let limit = Rlimit {
            current: Some(limit),
            maximum: getrlimit(resource).maximum,
        };
        prlimit(id, resource, limit).unwrap();
    }

    /// Waits until the program listens.
    pub fn ready(self) -> Self {
        let limit = Instant::now() + HANG_TIMEOUT;
        while std::os::unix::net::UnixStream::connect(&self.qmp).is_err() {
            assert!(Instant::now() < limit, "it does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        self
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Returns the processes that the program and its processes have started and that have not exited, with the first
    /// argument of each.
    pub fn descendants(&self) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        let mut parents = vec![self.id()];
        while let Some(parent) = parents.pop() {
            for pid in children(parent) {
                let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
                let first = arguments.next().unwrap_or_default();
                found.push((pid, String::from_utf8_lossy(first).into_owned()));
                parents.push(pid);
            }
        }
        found
    }

    /// Returns the names of [`Program::descendants`] in order.
    pub fn kinds_of_descendants(&self) -> Vec<String> {
        let mut kinds: Vec<String> = self.descendants().into_iter().map(|it| it.1).collect();
        kinds.sort_unstable();
        kinds
    }

    /// Returns whether the program has exited.
    pub fn has_ended(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_none_or(|rest| rest.trim_start().starts_with('Z'))
    }

    pub fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    /// Closes the reading end of the log: the program cannot write to it any longer.
    pub fn close_log(&mut self) {
        self.child.as_mut().unwrap().stderr = None;
    }

    pub fn finish(mut self) -> (Output, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, log)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let _ = child.kill();
        match child.wait_with_output() {
            Ok(output) if thread::panicking() => {
                eprintln!(
                    "the daemon's log:\n{}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            _ => {}
        }
    }
}

/// Returns the processes whose parent is `parent` and that have not exited.
pub fn children(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Some(pid) = entry
            .unwrap()
            .file_name()
            .to_str()
            .and_then(|it| it.parse().ok())
        else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let has_exited = fields.next().is_none_or(|state| state == "Z");
        if !has_exited && fields.next() == Some(parent.to_string().as_str()) {
            children.push(pid);
        }
    }
    children
}
