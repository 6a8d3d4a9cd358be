// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ctrl-C, counted.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How often the user asked for an end; clones share the count.
#[derive(Clone, Debug, Default)]
pub struct Interrupts(Arc<AtomicU32>);

impl Interrupts {
    /// Counts SIGINT, SIGTERM and SIGHUP of this process from now on; they do not end it any more.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn from_signals() -> io::Result<Self> {
        let interrupts = Self::default();
        let counter = interrupts.clone();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        thread::spawn(move || {
            for _ in signals.forever() {
                counter.add();
            }
        });
        Ok(interrupts)
    }

    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}
