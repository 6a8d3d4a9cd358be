// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The answers of a receiver.

use xxhash_rust::xxh3::xxh3_64;

use super::fields::{Fields, CHECKSUM_SIZE};
use super::limits::MESSAGE_MAX;
use crate::stream::format_error::Fault;

pub(in crate::stream) const ANSWER_FIXED: usize = 8;
const ANSWER_MAGIC: [u8; 4] = *b"\x8dANS";

/// An answer of the receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::stream) enum Answer {
    /// The receiver accepts the stream. The sender can send records.
    Accepted,
    /// The receiver refuses the stream, for the reason in the message.
    Refused(String),
    /// The whole stream is received and verified. The memory files are no longer marked as incomplete.
    Complete,
    /// The receiver accepted the stream and failed later, for the reason in the message.
    Failed(String),
    /// The whole stream is received, and the receiver still verifies it. The sender keeps waiting.
    Working,
}

impl Answer {
    pub const fn number(&self) -> u8 {
        match self {
            Self::Accepted => 1,
            Self::Refused(_) => 2,
            Self::Complete => 3,
            Self::Failed(_) => 4,
            Self::Working => 5,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let words = match self {
            Self::Refused(words) | Self::Failed(words) => shortened(words),
            _ => "",
        };
        let mut bytes = ANSWER_MAGIC.to_vec();
        bytes.extend([self.number(), 0]);
        // The cast does not truncate: `shortened` limits the length to `MESSAGE_MAX`.
        bytes.extend((words.len() as u16).to_le_bytes());
        bytes.extend(words.bytes());
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// Returns how many bytes follow the first [`ANSWER_FIXED`] bytes of an answer.
    pub fn rest(fixed: &[u8; ANSWER_FIXED]) -> Result<usize, Fault> {
        let mut fields = Fields(fixed);
        if fields.array() != Some(ANSWER_MAGIC) {
            return Err(Fault::AnswerFormat);
        }
        fields.u16();
        match fields.u16() {
            Some(words) if words <= MESSAGE_MAX => Ok(usize::from(words) + CHECKSUM_SIZE),
            words => Err(Fault::AnswerMessage(words.unwrap_or(0))),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let parts = bytes
            .split_last_chunk::<CHECKSUM_SIZE>()
            .and_then(|(body, check)| Some((body, check, body.split_at_checked(ANSWER_FIXED)?)));
        let Some((body, check, (fixed, words))) = parts else {
            return Err(Fault::AnswerFormat);
        };
        if xxh3_64(body) != u64::from_le_bytes(*check) {
            return Err(Fault::AnswerFormat);
        }
        let words = || printable(&String::from_utf8_lossy(words));
        match fixed.get(4).copied() {
            Some(1) => Ok(Self::Accepted),
            Some(2) => Ok(Self::Refused(words())),
            Some(3) => Ok(Self::Complete),
            Some(4) => Ok(Self::Failed(words())),
            Some(5) => Ok(Self::Working),
            kind => Err(Fault::AnswerKind(kind.unwrap_or(0))),
        }
    }
}

/// Returns the longest prefix of `text` with at most [`MESSAGE_MAX`] bytes that ends between two characters.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(usize::from(MESSAGE_MAX));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}

/// Returns the peer's message with control characters replaced by spaces, so that it can be printed on a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
