// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lines that wait to be written to a client. Their size is bounded, and no thread waits for room.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use rustix::event::{eventfd, EventfdFlags};

use crate::events::EventSink;
use crate::sync::lock;

/// The most bytes that may wait when a command is executed. A client that does not read its answers gets no more of
/// them, as with QEMU's monitor.
pub(super) const MAX_UNREAD: usize = 64 << 10;

/// The most bytes that may wait when an event is added. A client that does not read loses events.
const MAX_WITH_EVENTS: usize = 256 << 10;

/// The queue of lines, and what wakes the client's thread.
#[derive(Debug)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: VecDeque<u8>,
    lost_events: u64,
}

impl Outbox {
    /// Creates an empty outbox.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Adds an answer.
    pub(super) fn answer(&self, line: &str) {
        lock(&self.queue).push(line);
    }

    /// Returns the number of bytes that wait.
    pub(super) fn len(&self) -> usize {
        lock(&self.queue).bytes.len()
    }

    /// Returns the number of events that were dropped.
    pub(super) fn lost_events(&self) -> u64 {
        lock(&self.queue).lost_events
    }

    /// Writes as much as `stream` takes without waiting, and returns the number of bytes.
    ///
    /// # Errors
    ///
    /// If the client has closed the connection.
    pub(super) fn write_to(&self, mut stream: &UnixStream) -> io::Result<usize> {
        let mut queue = lock(&self.queue);
        let mut written = 0;
        while !queue.bytes.is_empty() {
            match stream.write(queue.bytes.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    queue.bytes.drain(..count);
                    written += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(written),
                Err(error) => return Err(error),
            }
        }
        // A long answer should not occupy memory for the rest of the session.
        queue.bytes.shrink_to(4096);
        Ok(written)
    }

    /// Wakes the client's thread.
    pub(super) fn wake(&self) {
        // Fails only if the counter would overflow, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Returns the descriptor that is readable after [`Outbox::wake`].
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the descriptor unreadable until the next [`Outbox::wake`].
    pub(super) fn clear_wake(&self) {
        // Fails if nothing has woken the thread.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

impl Queue {
    fn push(&mut self, line: &str) {
        self.bytes.extend(line.as_bytes());
        self.bytes.extend(b"\r\n");
    }
}

impl EventSink for Outbox {
    fn send(&self, line: &str) {
        let mut queue = lock(&self.queue);
        if queue.bytes.len().saturating_add(line.len()) > MAX_WITH_EVENTS {
            queue.lost_events = queue.lost_events.saturating_add(1);
            return;
        }
        queue.push(line);
        drop(queue);
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn events_of_a_client_that_does_not_read_are_bounded_and_counted() {
        let outbox = Outbox::new().unwrap();
        let event = "x".repeat(998);
        for _ in 0..1000 {
            outbox.send(&event);
        }
        let kept = MAX_WITH_EVENTS / 1000;
        assert_eq!(outbox.len(), kept * 1000);
        assert_eq!(outbox.lost_events(), 1000 - kept as u64);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut read = 0;
        while outbox.len() > 0 {
            let written = outbox.write_to(&ours).unwrap();
            let mut bytes = vec![0; written];
            theirs.read_exact(&mut bytes).unwrap();
            read += written;
        }
        assert_eq!(read, kept * 1000);
        drop(theirs);
        outbox.send(&event);
        assert!(outbox.write_to(&ours).is_err());
    }
}
