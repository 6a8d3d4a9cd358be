// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background jobs of a worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{anyhow, Result};
use guest_agent::calls::ChurnStats;
use guest_agent::pattern;

/// The longest sleep after a step: a stopped job ends soon.
const MAX_REST: Duration = Duration::from_millis(200);

/// A job that runs step by step until it is stopped.
pub trait Job: Send + 'static {
    /// Does the next step.
    fn step(&mut self) -> Result<()>;

    /// Compares all remaining pages and removes what the job has made.
    fn finish(&mut self) -> Result<()>;

    /// Returns the statistics so far.
    fn stats(&self) -> &ChurnStats;
}

/// A job in its own thread, so that the worker can still receive requests.
pub struct JobThread {
    stop: Arc<AtomicBool>,
    progress: Arc<Mutex<ChurnStats>>,
    thread: JoinHandle<Result<()>>,
}

impl JobThread {
    /// Starts the job. After each step it sleeps for `rest` times the duration of the step, up to [`MAX_REST`].
    pub fn start(mut job: impl Job, rest: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let progress = Arc::new(Mutex::new(ChurnStats::default()));
        let (seen, told) = (stop.clone(), progress.clone());
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                let begun = Instant::now();
                job.step()?;
                lock(&told).clone_from(job.stats());
                if rest > 0 {
                    thread::sleep(begun.elapsed().saturating_mul(rest).min(MAX_REST));
                }
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

    /// Returns the statistics so far.
    ///
    /// Fails if the thread has ended. [`JobThread::end`] returns the reason.
    pub fn progress(&self) -> Result<ChurnStats> {
        if self.thread.is_finished() {
            return Err(anyhow!("the job has ended before it was told to"));
        }
        Ok(lock(&self.progress).clone())
    }

    /// Stops the job, waits for its thread and returns the final statistics.
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

/// A pseudo-random sequence. The same seed gives the same sequence.
pub struct Rng(pub u64);

impl Rng {
    /// Returns the next number.
    pub fn next(&mut self) -> u64 {
        self.0 = pattern::next_random(self.0);
        self.0
    }

    /// Returns the next number modulo `bound`, or 0 if `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        // The truncation is intended: the low bits are as random as the others.
        (self.next() as usize) % bound.max(1)
    }
}
