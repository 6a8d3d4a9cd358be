// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Our own writers, kept from writing for a moment.

use std::sync::{Arc, Mutex, PoisonError};

/// Keeps the threads of our own process from writing to guest memory.
///
/// Other processes can be stopped for a moment; our own cannot, since it does the looking. Whoever serves devices hands in
/// the lock that they hold while they write.
pub trait Quiesce: Send {
    /// Does `action`, once, while nobody in our process writes to guest memory or makes holes in it.
    fn with_quiesced(&self, action: &mut dyn FnMut());
}

/// Of a process that never writes to guest memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWriters;

impl Quiesce for NoWriters {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        action();
    }
}

/// Writers hold this lock.
impl<T: Send> Quiesce for Arc<Mutex<T>> {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        let _held = self.lock().unwrap_or_else(PoisonError::into_inner);
        action();
    }
}
