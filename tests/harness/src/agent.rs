// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's end of the conversation with the first process of a guest.

use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{AnyCall, Call};
use guest_agent::protocol::{CallResult, Hello, Request, Response, VERSION};
use qmp_client::JsonLines;

use crate::HANG_TIMEOUT;

/// How long a call may take if it has no limit of its own: longer than what is waited for in the guest, which then says what that is.
const CALL_TIMEOUT: Duration = Duration::from_secs(HANG_TIMEOUT.as_secs() + 60);

/// The longest answer: a whole kernel log, or a file.
const MAX_LINE: usize = 256 << 20;

fn receive_hello(lines: &mut JsonLines, timeout: Duration) -> Result<Hello> {
    let hello: Option<Hello> = lines.receive(timeout)?;
    let hello =
        hello.with_context(|| format!("the guest's agent did not come up within {timeout:?}"))?;
    ensure!(
        hello.version == VERSION,
        "the guest's agent speaks version {}, not {VERSION}",
        hello.version
    );
    Ok(hello)
}

/// A guest that is up.
#[derive(Debug)]
pub struct AgentClient {
    lines: JsonLines,
    hello: Hello,
    last: u64,
}

impl AgentClient {
    /// Waits until the guest is up.
    ///
    /// # Errors
    ///
    /// If it does not come up within the limit, or carries an agent of another version.
    pub fn connect(stream: UnixStream, timeout: Duration) -> Result<Self> {
        let mut lines = Self::lines(stream);
        let hello = receive_hello(&mut lines, timeout)?;
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
    /// As [`AgentClient::connect`].
    pub fn reconnect(&mut self, timeout: Duration) -> Result<()> {
        self.hello = receive_hello(&mut self.lines, timeout)?;
        Ok(())
    }

    /// Goes on with a guest that has been moved, over the line that it has where it is now.
    pub fn switch_stream(&mut self, stream: UnixStream) {
        self.lines = Self::lines(stream);
    }

    fn lines(stream: UnixStream) -> JsonLines {
        JsonLines::new(stream, "the guest's agent").with_max_line(MAX_LINE)
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
    /// If the guest says that it failed, is gone, or is silent for longer than [`HANG_TIMEOUT`].
    pub fn call<C: Call>(&mut self, call: C) -> Result<C::Reply> {
        self.call_within(call, CALL_TIMEOUT)
    }

    /// As [`AgentClient::call`], with a limit of one's own; `Duration::MAX` for a shell.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn call_within<C: Call>(&mut self, call: C, timeout: Duration) -> Result<C::Reply> {
        let pending = self.start_call(call)?;
        let answer = self.finish_call(&pending, timeout)?;
        answer.with_context(|| {
            format!(
                "the guest did not answer {} within {timeout:?}",
                pending.description
            )
        })
    }

    /// Asks the guest to do something, and leaves the answer to [`AgentClient::finish_call`]. What was asked before is not waited
    /// for any more.
    ///
    /// # Errors
    ///
    /// If the guest is gone.
    pub fn start_call<C: Call>(&mut self, call: C) -> Result<PendingCall<C>> {
        self.last += 1;
        let call: AnyCall = call.into();
        let description = format!("{call:?}");
        self.lines.send(&Request {
            id: self.last,
            call,
        })?;
        Ok(PendingCall {
            id: self.last,
            description,
            call: PhantomData,
        })
    }

    /// The answer to what was asked; `None` if there is none by the limit.
    ///
    /// # Errors
    ///
    /// If the guest says that it failed, or is gone.
    pub fn finish_call<C: Call>(
        &mut self,
        pending: &PendingCall<C>,
        timeout: Duration,
    ) -> Result<Option<C::Reply>> {
        let description = &pending.description;
        // A deadline is an instant, and there is none for ever.
        let timeout = timeout.min(Duration::from_secs(365 * 24 * 3600));
        loop {
            let response: Option<Response> = self
                .lines
                .receive(timeout)
                .with_context(|| description.clone())?;
            let Some(response) = response else {
                return Ok(None);
            };
            if response.id != pending.id {
                continue;
            }
            return match response.result {
                CallResult::Done(value) => serde_json::from_value(value)
                    .map(Some)
                    .with_context(|| format!("a strange answer to {description}")),
                CallResult::Failed(message) => bail!("guest: {message}"),
            };
        }
    }
}

/// Something that was asked and not answered yet.
#[derive(Debug)]
pub struct PendingCall<C> {
    id: u64,
    description: String,
    call: PhantomData<fn() -> C>,
}
