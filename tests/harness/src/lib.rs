// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A library of guests for end-to-end tests: boot a guest, control it, put it under stress, and check the guest and the
//! host.
//!
//! A [`guest::Guest`] consists of a VMM ([`vmm::Vmm`]: QEMU with the stock Debian kernel, or user-mode Linux), a
//! balloon device (our daemon, or QEMU's own), and the guest agent in its initramfs ([`agent::AgentClient`]).
//!
//! Nothing outlives its handle: processes are killed and reaped, and sockets and files are removed, also if a test
//! panics. If the test process is killed, the kernel kills the processes.
//!
//! Every wait has a timeout, and waits for an event where there is one. The timeout is [`HANG_TIMEOUT`], which only
//! detects hangs. No result depends on speed.
#![deny(unsafe_code)]

pub mod agent;
pub mod artifacts;
pub mod attempts;
pub mod balloon_hotplug;
pub mod check;
pub mod counters;
pub mod daemon;
pub mod debug_kernel;
pub mod destination;
pub mod driver_cost;
pub mod exercise;
pub mod fault_injection;
pub mod guest;
pub mod hinting;
pub mod host;
pub mod initramfs;
pub mod ktap;
pub mod lines;
pub mod matrix;
pub mod memory_image;
pub mod migration;
pub mod migration_cost;
pub mod pinned_cpu;
pub mod power_state;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod resize;
pub mod scratch;
pub mod silent_device;
pub mod stress;
pub mod stressed_guest;
#[allow(unsafe_code)]
mod sys;
pub mod vmm;
pub mod zones;

use std::time::Duration;

pub use guest_agent::{calls, pattern, ranges};

/// The timeout after which an operation counts as hung. It is far longer than any operation takes on a machine with a
/// load of ten times its processors.
pub const HANG_TIMEOUT: Duration = Duration::from_secs(600);

/// [`HANG_TIMEOUT`] in milliseconds, for calls to a guest.
pub const HANG_TIMEOUT_MS: u64 = 600_000;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
