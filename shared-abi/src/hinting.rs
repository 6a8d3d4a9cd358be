// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The two state machines of free page hinting, as pure functions.
//!
//! A machine takes an event and gives its next state and what to do. It does no input or output, so
//! that the kernel module, the host device, KUnit, property tests and a model checker run the same
//! code.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Free Page Hinting".

pub mod device;
pub mod driver;

#[cfg(test)]
mod interleavings;
