// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that maps and writes memory on request: one request a line, one answer for each.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{bail, ensure, Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use serde::{Deserialize, Serialize};

use crate::mapping::{PageMapping, Rng};

/// The argument that makes this program run as a writer.
pub const ARGUMENT: &str = "writer";
/// The file descriptor of the memory file.
const FILE: i32 = 3;

/// A request to a writer. Page numbers are those of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum WriterRequest {
    /// Maps pages, in addition to the existing mappings.
    Map { first: u64, pages: u64 },
    /// Removes the last mapping.
    Unmap,
    /// Writes a page through the last mapping.
    Write { page: u64, value: u8 },
    /// Reads a page through the last mapping.
    Read { page: u64 },
    /// Maps a page, writes it and unmaps it.
    MapWriteUnmap { page: u64, value: u8 },
    /// Starts a child that maps a page, writes it and unmaps it, and waits until the child ends.
    ChildMapWriteUnmap { page: u64, value: u8 },
    /// Starts a child that is also a writer. The child maps nothing yet.
    StartChild,
    /// Forwards a request to the child.
    ToChild(Box<WriterRequest>),
    /// Ends the child.
    EndChild,
    /// Writes random pages as fast as possible, until [`WriterRequest::StopHammer`].
    Hammer { seed: u64 },
    /// Stops the writes of [`WriterRequest::Hammer`].
    StopHammer,
}

/// A handle of a writer process, which ends on drop.
pub struct Writer {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Writer {
    /// Starts a writer for a file of `pages` pages.
    pub fn start(file: &File, pages: u64) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.args([ARGUMENT, &pages.to_string()]);
        let file = FdMapping {
            parent_fd: file.try_clone()?.into(),
            child_fd: FILE,
        };
        command
            .fd_mappings(vec![file])
            .context("cannot pass the file")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a writer")?;
        let requests = child.stdin.take();
        let answers = child.stdout.take().context("no standard output")?;
        Ok(Self {
            child,
            requests,
            answers: BufReader::new(answers),
        })
    }

    /// Sends a request and waits until the writer has executed it.
    pub fn execute(&mut self, request: &WriterRequest) -> Result<()> {
        let requests = self.requests.as_mut().context("it was told to end")?;
        writeln!(requests, "{}", serde_json::to_string(request)?)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        ensure!(answer == "done\n", "{request:?}: {answer:?}");
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.requests = None;
        // The writer ends at the end of its standard input.
        let _ = self.child.wait();
    }
}

#[derive(Default)]
struct Hammer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// Runs the writer: executes requests until the end of standard input.
pub fn run(pages: u64) -> Result<()> {
    let file = std::fs::OpenOptions::new();
    let file = file
        .clone()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{FILE}"))?;
    let mut mappings: Vec<PageMapping> = Vec::new();
    let mut child = None;
    let mut hammer = Hammer::default();
    for line in std::io::stdin().lock().lines() {
        match serde_json::from_str(&line?)? {
            WriterRequest::Map { first, pages } => {
                mappings.push(PageMapping::map(&file, first, pages)?)
            }
            WriterRequest::Unmap => drop(mappings.pop().context("nothing is mapped")?),
            WriterRequest::Write { page, value } => last(&mappings)?.write(page, value)?,
            WriterRequest::Read { page } => drop(last(&mappings)?.read(page)?),
            WriterRequest::MapWriteUnmap { page, value } => {
                PageMapping::map(&file, page, 1)?.write(page, value)?
            }
            WriterRequest::ChildMapWriteUnmap { page, value } => {
                Writer::start(&file, pages)?
                    .execute(&WriterRequest::MapWriteUnmap { page, value })?;
            }
            WriterRequest::StartChild => child = Some(Writer::start(&file, pages)?),
            WriterRequest::ToChild(request) => {
                child.as_mut().context("no child")?.execute(&request)?
            }
            WriterRequest::EndChild => drop(child.take().context("no child")?),
            WriterRequest::Hammer { seed } => {
                hammer.stop.store(false, Ordering::Relaxed);
                let (mapping, stop) = (PageMapping::map(&file, 0, pages)?, hammer.stop.clone());
                hammer.thread = Some(std::thread::spawn(move || {
                    write_random(&mapping, pages, seed, &stop)
                }));
            }
            WriterRequest::StopHammer => {
                hammer.stop.store(true, Ordering::Relaxed);
                match hammer.thread.take().context("nothing to rest from")?.join() {
                    Ok(result) => result?,
                    Err(_) => bail!("the hammer broke"),
                }
            }
        }
        println!("done");
    }
    Ok(())
}

fn last(mappings: &[PageMapping]) -> Result<&PageMapping> {
    mappings.last().context("nothing is mapped")
}

/// Writes random pages until `stop` is set.
pub fn write_random(mapping: &PageMapping, pages: u64, seed: u64, stop: &AtomicBool) -> Result<()> {
    let mut random = Rng(seed);
    while !stop.load(Ordering::Relaxed) {
        let value = u8::try_from(random.below(256))?;
        mapping.write(random.below(pages), value)?;
    }
    Ok(())
}
