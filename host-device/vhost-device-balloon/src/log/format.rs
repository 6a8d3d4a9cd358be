// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Formats the log lines that the rate limit lets through.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::queue::LogQueue;
use super::rate_limit::{Decision, RateLimit};
use crate::backend::ORDERED_END;

/// The most characters of a message that a summary repeats.
const SUMMARY_LENGTH: usize = 200;

/// The message of an event.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let text = format!("{value:?}");
            self.0 = text.chars().take(SUMMARY_LENGTH).collect();
        }
    }
}

fn message(event: &Event<'_>) -> String {
    let mut message = Message::default();
    event.record(&mut message);
    message.0
}

/// Formats the lines that the limit lets through.
pub(super) struct LimitedFormat<F> {
    format: F,
    limit: Arc<RateLimit>,
    queue: Arc<LogQueue>,
}

impl<F> LimitedFormat<F> {
    pub(super) fn new(format: F, limit: Arc<RateLimit>, queue: Arc<LogQueue>) -> Self {
        Self {
            format,
            limit,
            queue,
        }
    }
}

impl<S, N, F> FormatEvent<S, N> for LimitedFormat<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    /// An event that is left out becomes an empty line, which the queue ignores.
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let level = *metadata.level();
        // The crate takes the end of the session for an error.
        if level == Level::ERROR && message(event).contains(ORDERED_END) {
            return Ok(());
        }
        if level <= Level::INFO {
            let kind = metadata.callsite();
            match self
                .limit
                .decide(kind, level, Instant::now(), || message(event))
            {
                Decision::Write => {}
                Decision::LeaveOutFirst => {
                    self.queue.wake();
                    return Ok(());
                }
                Decision::LeaveOut => return Ok(()),
            }
        }
        self.format.format_event(context, writer, event)
    }
}
