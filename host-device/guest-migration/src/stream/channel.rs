// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One channel of a received stream: its header, its records and its end.

use std::time::Duration;

use super::control::Control;
use super::decoder::{Decoder, Record};
use super::destination::OpenFiles;
use super::format::{Final, StreamHeader};
use super::format_error::Fault;
use super::receive_progress::ReceiveProgress;
use super::transport::Transport;
use super::StreamError;

/// One channel of a stream.
pub(super) struct Channel {
    pub(super) decoder: Decoder<Transport>,
    pub(super) header: StreamHeader,
    pub(super) accepted: bool,
}

impl Channel {
    pub(super) fn new(transport: Transport, timeout: Duration) -> Self {
        Self {
            decoder: Decoder::new(transport, timeout),
            header: StreamHeader {
                // Before the header is read, any sender on a two-way transport is told about a failure.
                answers: true,
                id: [0; 16],
                channel: 0,
                channels: 1,
                seed: 0,
                blocks: Vec::new(),
            },
            accepted: false,
        }
    }

    /// Reads the stream header, and compares it with the headers of the `others`.
    pub(super) fn read_header(
        &mut self,
        others: &[Self],
        accepts_many: bool,
    ) -> Result<(), StreamError> {
        let header = self.decoder.header()?;
        let fault = |fault| Err(self.decoder.fault(0, fault));
        if !accepts_many && header.channels > 1 {
            return fault(Fault::Channels {
                channel: header.channel,
                channels: header.channels,
            });
        }
        if let Some(first) = others.first() {
            let same = StreamHeader {
                channel: first.header.channel,
                ..header.clone()
            };
            if same != first.header {
                return fault(Fault::OtherMigration);
            }
        }
        if others.iter().any(|it| it.header.channel == header.channel) {
            return fault(Fault::DuplicateChannel(header.channel));
        }
        let transport = self.decoder.source();
        transport.set_channel(header.channel);
        if header.answers && !transport.is_two_way() {
            return Err(self.decoder.fault(0, Fault::OneWay));
        }
        self.header = header;
        Ok(())
    }
}

/// The end of one channel.
pub(super) struct ChannelResult {
    pub(super) last: Final,
    /// The last checksum of the channel before the final record.
    pub(super) chain: u64,
    /// Offset of the final record in the channel's stream, in bytes.
    pub(super) offset: u64,
    pub(super) iterations: u64,
}

/// The state that the threads of all channels share.
pub(super) struct ReceiveContext<'a> {
    pub(super) control: &'a Control,
    pub(super) progress: &'a ReceiveProgress,
    pub(super) opened: &'a OpenFiles,
    pub(super) channels: u16,
}

impl ReceiveContext<'_> {
    /// Receives all records of a channel.
    pub(super) fn run(&self, channel: &mut Channel) -> Result<ChannelResult, StreamError> {
        let decoder = &mut channel.decoder;
        let mut before = 0;
        let mut iterations = 0;
        let (last, chain, offset) = loop {
            self.control.check()?;
            let at = decoder.offset();
            let (pages, zeros) = match decoder.next()? {
                Record::Pages(run, bytes) => {
                    self.opened.write(run.block, run.first, bytes)?;
                    (run.pages, 0)
                }
                Record::Zeros(run) => {
                    self.opened.zero(run.block, run.first, run.pages)?;
                    (0, run.pages)
                }
                Record::IterationEnd(iteration) => {
                    // The next iteration may send a page again on another channel. That record must be applied last.
                    if !self.control.wait_at_barrier(self.channels)? {
                        return Err(decoder.fault(at, Fault::IterationsDiffer));
                    }
                    self.progress.set_iterations(iteration);
                    iterations = iteration;
                    (0, 0)
                }
                Record::Final(last, chain) => {
                    if !self.control.end_channel() {
                        return Err(decoder.fault(at, Fault::IterationsDiffer));
                    }
                    break (last, chain, at);
                }
            };
            self.progress.add(decoder.offset() - before, pages, zeros);
            before = decoder.offset();
        };
        self.progress.add(decoder.offset() - before, 0, 0);
        decoder.expect_end()?;
        Ok(ChannelResult {
            last,
            chain,
            offset,
            iterations,
        })
    }
}
