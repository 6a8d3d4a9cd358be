// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of the QEMU Monitor Protocol, which QEMU and our daemon both speak.
//!
//! Every wait has a limit, every line a greatest length, and a peer that refuses, is silent, talks nonsense or goes
//! gives an [`Error`] that names it. Commands and answers are JSON values: the daemon has commands that no schema of
//! QEMU's knows.
//!
//! ```no_run
//! use qmp_client::Client;
//! use serde_json::json;
//!
//! let mut qemu = Client::connect("/tmp/qemu-qmp.sock".as_ref())?;
//! qemu.command("stop", json!({}))?;
//! # Ok::<(), qmp_client::Error>(())
//! ```

#![forbid(unsafe_code)]

mod client;
mod error;
mod json_lines;
mod message;

pub use client::{Client, COMMAND_TIMEOUT};
pub use error::Error;
pub use json_lines::{JsonLines, LineError, MAX_LINE};
pub use message::{Event, QmpError};
