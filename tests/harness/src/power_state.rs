// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Suspend and resume, kexec, and reset of a guest.

use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{KexecExec, KexecLoad, ReadFile, WriteFile};
use serde_json::json;

use crate::guest::Guest;
use crate::initramfs::{KEXEC_INITRAMFS, KEXEC_KERNEL};
use crate::HANG_TIMEOUT;

impl Guest {
    /// Suspends the guest to memory (S3), wakes it, and waits until its agent answers. QEMU only.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses, or does not sleep or wake up.
    pub fn suspend_and_resume(&mut self) -> Result<()> {
        self.monitor()?.clear_events();
        let pending = self.agent.start_call(WriteFile {
            path: "/sys/power/state".into(),
            text: "mem".into(),
        })?;
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let asleep = self
                .monitor()?
                .wait_event(|event| event.name == "SUSPEND", Duration::from_millis(100))?;
            if asleep.is_some() {
                break;
            }
            // An answer before the SUSPEND event means that the guest did not sleep.
            if self
                .agent
                .finish_call(&pending, Duration::from_millis(1))?
                .is_some()
            {
                bail!("the guest says that it slept, and did not");
            }
            if Instant::now() > deadline {
                bail!("the guest did not fall asleep within {HANG_TIMEOUT:?}");
            }
        }
        let monitor = self.monitor()?;
        monitor.command("system_wakeup", json!({}))?;
        monitor
            .wait_event(|event| event.name == "WAKEUP", HANG_TIMEOUT)?
            .context("QEMU did not wake the guest")?;
        let woken = self.agent.finish_call(&pending, HANG_TIMEOUT)?;
        woken.with_context(|| format!("the guest did not wake up within {HANG_TIMEOUT:?}"))
    }

    /// Starts the kernel of [`Builder::kexec_kernel`] with the guest's own command line, and waits until it is up.
    ///
    /// [`Builder::kexec_kernel`]: crate::guest::Builder::kexec_kernel
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses or does not come up.
    pub fn kexec(&mut self) -> Result<()> {
        let command_line = self.call(ReadFile {
            path: "/proc/cmdline".into(),
        })?;
        self.call(KexecLoad {
            kernel: KEXEC_KERNEL.into(),
            initramfs: KEXEC_INITRAMFS.into(),
            command_line: command_line.trim().to_owned(),
        })?;
        self.call(KexecExec {})?;
        self.reconnect()
    }

    /// Resets the machine, and waits until its kernel is up again. QEMU only. The machine must [allow reboots].
    ///
    /// [allow reboots]: crate::vmm::hardware::Hardware::allow_reboot
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses, or the guest does not come up.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor()?.command("system_reset", json!({}))?;
        self.reconnect()
    }

    fn reconnect(&mut self) -> Result<()> {
        self.agent.reconnect(HANG_TIMEOUT)?;
        self.log.clear();
        self.kernel_log().map(drop)
    }
}
