// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The interface between the driver and the device of a virtio memory balloon.
//!
//! The crate defines the layout of configuration space, the feature bits, the order of the
//! virtqueues, the statistics tags, the command ids of free page hinting, and the state machines of
//! hinting for the driver and for the device. It contains only plain data and pure functions, so
//! that the kernel module, the host device and their tests run the same code.
//!
//! The files are compiled twice: by cargo as the crate `shared_abi`, and by Kbuild as a module of
//! the guest driver. Therefore paths in this crate are relative (`super::`), never `crate::`.
//!
//! Source: section "Traditional Memory Balloon Device" of the virtio specification, and
//! `include/uapi/linux/virtio_balloon.h`.

// Kbuild includes this file as a module, where a crate attribute is not allowed. Kbuild compiles
// without the standard library anyway.
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
