// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a worker does in the background until it is told to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{anyhow, Result};
use guest_agent::calls::Churned;
use guest_agent::pattern;

/// Something that is done step by step, without end.
pub trait Job: Send + 'static {
    /// Does the next.
    fn step(&mut self) -> Result<()>;

    /// Compares all that is left, and lets go of it.
    fn finish(&mut self) -> Result<()>;

    /// What was done so far.
    fn done(&self) -> &Churned;
}

/// A job in a thread of its own, so that this process can be told to end it.
pub struct Running {
    stop: Arc<AtomicBool>,
    so_far: Arc<Mutex<Churned>>,
    thread: JoinHandle<Result<()>>,
}

impl Running {
    /// Begins.
    pub fn start(mut job: impl Job) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let so_far = Arc::new(Mutex::new(Churned::default()));
        let (seen, told) = (stop.clone(), so_far.clone());
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                job.step()?;
                lock(&told).clone_from(job.done());
            }
            job.finish()?;
            lock(&told).clone_from(job.done());
            Ok(())
        });
        Self {
            stop,
            so_far,
            thread,
        }
    }

    /// What was done up to now, unless the job has failed: that only its end tells.
    pub fn so_far(&self) -> Result<Churned> {
        if self.thread.is_finished() {
            return Err(anyhow!("the job has ended before it was told to"));
        }
        Ok(lock(&self.so_far).clone())
    }

    /// Ends it.
    pub fn end(self) -> Result<Churned> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.join();
        joined.map_err(|_| anyhow!("the job's thread panicked"))??;
        Ok(lock(&self.so_far).clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sequence that looks random, and is the same for the same seed.
pub struct Random(pub u64);

impl Random {
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
