// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sending side.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::control::Control;
use super::encoder::{invalid_run, Encoder};
use super::endpoint::connect_to;
use super::format::{
    stream_digest, Answer, RamBlockEntry, StreamHeader, Totals, CHANNELS_MAX, RECORD_PAGES,
};
use super::transport::Transport;
use super::workers::Workers;
use super::{Address, StreamError};
use crate::{CancelToken, Layout, Memory, PageRun};

/// Where a stream goes.
#[derive(Debug)]
pub enum Target {
    /// To be connected to, or opened.
    Address(Address),
    /// Open already: one descriptor a channel.
    Connected(Vec<OwnedFd>),
}

impl From<Address> for Target {
    fn from(address: Address) -> Self {
        Self::Address(address)
    }
}

/// How pages are packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// With zstd, at this level.
    Zstd(i32),
}

/// How a stream is sent.
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Connections, over which pages are spread by as many threads.
    pub channels: u16,
    /// How pages are packed. What does not become smaller goes as it is.
    pub compression: Compression,
    /// The seed of the content digest that [`Writer::finish`] is given, if it is given one.
    pub seed: u64,
    /// How long the other side may take to be reached, to accept, to take more, and to answer.
    pub timeout: Duration,
    /// Ends the stream from another thread, also while it is being started.
    pub cancel: CancelToken,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            channels: 1,
            compression: Compression::None,
            seed: 0,
            timeout: Duration::from_secs(60),
            cancel: CancelToken::default(),
        }
    }
}

/// What was sent, when all is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Pages with content, each as often as it was sent.
    pub pages: u64,
    /// Pages of zeros, each as often as it was sent.
    pub zeros: u64,
    /// Rounds that were ended.
    pub iterations: u64,
    /// The receiver has said that all is there and right. On a one-way transport nobody says so.
    pub confirmed: bool,
}

/// Sends a stream.
///
/// Pages of one place always take the same channel, so what is sent later is applied later, also within a round.
/// Dropping it before [`finish`](Self::finish) breaks the stream off: the receiver sees that it is incomplete.
pub struct Writer {
    channels: Channels,
    control: Arc<Control>,
    cancel: CancelToken,
    blocks: Vec<u64>,
    bytes: Arc<AtomicU64>,
    iterations: u64,
    timeout: Duration,
    /// All was sent and, if somebody could say so, has arrived.
    done: bool,
}

enum Channels {
    /// The caller writes.
    One(Box<Encoder>),
    Many(Workers),
    Finished,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("bytes", &self.bytes())
            .field("rounds", &self.iterations)
            .finish_non_exhaustive()
    }
}

impl Writer {
    /// Connects, writes the headers, and waits on a two-way transport until the receiver has accepted them.
    ///
    /// # Errors
    ///
    /// The target cannot be reached or does not fit the options; the receiver refuses ([`StreamError::Refused`], with
    /// its words) or says nothing within the limit; the stream was cancelled.
    pub fn start(
        target: impl Into<Target>,
        layout: &Layout,
        options: WriterOptions,
    ) -> Result<Self, StreamError> {
        let control = Control::new(&options.cancel)?;
        Self::start_on(&control, target.into(), layout, options).map_err(|error| {
            let reason = control.stop(error);
            control.cancel();
            reason
        })
    }

    fn start_on(
        control: &Arc<Control>,
        target: Target,
        layout: &Layout,
        options: WriterOptions,
    ) -> Result<Self, StreamError> {
        let WriterOptions {
            channels,
            compression,
            seed,
            timeout,
            cancel,
        } = options;
        let fds = match target {
            Target::Connected(fds) => fds,
            Target::Address(address) => {
                check_channels(usize::from(channels))?;
                connect_to(&address, channels, control, timeout)?
            }
        };
        let channels = check_channels(fds.len())?;
        let wires = fds.into_iter().zip(0..channels);
        let mut wires: Vec<Transport> = wires
            .map(|(fd, channel)| Transport::new(fd, control, channel, timeout))
            .collect::<Result<_, _>>()?;
        let is_two_way = wires.iter().all(Transport::is_two_way);
        if !is_two_way && channels > 1 {
            return Err(StreamError::Options(
                "several channels need stream sockets".into(),
            ));
        }
        let bytes = Arc::new(AtomicU64::new(0));
        let chains = send_headers(&mut wires, layout, is_two_way, seed)?;
        if is_two_way {
            for transport in &mut wires {
                expect(transport, &Answer::Accepted, timeout)?;
            }
        }
        let encoders = wires.into_iter().zip(chains).map(|(transport, chain)| {
            bytes.fetch_add(transport.offset(), Ordering::Relaxed);
            Encoder::new(transport, chain, compression, &bytes)
        });
        let mut encoders: Vec<Encoder> = encoders.collect::<Result<_, _>>()?;
        let channels = match (encoders.pop(), encoders.is_empty()) {
            (Some(only), true) => Channels::One(Box::new(only)),
            (last, _) => {
                encoders.extend(last);
                Channels::Many(Workers::start(encoders, control)?)
            }
        };
        Ok(Self {
            channels,
            control: Arc::clone(control),
            cancel,
            blocks: layout.blocks().iter().map(|it| it.pages()).collect(),
            bytes,
            iterations: 0,
            timeout,
            done: false,
        })
    }

    /// Says that these pages are zero.
    ///
    /// # Errors
    ///
    /// As all that follow: the first failure of any channel, again and again; or a run that is not in the layout.
    pub fn zeros(&mut self, run: PageRun) -> Result<(), StreamError> {
        self.check(run, None)?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.zeros(run),
            Channels::Many(workers) => stripes(run).try_for_each(|part| workers.zeros(part)),
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Sends pages whose bytes are given.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros).
    pub fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), StreamError> {
        self.check(run, Some(bytes))?;
        let mut rest = bytes;
        let mut take = |part: PageRun| {
            let length = usize::try_from(part.length()).unwrap_or(usize::MAX);
            let (head, tail) = rest.split_at_checked(length)?;
            rest = tail;
            Some(head)
        };
        match &mut self.channels {
            Channels::One(encoder) => run.chunks(RECORD_PAGES).try_for_each(|part| {
                let bytes = take(part).ok_or_else(|| invalid_run(part, 0))?;
                encoder.pages(part, bytes)
            }),
            Channels::Many(workers) => stripes(run).try_for_each(|part| {
                let bytes = take(part).ok_or_else(|| invalid_run(part, 0))?;
                workers.pages(part, bytes)
            }),
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Sends pages as they lie in their file: without a copy, where the system can do that and there are enough of them
    /// beside each other.
    ///
    /// Without a copy means also: what the guest writes a little later may be sent instead of what is there now. The
    /// next sync of the dirty bits shows such a write.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros), or that the file cannot be read.
    pub fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), StreamError> {
        self.check(run, None)?;
        match &mut self.channels {
            Channels::One(encoder) => run
                .chunks(RECORD_PAGES)
                .try_for_each(|part| encoder.pages_from(part, memory)),
            Channels::Many(workers) => {
                stripes(run).try_for_each(|part| workers.pages_from(part, memory))
            }
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Ends a round, and waits until all of it is on the wire. The receiver applies nothing of the next round before all
    /// of this one.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros).
    pub fn end_iteration(&mut self) -> Result<(), StreamError> {
        self.control.check()?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.end_iteration(),
            Channels::Many(workers) => workers.end_iteration(),
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))?;
        self.iterations += 1;
        Ok(())
    }

    /// Ends the stream, and waits on a two-way transport until the receiver has found all of it to be there and right.
    ///
    /// `content` is the [digest](crate::digest::ContentDigest) of all memory, under the seed of the options; the
    /// receiver compares it with that of its files.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros); or the receiver found something wrong ([`StreamError::ReceiverFailed`], with its words), or
    /// says nothing within the limit. The destination must be taken as incomplete then.
    pub fn finish(mut self, content: Option<u128>) -> Result<Receipt, StreamError> {
        self.control.check()?;
        let channels = std::mem::replace(&mut self.channels, Channels::Finished);
        let finished = self.finish_channels(channels, content);
        self.done = finished.is_ok();
        finished.map_err(|error| self.control.stop(error))
    }

    fn finish_channels(
        &self,
        channels: Channels,
        content: Option<u128>,
    ) -> Result<Receipt, StreamError> {
        let mut encoders = match channels {
            Channels::One(encoder) => vec![*encoder],
            Channels::Many(workers) => workers.end()?,
            Channels::Finished => Vec::new(),
        };
        let mut totals = Totals {
            counts: Default::default(),
            content,
            stream: stream_digest(encoders.iter().map(Encoder::chain)),
        };
        for encoder in &encoders {
            totals.counts.add(encoder.counts());
        }
        for encoder in &mut encoders {
            encoder.finish(totals)?;
        }
        let mut wires = encoders.into_iter().map(Encoder::into_transport);
        let mut confirmed = false;
        // The others stay open until the verdict.
        if let Some(mut transport) = wires.next() {
            let _others: Vec<Transport> = wires.collect();
            if transport.is_two_way() {
                expect(&mut transport, &Answer::Complete, self.timeout)?;
                confirmed = true;
            }
        }
        Ok(Receipt {
            bytes: self.bytes(),
            pages: totals.counts.pages,
            zeros: totals.counts.zeros,
            iterations: self.iterations,
            confirmed,
        })
    }

    /// Puts on the wire what is held back to be sent together with more. Rounds' ends do so as well.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros).
    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.control.check()?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.flush(),
            // Each does it when it has nothing else to do.
            Channels::Many(_) | Channels::Finished => Ok(()),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Bytes on the wire so far, of all channels.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Rounds that were ended.
    pub fn iterations(&self) -> u64 {
        self.iterations
    }

    /// Ends the stream from another thread: the connections are shut down at once, and every call fails with
    /// [`StreamError::Cancelled`]. It is the one that came with the options.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    fn check(&self, run: PageRun, bytes: Option<&[u8]>) -> Result<(), StreamError> {
        self.control.check()?;
        let end = run.first.checked_add(run.pages);
        let has = self.blocks.get(run.block).copied().unwrap_or(0);
        let inside = run.pages > 0 && end.is_some_and(|end| end <= has);
        let length = bytes.map_or(run.length(), |bytes| bytes.len() as u64);
        if inside && length == run.length() {
            Ok(())
        } else {
            Err(invalid_run(run, bytes.map_or(0, <[u8]>::len)))
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.done {
            // Threads that wait for a silent peer hear this, and so does the peer, also if the connection is open
            // elsewhere in this process.
            self.control.cancel();
        }
    }
}

fn check_channels(count: usize) -> Result<u16, StreamError> {
    match u16::try_from(count) {
        Ok(channels) if (1..=CHANNELS_MAX).contains(&channels) => Ok(channels),
        _ => Err(StreamError::Options(format!(
            "a stream has 1 to {CHANNELS_MAX} channels, not {count}"
        ))),
    }
}

/// Writes the header of each channel, and returns what their chains of check values begin with.
fn send_headers(
    wires: &mut [Transport],
    layout: &Layout,
    answers: bool,
    seed: u64,
) -> Result<Vec<u64>, StreamError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
        StreamError::System {
            doing: "no random number for the migration's id",
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
            StreamError::Options("the format has no room for so many or such large blocks".into())
        })?;
        transport.write(&mut [IoSlice::new(&bytes)])?;
        chains.push(chain);
    }
    Ok(chains)
}

/// Waits for this answer.
fn expect(
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

/// The run in parts that do not cross a multiple of a record's pages: all of a part goes over one channel.
fn stripes(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.end();
    std::iter::successors(Some(run.first), move |at| {
        (at / RECORD_PAGES + 1).checked_mul(RECORD_PAGES)
    })
    .take_while(move |at| *at < end)
    .map(move |first| {
        let next = (first / RECORD_PAGES + 1).saturating_mul(RECORD_PAGES);
        PageRun {
            block: run.block,
            first,
            pages: next.min(end) - first,
        }
    })
}

/// Which of `channels` channels the pages of a [stripe](stripes) take.
pub(super) fn channel_of(run: PageRun, channels: usize) -> usize {
    let stripe = (run.first / RECORD_PAGES).wrapping_add(run.block as u64);
    usize::try_from(stripe % channels.max(1) as u64).unwrap_or(0)
}
