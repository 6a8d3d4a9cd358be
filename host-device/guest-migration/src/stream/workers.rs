// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A thread for each of several channels.

use std::sync::mpsc::{sync_channel, Receiver, RecvError, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::control::Control;
use super::encoder::Encoder;
use super::writer::channel_of;
use super::StreamError;
use crate::{Memory, PageRun};

/// Jobs that wait for one channel. Each is a record of at most 1 MiB.
const QUEUE: usize = 4;

enum Job {
    Pages(PageRun, Vec<u8>),
    PagesFrom(PageRun, Memory),
    Zeros(PageRun),
    /// Tell when the round's end is on the wire.
    EndIteration(SyncSender<()>),
}

/// The threads, and the ways to them.
pub(super) struct Workers {
    queues: Vec<SyncSender<Job>>,
    threads: Vec<JoinHandle<Encoder>>,
    control: Arc<Control>,
    /// Buffers that were sent.
    spare: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Workers {
    pub fn start(encoders: Vec<Encoder>, control: &Arc<Control>) -> Result<Self, StreamError> {
        let mut workers = Self {
            queues: Vec::new(),
            threads: Vec::new(),
            control: Arc::clone(control),
            spare: Arc::default(),
        };
        for (index, encoder) in encoders.into_iter().enumerate() {
            let (queue, jobs) = sync_channel(QUEUE);
            let worker = Worker {
                encoder,
                jobs,
                control: Arc::clone(control),
                spare: Arc::clone(&workers.spare),
            };
            let thread = std::thread::Builder::new()
                .name(format!("channel-{index}"))
                .spawn(move || worker.run())
                .map_err(|source| StreamError::System {
                    doing: "cannot start a thread",
                    source: Arc::new(source),
                })?;
            workers.queues.push(queue);
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub fn pages(&self, run: PageRun, bytes: &[u8]) -> Result<(), StreamError> {
        let mut buffer = lock(&self.spare).pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        self.dispatch(run, Job::Pages(run, buffer))
    }

    pub fn pages_from(&self, run: PageRun, memory: &Memory) -> Result<(), StreamError> {
        self.dispatch(run, Job::PagesFrom(run, memory.clone()))
    }

    pub fn zeros(&self, run: PageRun) -> Result<(), StreamError> {
        self.dispatch(run, Job::Zeros(run))
    }

    /// Returns when each channel has written the end of the round.
    pub fn end_iteration(&self) -> Result<(), StreamError> {
        let (done, all) = sync_channel(self.queues.len());
        for queue in &self.queues {
            self.queue(queue, Job::EndIteration(done.clone()))?;
        }
        drop(done);
        for _ in &self.queues {
            all.recv().map_err(|RecvError| self.reason())?;
        }
        Ok(())
    }

    /// Lets each do what is left, and returns the channels.
    pub fn end(mut self) -> Result<Vec<Encoder>, StreamError> {
        self.queues.clear();
        let encoders = std::mem::take(&mut self.threads)
            .into_iter()
            .map(|thread| thread.join().map_err(|_| self.reason()))
            .collect::<Result<_, _>>()?;
        self.control.check()?;
        Ok(encoders)
    }

    fn dispatch(&self, run: PageRun, job: Job) -> Result<(), StreamError> {
        match self.queues.get(channel_of(run, self.queues.len())) {
            Some(queue) => self.queue(queue, job),
            None => Err(self.reason()),
        }
    }

    /// Waits for a place in the queue. A thread that has stopped has no queue any more, so none waits for it.
    fn queue(&self, queue: &SyncSender<Job>, job: Job) -> Result<(), StreamError> {
        queue.send(job).map_err(|_| self.reason())
    }

    /// Why a thread has stopped.
    fn reason(&self) -> StreamError {
        self.control.check().err().unwrap_or(StreamError::Cancelled)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queues.clear();
        if !self.threads.is_empty() {
            self.control.stop(StreamError::Cancelled);
        }
        for thread in self.threads.drain(..) {
            // A panic was reported already by the thread itself.
            let _ = thread.join();
        }
    }
}

struct Worker {
    encoder: Encoder,
    jobs: Receiver<Job>,
    control: Arc<Control>,
    spare: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Worker {
    fn run(mut self) -> Encoder {
        if let Err(error) = self.work() {
            self.control.stop(error);
        }
        self.encoder
    }

    fn work(&mut self) -> Result<(), StreamError> {
        loop {
            let job = match self.jobs.try_recv() {
                Ok(job) => job,
                Err(TryRecvError::Disconnected) => return self.encoder.flush(),
                Err(TryRecvError::Empty) => {
                    // Nothing to wait for that could go along.
                    self.encoder.flush()?;
                    match self.jobs.recv() {
                        Ok(job) => job,
                        Err(RecvError) => return Ok(()),
                    }
                }
            };
            self.control.check()?;
            match job {
                Job::Pages(run, bytes) => {
                    self.encoder.pages(run, &bytes)?;
                    lock(&self.spare).push(bytes);
                }
                Job::PagesFrom(run, memory) => self.encoder.pages_from(run, &memory)?,
                Job::Zeros(run) => self.encoder.zeros(run)?,
                Job::EndIteration(done) => {
                    self.encoder.end_iteration()?;
                    // Nobody waits any more if the stream has failed elsewhere.
                    let _ = done.send(());
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
