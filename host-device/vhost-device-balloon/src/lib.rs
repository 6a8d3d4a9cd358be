// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio memory balloon as a vhost-user device.
//!
//! A VMM (QEMU with `vhost-user-test-device-pci`, user-mode Linux with `virtio_uml.device`) attaches the balloon over
//! a Unix socket. QMP clients control the balloon over another Unix socket.
//!
//! ```text
//!   VMM ── vhost-user ──► relay ──► crate vhost-user-backend ──► backend ──► device
//!                           ▲                                                  │
//!                           └───────── "the configuration changed" ◄───────────┤
//!   QMP clients ───────► qmp ────────────────────────────────────────────────► │ ──► migration: dirty bitmap
//! ```
//!
//! - [`server`] owns the two sockets, accepts connections, and decides when the program ends.
//! - [`session`] serves one connected front end.
//! - [`relay`] relays vhost-user messages, in order to send the configuration change message.
//! - [`log`] writes log lines without ever waiting for their reader, and limits their rate.
//! - [`signals`] and [`panics`] end the program.
//! - [`backend`] implements the interface of the crate `vhost-user-backend`. It holds no state of the balloon.
//! - `descriptors` checks the descriptors that a front end sends, and `vhost_daemon` runs the threads of the crate, with a
//!   [`private_connection`].
//! - [`vring`] is a virtqueue that counts notifications and interrupts.
//! - [`device`] is the balloon: configuration space, queues, hint rounds, statistics.
//! - [`device_lock`] is the lock of the device, a [`fair_mutex`].
//! - [`memory`] is guest memory as files that can be released to the host.
//! - [`migrate`] starts, controls and ends migrations.
//! - [`qmp`] serves QMP clients.
//! - [`broker`] is the process that does what the process of the device has no rights for. `packets` is the socket to it.
//! - [`confine`] gives up the rights of the process of the device.
//!
//! [`device::request`] validates each request of the guest once. Invalid input is a counted error that names the queue
//! and the address. The only unsafe code is the handler of SIGBUS in `memory/sys.rs`, and that of SIGSYS in `confine/sys.rs`.

#![deny(unsafe_code)]

pub mod args;
pub mod backend;
pub mod broker;
pub mod confine;
mod descriptors;
pub mod device;
pub mod device_lock;
pub mod event_count;
pub mod events;
pub mod fair_mutex;
pub mod log;
pub mod memory;
pub mod migrate;
mod packets;
pub mod panics;
pub mod private_connection;
pub mod qmp;
pub mod relay;
pub mod server;
pub mod session;
pub mod signals;
pub mod socket;
mod sync;
mod vhost_daemon;
pub mod vring;
