// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that sleeps and wakes, and one that starts another kernel.

use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{LoadKernel, ReadFile, StartKernel, WriteFile};
use serde_json::json;

use crate::guest::Guest;
use crate::initramfs::{NEXT_INITRAMFS, NEXT_KERNEL};
use crate::HANG_LIMIT;

impl Guest {
    /// Suspends the guest to memory (S3), wakes it, and waits until it works. QEMU only.
    ///
    /// # Errors
    ///
    /// If the guest refuses, or does not sleep or wake.
    pub fn sleep_and_wake(&mut self) -> Result<()> {
        self.monitor()?.forget_events();
        let pending = self.agent.begin(WriteFile {
            path: "/sys/power/state".into(),
            text: "mem".into(),
        })?;
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let asleep = self
                .monitor()?
                .wait_event(|event| event.name == "SUSPEND", Duration::from_millis(100))?;
            if asleep.is_some() {
                break;
            }
            // An answer before the sleep is one instead of it.
            if self
                .agent
                .finish(&pending, Duration::from_millis(1))?
                .is_some()
            {
                bail!("the guest says that it slept, and did not");
            }
            if Instant::now() > deadline {
                bail!("the guest did not fall asleep within {HANG_LIMIT:?}");
            }
        }
        let monitor = self.monitor()?;
        monitor.command("system_wakeup", json!({}))?;
        monitor
            .wait_event(|event| event.name == "WAKEUP", HANG_LIMIT)?
            .context("QEMU did not wake the guest")?;
        let woken = self.agent.finish(&pending, HANG_LIMIT)?;
        woken.with_context(|| format!("the guest did not wake up within {HANG_LIMIT:?}"))
    }

    /// Has the guest start the kernel that [`Builder::next_kernel`] gave it, as it is, and waits until it is up.
    ///
    /// [`Builder::next_kernel`]: crate::guest::Builder::next_kernel
    ///
    /// # Errors
    ///
    /// If the guest refuses or does not come up.
    pub fn start_next_kernel(&mut self) -> Result<()> {
        let command_line = self.call(ReadFile {
            path: "/proc/cmdline".into(),
        })?;
        self.call(LoadKernel {
            kernel: NEXT_KERNEL.into(),
            initramfs: NEXT_INITRAMFS.into(),
            command_line: command_line.trim().to_owned(),
        })?;
        self.call(StartKernel {})?;
        self.meet_again()
    }

    /// Resets the machine, and waits until its kernel, which starts anew, is up. QEMU only; the machine must be one that
    /// [restarts].
    ///
    /// [restarts]: crate::vmm::hardware::Hardware::restarts
    ///
    /// # Errors
    ///
    /// If QEMU refuses, or the guest does not come up.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor()?.command("system_reset", json!({}))?;
        self.meet_again()
    }

    fn meet_again(&mut self) -> Result<()> {
        self.agent.meet_again(HANG_LIMIT)?;
        self.log.clear();
        self.kernel_log().map(drop)
    }
}
