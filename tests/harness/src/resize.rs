// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inflates the balloon of a guest, and counts its pages on each NUMA node.

use anyhow::{Context, Result};
use guest_agent::calls::ReadFile;

use crate::guest::Guest;
use crate::{HANG_TIMEOUT, MIB};

impl Guest {
    /// Inflates the balloon by `bytes` and waits until it has its size. Returns the target: the size of the guest with
    /// this balloon, in bytes.
    ///
    /// # Errors
    ///
    /// Fails if the balloon does not reach the target.
    pub fn inflate_by(&mut self, bytes: u64) -> Result<u64> {
        let balloon = self.balloon_qmp()?;
        let target = balloon.balloon_actual()? - bytes;
        balloon.set_balloon(target)?;
        balloon.wait_balloon(target, HANG_TIMEOUT)?;
        Ok(target)
    }

    /// Inflates the balloon until `left` bytes are free. Returns the target: the size of the guest with this balloon,
    /// in bytes.
    ///
    /// # Errors
    ///
    /// Fails if the balloon does not reach the target.
    pub fn inflate_leaving(&mut self, left: u64) -> Result<u64> {
        let before = self.settled_memory_usage()?;
        let whole = self.balloon_qmp()?.balloon_actual()?;
        let target = (whole - before.free.saturating_sub(left)) / MIB * MIB;
        self.balloon_qmp()?.set_balloon(target)?;
        self.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
        Ok(target)
    }

    /// Returns the number of balloon pages on a NUMA node.
    ///
    /// # Errors
    ///
    /// Fails if the guest has no such node, or its kernel does not count balloon pages.
    pub fn balloon_pages_on_node(&mut self, node: u32) -> Result<u64> {
        // Folds the per-processor counters.
        self.vmstat_counter("nr_balloon_pages")?;
        let path = format!("/sys/devices/system/node/node{node}/vmstat");
        let text = self.call(ReadFile { path })?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("nr_balloon_pages "));
        Ok(value
            .context("the kernel counts no balloon pages")?
            .parse()?)
    }
}
