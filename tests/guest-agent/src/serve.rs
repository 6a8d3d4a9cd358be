// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop that answers the host.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_agent::calls::{AnyCall, Call};
use guest_agent::protocol::{Hello, Outcome, Request, Response, VERSION};
use nix::sys::reboot::RebootMode;
use serde::Serialize;
use serde_json::Value;

use crate::kernel_log::KernelLog;
use crate::power;
use crate::workloads::{Order, Workloads};

/// A call that needs nothing of the agent's own state.
pub trait Answer: Call {
    /// Does what the call says.
    fn answer(self) -> Result<Self::Answer>;
}

struct Agent {
    log: KernelLog,
    workloads: Workloads,
}

/// Says hello, then answers calls one after the other. Returns only on an error of the port.
pub fn serve(mut port: File) -> Result<()> {
    let mut agent = Agent {
        log: KernelLog::open()?,
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
            // The host's end is not open (yet, or any more): virtio-serial says so by an empty read.
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
            AnyCall::StartKernel(_) => Some(RebootMode::RB_KEXEC),
            _ => None,
        };
        let outcome = match agent.answer(request.call) {
            Ok(value) => Outcome::Done(value),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        send(
            &mut port,
            &Response {
                id: request.id,
                outcome,
            },
        )?;
        if let Some(mode) = end {
            power::end(mode);
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

fn done<C: Answer>(call: C) -> Result<Value> {
    encode(call.answer()?)
}

fn encode(answer: impl Serialize) -> Result<Value> {
    serde_json::to_value(answer).context("cannot encode an answer")
}

impl Agent {
    fn answer(&mut self, call: AnyCall) -> Result<Value> {
        match call {
            AnyCall::MemInfo(call) => done(call),
            AnyCall::BuddyInfo(call) => done(call),
            AnyCall::WaitMemFree(call) => done(call),
            AnyCall::WaitMemSettled(call) => done(call),
            AnyCall::LowestMemFree(call) => done(call),
            AnyCall::FreePages(call) => done(call),
            AnyCall::PageUse(call) => done(call),
            AnyCall::DropMemoryCaches(call) => done(call),
            AnyCall::Balloons(call) => done(call),
            AnyCall::WaitBalloons(call) => done(call),
            AnyCall::LoadKernel(call) => done(call),
            AnyCall::LoadModule(call) => done(call),
            AnyCall::UnloadModule(call) => done(call),
            AnyCall::Modules(call) => done(call),
            AnyCall::WaitKernelLog(call) => done(call),
            AnyCall::KunitResults(call) => done(call),
            AnyCall::ReadFile(call) => done(call),
            AnyCall::ListFolder(call) => done(call),
            AnyCall::WriteFile(call) => done(call),
            AnyCall::WriteFileFaulted(call) => done(call),
            AnyCall::LoadModuleFaulted(call) => done(call),
            AnyCall::Run(call) => done(call),
            AnyCall::Shell(call) => done(call),
            AnyCall::KernelLog(_) => encode(self.log.rest()?),
            AnyCall::Fill(call) => encode(self.workloads.fill(&call)?),
            AnyCall::Release(call) => encode(self.workloads.release(call.workload)?),
            AnyCall::ReleaseLowest(call) => {
                encode(self.workloads.release_lowest(call.workload, call.pages)?)
            }
            AnyCall::Verify(call) => encode(self.workloads.verify(call.workload)?),
            AnyCall::KeptPages(call) => encode(self.workloads.kept_pages(call.workload)?),
            AnyCall::Free(call) => encode(self.workloads.free(call.workload)?),
            AnyCall::Churn(call) => encode(self.workloads.churn(&Order::Churn(call))?),
            AnyCall::ChurnFiles(call) => encode(self.workloads.churn(&Order::ChurnFiles(call))?),
            AnyCall::ChurnForks(call) => encode(self.workloads.churn(&Order::ChurnForks(call))?),
            AnyCall::ChurnedSoFar(call) => encode(self.workloads.churned_so_far(call.workload)?),
            AnyCall::EndChurn(call) => encode(self.workloads.end_churn(call.workload)?),
            AnyCall::PowerOff(_) | AnyCall::StartKernel(_) => encode(()),
        }
    }
}
