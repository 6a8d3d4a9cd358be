// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a worker does in the background until it is told to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{anyhow, Result};
use guest_agent::calls::ChurnStats;
use guest_agent::pattern;

/// Something that is done step by step, without end.
pub trait Job: Send + 'static {
    /// Does the next.
    fn step(&mut self) -> Result<()>;

    /// Compares all that is left, and lets go of it.
    fn finish(&mut self) -> Result<()>;

    /// What was done so far.
    fn stats(&self) -> &ChurnStats;
}

/// A job in a thread of its own, so that this process can be told to end it.
pub struct JobThread {
    stop: Arc<AtomicBool>,
    progress: Arc<Mutex<ChurnStats>>,
    thread: JoinHandle<Result<()>>,
}

impl JobThread {
    /// Begins.
    pub fn start(mut job: impl Job) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let progress = Arc::new(Mutex::new(ChurnStats::default()));
        let (seen, told) = (stop.clone(), progress.clone());
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                job.step()?;
                lock(&told).clone_from(job.stats());
            }
            job.finish()?;
            lock(&told).clone_from(job.stats());
            Ok(())
        });
        Self {
            stop,
            progress,
            thread,
        }
    }

    /// What was done up to now, unless the job has failed: that only its end tells.
    pub fn progress(&self) -> Result<ChurnStats> {
        if self.thread.is_finished() {
            return Err(anyhow!("the job has ended before it was told to"));
        }
        Ok(lock(&self.progress).clone())
    }

    /// Ends it.
    pub fn end(self) -> Result<ChurnStats> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.join();
        joined.map_err(|_| anyhow!("the job's thread panicked"))??;
        Ok(lock(&self.progress).clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sequence that looks random, and is the same for the same seed.
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = pattern::next_random(self.0);
        self.0
    }

    /// The next number, less than `bound` (0 if that is 0).
    pub fn below(&mut self, bound: usize) -> usize {
        // Truncation is what is wanted: the low bits are as random as all.
        (self.next() as usize) % bound.max(1)
    }
}
