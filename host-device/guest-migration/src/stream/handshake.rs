// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The start of a stream at the sender: the stream headers, and the wait for an answer.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use super::format::{Answer, RamBlockEntry, StreamHeader, CHANNELS_MAX};
use super::transport::Transport;
use super::StreamError;
use crate::Layout;

pub(super) fn check_channels(count: usize) -> Result<u16, StreamError> {
    match u16::try_from(count) {
        Ok(channels) if (1..=CHANNELS_MAX).contains(&channels) => Ok(channels),
        _ => Err(StreamError::Options(format!(
            "stream has 1 to {CHANNELS_MAX} channels, not {count}"
        ))),
    }
}

/// Writes the stream header on each channel. Returns the headers' checksums, which start the checksum chains.
pub(super) fn send_headers(
    wires: &mut [Transport],
    layout: &Layout,
    answers: bool,
    seed: u64,
) -> Result<Vec<u64>, StreamError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
        StreamError::System {
            doing: "cannot get a random migration id",
            source: Arc::new(error.into()),
        }
    })?;
    let blocks = layout.blocks().iter().map(|block| RamBlockEntry {
        name: block.name().to_owned(),
        pages: block.pages(),
    });
    let mut header = StreamHeader {
        answers,
        id,
        channel: 0,
        channels: check_channels(wires.len())?,
        seed,
        blocks: blocks.collect(),
    };
    let mut chains = Vec::new();
    for transport in wires {
        header.channel = transport.channel();
        let (bytes, chain) = header.encode().ok_or_else(|| {
            StreamError::Options(
                "stream format does not support this number or size of RAM blocks".into(),
            )
        })?;
        transport.write(&mut [IoSlice::new(&bytes)])?;
        chains.push(chain);
    }
    Ok(chains)
}

/// Waits for the answer `expected`. Each [`Answer::Working`] restarts the timeout.
pub(super) fn expect(
    transport: &mut Transport,
    expected: &Answer,
    timeout: Duration,
) -> Result<(), StreamError> {
    loop {
        let answer = transport.next_answer(timeout)?;
        if answer == *expected {
            return Ok(());
        }
        if answer != Answer::Working {
            return Err(StreamError::Answer {
                channel: transport.channel(),
                fault: super::Fault::AnswerKind(answer.number()),
            });
        }
    }
}
