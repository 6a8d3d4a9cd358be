// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread of a client: reads and executes its commands, and writes answers and events.
//!
//! The thread never waits for the client in a read or a write: it polls, and gives up a client that does not read or
//! does not negotiate. While answers wait to be read, it executes no further command.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::context::CommandContext;
use super::frames::{FrameError, Frames};
use super::outbox::MAX_UNREAD;
use super::protocol::{self, QmpSession};
use super::table::Entry;

/// Time limits of a client.
#[derive(Clone, Copy, Debug)]
pub struct QmpLimits {
    /// How long a client may take to send `qmp_capabilities`.
    pub negotiation: Duration,
    /// How long a client may read nothing while lines wait for it.
    pub unread: Duration,
    /// How long the lines that wait are still written after the server has asked the thread to end.
    pub closing: Duration,
    /// How long a client must have sent no command before another one may take its place.
    pub idle: Duration,
}

impl Default for QmpLimits {
    fn default() -> Self {
        Self {
            negotiation: Duration::from_secs(30),
            unread: Duration::from_secs(30),
            closing: Duration::from_millis(200),
            idle: Duration::from_secs(60),
        }
    }
}

/// Serves a client until it disconnects or is disconnected. Returns why it was.
pub(super) fn serve_client(
    stream: &UnixStream,
    entry: &Entry,
    context: &CommandContext,
    limits: QmpLimits,
) -> String {
    let outbox = &entry.outbox;
    let mut session = QmpSession::new(context);
    outbox.answer(&protocol::greeting());
    let mut frames = Frames::new(stream);
    let connected = Instant::now();
    let mut written = connected;
    // Why nothing more is read.
    let mut input_end: Option<String> = None;
    loop {
        let delayed = context.events.send_delayed();
        let now = Instant::now();
        match outbox.write_to(stream) {
            Ok(0) if outbox.len() > 0 => {}
            Ok(_) => written = now,
            Err(error) => return input_end.unwrap_or_else(|| error.to_string()),
        }
        let unread = outbox.len();
        let closing = entry.closing();
        if let Some(why) = closing.as_ref().or(input_end.as_ref()) {
            if unread == 0 {
                return why.clone();
            }
        }
        let read_timeout = match closing {
            Some(_) => limits.closing,
            None => limits.unread,
        };
        if unread > 0 && now.saturating_duration_since(written) >= read_timeout {
            return format!(
                "client does not read: {unread} bytes wait for it, and {} events were dropped",
                outbox.lost_events()
            );
        }
        let negotiated = session.is_negotiated();
        if !negotiated && now.saturating_duration_since(connected) >= limits.negotiation {
            return "client did not send qmp_capabilities in time".into();
        }

        let reads = input_end.is_none() && closing.is_none() && unread <= MAX_UNREAD;
        if reads {
            let answer = match frames.next() {
                Ok(None) => {
                    input_end = Some("client closed the connection".into());
                    None
                }
                Ok(Some(frame)) => {
                    entry.set_active(&session);
                    let answer = session.answer(&frame, outbox);
                    entry.set_active(&session);
                    Some(answer)
                }
                Err(FrameError::Garbage) => {
                    let text = "JSON parse error, expecting an object";
                    Some(protocol::error(None, "GenericError", text))
                }
                Err(error @ FrameError::TooLong) => {
                    let text = error.to_string();
                    let answer = protocol::error(None, "GenericError", &text);
                    input_end = Some(text);
                    Some(answer)
                }
                Err(FrameError::Io(error)) if error.kind() == ErrorKind::WouldBlock => {
                    let deadlines = [
                        delayed,
                        (unread > 0).then_some(written + read_timeout),
                        (!negotiated).then_some(connected + limits.negotiation),
                    ];
                    wait(stream, entry, true, deadlines.into_iter().flatten().min());
                    None
                }
                Err(FrameError::Io(error)) => return error.to_string(),
            };
            if let Some(answer) = answer {
                outbox.answer(&answer);
                if session.quit_requested() {
                    (context.quit)();
                }
            }
        } else {
            let deadlines = [delayed, Some(written + read_timeout)];
            wait(stream, entry, false, deadlines.into_iter().flatten().min());
        }
    }
}

/// Sleeps until the stream or the outbox is ready, or until `deadline`. `reads` tells whether input is of interest.
fn wait(stream: &UnixStream, entry: &Entry, reads: bool, deadline: Option<Instant>) {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, reads);
    flags.set(PollFlags::OUT, entry.outbox.len() > 0);
    let mut fds = [
        PollFd::from_borrowed_fd(entry.outbox.wake_fd(), PollFlags::IN),
        PollFd::new(stream, flags),
    ];
    // Rounded up, so that the deadline has passed when the thread wakes.
    let timeout = deadline.map(|deadline| {
        deadline
            .saturating_duration_since(Instant::now())
            .saturating_add(Duration::from_millis(1))
    });
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    // An error means a signal, or a host without memory. The caller checks everything again.
    if poll(&mut fds, timeout.as_ref()).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    entry.outbox.clear_wake();
}
