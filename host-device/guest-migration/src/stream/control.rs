// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of one stream share: why it stops, and how those who wait hear of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::StreamError;
use crate::CancelToken;

/// The state of one stream. Whoever finds something wrong ends it for all threads: the first reason counts.
#[derive(Debug)]
pub(super) struct Control {
    /// Readable once the stream has been stopped, and from then on.
    event: OwnedFd,
    stopped: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    reason: Option<StreamError>,
    /// What is shut down when somebody cancels.
    sockets: Vec<Arc<OwnedFd>>,
    /// How many channels wait at the end of the round that is under way, and how many rounds have ended.
    waiting: u16,
    iterations: u64,
}

impl Control {
    /// The control of a stream that `cancel` ends.
    pub fn new(cancel: &CancelToken) -> Result<Arc<Self>, StreamError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags).map_err(|error| StreamError::System {
            doing: "cannot make an event file descriptor",
            source: Arc::new(error.into()),
        })?;
        let control = Arc::new(Self {
            event,
            stopped: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let weak = Arc::downgrade(&control);
        cancel.on_cancel(move || {
            if let Some(control) = weak.upgrade() {
                control.cancel();
            }
        });
        Ok(control)
    }

    /// Ends the stream, and the connections at once, so that the other side knows as well.
    pub fn cancel(&self) {
        self.stop(StreamError::Cancelled);
        for socket in std::mem::take(&mut self.state().sockets) {
            // It may be closed already, which is as good.
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
    }

    /// Ends the stream because of `reason`, unless it has one already; whichever it is now is returned.
    pub fn stop(&self, reason: StreamError) -> StreamError {
        let mut state = self.state();
        let reason = state.reason.get_or_insert(reason).clone();
        self.stopped.store(true, Ordering::Release);
        drop(state);
        // It can fail only when it is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        self.changed.notify_all();
        reason
    }

    /// Has `socket` shut down when somebody cancels.
    pub fn register_socket(&self, socket: &Arc<OwnedFd>) {
        let mut state = self.state();
        if matches!(state.reason, Some(StreamError::Cancelled)) {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        } else {
            state.sockets.push(Arc::clone(socket));
        }
    }

    /// # Errors
    ///
    /// Why the stream was stopped, if it was.
    pub fn check(&self) -> Result<(), StreamError> {
        if !self.stopped.load(Ordering::Acquire) {
            return Ok(());
        }
        match &self.state().reason {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    /// Waits until one of `events` is there on `fd`, at most for `timeout`: `None` if it was not.
    ///
    /// # Errors
    ///
    /// Why the stream was stopped, if it was.
    pub fn wait(
        &self,
        fd: BorrowedFd<'_>,
        events: PollFlags,
        timeout: Option<Duration>,
    ) -> Result<Option<PollFlags>, StreamError> {
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let rest = end.map(|end| end.saturating_duration_since(Instant::now()));
            let timeout = rest.and_then(|rest| Timespec::try_from(rest).ok());
            let mut fds = [
                PollFd::from_borrowed_fd(fd, events),
                PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => {
                    self.check()?;
                    let [first, _] = &fds;
                    if !first.revents().is_empty() {
                        return Ok(Some(first.revents()));
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(StreamError::System {
                        doing: "cannot wait for a transport",
                        source: Arc::new(error.into()),
                    })
                }
            }
        }
    }

    /// Sleeps for `duration`.
    ///
    /// # Errors
    ///
    /// Why the stream was stopped, if it was.
    pub fn sleep(&self, duration: Duration) -> Result<(), StreamError> {
        // Nothing but a stop makes it readable.
        self.wait(self.event.as_fd(), PollFlags::IN, Some(duration))?;
        self.check()
    }

    /// Waits until all `channels` have come to the end of a round, and returns how many rounds have ended.
    ///
    /// # Errors
    ///
    /// Why the stream was stopped, if it was.
    pub fn wait_at_barrier(&self, channels: u16) -> Result<u64, StreamError> {
        let mut state = self.state();
        state.waiting += 1;
        if state.waiting >= channels {
            state.waiting = 0;
            state.iterations += 1;
            self.changed.notify_all();
            return Ok(state.iterations);
        }
        let iteration = state.iterations;
        while state.iterations == iteration {
            if let Some(reason) = &state.reason {
                return Err(reason.clone());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.iterations)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
