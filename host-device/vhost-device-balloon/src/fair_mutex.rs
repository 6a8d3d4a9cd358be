// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mutex that threads get in the order in which they asked for it.
//!
//! The standard mutex lets a thread that unlocks and locks again overtake all others. A thread that works in small
//! steps, with the lock released between them, would then keep the others out until its last step.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::sync::lock;

/// A mutex that serves its callers first come, first served. A thread that panics while it holds the lock releases it.
#[derive(Debug, Default)]
pub struct FairMutex<T> {
    line: Mutex<Line>,
    turn: Condvar,
    value: Mutex<T>,
}

/// The callers, by number: `serving` holds the lock, and those up to `next` wait. The lock is free if both are
/// equal.
#[derive(Debug, Default)]
struct Line {
    next: u64,
    serving: u64,
}

/// Holds the lock. Dropping it gives the lock to the next caller.
#[derive(Debug)]
#[must_use = "dropping it unlocks"]
pub struct FairGuard<'a, T> {
    value: MutexGuard<'a, T>,
    // Dropped after the guard above, so that the next caller finds the value unlocked.
    _turn: Turn<'a>,
}

#[derive(Debug)]
struct Turn<'a> {
    line: &'a Mutex<Line>,
    turn: &'a Condvar,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut line = lock(self.line);
        line.serving = line.serving.wrapping_add(1);
        let waiting = line.serving != line.next;
        drop(line);
        if waiting {
            self.turn.notify_all();
        }
    }
}

impl<T> FairMutex<T> {
    /// Creates an unlocked mutex.
    pub fn new(value: T) -> Self {
        Self {
            line: Mutex::default(),
            turn: Condvar::new(),
            value: Mutex::new(value),
        }
    }

    /// Waits for the callers before this one, and locks.
    pub fn lock(&self) -> FairGuard<'_, T> {
        let mut line = lock(&self.line);
        let number = line.next;
        line.next = line.next.wrapping_add(1);
        while line.serving != number {
            line = self.turn.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        drop(line);
        let turn = Turn {
            line: &self.line,
            turn: &self.turn,
        };
        FairGuard {
            value: lock(&self.value),
            _turn: turn,
        }
    }

    /// Returns the number of threads that wait for the lock.
    pub fn waiting(&self) -> u64 {
        let line = lock(&self.line);
        line.next.wrapping_sub(line.serving).saturating_sub(1)
    }
}

impl<T> Deref for FairGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for FairGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_locks_again_at_once_lets_the_others_go_first() {
        let log = FairMutex::new(Vec::new());
        std::thread::scope(|scope| {
            let mut first = log.lock();
            for number in 1..4 {
                let log = &log;
                scope.spawn(move || log.lock().push(number));
                while log.waiting() < number {
                    std::thread::yield_now();
                }
            }
            first.push(0);
            drop(first);
            log.lock().push(4);
        });
        assert_eq!(*log.lock(), [0, 1, 2, 3, 4]);
        assert_eq!(log.waiting(), 0);
    }

    #[test]
    fn a_panic_releases_the_lock() {
        let value = FairMutex::new(1);
        std::thread::scope(|scope| {
            let panicked = scope.spawn(|| {
                let _held = value.lock();
                std::panic::resume_unwind(Box::new("on purpose"));
            });
            assert!(panicked.join().is_err());
        });
        assert_eq!(*value.lock(), 1);
    }
}
