// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The log on standard error.
//!
//! A log line never waits, never fails, and never panics: it goes into a bounded queue, and a thread of its own writes
//! it. Lines that do not fit, because standard error is not read or cannot be written, are lost and counted.
//! Whatever a guest, a front end or a QMP client does, lines of one kind are written at a limited rate, and the rest of
//! them is counted.
//!
//! `queue` is the queue and its thread, `rate_limit` the limit, and `format` applies it.

mod format;
mod queue;
mod rate_limit;

use std::io;
use std::sync::Arc;
use std::thread;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

use format::LimitedFormat;
use queue::LogQueue;
use rate_limit::RateLimit;

/// The log of this process. Dropping it writes the lines that are still queued.
#[derive(Debug)]
#[must_use = "dropping it ends the log"]
pub struct Log {
    queue: Arc<LogQueue>,
    has_thread: bool,
}

impl Log {
    /// Starts the log of this process, with lines up to `level`. Call it once.
    ///
    /// # Errors
    ///
    /// If the thread of the log cannot be started, or the process has a log already.
    pub fn start(level: LevelFilter) -> io::Result<Self> {
        let mut log = Self::prepare(level)?;
        log.start_thread()?;
        Ok(log)
    }

    /// As [`Log::start`], but starts no thread: lines wait until [`Log::start_thread`], or until the log is dropped.
    ///
    /// # Errors
    ///
    /// If the process has a log already.
    pub fn prepare(level: LevelFilter) -> io::Result<Self> {
        let limit = Arc::new(RateLimit::default());
        let queue = Arc::new(LogQueue::new(limit.clone()));
        let format = tracing_subscriber::fmt::format()
            .with_target(false)
            .with_ansi(false);
        tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .log_internal_errors(false)
            .with_writer(QueueWriter(queue.clone()))
            .event_format(LimitedFormat::new(format, limit, queue.clone()))
            .try_init()
            .map_err(io::Error::other)?;
        Ok(Self {
            queue,
            has_thread: false,
        })
    }

    /// Starts the thread that writes the lines, once.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn start_thread(&mut self) -> io::Result<()> {
        if !self.has_thread {
            let queue = self.queue.clone();
            thread::Builder::new()
                .name("log".into())
                .spawn(move || queue.write_lines(&io::stderr()))?;
            self.has_thread = true;
        }
        Ok(())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // Without a thread, the lines would not be written.
        if self.start_thread().is_ok() {
            self.queue.finish();
        }
    }
}

/// Puts each line into the queue.
#[derive(Clone, Debug)]
struct QueueWriter(Arc<LogQueue>);

impl io::Write for QueueWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for QueueWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}
