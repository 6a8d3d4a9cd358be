// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest agent: `/init` of a test guest. It sets the guest up and serves the host's calls until the host switches
//! the guest off.
//!
//! The agent must be the first process. For each workload it starts itself again, with the argument `worker`.
#![deny(unsafe_code)]

mod balloon_devices;
mod fault_injection;
mod file_churn;
mod files;
mod fork_churn;
mod job;
mod kernel_log;
mod memory;
mod memory_churn;
mod page_use;
mod port;
mod power;
mod processes;
mod serve;
mod setup;
#[allow(unsafe_code)]
mod sys;
mod worker;
mod workloads;

use std::process::ExitCode;

use nix::sys::reboot::RebootMode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(workloads::WORKER_ARGUMENT) {
        return match worker::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("worker: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if std::process::id() != 1 {
        eprintln!(
            "guest-agent is the first process of a test guest: it is of no use on a running system"
        );
        return ExitCode::FAILURE;
    }
    if let Err(error) = setup::mount_all().and_then(|()| {
        setup::load_early_modules()?;
        setup::shorten_pcp_lists();
        setup::pin_to_first_cpu()?;
        serve::serve(port::open()?)
    }) {
        eprintln!("agent: {error:#}");
    }
    power::shut_down(RebootMode::RB_POWER_OFF)
}
