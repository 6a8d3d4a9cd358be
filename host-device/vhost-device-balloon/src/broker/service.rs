// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of the broker process.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest_migration::find_pinning_of;
use guest_migration::signals::outlive_parent;
use rustix::process::{getppid, Pid};
use serde::de::DeserializeOwned;
use tracing::level_filters::LevelFilter;
use tracing::warn;

use super::messages::{Answer, Request, SlowRequest};
use super::HELPER_ARGUMENT;
use crate::device::saved_state::{SavedState, SavedStateError};
use crate::packets::PacketSocket;
use crate::private_connection::PrivateConnection;
use crate::socket::SocketFiles;

/// The argument with which the program is started as a broker process, before the log level.
pub(super) const ARGUMENT: &str = "broker-process";

/// The most helper processes at a time: that of a migration, and those that are about to exit.
const MAX_HELPERS: usize = 4;

/// How long a new helper process waits for the exit of earlier ones, if there are too many.
const EXIT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the end of this process waits for a request that takes long.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between two looks at what is waited for.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The most sockets of the device process.
const MAX_SOCKETS: usize = 2;

/// Returns whether this process was started as a broker process.
#[must_use]
pub fn is_broker_process() -> bool {
    env::args_os().nth(1).is_some_and(|it| it == ARGUMENT)
}

/// Runs this process as the broker process of its parent, until the parent has ended. Helper processes get the log level
/// `log_level`. Without `migration`, what only migrations need is refused.
///
/// # Errors
///
/// If this process was not started as a broker process, or its parent sends an invalid packet.
pub fn run(log_level: LevelFilter, migration: bool) -> io::Result<()> {
    // The parent still waits for the first answer.
    let device = getppid().map_or(0, Pid::as_raw_pid).unsigned_abs();
    outlive_parent()?;
    let socket = PacketSocket::from(io::stdin().as_fd().try_clone_to_owned()?);
    let slow_socket = PacketSocket::from(io::stdout().as_fd().try_clone_to_owned()?);
    let slow_service = SlowService {
        device,
        log_level,
        migration,
        helpers: Arc::default(),
    };
    let slow = thread::Builder::new().name("slow".into()).spawn(move || {
        let served = serve(&slow_socket, |request, fds, _| {
            slow_service.handle(request, fds)
        });
        if let Err(error) = served {
            warn!("broker process ends: {error}");
            process::exit(1);
        }
    })?;
    socket.send(&Answer::Done, &[])?;
    let mut service = Service::default();
    serve(&socket, |request, _, answer_fds| {
        service.handle(request, answer_fds).map(|()| Answer::Done)
    })?;
    // What it is doing still comes to its end, such as writing a saved state.
    let deadline = Instant::now() + END_TIMEOUT;
    while !slow.is_finished() && Instant::now() < deadline {
        thread::sleep(EXIT_POLL_INTERVAL);
    }
    Ok(())
}

/// Answers the requests of a connection until the other side closes it. `handle` gets the descriptors of the request, and
/// adds those of the answer.
fn serve<R: DeserializeOwned>(
    socket: &PacketSocket,
    mut handle: impl FnMut(R, Vec<OwnedFd>, &mut Vec<OwnedFd>) -> io::Result<Answer>,
) -> io::Result<()> {
    while let Some((request, fds)) = socket.receive()? {
        let mut answer_fds = Vec::new();
        let answer = handle(request, fds, &mut answer_fds);
        let answer = answer.unwrap_or_else(|error| Answer::Failed(error.to_string()));
        let answer_fds: Vec<BorrowedFd<'_>> = answer_fds.iter().map(AsFd::as_fd).collect();
        if socket.send(&answer, &answer_fds).is_err() {
            break;
        }
    }
    Ok(())
}

/// The service of the first connection.
#[derive(Default)]
struct Service {
    sockets: Vec<SocketFiles>,
    /// Whether the device process has given up its rights.
    is_confined: bool,
}

impl Service {
    /// Handles a request. Adds the descriptors of the answer to `answer_fds`.
    fn handle(&mut self, request: Request, answer_fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        match request {
            Request::KeepSocket(files) => {
                if self.is_confined || self.sockets.len() >= MAX_SOCKETS {
                    return Err(io::Error::other("device process names no further sockets"));
                }
                self.sockets.push(files);
            }
            Request::Confined => self.is_confined = true,
            Request::RemoveSocket(index) => {
                let files = self.sockets.get(index);
                files
                    .ok_or_else(|| io::Error::other("unknown socket"))?
                    .remove()?;
            }
            Request::PrivateConnection => {
                let connection = PrivateConnection::new()?;
                answer_fds.extend([connection.listener.into(), connection.stream.into()]);
            }
        }
        Ok(())
    }
}

/// The service of the second connection.
struct SlowService {
    /// The pid of the device process.
    device: u32,
    log_level: LevelFilter,
    /// Whether helper processes and saved states are permitted.
    migration: bool,
    /// Helper processes that have not exited.
    helpers: Arc<AtomicUsize>,
}

impl SlowService {
    fn handle(&self, request: SlowRequest, fds: Vec<OwnedFd>) -> io::Result<Answer> {
        match request {
            SlowRequest::FindPinning(ids) => {
                return find_pinning_of(ids, self.device).map(Answer::Pinning)
            }
            SlowRequest::StartHelper | SlowRequest::SaveState { .. } if !self.migration => {
                return Err(io::Error::other(
                    "the daemon was started with --migration off",
                ))
            }
            SlowRequest::StartHelper => self.start_helper(fds)?,
            SlowRequest::SaveState { filename, state } => {
                SavedState::write(&state, &filename).map_err(|error| match error {
                    SavedStateError::Write { source, .. } => source,
                    other => io::Error::other(other),
                })?;
            }
        }
        Ok(Answer::Done)
    }

    fn start_helper(&self, fds: Vec<OwnedFd>) -> io::Result<()> {
        let Ok([input, output]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(io::Error::other("a helper process needs two descriptors"));
        };
        // Those of earlier migrations exit soon, unless the device process keeps them.
        let deadline = Instant::now() + EXIT_TIMEOUT;
        while self.helpers.load(Ordering::Acquire) >= MAX_HELPERS {
            if Instant::now() >= deadline {
                return Err(io::Error::other("earlier helper processes have not exited"));
            }
            thread::sleep(EXIT_POLL_INTERVAL);
        }
        let mut helper = Command::new("/proc/self/exe")
            .arg0(env::args_os().next().unwrap_or_default())
            .args([
                HELPER_ARGUMENT,
                &self.log_level.to_string(),
                &self.device.to_string(),
            ])
            .stdin(input)
            .stdout(output)
            .spawn()?;
        self.helpers.fetch_add(1, Ordering::AcqRel);
        let helpers = self.helpers.clone();
        // Without the wait, the process remains a zombie until this one ends.
        let waiter = thread::Builder::new().name("helper".into()).spawn(move || {
            let _ = helper.wait();
            helpers.fetch_sub(1, Ordering::AcqRel);
        });
        waiter.map(drop)
    }
}
