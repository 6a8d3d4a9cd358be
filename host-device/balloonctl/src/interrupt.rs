// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counts interrupts such as Ctrl-C.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;

use guest_migration::signals::{is_ignored, unblock_all};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Number of interrupts of this process. Clones share the number.
#[derive(Clone, Debug, Default)]
pub struct Interrupts(Arc<AtomicU32>);

impl Interrupts {
    /// Counts SIGINT, SIGTERM and SIGHUP from now on. These signals no longer end the process. Under `nohup`, SIGHUP
    /// remains ignored.
    ///
    /// # Errors
    ///
    /// If the signal handlers cannot be installed.
    pub fn from_signals() -> io::Result<Self> {
        let interrupts = Self::default();
        unblock_all()?;
        let counter = interrupts.clone();
        let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        let mut signals = Signals::new([SIGINT, SIGTERM].into_iter().chain(hangup))?;
        thread::spawn(move || {
            for _ in signals.forever() {
                counter.add();
            }
        });
        Ok(interrupts)
    }

    /// Counts an interrupt.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns the number of interrupts.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}
