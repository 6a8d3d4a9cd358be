// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! "Something has changed, look again", for threads that wait without holding what they look at.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::lock;

/// A counter of changes that can be waited for. Giving the signal never waits, and is allowed under any lock.
#[derive(Debug, Default)]
pub struct Signal {
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Signal {
    /// Wakes all who wait.
    pub fn give(&self) {
        let mut changes = lock(&self.changes);
        *changes = changes.wrapping_add(1);
        drop(changes);
        self.changed.notify_all();
    }

    /// The number of changes so far. Who waits takes it before looking, so that no change after the look is missed.
    pub fn changes(&self) -> u64 {
        *lock(&self.changes)
    }

    /// Sleeps until there have been other than `seen` changes, or until `limit`; without a limit as long as it takes.
    /// Says whether there was a change.
    pub fn wait(&self, seen: u64, limit: Option<Instant>) -> bool {
        let mut changes = lock(&self.changes);
        while *changes == seen {
            let rest = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                return false;
            }
            let rest = rest.unwrap_or(Duration::from_secs(3600));
            (changes, _) = self
                .changed
                .wait_timeout(changes, rest)
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
    fn a_change_after_the_look_is_not_missed() {
        let signal = Arc::new(Signal::default());
        let seen = signal.changes();
        signal.give();
        assert!(signal.wait(seen, None));
        let seen = signal.changes();
        assert!(!signal.wait(seen, Some(Instant::now())));
        let giver = std::thread::spawn({
            let signal = signal.clone();
            move || signal.give()
        });
        assert!(signal.wait(seen, Some(Instant::now() + Duration::from_secs(600))));
        giver.join().unwrap();
    }
}
