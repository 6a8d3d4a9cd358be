// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of the QEMU Monitor Protocol (QMP), which QEMU and our daemon both speak.
//!
//! Every wait has a timeout, and every line has a maximum length. If a peer refuses a command, does not answer, sends
//! invalid data or disconnects, the client returns an [`Error`] that names the peer. Commands and answers are JSON
//! values, because the daemon has commands that QEMU's schema does not contain.
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
mod connect;
mod deadline;
mod error;
mod json_lines;
mod message;

pub use client::{Client, COMMAND_TIMEOUT};
pub use connect::connect;
pub use error::Error;
pub use json_lines::{JsonLines, LineError, MAX_LINE};
pub use message::{Event, QmpError};
