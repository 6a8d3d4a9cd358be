// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The target and the options of a writer.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::Address;
use crate::CancelToken;

/// The target of a stream.
#[derive(Debug)]
pub enum Target {
    /// An address to connect to or to open.
    Address(Address),
    /// Open file descriptors, one for each channel.
    Connected(Vec<OwnedFd>),
}

impl From<Address> for Target {
    fn from(address: Address) -> Self {
        Self::Address(address)
    }
}

/// The compression of pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// No compression.
    #[default]
    None,
    /// zstd, at this level.
    Zstd(i32),
}

/// Options of a [`Writer`](super::Writer).
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Number of channels. With several, pages are distributed over them, and each has a thread. Ignored for
    /// [`Target::Connected`], which has one channel for each file descriptor.
    pub channels: u16,
    /// The compression of pages. Pages that do not become smaller are sent uncompressed.
    pub compression: Compression,
    /// The seed of the content digest that is passed to [`Writer::finish`](super::Writer::finish), if any.
    pub seed: u64,
    /// How long the writer waits for the peer each time: to connect, to accept the stream, to take more bytes, and to
    /// answer.
    pub timeout: Duration,
    /// Cancels the stream from another thread, also during [`Writer::start`](super::Writer::start).
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
