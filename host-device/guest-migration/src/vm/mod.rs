// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who can pause the virtual machine for the last of a migration.

mod process_vm;
mod qmp_vm;

use thiserror::Error;

pub use process_vm::ProcessVm;
pub use qmp_vm::QmpVm;

/// Why a virtual machine was not paused, or does not go on.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{0}")]
pub struct VmError(pub String);

/// A virtual machine that can be paused.
pub trait Vm: Send {
    /// Whom it asks, for operators: "QMP at /run/vm.qmp".
    fn describe(&self) -> String;

    /// Pauses the guest: no processor of it, and no device but ours, writes to guest memory once this has returned.
    ///
    /// # Errors
    ///
    /// If it cannot be paused. It runs on then.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the guest go on.
    ///
    /// # Errors
    ///
    /// If it cannot be told to.
    fn resume(&mut self) -> Result<(), VmError>;
}
