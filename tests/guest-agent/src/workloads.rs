// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The processes that use memory, seen from the first process.
//!
//! A workload is a process of its own, so that its end gives back all that it had, and so that the kernel, when memory
//! runs out, can end it without ending the guest.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{ChurnFiles, ChurnForks, ChurnMemory, ChurnStats, Fill, Filled, Verified};
use guest_agent::protocol::CallResult;
use guest_agent::ranges::RangeSet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The argument that makes this program a worker.
pub const WORKER_ARGUMENT: &str = "worker";

/// What a worker is told, one JSON value a line. Each is answered by an [`CallResult`].
#[derive(Debug, Serialize, Deserialize)]
pub enum WorkerRequest {
    /// Map and fill; answered by the number of pages filled and kept.
    Fill(Fill),
    /// Give back what is not kept.
    Release,
    /// Give back so many pages of what is not kept: those with the lowest physical addresses.
    ReleaseLowest(u64),
    /// Compare what is kept.
    Verify,
    /// Say where it lies.
    KeptPages,
    /// Use memory in the background.
    ChurnMemory(ChurnMemory),
    /// Use files in the background.
    ChurnFiles(ChurnFiles),
    /// Fork in the background.
    ChurnForks(ChurnForks),
    /// Say what was done so far; answered by a [`ChurnStats`].
    ChurnProgress,
    /// End that, and say what was done; answered by a [`ChurnStats`].
    StopChurn,
}

/// The workloads that run.
#[derive(Default)]
pub struct Workloads {
    running: BTreeMap<u32, Worker>,
    last: u32,
}

impl Workloads {
    /// Starts one.
    pub fn fill(&mut self, fill: &Fill) -> Result<Filled> {
        let mut worker = Worker::start()?;
        let (pages, kept) = worker.request(&WorkerRequest::Fill(fill.clone()))?;
        Ok(Filled {
            workload: self.add(worker),
            pages,
            kept,
        })
    }

    /// Starts one that never stands still.
    pub fn churn(&mut self, request: &WorkerRequest) -> Result<u32> {
        let mut worker = Worker::start()?;
        worker.request::<()>(request)?;
        Ok(self.add(worker))
    }

    /// Asks one of these what it has done.
    pub fn churn_progress(&mut self, workload: u32) -> Result<ChurnStats> {
        self.find(workload)?.request(&WorkerRequest::ChurnProgress)
    }

    /// Ends one of these.
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

    /// Has one give back what it does not keep.
    pub fn release(&mut self, workload: u32) -> Result<()> {
        self.find(workload)?.request(&WorkerRequest::Release)
    }

    /// Has one give back so many pages of what it does not keep.
    pub fn release_lowest(&mut self, workload: u32, pages: u64) -> Result<()> {
        self.find(workload)?
            .request(&WorkerRequest::ReleaseLowest(pages))
    }

    /// Has one compare what it keeps.
    pub fn verify(&mut self, workload: u32) -> Result<Verified> {
        self.find(workload)?.request(&WorkerRequest::Verify)
    }

    /// Asks one where its pages lie.
    pub fn kept_pages(&mut self, workload: u32) -> Result<RangeSet> {
        self.find(workload)?.request(&WorkerRequest::KeptPages)
    }

    /// Ends one.
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
