// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Log lines on their way to standard error: a bounded queue, and the loop of the thread that empties it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};

use super::rate_limit::RateLimit;
use crate::sync::lock;

/// The most bytes that wait to be written.
const MAX_BYTES: usize = 256 << 10;

/// The most bytes of a line. Names that a client or a process of the host has chosen can be longer.
const MAX_LINE: usize = 4 << 10;

/// How long the end of the program waits for a line to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that did not fit or could not be written, and that the log does not tell of yet.
    lost: u64,
    /// Lines that were written or lost since the start.
    done: u64,
    is_writing: bool,
}

/// A bounded queue of log lines. Adding a line never waits for the reader of the log.
#[derive(Debug)]
pub(super) struct LogQueue {
    limit: Arc<RateLimit>,
    state: Mutex<State>,
    added: Condvar,
    written: Condvar,
}

impl LogQueue {
    pub(super) fn new(limit: Arc<RateLimit>) -> Self {
        Self {
            limit,
            state: Mutex::default(),
            added: Condvar::new(),
            written: Condvar::new(),
        }
    }

    /// Adds a line, or counts it as lost if too many wait.
    pub(super) fn push(&self, line: &[u8]) {
        if line.is_empty() {
            return;
        }
        let line = one_line(line);
        let mut state = lock(&self.state);
        if state.bytes + line.len() > MAX_BYTES {
            state.lost = state.lost.saturating_add(1);
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line);
        self.added.notify_one();
    }

    /// Tells the thread that lines of a kind are left out from now on, and that a summary is due later.
    pub(super) fn wake(&self) {
        // With the lock, so that the thread does not miss it between its check and its wait.
        let _state = lock(&self.state);
        self.added.notify_one();
    }

    /// Writes lines to `output`, for ever.
    pub(super) fn write_lines(&self, output: &impl AsFd) {
        loop {
            let (line, lost) = self.next();
            let mut failed = 0;
            let note = match lost {
                0 => Ok(()),
                _ => write(
                    output,
                    format!("{lost} log lines were lost: standard error was not read, or could not be written\n")
                        .as_bytes(),
                ),
            };
            if note.is_err() {
                failed += lost;
            }
            if write(output, &line).is_err() {
                failed += 1;
            }
            let mut state = lock(&self.state);
            state.lost = state.lost.saturating_add(failed);
            state.done += 1;
            state.is_writing = false;
            self.written.notify_all();
        }
    }

    /// Waits for the next line. Returns it with the number of lines that were lost since the last call.
    fn next(&self) -> (Vec<u8>, u64) {
        let mut state = lock(&self.state);
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes = state.bytes.saturating_sub(line.len());
                state.is_writing = true;
                return (line, std::mem::take(&mut state.lost));
            }
            // Looked at under the lock of the queue: see `wake`.
            let (summaries, due) = self.limit.summaries(Instant::now(), false);
            if !summaries.is_empty() {
                add_summaries(&mut state, summaries);
                continue;
            }
            state = match due {
                None => self
                    .added
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let result = self.added.wait_timeout(state, due);
                    result.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Waits until all lines are written, but not for a reader that reads nothing for [`FINISH_TIMEOUT`].
    pub(super) fn finish(&self) {
        let (summaries, _) = self.limit.summaries(Instant::now(), true);
        let mut state = lock(&self.state);
        add_summaries(&mut state, summaries);
        self.added.notify_one();
        let mut done = state.done;
        let mut limit = Instant::now() + FINISH_TIMEOUT;
        while !state.lines.is_empty() || state.is_writing {
            let rest = limit.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            let result = self.written.wait_timeout(state, rest);
            (state, _) = result.unwrap_or_else(PoisonError::into_inner);
            if state.done != done {
                done = state.done;
                limit = Instant::now() + FINISH_TIMEOUT;
            }
        }
    }
}

fn add_summaries(state: &mut State, summaries: Vec<String>) {
    for line in summaries {
        let line = one_line(line.as_bytes());
        state.bytes += line.len();
        state.lines.push_back(line);
    }
}

/// Returns `text` as one line of limited length, with a line feed at its end. Line breaks in a name that it contains would
/// look like other lines of the log.
fn one_line(text: &[u8]) -> Vec<u8> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let mut line = Vec::with_capacity(text.len().min(MAX_LINE) + 1);
    for byte in text {
        if line.len() >= MAX_LINE {
            // Not in the middle of a character.
            while line.last().is_some_and(|last| last & 0xc0 == 0x80) {
                line.pop();
            }
            if line.last().is_some_and(|last| last & 0x80 != 0) {
                line.pop();
            }
            line.extend(format!(" ... ({} bytes)", text.len()).bytes());
            break;
        }
        match byte {
            b'\n' => line.extend(b"\\n"),
            b'\r' => line.extend(b"\\r"),
            byte => line.push(*byte),
        }
    }
    line.push(b'\n');
    line
}

/// Writes all of `bytes`. Waits for a reader.
fn write(output: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(output, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            // Another process has made standard error non-blocking.
            Err(rustix::io::Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(output, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;

    #[test]
    fn lines_that_do_not_fit_are_counted_and_the_log_says_so() {
        let queue = Arc::new(LogQueue::new(Arc::default()));
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..MAX_BYTES / 1024 + 7 {
            queue.push(&line);
        }
        assert_eq!(lock(&queue.state).lost, 7);
        let (reader, writer) = std::io::pipe().unwrap();
        thread::spawn({
            let queue = queue.clone();
            move || queue.write_lines(&writer)
        });
        let mut text = vec![0; 2];
        let mut reader = reader;
        reader.read_exact(&mut text).unwrap();
        assert_eq!(text, b"7 ");
        let mut rest = vec![0; MAX_BYTES];
        reader.read_exact(&mut rest).unwrap();
        assert!(rest.starts_with(b"log lines were lost"));
        // The queue works on after a reader that has gone.
        drop(reader);
        queue.push(&line);
        queue.finish();
        let state = lock(&queue.state);
        assert!(state.lines.is_empty() && !state.is_writing);
    }

    #[test]
    fn a_name_cannot_make_lines_of_its_own_or_an_endless_one() {
        let line = |text: &str| String::from_utf8(one_line(text.as_bytes())).unwrap();
        assert_eq!(line("WARN no file\n"), "WARN no file\n");
        assert_eq!(line("no file a\n\r\nWARN b"), "no file a\\n\\r\\nWARN b\n");
        for text in ["y".repeat(60_000), "\u{20ac}".repeat(20_000)] {
            let line = line(&text);
            assert!(line.len() <= MAX_LINE + 32, "{}", line.len());
            assert!(line.ends_with(" ... (60000 bytes)\n"), "{line}");
        }
    }

    #[test]
    fn nobody_waits_for_a_log_that_is_not_read() {
        let queue = Arc::new(LogQueue::new(Arc::default()));
        let (_reader, writer) = std::io::pipe().unwrap();
        thread::spawn({
            let queue = queue.clone();
            move || queue.write_lines(&writer)
        });
        // More than the queue and the pipe hold.
        for _ in 0..1000 {
            queue.push(&[b'x'; 1024]);
        }
        assert!(lock(&queue.state).lost > 0);
        queue.finish();
        assert!(!lock(&queue.state).lines.is_empty());
    }
}
