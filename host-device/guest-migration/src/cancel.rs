// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cancellation of an operation from another thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Action = Box<dyn Fn() + Send>;

/// A token that cancels an operation from any thread. Clones share their state.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    cancelled: Condvar,
}

#[derive(Default)]
struct State {
    cancelled: bool,
    actions: Vec<Action>,
}

impl CancelToken {
    /// Cancels the operation. Wakes all sleepers, and runs the registered actions in this thread before it returns.
    /// Later calls have no effect.
    pub fn cancel(&self) {
        let actions = {
            let mut state = self.state();
            state.cancelled = true;
            std::mem::take(&mut state.actions)
        };
        self.0.cancelled.notify_all();
        for action in actions {
            action();
        }
    }

    /// Returns whether the token is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// Registers `action`, which runs in the thread that cancels the token. Runs `action` now if the token is cancelled
    /// already.
    ///
    /// The action must not block. Its purpose is to wake blocked threads, for example by closing their connection.
    pub fn on_cancel(&self, action: impl Fn() + Send + 'static) {
        let mut state = self.state();
        if state.cancelled {
            drop(state);
            action();
        } else {
            state.actions.push(Box::new(action));
        }
    }

    /// Sleeps for `duration` or until the token is cancelled, and returns whether it is cancelled.
    pub fn sleep(&self, duration: Duration) -> bool {
        let end = Instant::now().checked_add(duration);
        let mut state = self.state();
        loop {
            if state.cancelled {
                return true;
            }
            let rest = match end {
                Some(end) => end.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if rest.is_zero() {
                return false;
            }
            state = self
                .0
                .cancelled
                .wait_timeout(state, rest)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cancel").field(&self.is_cancelled()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn cancelling_wakes_a_sleeper_and_runs_the_actions() {
        let cancel = CancelToken::default();
        let (sender, done) = channel();
        let late = sender.clone();
        cancel.on_cancel(move || sender.send("at once").unwrap());
        let sleeper = std::thread::spawn({
            let cancel = cancel.clone();
            move || cancel.sleep(Duration::from_secs(600))
        });
        assert!(!cancel.sleep(Duration::from_millis(1)));
        cancel.cancel();
        assert!(sleeper.join().unwrap());
        assert_eq!(done.try_recv(), Ok("at once"));
        cancel.on_cancel(move || late.send("late").unwrap());
        assert_eq!(done.try_recv(), Ok("late"));
    }
}
