// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two programs that run guests.

pub mod hardware;
pub mod qemu;
pub mod uml;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{bail, Context, Result};

use serde_json::{Map, Value};

use crate::process::{Process, Streams};
use crate::MIB;

/// A program that runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, with the stock Debian kernel.
    Qemu,
    /// User-mode Linux: kernel and VMM in one.
    Uml,
    /// User-mode Linux with the debug kernel, which watches locks, objects and memory, and on two processors.
    Debug,
}

impl Vmm {
    /// The environment variable that, if it is set, makes [`Vmm::Uml`] mean the debug kernel. Then no other VMM can be
    /// had, so that the tests of guests in user-mode Linux, and only they, are run.
    pub const DEBUG_VARIABLE: &'static str = "VIRTIO_BALLOON_RS_DEBUG_KERNEL";

    /// The VMMs that a test is to go through one after the other: both, unless [`Vmm::DEBUG_VARIABLE`] is set.
    #[must_use]
    pub fn each() -> &'static [Self] {
        if Self::is_debug_only() {
            &[Self::Uml]
        } else {
            &[Self::Uml, Self::Qemu]
        }
    }

    /// Bytes of a guest's memory that the debug kernel keeps for itself, and others do not.
    pub(crate) fn overhead(self) -> u64 {
        match self {
            Self::Debug => 80 * MIB,
            Self::Qemu | Self::Uml => 0,
        }
    }

    /// How often a test that repeats itself does so: `times`, or a tenth of that on the debug kernel, which is slow.
    #[must_use]
    pub fn repeats(self, times: u32) -> u32 {
        if matches!(self.resolve(), Ok(Self::Debug)) {
            times.div_ceil(10)
        } else {
            times
        }
    }

    /// Whether [`Vmm::DEBUG_VARIABLE`] is set.
    #[must_use]
    pub fn is_debug_only() -> bool {
        std::env::var_os(Self::DEBUG_VARIABLE).is_some()
    }

    /// What is really to be run for this one.
    ///
    /// # Errors
    ///
    /// If it cannot be had, because [`Vmm::DEBUG_VARIABLE`] is set.
    pub(crate) fn resolve(self) -> Result<Self> {
        match self {
            Self::Uml if Self::is_debug_only() => Ok(Self::Debug),
            Self::Qemu if Self::is_debug_only() => bail!(
                "with {} there is no QEMU: a test of a guest in it has `qemu` in its name, and one of several VMMs asks \
                 `Vmm::each`",
                Self::DEBUG_VARIABLE
            ),
            vmm => Ok(vmm),
        }
    }
}

/// What a guest is to have, whatever runs it.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Bytes of memory.
    pub memory: u64,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its balloon device, if any.
    pub device: Attachment,
    /// More properties of a vhost-user device. QEMU only.
    pub properties: Map<String, Value>,
    /// In what it differs from the usual machine. QEMU only.
    pub hardware: hardware::Hardware,
    /// Whether the balloon is, or later will be, in a slot that it can be pulled from.
    pub hotplug_slot: bool,
    /// Whether it is going to sleep. Linux 7.3's console driver loses its way to the host then: when it wakes it asks
    /// whether the host listens before it has queued a buffer for the answer. So the agent has a serial line instead.
    pub suspendable: bool,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
    /// A file for its memory, which others can open by its name. QEMU only.
    pub memory_file: Option<PathBuf>,
    /// Whether it starts empty, and waits for a guest that comes from elsewhere. QEMU only.
    pub incoming: bool,
    /// Where its VMM is to listen for operators besides the test.
    pub qmp_socket: Option<PathBuf>,
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
pub struct StartedVmm {
    /// The VMM.
    pub process: Process,
    /// The agent's line.
    pub agent: UnixStream,
    /// The VMM's monitor, if it has one.
    pub monitor: Option<UnixStream>,
}

/// A pair of connected sockets, the second one for a child.
fn socket_pair() -> Result<(UnixStream, OwnedFd)> {
    let (near, far) = UnixStream::pair().context("cannot make a pair of sockets")?;
    Ok((near, far.into()))
}
