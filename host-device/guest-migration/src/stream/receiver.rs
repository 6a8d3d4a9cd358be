// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiver of a stream.
//!
//! The receiver accepts all channels, opens the memory files and accepts the stream. Then it receives the records of
//! each channel in a thread; with one channel, in the thread of the caller. After the final records it verifies counts
//! and digests, and removes the markers of the memory files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Channel, ChannelResult, ReceiveContext};
use super::control::Control;
use super::destination::{Destination, IncompleteFiles, OpenFiles};
use super::format::{stream_digest, Answer, StreamCounts, CHANNELS_MAX};
use super::format_error::Fault;
use super::listener::Listener;
use super::receive_progress::{ReceivePhase, ReceiveProgress};
use super::transport::Transport;
use super::{Address, StreamError};
use crate::digest::PageHasher;
use crate::CancelToken;

/// Interval of [`Answer::Working`] while the receiver verifies the memory files.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);
/// How long the receiver waits, after a failure, until the senders have closed their connections.
const LINGER: Duration = Duration::from_secs(2);

/// Options of a [`Receiver`].
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// How long to wait for the first channel. `None` waits without a timeout.
    pub accept_timeout: Option<Duration>,
    /// How long to wait for the other channels and the headers, inside a record, and for the sender to take an answer.
    /// Between records the sender may be silent without a timeout. The end of the connection is still noticed.
    pub timeout: Duration,
    /// Cancels the receiver from another thread.
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

/// The result of a received stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Bytes of the stream, of all channels.
    pub bytes: u64,
    /// Pages with content. A page that is received several times counts each time.
    pub pages: u64,
    /// Zero pages. A page that is received several times counts each time.
    pub zeros: u64,
    /// Number of iterations that have ended.
    pub iterations: u64,
    /// Number of channels.
    pub channels: u16,
    /// Name, number of pages and memory file of each RAM block.
    pub blocks: Vec<(String, u64, PathBuf)>,
    /// Whether the memory files were compared with the sender's content digest. They are equal then.
    pub content_checked: bool,
}

/// Receives one stream.
///
/// The destination is marked as incomplete when the receiver is created.
#[derive(Debug)]
pub struct Receiver {
    address: Address,
    /// Dropped when all channels are connected. The kernel then refuses further connections at once, unless the
    /// listening socket is open elsewhere.
    listener: Option<Listener>,
    marked: IncompleteFiles,
    options: ReceiverOptions,
    control: Arc<Control>,
    progress: ReceiveProgress,
}

/// Receives one stream at `address` into `destination`. Waits for a sender without a timeout.
///
/// # Errors
///
/// As [`Receiver::new`] and [`Receiver::run`].
pub fn receive(address: &Address, destination: Destination) -> Result<Received, StreamError> {
    let listener = Listener::bind(address)?;
    Receiver::new(listener, destination, ReceiverOptions::default())?.run()
}

impl Receiver {
    /// Creates a receiver for one stream, and marks the destination as incomplete.
    ///
    /// # Errors
    ///
    /// [`StreamError::Destination`] if the destination cannot be marked, or another receiver uses the same files;
    /// [`StreamError::System`] if no eventfd can be created.
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

    /// Returns the progress of the receiver, for other threads.
    pub fn progress(&self) -> ReceiveProgress {
        self.progress.clone()
    }

    /// Returns the address that the receiver listens at, with the actual port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a sender and receives its stream. On a two-way transport, tells the sender the result.
    ///
    /// # Errors
    ///
    /// A fault in the stream, a failure of the transport or the memory files, or a cancellation. The memory files stay
    /// marked as incomplete then.
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
        // A sender that does not get this answer treats the migration as failed. So the receiver fails as well.
        if let Some(channel) = channels.first_mut().filter(|it| it.header.answers) {
            channel.decoder.source().answer(&Answer::Complete)?;
        }
        Ok(received)
    }

    /// Accepts all channels, reads their headers, opens the memory files, and accepts the stream.
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

    /// Receives all records of all channels. With several channels, each has a thread.
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
                // The panic message is already printed.
                Err(_) => Err(self.control.stop(StreamError::Cancelled)),
            });
            ended.collect()
        })
    }

    /// Verifies the final counts and the digests. Returns the counts, and whether the files' content was compared.
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

/// Tells every sender that waits for answers why the stream has failed.
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
