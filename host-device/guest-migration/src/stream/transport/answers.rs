// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The answers on a transport: sends those of a receiver, and reads them at the sender.

use std::io::{IoSlice, IoSliceMut};
use std::time::Duration;

use rustix::net::Shutdown;

use super::{Transport, TransportKind};
use crate::stream::format::{Answer, ANSWER_FIXED};
use crate::stream::format_error::Fault;
use crate::stream::StreamError;

/// How long to wait for the message of a receiver that has failed.
const RECEIVER_ERROR_TIMEOUT: Duration = Duration::from_secs(1);

impl Transport {
    /// Sends an answer to the sender.
    pub fn answer(&mut self, answer: &Answer) -> Result<(), StreamError> {
        // Answers do not count as bytes of the stream.
        let offset = self.offset;
        self.answers = true;
        let done = self.write(&mut [IoSlice::new(&answer.encode())]);
        self.offset = offset;
        done
    }

    /// Sends a last answer on a socket, and shuts down the sending direction. Works on a stopped stream as well.
    pub fn send_and_shut_down(&self, answer: &Answer) {
        if self.kind == TransportKind::Socket {
            // Best effort: the buffer of an idle direction has room for the answer. A dead peer does not need it.
            let _ = rustix::io::write(&self.fd, &answer.encode());
            let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
        }
    }

    /// Waits for an answer. [`Answer::Refused`] and [`Answer::Failed`] are returned as errors.
    pub fn next_answer(&mut self, timeout: Duration) -> Result<Answer, StreamError> {
        let offset = self.offset;
        let answer = self.read_answer(timeout);
        self.offset = offset;
        match answer? {
            Answer::Refused(words) => Err(StreamError::Refused(words)),
            Answer::Failed(words) => Err(StreamError::ReceiverFailed(words)),
            answer => Ok(answer),
        }
    }

    fn read_answer(&mut self, timeout: Duration) -> Result<Answer, StreamError> {
        let channel = self.channel;
        let fault = |fault: Fault| StreamError::Answer { channel, fault };
        let mut fixed = [0; ANSWER_FIXED];
        self.read_exact(&mut fixed, timeout)?;
        let rest = Answer::rest(&fixed).map_err(fault)?;
        let mut bytes = fixed.to_vec();
        bytes.resize(ANSWER_FIXED + rest, 0);
        if let Some(rest) = bytes.get_mut(ANSWER_FIXED..) {
            self.read_exact(rest, timeout)?;
        }
        Answer::decode(&bytes).map_err(fault)
    }

    fn read_exact(&mut self, mut bytes: &mut [u8], timeout: Duration) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let count = self.read(&mut [IoSliceMut::new(bytes)], Some(timeout))?;
            if count == 0 {
                return Err(self.closed());
            }
            bytes = bytes.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Returns the failure that the receiver reported before the end of the connection, or else `error`.
    pub(super) fn receiver_error_or(&mut self, error: StreamError) -> StreamError {
        let error = self.stop_reason_or(error);
        let hears = self.kind == TransportKind::Socket && !self.answers;
        if !hears || matches!(error, StreamError::Cancelled) {
            return error;
        }
        match self.next_answer(RECEIVER_ERROR_TIMEOUT) {
            Err(words @ (StreamError::ReceiverFailed(_) | StreamError::Refused(_))) => words,
            Err(cancelled @ StreamError::Cancelled) => cancelled,
            Err(_) => error,
            Ok(answer) => StreamError::Answer {
                channel: self.channel,
                fault: Fault::AnswerKind(answer.number()),
            },
        }
    }
}
