// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of a writer with several channels.
//!
//! Each channel has a thread that owns its [`Encoder`], and a bounded queue of jobs. The first failure of any thread
//! stops the stream through the shared [`Control`].

use std::sync::mpsc::{sync_channel, Receiver, RecvError, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::control::Control;
use super::encoder::Encoder;
use super::stripes::channel_of;
use super::StreamError;
use crate::{Memory, PageRun};

/// Capacity of the job queue of a channel. Each job is one record of at most 1 MiB.
const QUEUE: usize = 4;

enum Job {
    Pages(PageRun, Vec<u8>),
    PagesFrom(PageRun, Memory),
    Zeros(PageRun),
    /// Ends the iteration, and sends a message when its end is on the wire.
    EndIteration(SyncSender<()>),
}

/// The threads of all channels, and their job queues.
pub(super) struct Workers {
    queues: Vec<SyncSender<Job>>,
    threads: Vec<JoinHandle<Encoder>>,
    control: Arc<Control>,
    /// Buffers for page content, for reuse after they are sent.
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
                    doing: "cannot start a channel thread",
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

    /// Ends the iteration on all channels. Waits until each channel has written the end.
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

    /// Waits until the threads have done all queued jobs. Returns the encoders.
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

    /// Queues a job. Waits while the queue is full. Fails if the thread has stopped, which closes its queue.
    fn queue(&self, queue: &SyncSender<Job>, job: Job) -> Result<(), StreamError> {
        queue.send(job).map_err(|_| self.reason())
    }

    /// Returns why a thread has stopped.
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
            // Ignored: the message of a panic is already printed.
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
                    // No queued job can share the write with the batch, so write the batch now.
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
                    // Ignored: `Workers::end_iteration` has returned if another channel has failed.
                    let _ = done.send(());
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
