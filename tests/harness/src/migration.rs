// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Migrations of a guest's memory by our daemon, and the comparison of source and destination.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_agent::calls::PageUse;
use guest_agent::ranges::RangeSet;
pub use guest_migration::status::{MigrationInfo, MigrationStatus};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::destination::Destination;
use crate::guest::Guest;
use crate::host::guest_memory_file;
use crate::memory_image::{MemoryImage, PageHashes};
use crate::qmp::Qmp;
use crate::HANG_TIMEOUT;

/// Commands of our daemon.
impl Qmp {
    /// Starts a migration of the guest's memory to `uri`. For the switchover, the daemon pauses the guest through the
    /// VMM's QMP socket `vmm`. Without `vmm`, the daemon stops the guest's processes.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn migrate(&mut self, uri: &str, vmm: Option<&Path>) -> Result<()> {
        let arguments = match vmm {
            Some(vmm) => json!({ "uri": uri, "vmm-qmp": vmm }),
            None => json!({ "uri": uri }),
        };
        self.command("migrate", arguments).map(drop)
    }

    /// Sets parameters of the next migration.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn migrate_set_parameters(&mut self, parameters: Value) -> Result<()> {
        self.command("migrate-set-parameters", parameters).map(drop)
    }

    /// Cancels the migration.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn migrate_cancel(&mut self) -> Result<()> {
        self.command("migrate-cancel", json!({})).map(drop)
    }

    /// Returns the state of the migration.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn query_migrate(&mut self) -> Result<MigrationInfo> {
        self.query("query-migrate")
    }

    /// Waits until the migration satisfies `wanted`. `what` describes the condition in error messages.
    ///
    /// # Errors
    ///
    /// Fails if `timeout` passes, or the migration ends, before `wanted` is satisfied.
    pub fn wait_migration(
        &mut self,
        what: &str,
        wanted: impl Fn(&MigrationInfo) -> bool,
        timeout: Duration,
    ) -> Result<MigrationInfo> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.query_migrate()?;
            if wanted(&now) {
                return Ok(now);
            }
            ensure!(
                !now.status.is_over(),
                "the migration did not come to {what:?}: {now:?}"
            );
            ensure!(
                Instant::now() < deadline,
                "the migration did not come to {what:?} within {timeout:?}: {now:?}"
            );
            // The daemon sends events for changes of the state, but not for sent pages.
            self.wait_event(|event| event.name == "MIGRATION", Duration::from_millis(5))?;
        }
    }

    /// Waits until the migration has ended, with any result.
    ///
    /// # Errors
    ///
    /// Fails if the migration has not ended within [`HANG_TIMEOUT`].
    pub fn wait_migration_end(&mut self) -> Result<MigrationInfo> {
        self.wait_migration("its end", |now| now.status.is_over(), HANG_TIMEOUT)
    }
}

/// A comparison of the memory of source and destination while the source is paused.
#[derive(Debug)]
pub struct MemoryComparison {
    /// The number of pages of the source that are not holes.
    pub data_pages: u64,
    /// The pages that differ at the destination.
    pub different: RangeSet,
    /// The hashes of these pages at the source.
    before: PageHashes,
}

/// Migrations by our daemon.
impl Guest {
    /// Opens the guest's memory file on the host.
    ///
    /// # Errors
    ///
    /// Fails if the VMM has ended.
    pub fn memory_image(&self) -> Result<MemoryImage> {
        MemoryImage::open(&guest_memory_file(self.vmm.id())?)
    }

    /// Starts a migration of the guest's memory to `uri`. For the switchover, the daemon pauses the guest through the
    /// VMM's QMP socket if there is one ([`crate::guest::Builder::qmp_socket`]). Otherwise the daemon stops the guest's
    /// processes.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn start_migration(&mut self, uri: &str) -> Result<()> {
        let vmm = self.vmm_qmp_socket();
        self.daemon()?.qmp().migrate(uri, vmm.as_deref())
    }

    /// Migrates the guest's memory to `destination` and waits until the destination is complete. The guest stays
    /// paused.
    ///
    /// # Errors
    ///
    /// Fails if the source or the destination fails.
    pub fn migrate_to(&mut self, destination: &mut Destination) -> Result<MigrationInfo> {
        self.start_migration(&destination.uri())?;
        self.finish_migration(destination)
    }

    /// Waits until a migration to `destination` has ended and the destination is complete. The guest stays paused.
    ///
    /// # Errors
    ///
    /// Fails if the source or the destination fails.
    pub fn finish_migration(&mut self, destination: &mut Destination) -> Result<MigrationInfo> {
        let status = self.daemon()?.qmp().wait_migration_end()?;
        ensure!(
            status.status == MigrationStatus::Completed,
            "the migration did not succeed: {status:#?}"
        );
        destination.wait().context("at the destination")?;
        Ok(status)
    }

    /// Compares source and destination after a successful migration. The guest must still be paused.
    ///
    /// # Errors
    ///
    /// Fails if the memory of source or destination cannot be read.
    pub fn compare_memory(&self, destination: &Destination) -> Result<MemoryComparison> {
        let (source, destination) = (self.memory_image()?, destination.memory_image()?);
        let different = source.differences(&destination)?;
        Ok(MemoryComparison {
            data_pages: source.data()?.bytes() / 4096,
            before: source.page_hashes(&different)?,
            different,
        })
    }

    /// Copies the differing pages from the destination to the paused guest. The guest then runs with the destination's
    /// memory, and misses every page that the destination lacks.
    ///
    /// # Errors
    ///
    /// Fails if the guest's memory cannot be written.
    pub fn adopt(&self, comparison: &MemoryComparison, destination: &Destination) -> Result<()> {
        self.memory_image()?
            .copy_from(&destination.memory_image()?, &comparison.different)
    }

    /// Checks that the guest, which runs with its own memory, does not use the pages that differ at the destination.
    ///
    /// A page that differed at the pause, and has not changed since, must be free. A page that has changed since may
    /// have been free at the pause or may have been in use. [`Guest::adopt`] also checks such pages.
    ///
    /// # Errors
    ///
    /// Fails if the guest uses a page that differs.
    pub fn check_different_pages_are_free(&mut self, comparison: &MemoryComparison) -> Result<()> {
        // Without compaction: a page migration would leave the old page free.
        let now = self.call(PageUse {})?;
        let same = comparison.before.unchanged(&self.memory_image()?)?;
        let used = same.intersection(&now.used);
        ensure!(
            used.ranges().is_empty(),
            "these pages are in use, and differ at the destination: {:x?}",
            used.ranges()
        );
        Ok(())
    }

    /// Resumes a guest that a migration has paused, with the `cont` command of our daemon.
    ///
    /// # Errors
    ///
    /// Fails if the guest does not resume.
    pub fn resume(&mut self) -> Result<()> {
        self.daemon()?.qmp().command("cont", json!({})).map(drop)
    }

    /// Returns whether the guest is paused.
    ///
    /// # Errors
    ///
    /// Fails if the state of the process or of the VMM cannot be read.
    pub fn is_paused(&mut self) -> Result<bool> {
        #[derive(Deserialize)]
        struct RunState {
            running: bool,
        }
        if self.vmm.is_stopped()? {
            return Ok(true);
        }
        match &mut self.monitor {
            Some(monitor) => Ok(!monitor.query::<RunState>("query-status")?.running),
            None => Ok(false),
        }
    }
}
