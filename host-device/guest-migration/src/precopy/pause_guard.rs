// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guard that resumes the VM.

use tracing::warn;

use super::progress::Progress;
use crate::vm::{Vm, VmError};

/// A VM that resumes if it is dropped while it is paused.
pub(super) struct PauseGuard {
    vm: Option<Box<dyn Vm>>,
    paused: bool,
    /// Shows that the guest could not be resumed.
    progress: Progress,
}

impl PauseGuard {
    pub(super) fn new(vm: Option<Box<dyn Vm>>, progress: &Progress) -> Self {
        Self {
            vm,
            paused: false,
            progress: progress.clone(),
        }
    }

    pub(super) fn pause(&mut self) -> Result<(), VmError> {
        if let Some(vm) = &mut self.vm {
            // Before pausing: the VM must resume even if pausing fails half-way.
            self.paused = true;
            vm.pause()?;
        }
        Ok(())
    }

    pub(super) fn keep_paused(&mut self) -> Option<Box<dyn Vm>> {
        self.paused = false;
        let mut vm = self.vm.take();
        if let Some(vm) = &mut vm {
            vm.keep_paused();
        }
        vm
    }
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        if let (true, Some(vm)) = (self.paused, &mut self.vm) {
            if let Err(error) = vm.resume() {
                self.progress.update(|status| status.guest_paused = true);
                warn!(
                    "guest is paused and cannot be resumed ({}): {error}; resume it with 'cont' if it stays paused",
                    vm.describe()
                );
            }
        }
    }
}
