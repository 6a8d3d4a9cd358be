// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Excludes the threads of the device that write to guest memory.

use std::sync::{Arc, Mutex, PoisonError};

/// Keeps the threads of the device's process from writing to guest memory.
///
/// A dirty sync stops all other processes. It does not stop the process of the device, which is usually the one in which
/// the sync runs. A process that serves devices passes the lock that its threads hold while they write.
pub trait Quiesce: Send {
    /// Returns the pid of the device's process, which a dirty sync does not stop.
    fn process(&self) -> u32 {
        std::process::id()
    }

    /// Runs `action` once, while no thread of the device's process writes to guest memory or punches holes in it. Does not
    /// run it if the device cannot be quiesced.
    fn with_quiesced(&self, action: &mut dyn FnMut());
}

/// A [`Quiesce`] for writers that hold this lock while they write.
impl<T: Send> Quiesce for Arc<Mutex<T>> {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        let _held = self.lock().unwrap_or_else(PoisonError::into_inner);
        action();
    }
}
