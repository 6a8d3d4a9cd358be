// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio memory balloon as a vhost-user device.
//!
//! A VMM (QEMU with `vhost-user-test-device-pci`, user-mode Linux with `virtio_uml.device`) attaches the
//! balloon over a Unix socket; an operator steers it over another one, in the manner of QMP.
//!
//! ```text
//!   VMM ── vhost-user ──► relay ──► crate vhost-user-backend ──► backend ──► device
//!                           ▲                                                  │
//!                           └───────── "the configuration changed" ◄───────────┤
//!   operators ── QMP ──► qmp ────────────────────────────────────────────────► │ ──► migration: dirty bitmap
//! ```
//!
//! - [`server`] owns the two sockets and decides who may connect, and when the program ends.
//! - [`session`] is one connected front end.
//! - [`relay`] exists only to be able to send the configuration change message.
//! - [`backend`] is the face towards the crate `vhost-user-backend`; it has no state of the balloon's.
//! - [`vring`] is a queue of that crate's, which counts.
//! - [`device`] is the balloon: configuration space, queues, hinting rounds, statistics.
//! - [`memory`] is the guest's memory as files that space can be given back from.
//! - [`migrate`] is what a migration needs of all these, and its start and end.
//! - [`qmp`] is the operators' side.
//!
//! Whatever the guest puts on a queue is checked once, in [`device::request`], and wrong input becomes a
//! counted error that names the queue and the address. Nothing in this crate is unsafe.

#![forbid(unsafe_code)]

pub mod args;
pub mod backend;
pub mod device;
pub mod event_count;
pub mod events;
pub mod memory;
pub mod migrate;
pub mod qmp;
pub mod relay;
pub mod server;
pub mod session;
pub mod socket;
pub mod vring;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a thread panicked while it held it: what the mutexes of this crate guard is
/// consistent after every statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
