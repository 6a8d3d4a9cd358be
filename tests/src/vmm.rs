// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two programs that run guests.

pub mod qemu;
pub mod uml;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result};

use serde_json::{Map, Value};

use crate::process::{Process, Streams};

/// A program that runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, with the stock Debian kernel.
    Qemu,
    /// User-mode Linux: kernel and VMM in one.
    Uml,
}

/// What a guest is to have, whatever runs it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Bytes of memory.
    pub memory: u64,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its balloon device, if any.
    pub device: Attachment,
    /// Whether the balloon is, or later will be, in a slot that it can be pulled from.
    pub slot: bool,
    /// Whether it is going to sleep. Linux 7.3's console driver loses its way to the host then: when it wakes it asks
    /// whether the host listens before it has queued a buffer for the answer. So the agent has a serial line instead.
    pub sleeps: bool,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
    /// What becomes of its console.
    pub console: Streams,
}

/// The balloon device of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// None.
    None,
    /// A vhost-user device that listens on a socket.
    VhostUser(PathBuf),
    /// QEMU's own, with free page hinting, and these further properties.
    QemuOwn(Map<String, Value>),
}

/// A guest that has been started.
#[derive(Debug)]
pub struct Started {
    /// The VMM.
    pub process: Process,
    /// The agent's line.
    pub agent: UnixStream,
    /// The VMM's monitor, if it has one.
    pub monitor: Option<UnixStream>,
}

/// A pair of connected sockets, the second one for a child.
fn line() -> Result<(UnixStream, OwnedFd)> {
    let (near, far) = UnixStream::pair().context("cannot make a pair of sockets")?;
    Ok((near, far.into()))
}
