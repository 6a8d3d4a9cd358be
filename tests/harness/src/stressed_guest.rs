// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that works all the time, whatever is done to it.

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{ChurnStats, WaitMemFree};

use crate::check::MemoryUsage;
use crate::guest::{Builder, Driver, Guest};
use crate::stress::{Stress, StressLoad};
use crate::vmm::Vmm;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// A guest with a driver, and workloads that run.
#[derive(Debug)]
pub struct StressedGuest {
    /// The guest.
    pub guest: Guest,
    stress: Stress,
    driver: Driver,
    load: StressLoad,
    before: MemoryUsage,
}

impl StressedGuest {
    /// Boots a guest whose free memory has been used, loads `driver`, and puts it under `load`.
    ///
    /// # Errors
    ///
    /// If it does not come so far.
    pub fn start(
        builder: Builder<'_>,
        driver: Driver,
        load: StressLoad,
        seed: u64,
    ) -> Result<Self> {
        let (mut guest, before) = builder.boot_filled(16 * MIB, driver)?;
        let stress = Stress::start(&mut guest, load, seed)?;
        let mut this = Self {
            guest,
            stress,
            driver,
            load,
            before,
        };
        this.check_progress()?;
        Ok(this)
    }

    /// Waits until each workload has got on, and fails if one of them has found a wrong page.
    ///
    /// # Errors
    ///
    /// As [`Stress::wait_compared`].
    pub fn check_progress(&mut self) -> Result<()> {
        let pages = match self.guest.vmm_kind() {
            Vmm::Qemu => 100,
            Vmm::Uml | Vmm::Debug => 300,
        };
        self.stress
            .wait_compared(&mut self.guest, pages, HANG_TIMEOUT)
            .context("the workloads do not go on as they should")
    }

    /// What all workloads together have done so far.
    ///
    /// # Errors
    ///
    /// If one of them is no more.
    pub fn progress(&mut self) -> Result<ChurnStats> {
        let mut all = ChurnStats::default();
        for one in self.stress.progress(&mut self.guest)? {
            all += one;
        }
        Ok(all)
    }

    /// As [`StressedGuest::check_progress`], and fails if the driver still holds what it has hinted (R16), or the kernel has complained.
    ///
    /// # Errors
    ///
    /// If so.
    pub fn check_unharmed(&mut self) -> Result<()> {
        /// What files, stacks and page tables take beside what the workloads were allowed.
        const SLACK: u64 = 24 * MIB;
        let load = self.load.processes * self.load.each + self.load.files + 6 * self.load.forks;
        let at_least = self.before.free.saturating_sub(load + SLACK);
        ensure!(
            at_least > 2 * (self.before.free / 16),
            "a guest with {} bytes free and {load} in use cannot show that hinted pages are back",
            self.before.free
        );
        self.guest
            .call(WaitMemFree {
                at_least,
                at_most: u64::MAX,
                timeout_ms: HANG_TIMEOUT_MS,
            })
            .context("the guest has not got back what it hinted")?;
        self.check_progress()?;
        self.guest.check_log()
    }

    /// Ends the workloads, each of which compares all that it has left; then nothing may be missing in the guest, also once the
    /// driver is gone. It is switched off.
    ///
    /// # Errors
    ///
    /// If anything is wrong.
    pub fn end(mut self) -> Result<ChurnStats> {
        let done = self.stress.end_and_verify(&mut self.guest)?;
        self.guest.check_memory(self.before)?;
        self.guest.unload(self.driver)?;
        self.guest.check_memory(self.before)?;
        self.guest.check_log()?;
        self.guest.power_off()?;
        Ok(done)
    }

    /// As [`StressedGuest::end`], of a guest whose device has gone, of which user-mode Linux complains in its log.
    ///
    /// # Errors
    ///
    /// If a page is wrong or missing.
    pub fn end_without_device(mut self) -> Result<ChurnStats> {
        let done = self.stress.end_and_verify(&mut self.guest)?;
        self.guest.unload(self.driver)?;
        self.guest.check_memory(self.before)?;
        self.guest.power_off()?;
        Ok(done)
    }
}
