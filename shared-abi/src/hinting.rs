// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The state machines of free page hinting, as pure functions.
//!
//! A state machine takes an event, and returns its next state and the actions to perform. It does
//! no input or output. Therefore the kernel module, the host device, KUnit, the property tests and
//! a model checker run the same code.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Free Page Hinting".

pub mod device;
pub mod driver;

#[cfg(test)]
mod interleavings;
