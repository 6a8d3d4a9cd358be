// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's connection to the guest agent.

use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{AnyCall, Call};
use guest_agent::protocol::{CallResult, Hello, Request, Response, VERSION};
use qmp_client::JsonLines;

use crate::HANG_TIMEOUT;

/// The timeout of a call without its own. The agent's own timeouts are at most [`HANG_TIMEOUT`], so the agent's error
/// message comes first and names the reason.
const CALL_TIMEOUT: Duration = Duration::from_secs(HANG_TIMEOUT.as_secs() + 60);

/// The maximum length of an answer: a whole kernel log, or a file.
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

/// A connection to the agent of a guest that is up.
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
    /// Fails if the guest does not come up within `timeout`, or has an agent of another version.
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
    /// Same as [`AgentClient::connect`].
    pub fn reconnect(&mut self, timeout: Duration) -> Result<()> {
        self.hello = receive_hello(&mut self.lines, timeout)?;
        Ok(())
    }

    /// Continues on the stream of the machine to which the guest has been migrated.
    pub fn switch_stream(&mut self, stream: UnixStream) {
        self.lines = Self::lines(stream);
    }

    fn lines(stream: UnixStream) -> JsonLines {
        JsonLines::new(stream, "the guest's agent").with_max_line(MAX_LINE)
    }

    /// Returns the guest's hello message.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Sends a call to the guest and waits for the answer.
    ///
    /// # Errors
    ///
    /// Fails if the guest reports an error, the connection is closed, or the guest does not answer within
    /// [`HANG_TIMEOUT`] and a minute.
    pub fn call<C: Call>(&mut self, call: C) -> Result<C::Reply> {
        self.call_within(call, CALL_TIMEOUT)
    }

    /// Does the same as [`AgentClient::call`], with another timeout; `Duration::MAX` for a shell.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
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

    /// Sends a call to the guest. [`AgentClient::finish_call`] waits for the answer. Answers to earlier calls are
    /// dropped.
    ///
    /// # Errors
    ///
    /// Fails if the connection is closed.
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

    /// Waits for the answer to a call. Returns `None` after `timeout`.
    ///
    /// # Errors
    ///
    /// Fails if the guest reports an error, or the connection is closed.
    pub fn finish_call<C: Call>(
        &mut self,
        pending: &PendingCall<C>,
        timeout: Duration,
    ) -> Result<Option<C::Reply>> {
        let description = &pending.description;
        // An `Instant` cannot represent a deadline after `Duration::MAX`.
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

/// A call that is sent and not answered yet.
#[derive(Debug)]
pub struct PendingCall<C> {
    id: u64,
    description: String,
    call: PhantomData<fn() -> C>,
}
