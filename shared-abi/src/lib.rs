// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! What a virtio memory balloon's driver and its device must agree on, and nothing else.
//!
//! The layout of config space, the feature bits, the order of the queues, the statistics tags, the
//! command ids of free page hinting, and the two state machines of hinting: the driver's and the
//! device's. All of it is plain data and pure functions, so that the kernel module, the host device
//! and their tests run the very same code.
//!
//! Compiled twice from the same files: by cargo as the crate `shared_abi`, and by Kbuild as a module
//! of the guest driver. Paths inside are therefore relative (`super::`), never `crate::`.
//!
//! Source: the section "Traditional Memory Balloon Device" of the virtio specification, and
//! `include/uapi/linux/virtio_balloon.h`.

// Kbuild includes this file as a module, where a crate attribute has no place; it compiles
// without the standard library anyhow.
#![cfg_attr(not(MODULE), no_std)]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(test)]
#[macro_use]
extern crate std;

pub mod command;
pub mod config;
pub mod features;
pub mod hinting;
pub mod page;
pub mod queue;
pub mod stats;

/// The virtio device id of a traditional memory balloon.
pub const VIRTIO_ID_BALLOON: u32 = 5;
