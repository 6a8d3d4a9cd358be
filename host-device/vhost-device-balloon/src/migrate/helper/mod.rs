// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The helper process of a migration.
//!
//! A migration reads other processes, stops them, and connects to the destination and to the VMM. The device process has
//! no rights for that. The broker process therefore starts a helper process, which exists only while the migration runs.
//!
//! ```text
//!   device process                                helper process
//!   MigrationManager ── task, memory files ─────► Precopy
//!   device  ◄──────────── open, close, done, quiesce ── RemoteDevice
//!   device  ── hints, punched pages, answers ───► RemoteDevice ──► HintWindow
//!   Progress  ◄───────────── status, passes, end ── Progress
//! ```
//!
//! One socket carries everything in order. So a hint is applied before the window closes (R6): the device process closes
//! its own window first, sends the hints that are left, and then confirms. And the pages that were punched before a dirty
//! sync arrive before the confirmation that the device is quiesced. Neither is ever lost, and neither needs a queue: the
//! device process keeps them as bits, and sends what is new.
//!
//! If the device process ends, the helper process cancels the migration and resumes the guest. If the helper process ends,
//! the migration fails, and its guard process resumes the guest.
//!
//! `messages` are the messages. `client` is the end of the device process. `service` is the work of the helper process,
//! and `remote_device` is the device as it sees it.

pub(super) mod client;
mod messages;
mod remote_device;
mod service;

pub use service::{is_helper_process, run};
