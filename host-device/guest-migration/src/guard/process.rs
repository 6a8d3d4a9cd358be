// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guard process, and its connection to its parent.

use std::env;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use qmp_client::{JsonLines, LineError};
use serde::Serialize;
use thiserror::Error;

use crate::signals::outlive_parent;

/// The argument with which a program is started as a guard process.
pub const ARGUMENT: &str = "guard-process";

/// Timeout of the start of a guard process, and of each of its answers.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Whether this program knows [`ARGUMENT`].
static ENABLED: AtomicBool = AtomicBool::new(false);

/// Why there is no guard process.
#[derive(Debug, Error)]
pub enum GuardError {
    /// The program cannot be started again.
    #[error("guard process cannot be started: {0}")]
    Start(#[from] io::Error),
    /// The connection to the guard process failed.
    #[error("guard process has ended: {0}")]
    Lost(#[from] LineError),
    /// The guard process did not answer.
    #[error("guard process did not answer within {TIMEOUT:?}")]
    Silent,
    /// The guard process cannot do what it was told.
    #[error("guard process cannot resume the guest; its message is in the log")]
    Unable,
}

/// Returns whether this process was started as a guard process.
#[must_use]
pub fn is_guard_process() -> bool {
    env::args_os().nth(1).is_some_and(|it| it == ARGUMENT)
}

/// Permits guard processes. The program has called [`is_guard_process`] before, and acts upon it.
pub fn enable() {
    ENABLED.store(true, Ordering::Relaxed);
}

/// A guard process of this process.
///
/// Dropping it closes the connection: the guard process resumes what it was last told of, and ends.
#[derive(Debug)]
pub struct GuardProcess {
    lines: JsonLines,
    child: Option<Child>,
}

impl GuardProcess {
    /// Starts a guard process and waits until it is ready. Returns `None` if the program has not called [`enable`].
    ///
    /// # Errors
    ///
    /// If the guard process cannot be started.
    pub fn start() -> Result<Option<Self>, GuardError> {
        if !ENABLED.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (near, far) = UnixStream::pair()?;
        // The link leads to the running program, also after its file was replaced.
        let child = Command::new("/proc/self/exe")
            .arg0(env::args_os().next().unwrap_or_default())
            .arg(ARGUMENT)
            .stdin(OwnedFd::from(far))
            .stdout(Stdio::null())
            .spawn()?;
        let mut guard = Self {
            lines: JsonLines::new(near, "guard process"),
            child: Some(child),
        };
        guard.answer().map(|()| Some(guard))
    }

    /// Sends a message and waits until the guard process has acted upon it.
    ///
    /// # Errors
    ///
    /// If the guard process has not. It is killed then, and resumes nothing.
    pub fn tell(&mut self, message: &impl Serialize) -> Result<(), GuardError> {
        let sent = self.lines.send(message).map_err(GuardError::from);
        sent.and_then(|()| self.answer())
    }

    fn answer(&mut self) -> Result<(), GuardError> {
        let answer = match self.lines.receive(TIMEOUT) {
            Ok(Some(true)) => return Ok(()),
            Ok(Some(false)) => GuardError::Unable,
            Ok(None) => GuardError::Silent,
            Err(error) => error.into(),
        };
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
        Err(answer)
    }
}

impl Drop for GuardProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Resuming may take long, and the connection is closed only after this function. Without this thread, the
            // process remains a zombie until its parent ends.
            let name = "guard-process".to_owned();
            let _ = thread::Builder::new()
                .name(name)
                .spawn(move || child.wait());
        }
    }
}

/// Makes this process a guard process, and returns the connection to its parent. The parent waits for one `true` after
/// each of its messages; the first one is sent here.
///
/// # Errors
///
/// If standard input is not the connection, or signals cannot be ignored.
pub fn connect_to_parent() -> io::Result<JsonLines> {
    outlive_parent()?;
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut parent = JsonLines::new(stream, "parent of the guard process");
    parent.send(&true).map_err(io::Error::other)?;
    Ok(parent)
}
