// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration stream: the format of guest memory on the wire, its sender and receiver, and their transports.
//!
//! `docs/stream.md` describes the format. [`Writer`] sends a stream. [`Receiver`] receives a stream and writes it into
//! a [`Destination`]: memory files that stay marked as incomplete until the whole stream is received and verified.
//!
//! ```
//! use std::sync::Arc;
//! use guest_migration::stream::{Destination, Listener, WriterOptions, Receiver, ReceiverOptions, Writer};
//! use guest_migration::{RamBlock, Layout, PageRun, PAGE_SIZE};
//!
//! # let dir = tempfile::tempdir()?;
//! let address = format!("unix:{}", dir.path().join("socket").display()).parse()?;
//! let file = dir.path().join("memory");
//! let listener = Listener::bind(&address)?;
//! let receiver = Receiver::new(listener, Destination::with_file(&file), ReceiverOptions::default())?;
//! let receiving = std::thread::spawn(move || receiver.run());
//!
//! let layout = Layout::new([RamBlock::new("ram", 64 * PAGE_SIZE)?], [])?;
//! let mut writer = Writer::start(address, &layout, WriterOptions::default())?;
//! let run = PageRun { block: 0, first: 3, pages: 1 };
//! writer.pages(run, &[7; PAGE_SIZE as usize])?;
//! writer.end_iteration()?;
//! assert!(writer.finish(None)?.confirmed);
//!
//! assert_eq!(receiving.join().unwrap()?.pages, 1);
//! assert_eq!(std::fs::read(&file)?[3 * PAGE_SIZE as usize], 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod channel;
mod connect;
mod control;
mod decoder;
mod destination;
mod destination_error;
mod encoder;
mod error;
mod format;
mod format_error;
mod handshake;
mod listener;
mod options;
mod receive_progress;
mod receiver;
mod socket_file;
mod socket_options;
mod stripes;
#[cfg(test)]
mod tests;
mod transport;
mod workers;
mod writer;

pub use address::{Address, AddressError};
pub use destination::Destination;
pub use destination_error::DestinationError;
pub use error::StreamError;
pub use format::{CHANNELS_MAX, MESSAGE_MAX, RECORD_PAGES, VERSION};
pub use format_error::Fault;
pub use listener::Listener;
pub use options::{Compression, Target, WriterOptions};
pub use receive_progress::{ReceivePhase, ReceiveProgress};
pub use receiver::{receive, Received, Receiver, ReceiverOptions};
pub use writer::{Receipt, Writer};
