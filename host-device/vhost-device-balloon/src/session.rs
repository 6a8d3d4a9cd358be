// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connected front end, from its first message to its last.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, RESCHEDULE_EVENT};
use crate::device::Device;
use crate::lock;
use crate::relay::{CloseReason, ConfigNotifier, Relay};

/// Why a front end cannot be served.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The host refused something.
    #[error("the front end cannot be served: {0}")]
    Io(#[from] io::Error),
    /// The vhost-user crate refused something.
    #[error("the front end cannot be served: {0}")]
    VhostUser(vhost_user_backend::Error),
}

/// How a connection ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionEnd {
    /// For the log and for operators: a sentence without its full stop.
    pub reason: String,
    /// Whether the front end is to blame.
    pub is_error: bool,
}

/// A connection that is being served.
#[derive(Debug)]
pub struct Session {
    front_end: UnixStream,
    device: Arc<Mutex<Device>>,
    closing: Arc<AtomicBool>,
    thread: JoinHandle<SessionEnd>,
}

impl Session {
    /// Serves `front_end` with `device`, in threads of its own, and calls `on_end` after the last of them
    /// has done its work.
    ///
    /// # Errors
    ///
    /// If the threads or their means cannot be made.
    pub fn start(
        front_end: UnixStream,
        device: Arc<Mutex<Device>>,
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
        // Before the first message can arrive: the device drops what comes without a connection.
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
                        reason: "the device was stopped".into(),
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
        // Fails if the front end was faster.
        let _ = self.front_end.shutdown(Shutdown::Both);
    }

    /// Waits for the end of the connection, and tells the device of it.
    ///
    /// Not before: the device tells the operators, and one who then starts the next VMM must find whoever
    /// calls this ready for it.
    pub fn join(self) -> SessionEnd {
        let ended = self.thread.join().unwrap_or_else(|_| SessionEnd {
            reason: "the thread that serves the front end panicked".into(),
            is_error: true,
        });
        lock(&self.device).front_end_disconnected(&ended.reason);
        ended
    }
}

fn classify_end(closed: &CloseReason, served: vhost_user_backend::Result<()>) -> SessionEnd {
    match (closed, served) {
        (CloseReason::ByFrontEnd, _) => SessionEnd {
            reason: "the front end closed the connection".into(),
            is_error: false,
        },
        (CloseReason::Failed(error), _) => SessionEnd {
            reason: format!("the connection to the front end failed: {error}"),
            is_error: true,
        },
        (CloseReason::ByBackend, Ok(())) => SessionEnd {
            reason: "the connection was closed".into(),
            is_error: false,
        },
        (CloseReason::ByBackend, Err(error)) => SessionEnd {
            reason: format!("the front end does not speak vhost-user as it should: {error}"),
            is_error: true,
        },
    }
}

/// A listener with one connection waiting, and that connection's other end.
///
/// The crate can serve only what it accepts itself. The directory is nobody else's, and is gone before the
/// first message.
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
