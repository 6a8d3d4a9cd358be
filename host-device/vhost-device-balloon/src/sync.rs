// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks of this crate.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What [`lock`] can lock.
pub(crate) trait Lock {
    /// Holds the lock until it is dropped.
    type Guard<'a>
    where
        Self: 'a;

    /// Waits for the lock.
    fn acquire(&self) -> Self::Guard<'_>;
}

impl<T> Lock for Mutex<T> {
    type Guard<'a>
        = MutexGuard<'a, T>
    where
        Self: 'a;

    /// Locks the mutex, even if a thread panicked while it held the lock. The state under the mutexes of this crate is
    /// consistent after every statement.
    fn acquire(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<L: Lock> Lock for Arc<L> {
    type Guard<'a>
        = L::Guard<'a>
    where
        Self: 'a;

    fn acquire(&self) -> L::Guard<'_> {
        L::acquire(self)
    }
}

impl<L: Lock> Lock for &L {
    type Guard<'a>
        = L::Guard<'a>
    where
        Self: 'a;

    fn acquire(&self) -> L::Guard<'_> {
        L::acquire(self)
    }
}

/// Locks `mutex`.
pub(crate) fn lock<L: Lock>(mutex: &L) -> L::Guard<'_> {
    mutex.acquire()
}
