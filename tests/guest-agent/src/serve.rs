// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop that answers the host's calls.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_agent::calls::{AnyCall, Call};
use guest_agent::protocol::{CallResult, Hello, Request, Response, VERSION};
use nix::sys::reboot::RebootMode;
use serde::Serialize;
use serde_json::Value;

use crate::kernel_log::KmsgReader;
use crate::power;
use crate::workloads::{WorkerRequest, Workloads};

/// A call that does not need the agent's state.
pub trait HandleCall: Call {
    /// Executes the call.
    fn handle(self) -> Result<Self::Reply>;
}

struct Agent {
    log: KmsgReader,
    workloads: Workloads,
}

/// Sends the hello message, then answers calls one after the other.
///
/// Returns only on an error: the kernel log does not open, the port fails, or a line is not a request.
pub fn serve(mut port: File) -> Result<()> {
    let mut agent = Agent {
        log: KmsgReader::open()?,
        workloads: Workloads::default(),
    };
    send(&mut port, &hello()?)?;
    let mut requests = BufReader::new(port.try_clone().context("cannot share the port")?);
    let mut line = String::new();
    loop {
        if requests
            .read_line(&mut line)
            .context("cannot read from the port")?
            == 0
        {
            // The host's end is not open yet, or is closed. virtio-serial reports this as an empty read.
            sleep(Duration::from_millis(10));
            continue;
        }
        if !line.ends_with('\n') {
            continue;
        }
        let request: Request =
            serde_json::from_str(&line).with_context(|| format!("not a request: {line:?}"))?;
        line.clear();
        let end = match request.call {
            AnyCall::PowerOff(_) => Some(RebootMode::RB_POWER_OFF),
            AnyCall::KexecExec(_) => Some(RebootMode::RB_KEXEC),
            _ => None,
        };
        let result = match agent.handle(request.call) {
            Ok(value) => CallResult::Done(value),
            Err(error) => CallResult::Failed(format!("{error:#}")),
        };
        send(
            &mut port,
            &Response {
                id: request.id,
                result,
            },
        )?;
        if let Some(mode) = end {
            power::shut_down(mode);
        }
    }
}

fn hello() -> Result<Hello> {
    let kernel = nix::sys::utsname::uname().context("the kernel does not say its release")?;
    let release = kernel.release().to_string_lossy().into_owned();
    let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?
        .context("the page size is unknown")?;
    Ok(Hello {
        version: VERSION,
        release,
        page_size: u64::try_from(page_size)?,
    })
}

fn send(port: &mut File, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message).context("cannot encode an answer")?;
    line.push(b'\n');
    port.write_all(&line).context("cannot write to the port")
}

fn reply<C: HandleCall>(call: C) -> Result<Value> {
    encode(call.handle()?)
}

fn encode(answer: impl Serialize) -> Result<Value> {
    serde_json::to_value(answer).context("cannot encode an answer")
}

impl Agent {
    fn handle(&mut self, call: AnyCall) -> Result<Value> {
        match call {
            AnyCall::MemInfo(call) => reply(call),
            AnyCall::BuddyInfo(call) => reply(call),
            AnyCall::WaitMemFree(call) => reply(call),
            AnyCall::WaitMemSettled(call) => reply(call),
            AnyCall::LowestMemFree(call) => reply(call),
            AnyCall::FreePages(call) => reply(call),
            AnyCall::PageUse(call) => reply(call),
            AnyCall::DropCachesAndCompact(call) => reply(call),
            AnyCall::ListBalloonDevices(call) => reply(call),
            AnyCall::WaitBalloonDevices(call) => reply(call),
            AnyCall::KexecLoad(call) => reply(call),
            AnyCall::LoadModule(call) => reply(call),
            AnyCall::UnloadModule(call) => reply(call),
            AnyCall::Modules(call) => reply(call),
            AnyCall::WaitKernelLog(call) => reply(call),
            AnyCall::KunitResults(call) => reply(call),
            AnyCall::ReadFile(call) => reply(call),
            AnyCall::ListFolder(call) => reply(call),
            AnyCall::WriteFile(call) => reply(call),
            AnyCall::WriteFileFailNth(call) => reply(call),
            AnyCall::LoadModuleFailNth(call) => reply(call),
            AnyCall::Run(call) => reply(call),
            AnyCall::Shell(call) => reply(call),
            AnyCall::KernelLog(_) => encode(self.log.rest()?),
            AnyCall::Fill(call) => encode(self.workloads.fill(&call)?),
            AnyCall::Release(call) => encode(self.workloads.release(call.workload)?),
            AnyCall::ReleaseLowest(call) => {
                encode(self.workloads.release_lowest(call.workload, call.pages)?)
            }
            AnyCall::Verify(call) => encode(self.workloads.verify(call.workload)?),
            AnyCall::KeptPages(call) => encode(self.workloads.kept_pages(call.workload)?),
            AnyCall::Free(call) => encode(self.workloads.free(call.workload)?),
            AnyCall::ChurnMemory(call) => {
                encode(self.workloads.churn(&WorkerRequest::ChurnMemory(call))?)
            }
            AnyCall::ChurnFiles(call) => {
                encode(self.workloads.churn(&WorkerRequest::ChurnFiles(call))?)
            }
            AnyCall::ChurnForks(call) => {
                encode(self.workloads.churn(&WorkerRequest::ChurnForks(call))?)
            }
            AnyCall::ChurnProgress(call) => encode(self.workloads.churn_progress(call.workload)?),
            AnyCall::StopChurn(call) => encode(self.workloads.stop_churn(call.workload)?),
            AnyCall::PowerOff(_) | AnyCall::KexecExec(_) => encode(()),
        }
    }
}
