// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sending side.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::control::Control;
use super::encoder::{out_of_layout, Encoder};
use super::format::{stream_digest, Answer, BlockName, Header, Totals, CHANNELS_MAX, RECORD_PAGES};
use super::transport::connect_to;
use super::wire::Wire;
use super::workers::Workers;
use super::{Address, StreamError};
use crate::{Cancel, Layout, Memory, Run};

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
pub struct Options {
    /// Connections, over which pages are spread by as many threads.
    pub channels: u16,
    /// How pages are packed. What does not become smaller goes as it is.
    pub compression: Compression,
    /// The seed of the content digest that [`Writer::finish`] is given, if it is given one.
    pub seed: u64,
    /// How long the other side may take to be reached, to accept, to take more, and to answer.
    pub limit: Duration,
    /// Ends the stream from another thread, also while it is being started.
    pub cancel: Cancel,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            channels: 1,
            compression: Compression::None,
            seed: 0,
            limit: Duration::from_secs(60),
            cancel: Cancel::default(),
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
    pub rounds: u64,
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
    cancel: Cancel,
    blocks: Vec<u64>,
    bytes: Arc<AtomicU64>,
    rounds: u64,
    limit: Duration,
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
            .field("rounds", &self.rounds)
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
        options: Options,
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
        options: Options,
    ) -> Result<Self, StreamError> {
        let Options {
            channels,
            compression,
            seed,
            limit,
            cancel,
        } = options;
        let fds = match target {
            Target::Connected(fds) => fds,
            Target::Address(address) => {
                check_channels(usize::from(channels))?;
                connect_to(&address, channels, control, limit)?
            }
        };
        let channels = check_channels(fds.len())?;
        let wires = fds.into_iter().zip(0..channels);
        let mut wires: Vec<Wire> = wires
            .map(|(fd, channel)| Wire::new(fd, control, channel, limit))
            .collect::<Result<_, _>>()?;
        let two_way = wires.iter().all(Wire::two_way);
        if !two_way && channels > 1 {
            return Err(StreamError::Options(
                "several channels need stream sockets".into(),
            ));
        }
        let bytes = Arc::new(AtomicU64::new(0));
        let chains = send_headers(&mut wires, layout, two_way, seed)?;
        if two_way {
            for wire in &mut wires {
                expect(wire, &Answer::Accepted, limit)?;
            }
        }
        let encoders = wires.into_iter().zip(chains).map(|(wire, chain)| {
            bytes.fetch_add(wire.offset(), Ordering::Relaxed);
            Encoder::new(wire, chain, compression, &bytes)
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
            rounds: 0,
            limit,
            done: false,
        })
    }

    /// Says that these pages are zero.
    ///
    /// # Errors
    ///
    /// As all that follow: the first failure of any channel, again and again; or a run that is not in the layout.
    pub fn zeros(&mut self, run: Run) -> Result<(), StreamError> {
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
    pub fn pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), StreamError> {
        self.check(run, Some(bytes))?;
        let mut rest = bytes;
        let mut take = |part: Run| {
            let length = usize::try_from(part.length()).unwrap_or(usize::MAX);
            let (head, tail) = rest.split_at_checked(length)?;
            rest = tail;
            Some(head)
        };
        match &mut self.channels {
            Channels::One(encoder) => run.pieces(RECORD_PAGES).try_for_each(|part| {
                let bytes = take(part).ok_or_else(|| out_of_layout(part, 0))?;
                encoder.pages(part, bytes)
            }),
            Channels::Many(workers) => stripes(run).try_for_each(|part| {
                let bytes = take(part).ok_or_else(|| out_of_layout(part, 0))?;
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
    pub fn pages_from(&mut self, run: Run, memory: &Memory) -> Result<(), StreamError> {
        self.check(run, None)?;
        match &mut self.channels {
            Channels::One(encoder) => run
                .pieces(RECORD_PAGES)
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
    pub fn end_round(&mut self) -> Result<(), StreamError> {
        self.control.check()?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.end_round(),
            Channels::Many(workers) => workers.end_round(),
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))?;
        self.rounds += 1;
        Ok(())
    }

    /// Ends the stream, and waits on a two-way transport until the receiver has found all of it to be there and right.
    ///
    /// `content` is the [digest](crate::digest::ContentDigest) of all memory, under the seed of the options; the
    /// receiver compares it with that of its files.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros); or the receiver found something wrong ([`StreamError::GaveUp`], with its words), or
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
        let mut wires = encoders.into_iter().map(Encoder::into_wire);
        let mut confirmed = false;
        // The others stay open until the verdict.
        if let Some(mut wire) = wires.next() {
            let _others: Vec<Wire> = wires.collect();
            if wire.two_way() {
                expect(&mut wire, &Answer::Complete, self.limit)?;
                confirmed = true;
            }
        }
        Ok(Receipt {
            bytes: self.bytes(),
            pages: totals.counts.pages,
            zeros: totals.counts.zeros,
            rounds: self.rounds,
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
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Ends the stream from another thread: the connections are shut down at once, and every call fails with
    /// [`StreamError::Cancelled`]. It is the one that came with the options.
    pub fn canceller(&self) -> Cancel {
        self.cancel.clone()
    }

    fn check(&self, run: Run, bytes: Option<&[u8]>) -> Result<(), StreamError> {
        self.control.check()?;
        let end = run.first.checked_add(run.pages);
        let has = self.blocks.get(run.block).copied().unwrap_or(0);
        let inside = run.pages > 0 && end.is_some_and(|end| end <= has);
        let length = bytes.map_or(run.length(), |bytes| bytes.len() as u64);
        if inside && length == run.length() {
            Ok(())
        } else {
            Err(out_of_layout(run, bytes.map_or(0, <[u8]>::len)))
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
    wires: &mut [Wire],
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
    let blocks = layout.blocks().iter().map(|block| BlockName {
        name: block.name().to_owned(),
        pages: block.pages(),
    });
    let mut header = Header {
        answers,
        id,
        channel: 0,
        channels: check_channels(wires.len())?,
        seed,
        blocks: blocks.collect(),
    };
    let mut chains = Vec::new();
    for wire in wires {
        header.channel = wire.channel();
        let (bytes, chain) = header.encode().ok_or_else(|| {
            StreamError::Options("the format has no room for so many or such large blocks".into())
        })?;
        wire.write(&mut [IoSlice::new(&bytes)])?;
        chains.push(chain);
    }
    Ok(chains)
}

/// Waits for this answer.
fn expect(wire: &mut Wire, expected: &Answer, limit: Duration) -> Result<(), StreamError> {
    loop {
        let answer = wire.next_answer(limit)?;
        if answer == *expected {
            return Ok(());
        }
        if answer != Answer::Working {
            return Err(StreamError::Answer {
                channel: wire.channel(),
                fault: super::Fault::AnswerKind(answer.number()),
            });
        }
    }
}

/// The run in parts that do not cross a multiple of a record's pages: all of a part goes over one channel.
fn stripes(run: Run) -> impl Iterator<Item = Run> {
    let end = run.end();
    std::iter::successors(Some(run.first), move |at| {
        (at / RECORD_PAGES + 1).checked_mul(RECORD_PAGES)
    })
    .take_while(move |at| *at < end)
    .map(move |first| {
        let next = (first / RECORD_PAGES + 1).saturating_mul(RECORD_PAGES);
        Run {
            block: run.block,
            first,
            pages: next.min(end) - first,
        }
    })
}

/// Which of `channels` channels the pages of a [stripe](stripes) take.
pub(super) fn channel_of(run: Run, channels: usize) -> usize {
    let stripe = (run.first / RECORD_PAGES).wrapping_add(run.block as u64);
    usize::try_from(stripe % channels.max(1) as u64).unwrap_or(0)
}
