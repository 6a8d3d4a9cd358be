// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that the threads of one stream share: why the stream stops, and the barrier between iterations.
//!
//! A stop wakes all waiting threads: an eventfd ends waits for file descriptors, and a condition variable ends waits at
//! the barrier. A mutex protects the reason, the registered sockets and the state of the barrier.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::StreamError;
use crate::CancelToken;

/// The state of one stream. Any thread can stop the stream for all threads. The first reason is kept.
#[derive(Debug)]
pub(super) struct Control {
    /// An eventfd that becomes readable when the stream is stopped, and stays readable.
    event: OwnedFd,
    stopped: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    reason: Option<StreamError>,
    /// The sockets to shut down on cancellation.
    sockets: Vec<Arc<OwnedFd>>,
    /// Number of channels that wait at the end of the current iteration.
    waiting: u16,
    /// Number of iterations that all channels have ended.
    iterations: u64,
    /// Whether a channel has ended.
    ended: bool,
}

impl Control {
    /// Creates the state of a stream that `cancel` can cancel.
    pub fn new(cancel: &CancelToken) -> Result<Arc<Self>, StreamError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags).map_err(|error| StreamError::System {
            doing: "cannot create an eventfd",
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

    /// Stops the stream and shuts down its connections, so that the peer notices at once.
    pub fn cancel(&self) {
        self.stop(StreamError::Cancelled);
        for socket in std::mem::take(&mut self.state().sockets) {
            // Ignored: it fails if the connection is closed already.
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
    }

    /// Stops the stream with `reason`, unless it is stopped already. Returns the reason that is kept.
    pub fn stop(&self, reason: StreamError) -> StreamError {
        let mut state = self.state();
        let reason = state.reason.get_or_insert(reason).clone();
        self.stopped.store(true, Ordering::Release);
        drop(state);
        // Ignored: it fails only if the eventfd is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        self.changed.notify_all();
        reason
    }

    /// Registers `socket` for shutdown on cancellation. Shuts it down at once if the stream is cancelled already.
    pub fn register_socket(&self, socket: &Arc<OwnedFd>) {
        let mut state = self.state();
        if matches!(state.reason, Some(StreamError::Cancelled)) {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        } else {
            state.sockets.push(Arc::clone(socket));
        }
    }

    /// Checks that the stream is not stopped.
    ///
    /// # Errors
    ///
    /// The reason, if the stream is stopped.
    pub fn check(&self) -> Result<(), StreamError> {
        if !self.stopped.load(Ordering::Acquire) {
            return Ok(());
        }
        match &self.state().reason {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    /// Waits for one of `events` on `fd`, for at most `timeout`. Returns `None` after the timeout.
    ///
    /// # Errors
    ///
    /// The reason, if the stream is stopped; or a failure of `poll`.
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
                        doing: "cannot poll the transport",
                        source: Arc::new(error.into()),
                    })
                }
            }
        }
    }

    /// Sleeps for `duration`, or until the stream is stopped.
    ///
    /// # Errors
    ///
    /// The reason, if the stream is stopped; or a failure of `poll`.
    pub fn sleep(&self, duration: Duration) -> Result<(), StreamError> {
        // Only a stop makes the eventfd readable.
        self.wait(self.event.as_fd(), PollFlags::IN, Some(duration))?;
        self.check()
    }

    /// Waits until all `channels` are at the end of the current iteration. Returns false if a channel has ended, and so
    /// never gets there.
    ///
    /// # Errors
    ///
    /// The reason, if the stream is stopped.
    pub fn wait_at_barrier(&self, channels: u16) -> Result<bool, StreamError> {
        let mut state = self.state();
        if state.ended {
            return Ok(false);
        }
        state.waiting += 1;
        if state.waiting >= channels {
            state.waiting = 0;
            state.iterations += 1;
            self.changed.notify_all();
            return Ok(true);
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
        Ok(true)
    }

    /// Records that a channel has ended. Returns false if others wait at the end of an iteration that the channel has
    /// not: the caller must stop the stream, because they would wait forever.
    pub fn end_channel(&self) -> bool {
        let mut state = self.state();
        state.ended = true;
        state.waiting == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
