// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The workloads: processes that use memory, as the agent sees them.
//!
//! Each workload has its own process, so that the end of the process frees all its memory, and so that the OOM killer
//! can end the workload without ending the guest.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{ChurnFiles, ChurnForks, ChurnMemory, ChurnStats, Fill, Filled, Verified};
use guest_agent::protocol::CallResult;
use guest_agent::ranges::RangeSet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The argument that makes this program run as a worker.
pub const WORKER_ARGUMENT: &str = "worker";

/// A request to a worker, one JSON value a line. The worker answers each with a [`CallResult`].
#[derive(Debug, Serialize, Deserialize)]
pub enum WorkerRequest {
    /// Maps and fills memory; answered by the number of filled pages and the number of kept pages.
    Fill(Fill),
    /// Gives the pages that are not kept back to the kernel.
    Release,
    /// Gives this many of the pages that are not kept back to the kernel: those with the lowest physical addresses.
    ReleaseLowest(u64),
    /// Compares the kept pages.
    Verify,
    /// Returns the physical ranges of the kept pages.
    KeptPages,
    /// Churns memory in the background.
    ChurnMemory(ChurnMemory),
    /// Churns files in the background.
    ChurnFiles(ChurnFiles),
    /// Forks in the background.
    ChurnForks(ChurnForks),
    /// Returns the statistics of the background job so far, as [`ChurnStats`].
    ChurnProgress,
    /// Ends the background job and returns its statistics, as [`ChurnStats`].
    StopChurn,
}

/// The running workloads.
#[derive(Default)]
pub struct Workloads {
    running: BTreeMap<u32, Worker>,
    last: u32,
}

impl Workloads {
    /// Starts a workload that fills memory.
    pub fn fill(&mut self, fill: &Fill) -> Result<Filled> {
        let mut worker = Worker::start()?;
        let (pages, kept) = worker.request(&WorkerRequest::Fill(fill.clone()))?;
        Ok(Filled {
            workload: self.add(worker),
            pages,
            kept,
        })
    }

    /// Starts a workload with a background job.
    pub fn churn(&mut self, request: &WorkerRequest) -> Result<u32> {
        let mut worker = Worker::start()?;
        worker.request::<()>(request)?;
        Ok(self.add(worker))
    }

    /// Returns the statistics of a workload's background job so far.
    pub fn churn_progress(&mut self, workload: u32) -> Result<ChurnStats> {
        self.find(workload)?.request(&WorkerRequest::ChurnProgress)
    }

    /// Ends a workload with a background job.
    pub fn stop_churn(&mut self, workload: u32) -> Result<ChurnStats> {
        let churned = self.find(workload)?.request(&WorkerRequest::StopChurn)?;
        self.free(workload)?;
        Ok(churned)
    }

    fn add(&mut self, worker: Worker) -> u32 {
        self.last = self.last.wrapping_add(1);
        self.running.insert(self.last, worker);
        self.last
    }

    /// Makes a workload give back the pages that it does not keep.
    pub fn release(&mut self, workload: u32) -> Result<()> {
        self.find(workload)?.request(&WorkerRequest::Release)
    }

    /// Makes a workload give back `pages` pages that it does not keep, those with the lowest physical addresses.
    pub fn release_lowest(&mut self, workload: u32, pages: u64) -> Result<()> {
        self.find(workload)?
            .request(&WorkerRequest::ReleaseLowest(pages))
    }

    /// Makes a workload compare the pages that it keeps.
    pub fn verify(&mut self, workload: u32) -> Result<Verified> {
        self.find(workload)?.request(&WorkerRequest::Verify)
    }

    /// Returns the physical ranges of a workload's kept pages.
    pub fn kept_pages(&mut self, workload: u32) -> Result<RangeSet> {
        self.find(workload)?.request(&WorkerRequest::KeptPages)
    }

    /// Ends a workload.
    pub fn free(&mut self, workload: u32) -> Result<()> {
        let worker = self.running.remove(&workload);
        worker
            .with_context(|| format!("there is no workload {workload}"))?
            .end()
    }

    fn find(&mut self, workload: u32) -> Result<&mut Worker> {
        self.running
            .get_mut(&workload)
            .with_context(|| format!("there is no workload {workload}"))
    }
}

struct Worker {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    fn start() -> Result<Self> {
        let mut process = Command::new("/proc/self/exe")
            .arg(WORKER_ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a worker")?;
        let requests = process
            .stdin
            .take()
            .context("the worker has no standard input")?;
        let answers = process
            .stdout
            .take()
            .context("the worker has no standard output")?;
        Ok(Self {
            process,
            requests,
            answers: BufReader::new(answers),
        })
    }

    fn request<A: DeserializeOwned>(&mut self, request: &WorkerRequest) -> Result<A> {
        let mut line = serde_json::to_string(request).context("cannot encode an order")?;
        line.push('\n');
        let sent = self.requests.write_all(line.as_bytes());
        let mut answer = String::new();
        if sent.is_err() || self.answers.read_line(&mut answer).unwrap_or(0) == 0 {
            let status = self.process.wait().context("cannot wait for a worker")?;
            bail!("the worker is gone ({status}); the kernel log says more if memory ran out");
        }
        match serde_json::from_str(&answer).context("the worker's answer is not one")? {
            CallResult::Done(value) => {
                serde_json::from_value(value).context("the worker's answer is of another kind")
            }
            CallResult::Failed(message) => bail!("{message}"),
        }
    }

    fn end(mut self) -> Result<()> {
        drop(self.requests);
        let status = self.process.wait().context("cannot wait for a worker")?;
        if !status.success() {
            bail!("the worker ended with {status}");
        }
        Ok(())
    }
}
