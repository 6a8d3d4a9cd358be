// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory on its way from one host to another: the format, both ends, and what carries it.
//!
//! The bytes are described in `docs/stream.md`. [`Writer`] sends; [`Receiver`] takes in, and writes into a
//! [`Destination`], memory files that stay marked as incomplete unless all of it has come and is right.
//!
//! ```
//! use std::sync::Arc;
//! use migration::stream::{Destination, Listener, Options, Receiver, ReceiverOptions, Writer};
//! use migration::{Block, Layout, Run, PAGE_SIZE};
//!
//! # let dir = tempfile::tempdir()?;
//! let address = format!("unix:{}", dir.path().join("socket").display()).parse()?;
//! let file = dir.path().join("memory");
//! let listener = Listener::bind(&address)?;
//! let receiver = Receiver::new(listener, Destination::single(&file), ReceiverOptions::default())?;
//! let receiving = std::thread::spawn(move || receiver.run());
//!
//! let layout = Layout::new([Block::new("ram", 64 * PAGE_SIZE)?], [])?;
//! let mut writer = Writer::start(address, &layout, Options::default())?;
//! let run = Run { block: 0, first: 3, pages: 1 };
//! writer.pages(run, &[7; PAGE_SIZE as usize])?;
//! writer.end_round()?;
//! assert!(writer.finish(None)?.confirmed);
//!
//! assert_eq!(receiving.join().unwrap()?.pages, 1);
//! assert_eq!(std::fs::read(&file)?[3 * PAGE_SIZE as usize], 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod control;
mod decoder;
mod destination;
mod encoder;
mod error;
mod format;
mod progress;
mod receiver;
#[cfg(test)]
mod tests;
mod transport;
mod wire;
mod workers;
mod writer;

pub use address::{Address, AddressError};
pub use destination::Destination;
pub use error::{DestinationError, Fault, StreamError};
pub use format::{CHANNELS_MAX, RECORD_PAGES, VERSION, WORDS_MAX};
pub use progress::{Phase, Progress};
pub use receiver::{receive, Received, Receiver, ReceiverOptions};
pub use transport::Listener;
pub use writer::{Compression, Options, Receipt, Target, Writer};
