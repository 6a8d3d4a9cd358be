// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A counter of changes, for threads that wait for a change without holding the lock of the changing state.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// A counter of changes that threads can wait for. Notifying does not wait for other threads, and is
/// allowed under any lock.
#[derive(Debug, Default)]
pub struct EventCount {
    generation: Mutex<u64>,
    changed: Condvar,
}

impl EventCount {
    /// Counts a change, and wakes all waiters.
    pub fn notify_all(&self) {
        let mut generation = lock(&self.generation);
        *generation = generation.wrapping_add(1);
        drop(generation);
        self.changed.notify_all();
    }

    /// Returns the number of changes so far. A waiter reads this number before it checks its condition, so that it
    /// misses no later change.
    pub fn generation(&self) -> u64 {
        *lock(&self.generation)
    }

    /// Sleeps until the number of changes differs from `seen`, or until `deadline`; `None` means no deadline. Returns
    /// whether there was a change.
    pub fn wait(&self, seen: u64, deadline: Option<Instant>) -> bool {
        let mut generation = lock(&self.generation);
        while *generation == seen {
            let rest = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                return false;
            }
            let rest = rest.unwrap_or(Duration::from_secs(3600));
            (generation, _) = self
                .changed
                .wait_timeout(generation, rest)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_change_after_the_read_is_not_missed() {
        let event_count = Arc::new(EventCount::default());
        let seen = event_count.generation();
        event_count.notify_all();
        assert!(event_count.wait(seen, None));
        let seen = event_count.generation();
        assert!(!event_count.wait(seen, Some(Instant::now())));
        let giver = std::thread::spawn({
            let event_count = event_count.clone();
            move || event_count.notify_all()
        });
        assert!(event_count.wait(seen, Some(Instant::now() + Duration::from_secs(600))));
        giver.join().unwrap();
    }
}
