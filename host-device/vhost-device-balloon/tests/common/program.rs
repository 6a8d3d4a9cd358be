// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program as a child process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};

use super::HANG_TIMEOUT;

/// A running program, with its sockets in a given directory. Dropping it kills the program.
pub struct Program {
    child: Option<Child>,
    pub socket: PathBuf,
    pub qmp: PathBuf,
}

impl Program {
    pub fn start(directory: &Path, arguments: &[&str]) -> Self {
        let (socket, qmp) = (directory.join("vhost"), directory.join("qmp"));
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-balloon"))
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .args(["--qmp-socket".as_ref(), qmp.as_os_str()])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child: Some(child),
            socket,
            qmp,
        }
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

    pub fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    pub fn finish(mut self) -> (Output, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, log)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
