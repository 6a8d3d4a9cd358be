// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connected front end, from its first message to its last.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, RESCHEDULE_EVENT};
use crate::device_lock::DeviceLock;
use crate::relay::{CloseReason, ConfigNotifier, Relay};
use crate::sync::lock;

/// Why a front end cannot be served.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The host reported an error.
    #[error("front end session cannot be started: {0}")]
    Io(#[from] io::Error),
    /// The vhost-user crate reported an error.
    #[error("front end session cannot be started: {0}")]
    VhostUser(vhost_user_backend::Error),
}

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
        let backend = Arc::new(Backend::new(device.clone(), front_end.try_clone()?)?);
        let mut daemon = VhostUserDaemon::new(
            "vhost-user".into(),
            backend.clone(),
            GuestMemoryAtomic::new(GuestMemoryMmap::new()),
        )
        .map_err(SessionError::VhostUser)?;
        for handler in daemon.get_epoll_handlers() {
            handler.register_listener(
                backend.reschedule_fd(),
                EventSet::IN,
                u64::from(RESCHEDULE_EVENT),
            )?;
        }

        let (listener, inner) = private_connection()?;
        let notifier = Arc::new(ConfigNotifier::default());
        // Before the first message can arrive: without a connection, the device ignores messages.
        lock(&device).front_end_connected(notifier.clone());
        let started = daemon
            .start(&mut Listener::from(listener))
            .map_err(SessionError::VhostUser)
            .and_then(|()| Ok(Relay::start(front_end.try_clone()?, inner, notifier)?));
        let relay = match started {
            Ok(relay) => relay,
            Err(error) => {
                lock(&device).front_end_disconnected(&error.to_string());
                return Err(error);
            }
        };

        let closing = Arc::new(AtomicBool::new(false));
        let stopped = closing.clone();
        let thread = thread::Builder::new()
            .name("front-end".into())
            .spawn(move || {
                let served = daemon.wait();
                let mut ended = classify_end(&relay.join(), served);
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
            })?;
        Ok(Self {
            front_end,
            device,
            closing,
            thread,
        })
    }

    /// Closes the connection, if it is still open.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // Fails if the front end has already closed the connection.
        let _ = self.front_end.shutdown(Shutdown::Both);
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

fn classify_end(closed: &CloseReason, served: vhost_user_backend::Result<()>) -> SessionEnd {
    match (closed, served) {
        (CloseReason::ByFrontEnd, _) => SessionEnd {
            reason: "front end closed the connection".into(),
            is_error: false,
        },
        (CloseReason::Failed(error), _) => SessionEnd {
            reason: format!("connection to the front end failed: {error}"),
            is_error: true,
        },
        (CloseReason::ByBackend, Ok(())) => SessionEnd {
            reason: "back end closed the connection".into(),
            is_error: false,
        },
        (CloseReason::ByBackend, Err(error)) => SessionEnd {
            reason: format!("front end violated the vhost-user protocol: {error}"),
            is_error: true,
        },
    }
}

/// Returns a listener with one pending connection, and the other end of that connection.
///
/// The crate serves only a connection that it accepts itself. The directory of the listener is private, and is removed
/// before the first message.
fn private_connection() -> io::Result<(UnixListener, UnixStream)> {
    let directory = tempfile::Builder::new()
        .prefix("vhost-device-balloon-")
        .tempdir()?;
    let path = directory.path().join("relay");
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    directory.close()?;
    Ok((listener, stream))
}
