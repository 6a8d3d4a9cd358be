// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest under continuous memory stress.

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{ChurnStats, WaitMemFree};

use crate::artifacts::Artifacts;
use crate::check::MemoryUsage;
use crate::guest::{Builder, Driver, Guest};
use crate::stress::{Stress, StressLoad};
use crate::vmm::Vmm;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// A guest with a loaded driver and running workloads.
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
    /// Boots a guest with `driver` after its free memory was filled and freed, and starts workloads with `load`.
    ///
    /// # Errors
    ///
    /// Fails if one of these steps fails.
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

    /// Starts a guest in user-mode Linux with our driver and our device. The device discards hinted pages and has
    /// further `options`. The guest is small, so that many migrations fit into a test.
    ///
    /// # Errors
    ///
    /// Same as [`StressedGuest::start`].
    pub fn start_small(artifacts: &Artifacts, options: &[&str]) -> Result<Self> {
        const MEMORY: u64 = 160 * MIB;
        const LOAD: u64 = 32 * MIB;
        const SEED: u64 = 16;
        let mut all = vec!["--discard-hinted"];
        all.extend(options);
        let builder = Builder::new(artifacts, Vmm::Uml)
            .memory(MEMORY)
            .device_options(&all);
        Self::start(
            builder,
            Driver::Ours,
            StressLoad::new(LOAD).with_rests(),
            SEED,
        )
    }

    /// Waits until each workload has made progress. Checks that none has found a wrong page.
    ///
    /// # Errors
    ///
    /// Same as [`Stress::wait_compared`].
    pub fn check_progress(&mut self) -> Result<()> {
        let pages = match self.guest.vmm_kind() {
            Vmm::Qemu => 100,
            Vmm::Uml | Vmm::Debug => 300,
        };
        self.stress
            .wait_compared(&mut self.guest, pages, HANG_TIMEOUT)
            .context("the workloads make no progress")
    }

    /// Returns the sum of the statistics of all workloads so far.
    ///
    /// # Errors
    ///
    /// Fails if a workload has ended.
    pub fn progress(&mut self) -> Result<ChurnStats> {
        let mut all = ChurnStats::default();
        for one in self.stress.progress(&mut self.guest)? {
            all += one;
        }
        Ok(all)
    }

    /// Does the same as [`StressedGuest::check_progress`]. Also checks that the driver has returned its hinted blocks
    /// (R16) and that the kernel has logged no warning.
    ///
    /// # Errors
    ///
    /// Fails if a check fails.
    pub fn check_unharmed(&mut self) -> Result<()> {
        /// The memory of files, stacks and page tables in addition to the load of the workloads.
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

    /// Ends the workloads, which compare their remaining pages first. Checks that the guest has its memory back before
    /// and after the driver is unloaded, and switches the guest off.
    ///
    /// # Errors
    ///
    /// Fails if a check fails.
    pub fn end(mut self) -> Result<ChurnStats> {
        let done = self.stress.end_and_verify(&mut self.guest)?;
        self.guest.check_memory(self.before)?;
        self.guest.unload(self.driver)?;
        self.guest.check_memory(self.before)?;
        self.guest.check_log()?;
        self.guest.power_off()?;
        Ok(done)
    }

    /// Does the same as [`StressedGuest::end`], for a guest without its device. Does not check the kernel log, because
    /// user-mode Linux logs warnings about the missing device.
    ///
    /// # Errors
    ///
    /// Fails if a page is wrong or memory is missing.
    pub fn end_without_device(mut self) -> Result<ChurnStats> {
        let done = self.stress.end_and_verify(&mut self.guest)?;
        self.guest.unload(self.driver)?;
        self.guest.check_memory(self.before)?;
        self.guest.power_off()?;
        Ok(done)
    }
}
