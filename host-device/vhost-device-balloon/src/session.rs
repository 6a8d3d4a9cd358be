// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connected front end, from its first message to its last.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::backend::Backend;
use crate::device_lock::DeviceLock;
use crate::private_connection::PrivateConnection;
use crate::relay::{CloseReason, ConfigNotifier, Relay};
use crate::sync::lock;
use crate::vhost_daemon::{Served, VhostDaemon};

pub use crate::vhost_daemon::SessionError;

/// Interval between two checks whether a session has ended. The standard library cannot join a thread with a time limit.
const JOIN_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How a connection ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionEnd {
    /// For the log and for QMP clients: a sentence without a full stop.
    pub reason: String,
    /// Whether the connection failed or the front end violated the protocol.
    pub is_error: bool,
}

/// A front end that is being served.
#[derive(Debug)]
pub struct Session {
    front_end: UnixStream,
    device: Arc<DeviceLock>,
    closing: Arc<AtomicBool>,
    thread: JoinHandle<SessionEnd>,
}

impl Session {
    /// Serves `front_end` with `device` in threads of its own. Calls `on_end` when the last of these threads
    /// has finished its work.
    ///
    /// # Errors
    ///
    /// If threads or descriptors cannot be created.
    pub fn start(
        front_end: UnixStream,
        device: Arc<DeviceLock>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, SessionError> {
        Self::start_with(front_end, PrivateConnection::new()?, device, on_end)
    }

    /// As [`Session::start`], with a private connection that was created before.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn start_with(
        front_end: UnixStream,
        private_connection: PrivateConnection,
        device: Arc<DeviceLock>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, SessionError> {
        let backend = Arc::new(Backend::new(device.clone(), front_end.try_clone()?)?);
        let (mut daemon, inner) = VhostDaemon::start(backend.clone(), private_connection)?;
        let (relayed, closer) = (front_end.try_clone()?, inner.try_clone()?);
        let notifier = Arc::new(ConfigNotifier::default());
        // Before the first message can arrive: without a connection, the device ignores messages.
        lock(&device).front_end_connected(notifier.clone());
        let closing = Arc::new(AtomicBool::new(false));
        let stopped = closing.clone();
        let started = Relay::start(relayed, inner, notifier).and_then(|relay| {
            thread::Builder::new()
                .name("front-end".into())
                .spawn(move || {
                    let served = daemon.wait();
                    // After a panic the connection is still open.
                    let _ = closer.shutdown(Shutdown::Both);
                    let last_request = relay.last_request();
                    let mut ended = classify_end(&relay.join(), served, &last_request);
                    if let Some(reason) = backend.failure() {
                        ended = SessionEnd {
                            reason,
                            is_error: true,
                        };
                    }
                    if stopped.load(Ordering::Acquire) {
                        ended = SessionEnd {
                            reason: "daemon is shutting down".into(),
                            is_error: false,
                        };
                    }
                    // Joins the thread that watches the queues.
                    drop(daemon);
                    on_end();
                    ended
                })
        });
        match started {
            Ok(thread) => Ok(Self {
                front_end,
                device,
                closing,
                thread,
            }),
            Err(error) => {
                // Ends the threads that have been started.
                let _ = front_end.shutdown(Shutdown::Both);
                lock(&device).front_end_disconnected(&error.to_string());
                Err(error.into())
            }
        }
    }

    /// Returns whether the front end has closed the connection, so that the session is about to end.
    pub fn is_ending(&self) -> bool {
        let mut fds = [PollFd::new(&self.front_end, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // The host reports a closed connection whatever is asked for.
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Closes the connection, if it is still open.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // Fails if the front end has already closed the connection.
        let _ = self.front_end.shutdown(Shutdown::Both);
    }

    /// As [`Session::join`], but waits no longer than `limit`. Returns `None`, and reports nothing, if the session has not
    /// ended by then: a thread waits in a system call on a file of the front end, such as a file on FUSE.
    pub fn join_within(self, limit: Duration) -> Option<SessionEnd> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(JOIN_POLL_INTERVAL);
        }
        Some(self.join())
    }

    /// Waits for the end of the connection, and reports it to the device.
    ///
    /// The session's threads do not report it. The device emits an event, and a QMP client may then start the next VMM
    /// at once. The caller must be ready to accept that VMM by the time of the event.
    pub fn join(self) -> SessionEnd {
        let ended = self.thread.join().unwrap_or_else(|_| SessionEnd {
            reason: "front end thread panicked".into(),
            is_error: true,
        });
        lock(&self.device).front_end_disconnected(&ended.reason);
        ended
    }
}

fn classify_end(closed: &CloseReason, served: Served, last_request: &str) -> SessionEnd {
    // When the crate ends the connection, the relay closes the other side, and cannot tell who was the first.
    match (served, closed) {
        (Served::RequestFailed(error), _) => SessionEnd {
            reason: format!(
                "front end violated the vhost-user protocol: {error}; its last request was {last_request}"
            ),
            is_error: true,
        },
        (Served::Panicked, _) => SessionEnd {
            reason: "thread of the vhost-user messages panicked".into(),
            is_error: true,
        },
        (Served::Closed, CloseReason::ByFrontEnd) => SessionEnd {
            reason: "front end closed the connection".into(),
            is_error: false,
        },
        (Served::Closed, CloseReason::ByBackend) => SessionEnd {
            reason: "back end closed the connection".into(),
            is_error: false,
        },
        (Served::Closed, CloseReason::Failed(error)) => SessionEnd {
            reason: format!("connection to the front end failed: {error}"),
            is_error: true,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::device::Device;
    use shared_abi::features::Features;

    #[test]
    fn a_session_that_does_not_end_is_left_behind() {
        let (front_end, _other) = UnixStream::pair().unwrap();
        let (end, ended) = mpsc::channel();
        let session = |thread| Session {
            front_end: front_end.try_clone().unwrap(),
            device: Arc::new(DeviceLock::new(Device::new(Features::NONE, Arc::default()))),
            closing: Arc::default(),
            thread,
        };
        let stuck = session(thread::spawn(move || ended.recv().unwrap()));
        assert_eq!(stuck.join_within(Duration::from_millis(20)), None);
        let reason = SessionEnd {
            reason: "front end closed the connection".into(),
            is_error: false,
        };
        // The thread still runs.
        end.send(reason.clone()).unwrap();
        let same = reason.clone();
        let ending = session(thread::spawn(move || same));
        assert_eq!(ending.join_within(Duration::from_secs(600)), Some(reason));
    }
}
