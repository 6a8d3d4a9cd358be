// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests as a library: boot one, talk to it, put it under stress, check what it and the host say.
//!
//! A [`guest::Guest`] is made of a VMM ([`vmm::Vmm`]: QEMU with the stock Debian kernel, or user-mode Linux), a balloon
//! device (our daemon, or QEMU's own), and a program of ours in its initramfs that does what it is told
//! ([`agent::AgentClient`]). Nothing outlives its handle: processes are killed and waited for, sockets and files removed, also
//! when a test panics, and also (by the kernel) when the test process itself is killed.
//!
//! Every wait has a limit, and what is waited for is an event wherever there is one. The limit is [`HANG_TIMEOUT`]: it tells what hangs
//! from what is slow, and no verdict depends on how fast anything is.
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

/// How long anything may take before it is taken for hung. It is far more than anything takes on a machine with ten times as much to do
/// as it has processors for.
pub const HANG_TIMEOUT: Duration = Duration::from_secs(600);

/// [`HANG_TIMEOUT`] as calls to a guest have it.
pub const HANG_TIMEOUT_MS: u64 = 600_000;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
