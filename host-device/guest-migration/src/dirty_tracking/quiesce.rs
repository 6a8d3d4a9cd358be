// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Excludes the threads of our own process that write to guest memory.

use std::sync::{Arc, Mutex, PoisonError};

/// Keeps the threads of our own process from writing to guest memory.
///
/// A dirty sync stops all other processes. It cannot stop our own process, in which it runs. A process that serves
/// devices passes the lock that its threads hold while they write.
pub trait Quiesce: Send {
    /// Runs `action` once, while no thread of our process writes to guest memory or punches holes in it.
    fn with_quiesced(&self, action: &mut dyn FnMut());
}

/// A [`Quiesce`] for writers that hold this lock while they write.
impl<T: Send> Quiesce for Arc<Mutex<T>> {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        let _held = self.lock().unwrap_or_else(PoisonError::into_inner);
        action();
    }
}
