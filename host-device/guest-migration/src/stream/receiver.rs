// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiving side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::decoder::{Decoder, Record};
use super::destination::{Destination, IncompleteFiles, OpenFiles};
use super::endpoint::Listener;
use super::error::Fault;
use super::format::{stream_digest, Answer, Final, StreamCounts, StreamHeader, CHANNELS_MAX};
use super::receive_progress::{ReceivePhase, ReceiveProgress};
use super::transport::Transport;
use super::{Address, StreamError};
use crate::digest::PageHasher;
use crate::CancelToken;

/// How often a sender that waits for the verdict is told to wait on.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);
/// How long a sender has to hear why its stream was given up.
const LINGER: Duration = Duration::from_secs(2);

/// How a stream is received.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// How long to wait for a sender's first channel; `None` is for ever.
    pub accept_timeout: Option<Duration>,
    /// How long the sender may take for its other channels and its headers, and inside a record. Between records it may
    /// be silent for as long as it likes: a connection that dies meanwhile is noticed.
    pub timeout: Duration,
    /// Ends it from another thread.
    pub cancel: CancelToken,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            accept_timeout: None,
            timeout: Duration::from_secs(30),
            cancel: CancelToken::default(),
        }
    }
}

/// What was received, when all is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Bytes of the stream, of all channels.
    pub bytes: u64,
    /// Pages with content, each as often as it came.
    pub pages: u64,
    /// Pages of zeros, each as often as they came.
    pub zeros: u64,
    /// Rounds that were ended.
    pub iterations: u64,
    /// Channels.
    pub channels: u16,
    /// The blocks' names, numbers of pages and files.
    pub blocks: Vec<(String, u64, PathBuf)>,
    /// The files were compared with the sender's digest of its memory, and are the same.
    pub content_checked: bool,
}

/// Receives one stream.
///
/// Its destination is marked as incomplete from the moment that there is a receiver.
#[derive(Debug)]
pub struct Receiver {
    address: Address,
    /// Until all channels are there: whoever comes later is refused by the system, at once.
    listener: Option<Listener>,
    marked: IncompleteFiles,
    options: ReceiverOptions,
    control: Arc<Control>,
    progress: ReceiveProgress,
}

/// Receives one stream that comes to `address` into `destination`, and waits for it as long as it takes.
///
/// # Errors
///
/// As [`Receiver::new`] and [`Receiver::run`].
pub fn receive(address: &Address, destination: Destination) -> Result<Received, StreamError> {
    let listener = Listener::bind(address)?;
    Receiver::new(listener, destination, ReceiverOptions::default())?.run()
}

impl Receiver {
    /// A receiver for one stream; marks the destination as incomplete.
    ///
    /// # Errors
    ///
    /// [`StreamError::Destination`] if that cannot be, or another receiver is at work on the same files.
    pub fn new(
        listener: Listener,
        destination: Destination,
        options: ReceiverOptions,
    ) -> Result<Self, StreamError> {
        let control = Control::new(&options.cancel)?;
        Ok(Self {
            address: listener.address().clone(),
            listener: Some(listener),
            marked: destination.mark_incomplete()?,
            options,
            control,
            progress: ReceiveProgress::default(),
        })
    }

    /// How far it has come, readable from other threads.
    pub fn progress(&self) -> ReceiveProgress {
        self.progress.clone()
    }

    /// Where it listens: with the port that it got.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a sender, and takes its stream in. Where the sender can hear it, it is told how that went.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the stream, the transport or the files. The files stay marked as incomplete then.
    pub fn run(mut self) -> Result<Received, StreamError> {
        let mut channels = Vec::new();
        let done = self.receive(&mut channels);
        self.progress.set_phase(ReceivePhase::Ended);
        if let Err(error) = &done {
            self.marked.write_failure(&error.to_string());
            report_failure(&mut channels, error);
        }
        done
    }

    fn receive(&mut self, channels: &mut Vec<Channel>) -> Result<Received, StreamError> {
        let opened = self
            .accept(channels)
            .map_err(|error| self.control.stop(error))?;
        self.progress.set_phase(ReceivePhase::Receiving);
        let finals = self.receive_records(channels, &opened)?;
        self.progress.set_phase(ReceivePhase::Checking);
        let (counts, checked) = self
            .check(channels, &finals, &opened)
            .map_err(|error| self.control.stop(error))?;
        let first = channels.first();
        let blocks = first.map(|channel| channel.header.blocks.as_slice());
        let blocks = blocks.unwrap_or_default().iter().zip(opened.paths());
        let received = Received {
            bytes: channels.iter().map(|it| it.decoder.offset()).sum(),
            pages: counts.pages,
            zeros: counts.zeros,
            iterations: finals.first().map_or(0, |last| last.iterations),
            channels: u16::try_from(channels.len()).unwrap_or(CHANNELS_MAX),
            blocks: blocks
                .map(|(block, path)| (block.name.clone(), block.pages, path))
                .collect(),
            content_checked: checked,
        };
        self.marked.complete()?;
        // A sender that cannot be told goes on as if all had failed, and so does this side.
        if let Some(channel) = channels.first_mut().filter(|it| it.header.answers) {
            channel.decoder.source().answer(&Answer::Complete)?;
        }
        Ok(received)
    }

    /// Takes all channels and their headers, opens the files, and accepts the stream.
    fn accept(&mut self, channels: &mut Vec<Channel>) -> Result<OpenFiles, StreamError> {
        let Some(mut listener) = self.listener.take() else {
            return Err(StreamError::Cancelled);
        };
        let mut wanted = 1;
        let mut timeout = self.options.accept_timeout;
        let mut end = None;
        while channels.len() < usize::from(wanted) {
            let accepted = listener.accept(&self.control, timeout)?;
            let Some(fd) = accepted else {
                return Err(StreamError::MissingChannels {
                    there: channels.len(),
                    wanted: usize::from(wanted),
                    timeout: timeout.unwrap_or_default(),
                });
            };
            let now = Instant::now();
            let transport = Transport::new(fd, &self.control, 0, self.options.timeout)?;
            channels.push(Channel::new(transport, self.options.timeout));
            let accepts_many = listener.accepts_many();
            let (newest, others) = match channels.split_last_mut() {
                Some(split) => split,
                None => continue,
            };
            newest.read_header(others, accepts_many)?;
            wanted = newest.header.channels;
            let end = *end.get_or_insert(now.checked_add(self.options.timeout));
            timeout = end.map(|end| end.saturating_duration_since(Instant::now()));
        }
        drop(listener);
        channels.sort_by_key(|channel| channel.header.channel);
        let blocks = match channels.first() {
            Some(first) => &first.header.blocks,
            None => return Err(StreamError::Cancelled),
        };
        self.progress
            .set_total(blocks.iter().map(|block| block.pages).sum());
        let opened = self.marked.open(blocks)?;
        for channel in channels {
            channel.accepted = true;
            if channel.header.answers {
                channel.decoder.source().answer(&Answer::Accepted)?;
            }
        }
        Ok(opened)
    }

    /// Takes in all records of all channels, each in its thread.
    fn receive_records(
        &self,
        channels: &mut [Channel],
        opened: &OpenFiles,
    ) -> Result<Vec<ChannelResult>, StreamError> {
        let count = u16::try_from(channels.len()).unwrap_or(CHANNELS_MAX);
        let inward = ReceiveContext {
            control: &self.control,
            progress: &self.progress,
            opened,
            channels: count,
        };
        if let [only] = channels {
            let ended = inward.run(only).map_err(|error| self.control.stop(error))?;
            return Ok(vec![ended]);
        }
        std::thread::scope(|scope| {
            let inward = &inward;
            let threads: Vec<_> = channels
                .iter_mut()
                .map(|channel| {
                    scope.spawn(move || {
                        let ended = inward.run(channel);
                        ended.map_err(|error| inward.control.stop(error))
                    })
                })
                .collect();
            let ended = threads.into_iter().map(|thread| match thread.join() {
                Ok(ended) => ended,
                // The thread has reported its panic.
                Err(_) => Err(self.control.stop(StreamError::Cancelled)),
            });
            ended.collect()
        })
    }

    /// Looks at the whole. Returns what has come, and whether the files' content was compared.
    fn check(
        &self,
        channels: &mut [Channel],
        finals: &[ChannelResult],
        opened: &OpenFiles,
    ) -> Result<(StreamCounts, bool), StreamError> {
        let (Some(channel), Some(first)) = (channels.first_mut(), finals.first()) else {
            return Err(StreamError::Cancelled);
        };
        let fault = |fault| channel.decoder.fault(first.offset, fault);
        let totals = first.last.totals;
        if finals.iter().any(|it| it.last.totals != totals) {
            return Err(fault(Fault::FinalRecordsDiffer));
        }
        let mut seen = StreamCounts::default();
        for ended in finals {
            seen.add(ended.last.counts);
        }
        let said = totals.counts;
        for (what, said, seen) in [
            ("pages on all channels", said.pages, seen.pages),
            ("zero pages on all channels", said.zeros, seen.zeros),
            ("bytes of pages on all channels", said.payload, seen.payload),
        ] {
            if said != seen {
                return Err(fault(Fault::Count { what, said, seen }));
            }
        }
        if stream_digest(finals.iter().map(|ended| ended.chain)) != totals.stream {
            return Err(fault(Fault::StreamDigest));
        }
        let Some(there) = totals.content else {
            return Ok((seen, false));
        };
        let hasher = PageHasher::new(channel.header.seed);
        let (answers, transport) = (channel.header.answers, channel.decoder.source());
        let mut said = Instant::now();
        let here = opened.digest(&hasher, || {
            self.control.check()?;
            if answers && said.elapsed() >= WORKING_INTERVAL {
                said = Instant::now();
                transport.answer(&Answer::Working)?;
            }
            Ok::<(), StreamError>(())
        })?;
        let here = here.value();
        if here == there {
            Ok((seen, true))
        } else {
            Err(StreamError::ContentMismatch { here, there })
        }
    }
}

/// One channel of a stream.
struct Channel {
    decoder: Decoder<Transport>,
    header: StreamHeader,
    accepted: bool,
}

impl Channel {
    fn new(transport: Transport, timeout: Duration) -> Self {
        Self {
            decoder: Decoder::new(transport, timeout),
            header: StreamHeader {
                // Until the header has come, a sender that can be answered is told what is wrong.
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

    /// Reads the header, and compares it with those of the channels before.
    fn read_header(&mut self, others: &[Self], accepts_many: bool) -> Result<(), StreamError> {
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

/// How a channel ended.
struct ChannelResult {
    last: Final,
    /// Its check value before the final record, and where that is.
    chain: u64,
    offset: u64,
    iterations: u64,
}

/// What the threads of the channels share.
struct ReceiveContext<'a> {
    control: &'a Control,
    progress: &'a ReceiveProgress,
    opened: &'a OpenFiles,
    channels: u16,
}

impl ReceiveContext<'_> {
    /// Takes in the records of a channel.
    fn run(&self, channel: &mut Channel) -> Result<ChannelResult, StreamError> {
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
                    // What is sent again in the next round must not be overtaken by another channel's of this one.
                    self.control.wait_at_barrier(self.channels)?;
                    self.progress.set_iterations(iteration);
                    iterations = iteration;
                    (0, 0)
                }
                Record::Final(last, chain) => break (last, chain, at),
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

/// Tells the senders that can hear it why their stream has ended.
fn report_failure(channels: &mut [Channel], error: &StreamError) {
    for channel in channels.iter_mut().filter(|it| it.header.answers) {
        let words = error.to_string();
        let answer = match channel.accepted {
            true => Answer::Failed(words),
            false => Answer::Refused(words),
        };
        channel.decoder.source().send_and_shut_down(&answer);
    }
    if let Some(end) = Instant::now().checked_add(LINGER) {
        for channel in channels.iter_mut().filter(|it| it.header.answers) {
            channel.decoder.source().drain(end);
        }
    }
}
