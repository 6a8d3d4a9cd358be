// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The status of a migration, in the format of QEMU's `query-migrate`.
//!
//! Names are those of QEMU where QEMU has one. Times are in milliseconds unless the name states another unit. Sizes are
//! in bytes. Pages have [`PAGE_SIZE`](crate::PAGE_SIZE) bytes.

use serde::{Deserialize, Serialize};

/// The state of a migration.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// No migration was started.
    #[default]
    None,
    /// The migration connects to the destination and starts dirty tracking.
    Setup,
    /// Memory is sent while the guest runs.
    Active,
    /// The migration waits for `migrate-continue` before the last iteration. The guest runs and has its hinted pages
    /// back.
    PreSwitchover,
    /// The guest is paused, and the remaining memory is sent.
    Device,
    /// All of memory is at the destination. The guest is paused at the source.
    Completed,
    /// The migration failed. The guest runs at the source.
    Failed,
    /// The migration is being cancelled.
    Cancelling,
    /// The migration was cancelled. The guest runs at the source.
    Cancelled,
}

impl MigrationStatus {
    /// Returns the name that QMP shows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Returns whether the migration has ended or was never started.
    pub const fn is_over(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }
}

/// Statistics of guest memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStats {
    /// Bytes of guest memory.
    pub total: u64,
    /// Bytes of dirty pages.
    pub remaining: u64,
    /// Bytes sent over the wire.
    pub transferred: u64,
    /// Size of a page in bytes.
    pub page_size: u64,
    /// Pages sent with their content. A page counts each time it is sent.
    pub normal: u64,
    /// Pages sent as zeros. A page counts each time it is sent.
    pub duplicate: u64,
    /// Pages of both kinds that were sent before.
    pub resent: u64,
    /// Pages that were not sent since they were last marked dirty, because hints cleared their dirty bits.
    pub skipped: u64,
    /// Dirty pages whose bits hints cleared. A page counts each time.
    pub hinted: u64,
    /// Pages that the check at the end found changed and sent again. A value other than 0 means that dirty tracking has
    /// missed writes.
    pub missed: u64,
    /// Average throughput since the start, in megabits per second.
    pub mbps: f64,
    /// Number of dirty syncs.
    pub dirty_sync_count: u64,
    /// Pages per second that became dirty, as of the last dirty sync.
    pub dirty_pages_rate: u64,
}

/// One iteration: from the end of a dirty sync to the end of the next. The last iteration starts with a dirty sync
/// instead, with the guest paused.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Iteration {
    /// Whether the guest was paused.
    pub paused: bool,
    /// Dirty pages at the start; in the last iteration, after its dirty sync.
    pub dirty: u64,
    /// Dirty pages among these whose bits hints cleared.
    pub hinted: u64,
    /// Pages sent with their content.
    pub normal: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Bytes sent over the wire.
    pub transferred: u64,
    /// Time spent waiting for hints, in microseconds.
    pub hint_wait_us: u64,
    /// Time spent sending, in microseconds.
    pub send_us: u64,
    /// Duration of the dirty sync, in microseconds.
    pub sync_us: u64,
    /// How long processes were stopped for the dirty sync, in microseconds.
    pub stopped_us: u64,
}

/// How writes are tracked.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrackingInfo {
    /// `soft-dirty` or `content`.
    pub mode: String,
    /// Whether hints are used.
    pub free_page_hint: bool,
    /// Why this mode was selected, and why hints are used or not.
    pub reason: String,
}

/// The status of a migration, as `query-migrate` returns it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// State of the migration.
    pub status: MigrationStatus,
    /// Time from the start of the migration until now, or until its end.
    pub total_time: u64,
    /// Time from the start until memory is sent.
    pub setup_time: u64,
    /// How long the guest has been paused, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Estimated downtime if the guest were paused now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Statistics of guest memory.
    pub ram: RamStats,
    /// The iterations in order, limited to the most recent ones.
    pub rounds: Vec<Iteration>,
    /// How writes are tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracking: Option<TrackingInfo>,
    /// Whether the migration has paused the guest, has not completed, and could not resume the guest.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub guest_paused: bool,
    /// Why the migration failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_qemu() {
        let status = MigrationInfo {
            status: MigrationStatus::PreSwitchover,
            downtime: Some(3),
            ..MigrationInfo::default()
        };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["status"], "pre-switchover");
        assert_eq!(json["status"], MigrationStatus::PreSwitchover.name());
        assert_eq!(json["ram"]["dirty-sync-count"], 0);
        assert!(json.get("error-desc").is_none());
        assert_eq!(
            serde_json::from_value::<MigrationInfo>(json).unwrap(),
            status
        );
    }
}
