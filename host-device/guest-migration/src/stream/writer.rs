// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender of a stream.
//!
//! With one channel, the thread of the caller encodes and writes. With several, each channel has a thread of
//! [`Workers`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::connect::connect_to;
use super::control::Control;
use super::encoder::Encoder;
use super::error::invalid_run;
use super::format::{stream_digest, Answer, Totals, RECORD_PAGES};
use super::handshake::{check_channels, expect, send_headers};
use super::options::{Target, WriterOptions};
use super::stripes::stripes;
use super::transport::Transport;
use super::workers::Workers;
use super::StreamError;
use crate::{CancelToken, Layout, Memory, PageRun};

/// The result of a sent stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes on the wire, of all channels.
    pub bytes: u64,
    /// Pages with content. A page that is sent several times counts each time.
    pub pages: u64,
    /// Zero pages. A page that is sent several times counts each time.
    pub zeros: u64,
    /// Number of iterations that have ended.
    pub iterations: u64,
    /// Whether the receiver confirmed that the stream is complete and verified. Always false on a one-way transport.
    pub confirmed: bool,
}

/// Sends a stream.
///
/// A page is always sent on the same channel, so the receiver applies its versions in the order of sending, also within
/// an iteration.
///
/// Dropping the writer before [`finish`](Self::finish) aborts the stream: the receiver sees that it is incomplete.
pub struct Writer {
    channels: Channels,
    control: Arc<Control>,
    cancel: CancelToken,
    blocks: Vec<u64>,
    bytes: Arc<AtomicU64>,
    iterations: u64,
    timeout: Duration,
    /// Whether [`finish`](Self::finish) succeeded.
    done: bool,
}

enum Channels {
    /// One channel. The thread of the caller writes.
    One(Box<Encoder>),
    Many(Workers),
    Finished,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("bytes", &self.bytes())
            .field("iterations", &self.iterations)
            .finish_non_exhaustive()
    }
}

impl Writer {
    /// Connects and writes the stream headers. On a two-way transport, waits until the receiver accepts the stream.
    ///
    /// # Errors
    ///
    /// The target cannot be reached or does not fit the options; the receiver refuses the stream
    /// ([`StreamError::Refused`], with its message) or does not answer within the timeout; or the stream is cancelled.
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

    /// Sends a run of zero pages.
    ///
    /// # Errors
    ///
    /// The run is not in the layout; the stream can be continued. Or a channel failed; every later call fails with the
    /// same error.
    pub fn zeros(&mut self, run: PageRun) -> Result<(), StreamError> {
        self.check(run, None)?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.zeros(run),
            Channels::Many(workers) => stripes(run).try_for_each(|part| workers.zeros(part)),
            Channels::Finished => Err(StreamError::Cancelled),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Sends a run of pages with the content `bytes`.
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

    /// Sends a run of pages from their memory file.
    ///
    /// Without compression, a long run is sent without a copy if the kernel supports that. The stream may then contain
    /// a write that the guest makes shortly after this call. The next dirty sync marks such a write.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros); or the memory file cannot be read.
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

    /// Ends an iteration, and waits until all its records are on the wire.
    ///
    /// The receiver applies the whole iteration before it applies a record of the next one.
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

    /// Ends the stream. On a two-way transport, waits until the receiver has verified it.
    ///
    /// `content` is the [digest](crate::digest::ContentDigest) of all guest memory, with the seed of the options. The
    /// receiver compares it with the digest of its memory files.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros); or the receiver failed ([`StreamError::ReceiverFailed`], with its message) or does
    /// not answer within the timeout. After an error the destination must be treated as incomplete.
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
        // The other channels stay open until the receiver's final answer.
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

    /// Writes the records that are batched. The end of an iteration does so as well.
    ///
    /// # Errors
    ///
    /// As [`zeros`](Self::zeros).
    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.control.check()?;
        match &mut self.channels {
            Channels::One(encoder) => encoder.flush(),
            // Each worker writes its batch when its queue is empty.
            Channels::Many(_) | Channels::Finished => Ok(()),
        }
        .map_err(|error| self.control.stop(error))
    }

    /// Returns the number of bytes on the wire so far, of all channels.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns how many iterations have ended.
    pub fn iterations(&self) -> u64 {
        self.iterations
    }

    /// Returns the token in the options, which cancels the stream from another thread.
    ///
    /// Cancellation shuts down the connections at once, and every later call fails with [`StreamError::Cancelled`].
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
            // This wakes worker threads that wait for a silent peer. The shutdown also ends a connection that is still
            // open elsewhere in this process, so the peer notices.
            self.control.cancel();
        }
    }
}
