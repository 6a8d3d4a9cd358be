// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's end of the conversation with the first process of a guest.

use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{AnyCall, Call};
use guest_agent::protocol::{Hello, Outcome, Request, Response, VERSION};
use qmp_client::JsonLines;

use crate::HANG_LIMIT;

/// How long a call may take if it has no limit of its own: longer than what is waited for in the guest, which then says what that is.
const CALL_LIMIT: Duration = Duration::from_secs(HANG_LIMIT.as_secs() + 60);

/// The longest answer: a whole kernel log, or a file.
const MAX_LINE: usize = 256 << 20;

fn receive_hello(lines: &mut JsonLines, limit: Duration) -> Result<Hello> {
    let hello: Option<Hello> = lines.receive(limit)?;
    let hello =
        hello.with_context(|| format!("the guest's agent did not come up within {limit:?}"))?;
    ensure!(
        hello.version == VERSION,
        "the guest's agent speaks version {}, not {VERSION}",
        hello.version
    );
    Ok(hello)
}

/// A guest that is up.
#[derive(Debug)]
pub struct Agent {
    lines: JsonLines,
    hello: Hello,
    last: u64,
}

impl Agent {
    /// Waits until the guest is up.
    ///
    /// # Errors
    ///
    /// If it does not come up within the limit, or carries an agent of another version.
    pub fn meet(stream: UnixStream, limit: Duration) -> Result<Self> {
        let mut lines = Self::lines(stream);
        let hello = receive_hello(&mut lines, limit)?;
        Ok(Self {
            lines,
            hello,
            last: 0,
        })
    }

    /// Waits until the kernel that the guest was told to start is up.
    ///
    /// # Errors
    ///
    /// As [`Agent::meet`].
    pub fn meet_again(&mut self, limit: Duration) -> Result<()> {
        self.hello = receive_hello(&mut self.lines, limit)?;
        Ok(())
    }

    /// Goes on with a guest that has been moved, over the line that it has where it is now.
    pub fn moved(&mut self, stream: UnixStream) {
        self.lines = Self::lines(stream);
    }

    fn lines(stream: UnixStream) -> JsonLines {
        JsonLines::new(stream, "the guest's agent").longest(MAX_LINE)
    }

    /// What the guest said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Asks the guest to do something, and waits for its answer.
    ///
    /// # Errors
    ///
    /// If the guest says that it failed, is gone, or is silent for longer than [`HANG_LIMIT`].
    pub fn call<C: Call>(&mut self, call: C) -> Result<C::Answer> {
        self.call_within(call, CALL_LIMIT)
    }

    /// As [`Agent::call`], with a limit of one's own; `Duration::MAX` for a shell.
    ///
    /// # Errors
    ///
    /// As [`Agent::call`].
    pub fn call_within<C: Call>(&mut self, call: C, limit: Duration) -> Result<C::Answer> {
        let pending = self.begin(call)?;
        let answer = self.finish(&pending, limit)?;
        answer.with_context(|| {
            format!(
                "the guest did not answer {} within {limit:?}",
                pending.shown
            )
        })
    }

    /// Asks the guest to do something, and leaves the answer to [`Agent::finish`]. What was asked before is not waited
    /// for any more.
    ///
    /// # Errors
    ///
    /// If the guest is gone.
    pub fn begin<C: Call>(&mut self, call: C) -> Result<Pending<C>> {
        self.last += 1;
        let call: AnyCall = call.into();
        let shown = format!("{call:?}");
        self.lines.send(&Request {
            id: self.last,
            call,
        })?;
        Ok(Pending {
            id: self.last,
            shown,
            call: PhantomData,
        })
    }

    /// The answer to what was asked; `None` if there is none by the limit.
    ///
    /// # Errors
    ///
    /// If the guest says that it failed, or is gone.
    pub fn finish<C: Call>(
        &mut self,
        pending: &Pending<C>,
        limit: Duration,
    ) -> Result<Option<C::Answer>> {
        let shown = &pending.shown;
        // A deadline is an instant, and there is none for ever.
        let limit = limit.min(Duration::from_secs(365 * 24 * 3600));
        loop {
            let response: Option<Response> =
                self.lines.receive(limit).with_context(|| shown.clone())?;
            let Some(response) = response else {
                return Ok(None);
            };
            if response.id != pending.id {
                continue;
            }
            return match response.outcome {
                Outcome::Done(value) => serde_json::from_value(value)
                    .map(Some)
                    .with_context(|| format!("a strange answer to {shown}")),
                Outcome::Failed(message) => bail!("guest: {message}"),
            };
        }
    }
}

/// Something that was asked and not answered yet.
#[derive(Debug)]
pub struct Pending<C> {
    id: u64,
    shown: String,
    call: PhantomData<fn() -> C>,
}
