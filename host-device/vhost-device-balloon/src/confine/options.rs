// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The choices of the command line.

use clap::ValueEnum;

/// The kind of sandbox.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Sandbox {
    /// No sandbox.
    None,
    /// An empty directory as the root directory. Needs root.
    Chroot,
    /// An empty root directory in a mount namespace, and a user, a network and an IPC namespace.
    Namespace,
}

/// What happens at a system call that the device does not need.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Seccomp {
    /// All system calls are permitted.
    None,
    /// The kernel logs the system call, and executes it.
    Log,
    /// The daemon names the system call on standard error, and SIGSYS kills it.
    Trap,
    /// The kernel kills the daemon.
    Kill,
}

/// Whether a measure is used.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Switch {
    /// It is used.
    On,
    /// It is not used.
    Off,
}
