// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiving side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::decoder::{Decoder, Record};
use super::destination::{Destination, Marked, Opened};
use super::error::Fault;
use super::format::{stream_digest, Answer, Counts, Final, Header, CHANNELS_MAX};
use super::progress::{Phase, Progress};
use super::transport::Listener;
use super::wire::Wire;
use super::{Address, StreamError};
use crate::digest::PageHasher;
use crate::Cancel;

/// How often a sender that waits for the verdict is told to wait on.
const STILL_WORKING: Duration = Duration::from_secs(1);
/// How long a sender has to hear why its stream was given up.
const LINGER: Duration = Duration::from_secs(2);

/// How a stream is received.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// How long to wait for a sender's first channel; `None` is for ever.
    pub wait: Option<Duration>,
    /// How long the sender may take for its other channels and its headers, and inside a record. Between records it may
    /// be silent for as long as it likes: a connection that dies meanwhile is noticed.
    pub limit: Duration,
    /// Ends it from another thread.
    pub cancel: Cancel,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            wait: None,
            limit: Duration::from_secs(30),
            cancel: Cancel::default(),
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
    pub rounds: u64,
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
    marked: Marked,
    options: ReceiverOptions,
    control: Arc<Control>,
    progress: Progress,
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
            marked: destination.mark()?,
            options,
            control,
            progress: Progress::default(),
        })
    }

    /// How far it has come, readable from other threads.
    pub fn progress(&self) -> Progress {
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
        self.progress.set_phase(Phase::Ended);
        if let Err(error) = &done {
            self.marked.failed(&error.to_string());
            hang_up(&mut channels, error);
        }
        done
    }

    fn receive(&mut self, channels: &mut Vec<Channel>) -> Result<Received, StreamError> {
        let opened = self
            .accept(channels)
            .map_err(|error| self.control.stop(error))?;
        self.progress.set_phase(Phase::Receiving);
        let finals = self.take_in(channels, &opened)?;
        self.progress.set_phase(Phase::Checking);
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
            rounds: finals.first().map_or(0, |last| last.rounds),
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
    fn accept(&mut self, channels: &mut Vec<Channel>) -> Result<Opened, StreamError> {
        let Some(mut listener) = self.listener.take() else {
            return Err(StreamError::Cancelled);
        };
        let mut wanted = 1;
        let mut limit = self.options.wait;
        let mut end = None;
        while channels.len() < usize::from(wanted) {
            let accepted = listener.accept(&self.control, limit)?;
            let Some(fd) = accepted else {
                return Err(StreamError::Missing {
                    there: channels.len(),
                    wanted: usize::from(wanted),
                    limit: limit.unwrap_or_default(),
                });
            };
            let now = Instant::now();
            let wire = Wire::new(fd, &self.control, 0, self.options.limit)?;
            channels.push(Channel::new(wire, self.options.limit));
            let many = listener.many();
            let (newest, others) = match channels.split_last_mut() {
                Some(split) => split,
                None => continue,
            };
            newest.greet(others, many)?;
            wanted = newest.header.channels;
            let end = *end.get_or_insert(now.checked_add(self.options.limit));
            limit = end.map(|end| end.saturating_duration_since(Instant::now()));
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
    fn take_in(
        &self,
        channels: &mut [Channel],
        opened: &Opened,
    ) -> Result<Vec<Ended>, StreamError> {
        let count = u16::try_from(channels.len()).unwrap_or(CHANNELS_MAX);
        let inward = Inward {
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
        finals: &[Ended],
        opened: &Opened,
    ) -> Result<(Counts, bool), StreamError> {
        let (Some(channel), Some(first)) = (channels.first_mut(), finals.first()) else {
            return Err(StreamError::Cancelled);
        };
        let fault = |fault| channel.decoder.fault(first.offset, fault);
        let totals = first.last.totals;
        if finals.iter().any(|it| it.last.totals != totals) {
            return Err(fault(Fault::Finals));
        }
        let mut seen = Counts::default();
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
        let (answers, wire) = (channel.header.answers, channel.decoder.source());
        let mut said = Instant::now();
        let here = opened.digest(&hasher, || {
            self.control.check()?;
            if answers && said.elapsed() >= STILL_WORKING {
                said = Instant::now();
                wire.answer(&Answer::Working)?;
            }
            Ok::<(), StreamError>(())
        })?;
        let here = here.value();
        if here == there {
            Ok((seen, true))
        } else {
            Err(StreamError::Content { here, there })
        }
    }
}

/// One channel of a stream.
struct Channel {
    decoder: Decoder<Wire>,
    header: Header,
    accepted: bool,
}

impl Channel {
    fn new(wire: Wire, limit: Duration) -> Self {
        Self {
            decoder: Decoder::start(wire, limit),
            header: Header {
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
    fn greet(&mut self, others: &[Self], many: bool) -> Result<(), StreamError> {
        let header = self.decoder.header()?;
        let fault = |fault| Err(self.decoder.fault(0, fault));
        if !many && header.channels > 1 {
            return fault(Fault::Channels {
                channel: header.channel,
                channels: header.channels,
            });
        }
        if let Some(first) = others.first() {
            let same = Header {
                channel: first.header.channel,
                ..header.clone()
            };
            if same != first.header {
                return fault(Fault::OtherMigration);
            }
        }
        if others.iter().any(|it| it.header.channel == header.channel) {
            return fault(Fault::ChannelTwice(header.channel));
        }
        let wire = self.decoder.source();
        wire.set_channel(header.channel);
        if header.answers && !wire.two_way() {
            return Err(self.decoder.fault(0, Fault::OneWay));
        }
        self.header = header;
        Ok(())
    }
}

/// How a channel ended.
struct Ended {
    last: Final,
    /// Its check value before the final record, and where that is.
    chain: u64,
    offset: u64,
    rounds: u64,
}

/// What the threads of the channels share.
struct Inward<'a> {
    control: &'a Control,
    progress: &'a Progress,
    opened: &'a Opened,
    channels: u16,
}

impl Inward<'_> {
    /// Takes in the records of a channel.
    fn run(&self, channel: &mut Channel) -> Result<Ended, StreamError> {
        let decoder = &mut channel.decoder;
        let mut before = 0;
        let mut rounds = 0;
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
                Record::Round(round) => {
                    // What is sent again in the next round must not be overtaken by another channel's of this one.
                    self.control.meet(self.channels)?;
                    self.progress.set_rounds(round);
                    rounds = round;
                    (0, 0)
                }
                Record::Final(last, chain) => break (last, chain, at),
            };
            self.progress.add(decoder.offset() - before, pages, zeros);
            before = decoder.offset();
        };
        self.progress.add(decoder.offset() - before, 0, 0);
        decoder.nothing_follows()?;
        Ok(Ended {
            last,
            chain,
            offset,
            rounds,
        })
    }
}

/// Tells the senders that can hear it why their stream has ended.
fn hang_up(channels: &mut [Channel], error: &StreamError) {
    for channel in channels.iter_mut().filter(|it| it.header.answers) {
        let words = error.to_string();
        let answer = match channel.accepted {
            true => Answer::Failed(words),
            false => Answer::Refused(words),
        };
        channel.decoder.source().say_why(&answer);
    }
    if let Some(end) = Instant::now().checked_add(LINGER) {
        for channel in channels.iter_mut().filter(|it| it.header.answers) {
            channel.decoder.source().drain(end);
        }
    }
}
