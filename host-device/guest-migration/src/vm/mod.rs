// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pausing the virtual machine (VM) for the switchover.

mod paused_guest;
mod process_vm;
mod qmp_vm;
mod resume;

use thiserror::Error;

pub use paused_guest::PausedGuest;
pub use process_vm::ProcessVm;
pub use qmp_vm::QmpVm;
pub use resume::resume;

/// Why a VM was not paused or not resumed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{0}")]
pub struct VmError(pub String);

/// A virtual machine that can be paused.
pub trait Vm: Send {
    /// Returns how the VM is paused, for the user: "QMP at /run/vm.qmp".
    fn describe(&self) -> String;

    /// Pauses the guest. Once this returns, no vCPU writes to guest memory, and no device other than our own.
    ///
    /// # Errors
    ///
    /// If the guest cannot be paused. It then continues to run.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Resumes the guest.
    ///
    /// # Errors
    ///
    /// If the guest cannot be resumed.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Leaves the paused guest paused: the switchover is complete. From now on, only [`Vm::resume`] resumes it, and no
    /// longer the end of this process.
    fn keep_paused(&mut self) {}

    /// Returns what [`Vm::resume`] would resume now, for another process.
    fn paused_guest(&self) -> PausedGuest {
        PausedGuest::default()
    }
}
