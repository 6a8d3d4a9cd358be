// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The broker process: does for the device process what that process has no rights for.
//!
//! The device process serves the guest and its front end, which are not trusted, and gives up its rights before it does
//! so. It starts the broker process before that. The broker process keeps the rights of the caller, and does only this:
//!
//! - It searches for devices that pin guest memory, in `/proc`.
//! - It starts the helper process of a migration, which reads other processes and connects to the destination.
//! - It writes a saved state to a file.
//! - It creates the connection between the two halves of the device process that a front end is served with.
//! - It removes the sockets of the device process at its end.
//!
//! Each is one packet and one answer, on one of two connections: one for what takes little time, one for what may take
//! long. Each answer has a time limit, because a stopped broker process must not stop the daemon. The broker process trusts no packet: it checks each, and ends at one that it does
//! not understand. It ends with the device process.
//!
//! `messages` are the packets, `client` is the end of the device process, and `service` is the work of the broker process.

mod client;
mod messages;
mod service;

pub use client::Broker;
pub use service::{is_broker_process, run};

/// The argument with which the program is started as the helper process of a migration, before the log level and the pid
/// of the device process.
pub const HELPER_ARGUMENT: &str = "migration-helper";
