// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMMs: QEMU and user-mode Linux.

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

/// A VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, with the stock Debian kernel.
    Qemu,
    /// User-mode Linux, which is kernel and VMM in one.
    Uml,
    /// User-mode Linux with the debug kernel, which checks locks, objects and memory, and has two processors.
    Debug,
}

impl Vmm {
    /// The environment variable that makes [`Vmm::Uml`] mean the debug kernel. If it is set, no other VMM is available,
    /// so that exactly the tests of guests in user-mode Linux run.
    pub const DEBUG_VARIABLE: &'static str = "VIRTIO_BALLOON_RS_DEBUG_KERNEL";

    /// Returns the VMMs that a test runs with, one after the other: both, or only user-mode Linux if
    /// [`Vmm::DEBUG_VARIABLE`] is set.
    #[must_use]
    pub fn each() -> &'static [Self] {
        if Self::is_debug_only() {
            &[Self::Uml]
        } else {
            &[Self::Uml, Self::Qemu]
        }
    }

    /// Returns the memory that the debug kernel needs in addition for its own use, in bytes.
    pub(crate) fn overhead(self) -> u64 {
        match self {
            Self::Debug => 80 * MIB,
            Self::Qemu | Self::Uml => 0,
        }
    }

    /// Returns the number of repetitions of a test: `times`, or a tenth of it on the debug kernel, which is slow.
    #[must_use]
    pub fn repeats(self, times: u32) -> u32 {
        if matches!(self.resolve(), Ok(Self::Debug)) {
            times.div_ceil(10)
        } else {
            times
        }
    }

    /// Returns whether [`Vmm::DEBUG_VARIABLE`] is set.
    #[must_use]
    pub fn is_debug_only() -> bool {
        std::env::var_os(Self::DEBUG_VARIABLE).is_some()
    }

    /// Returns the VMM to run: the debug kernel instead of user-mode Linux if [`Vmm::DEBUG_VARIABLE`] is set.
    ///
    /// # Errors
    ///
    /// Fails for QEMU if [`Vmm::DEBUG_VARIABLE`] is set.
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

/// The configuration of a machine, for any VMM.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The size of memory, in bytes.
    pub memory: u64,
    /// The path of the initramfs.
    pub initramfs: PathBuf,
    /// The balloon device.
    pub device: Attachment,
    /// Further properties of a vhost-user device. QEMU only.
    pub properties: Map<String, Value>,
    /// The hardware of the machine. QEMU only.
    pub hardware: hardware::Hardware,
    /// Whether the balloon is in a hot-plug slot, now or later.
    pub hotplug_slot: bool,
    /// Whether the guest will be suspended. The agent then uses a serial line.
    ///
    /// On resume, the console driver of Linux 7.3 asks whether the host listens before it has queued a buffer for the
    /// answer, and loses its connection to the host.
    pub suspendable: bool,
    /// Further arguments for the kernel's command line.
    pub kernel_arguments: String,
    /// A file for guest memory, which other programs can open by its path. QEMU only.
    pub memory_file: Option<PathBuf>,
    /// Whether the machine waits for an incoming migration. QEMU only.
    pub incoming: bool,
    /// The path of an additional QMP socket.
    pub qmp_socket: Option<PathBuf>,
    /// The streams of the guest's console.
    pub console: Streams,
}

/// The balloon device of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// No balloon device.
    None,
    /// A vhost-user device, which listens on this socket.
    VhostUser(PathBuf),
    /// QEMU's own device with free page hinting, and these further properties.
    QemuOwn(Map<String, Value>),
}

/// A VMM that has been started.
#[derive(Debug)]
pub struct StartedVmm {
    /// The process of the VMM.
    pub process: Process,
    /// The connection to the agent.
    pub agent: UnixStream,
    /// The connection to the VMM's monitor, if it has one.
    pub monitor: Option<UnixStream>,
}

/// Returns a pair of connected sockets. The second one is for a child process.
fn socket_pair() -> Result<(UnixStream, OwnedFd)> {
    let (near, far) = UnixStream::pair().context("cannot make a pair of sockets")?;
    Ok((near, far.into()))
}
