// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Migrations of a guest's memory by our daemon, and what both sides hold afterwards.

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

/// Commands to our daemon.
impl Qmp {
    /// Begins to move the guest's memory to `uri`. The guest will be paused by the VMM whose operators' socket is given, else by
    /// stopping its processes.
    ///
    /// # Errors
    ///
    /// If it is refused.
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
    /// If they are refused.
    pub fn migrate_set_parameters(&mut self, parameters: Value) -> Result<()> {
        self.command("migrate-set-parameters", parameters).map(drop)
    }

    /// Gives the migration up.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn migrate_cancel(&mut self) -> Result<()> {
        self.command("migrate-cancel", json!({})).map(drop)
    }

    /// How the migration stands.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn query_migrate(&mut self) -> Result<MigrationInfo> {
        self.query("query-migrate")
    }

    /// Waits until the migration satisfies `wanted`, which `what` describes.
    ///
    /// # Errors
    ///
    /// If it does not by the limit, or ends in another state before.
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
            // Changes of state are events; pages that are sent are not.
            self.wait_event(|event| event.name == "MIGRATION", Duration::from_millis(5))?;
        }
    }

    /// Waits for the migration's end, whatever it is.
    ///
    /// # Errors
    ///
    /// If it has none by [`HANG_TIMEOUT`].
    pub fn wait_migration_end(&mut self) -> Result<MigrationInfo> {
        self.wait_migration("its end", |now| now.status.is_over(), HANG_TIMEOUT)
    }
}

/// What both sides of a migration hold while the source is paused.
#[derive(Debug)]
pub struct MemoryComparison {
    /// Pages of the source's memory that are no holes.
    pub data_pages: u64,
    /// What differs at the destination.
    pub different: RangeSet,
    /// What that was like at the source.
    before: PageHashes,
}

/// Migrations by our daemon.
impl Guest {
    /// The guest's memory, as the host has it.
    ///
    /// # Errors
    ///
    /// If the VMM is no more.
    pub fn memory_image(&self) -> Result<MemoryImage> {
        MemoryImage::open(&guest_memory_file(self.vmm.id())?)
    }

    /// Begins to move the guest's memory to `uri`. It will be paused by its VMM if that listens for operators
    /// ([`crate::guest::Builder::qmp_socket`]), else by stopping its processes.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn start_migration(&mut self, uri: &str) -> Result<()> {
        let vmm = self.vmm_qmp_socket();
        self.daemon()?.qmp().migrate(uri, vmm.as_deref())
    }

    /// Moves the guest's memory to `destination`, where all of it is when this returns; the guest is paused then.
    ///
    /// # Errors
    ///
    /// If either side fails.
    pub fn migrate_to(&mut self, destination: &mut Destination) -> Result<MigrationInfo> {
        self.start_migration(&destination.uri())?;
        self.finish_migration(destination)
    }

    /// Waits for the end of a migration to `destination`, where all of the guest's memory is then; the guest is paused.
    ///
    /// # Errors
    ///
    /// If either side fails.
    pub fn finish_migration(&mut self, destination: &mut Destination) -> Result<MigrationInfo> {
        let status = self.daemon()?.qmp().wait_migration_end()?;
        ensure!(
            status.status == MigrationStatus::Completed,
            "the migration did not succeed: {status:#?}"
        );
        destination.wait().context("at the destination")?;
        Ok(status)
    }

    /// Compares both sides of a migration that has just succeeded. The guest is still paused.
    ///
    /// # Errors
    ///
    /// If either side's memory cannot be read.
    pub fn compare_memory(&self, destination: &Destination) -> Result<MemoryComparison> {
        let (source, destination) = (self.memory_image()?, destination.memory_image()?);
        let different = source.differences(&destination)?;
        Ok(MemoryComparison {
            data_pages: source.data()?.bytes() / 4096,
            before: source.page_hashes(&different)?,
            different,
        })
    }

    /// Has the guest, which is paused, go on with what the destination got: from now on it works with that, and whatever the
    /// destination lacks it lacks too.
    ///
    /// # Errors
    ///
    /// If its memory cannot be written.
    pub fn adopt(&self, comparison: &MemoryComparison, destination: &Destination) -> Result<()> {
        self.memory_image()?
            .copy_from(&destination.memory_image()?, &comparison.different)
    }

    /// Checks that the guest, which goes on with its own memory, has no use for what the destination lacks.
    ///
    /// What differed when the guest was paused, and is now as it was then, must be free. What is not as it was was free then or
    /// has been written since, which cannot be told apart; [`Guest::adopt`] is for that.
    ///
    /// # Errors
    ///
    /// If the guest uses a page that differs.
    pub fn check_different_pages_are_free(&mut self, comparison: &MemoryComparison) -> Result<()> {
        // As they lie: compaction would move what is in use, and its old places would be free.
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

    /// Lets a guest that a migration has paused go on, as an operator does who wants it back.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn resume(&mut self) -> Result<()> {
        self.daemon()?.qmp().command("cont", json!({})).map(drop)
    }

    /// Whether the guest is paused.
    ///
    /// # Errors
    ///
    /// If the VMM does not say.
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
