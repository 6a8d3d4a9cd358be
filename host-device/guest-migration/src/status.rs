// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration shows of itself, in the shape of QEMU's `query-migrate`.
//!
//! Names are QEMU's where it has one. Times are in milliseconds, sizes in bytes, pages of [`PAGE_SIZE`](crate::PAGE_SIZE).

use serde::{Deserialize, Serialize};

/// How far a migration has come.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There was none.
    #[default]
    None,
    /// The destination is being connected to, and tracking begun.
    Setup,
    /// Memory is sent while the guest runs.
    Active,
    /// What is left would fit the downtime. It waits for `migrate-continue`; the guest runs, and has its hinted pages back.
    PreSwitchover,
    /// The guest is paused, and the rest is sent.
    Device,
    /// All of memory is at the destination, and the guest is paused here.
    Completed,
    /// It was given up, because of an error. The guest runs on.
    Failed,
    /// It is being given up, as it was told to.
    Cancelling,
    /// It was given up, as it was told to. The guest runs on.
    Cancelled,
}

impl MigrationStatus {
    /// The name that operators see.
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

    /// Whether it has ended, or there was none.
    pub const fn is_over(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }
}

/// What became of memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStats {
    /// Bytes of guest memory.
    pub total: u64,
    /// Bytes of pages that are dirty.
    pub remaining: u64,
    /// Bytes that went over the wire.
    pub transferred: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Pages that were sent with their content, each as often as it was sent.
    pub normal: u64,
    /// Pages that were sent as "zeros", each as often.
    pub duplicate: u64,
    /// Of both, those that had been sent before.
    pub resent: u64,
    /// Pages that hints have spared: not sent since they were last written, and not to be.
    pub skipped: u64,
    /// Dirty pages that hints took out, each as often as they did.
    pub hinted: u64,
    /// Pages that the check at the end found changed though tracking had not seen it, and sent again. Not 0: tracking has missed writes.
    pub missed: u64,
    /// Megabits a second over the wire, over all.
    pub mbps: f64,
    /// Syncs of the dirty bitmap.
    pub dirty_sync_count: u64,
    /// Pages written a second, as of the last sync.
    pub dirty_pages_rate: u64,
}

/// One round: from the end of a sync to the end of the next.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Iteration {
    /// Whether the guest was paused.
    pub paused: bool,
    /// Dirty pages at its start.
    pub dirty: u64,
    /// Of them, those that hints took out.
    pub hinted: u64,
    /// Pages sent with their content.
    pub normal: u64,
    /// Pages sent as "zeros".
    pub duplicate: u64,
    /// Bytes that went over the wire.
    pub transferred: u64,
    /// How long it waited for hints, in microseconds.
    pub hint_wait_us: u64,
    /// How long it sent, in microseconds.
    pub send_us: u64,
    /// How long the sync at its end took, in microseconds; 0 if there was none.
    pub sync_us: u64,
    /// How long processes were stopped for that sync, in microseconds.
    pub stopped_us: u64,
}

/// How writes are tracked.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrackingInfo {
    /// `soft-dirty` or `content`.
    pub mode: String,
    /// Whether hints are used with it.
    pub free_page_hint: bool,
    /// Why this way, and why hints are used or not.
    pub reason: String,
}

/// A migration as an operator sees it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// How far it has come.
    pub status: MigrationStatus,
    /// From the command to now, or to its end.
    pub total_time: u64,
    /// Until the first page.
    pub setup_time: u64,
    /// How long the guest was paused, once it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// How long it would be paused if it were now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Memory.
    pub ram: RamStats,
    /// The rounds, the first ones first; after many, only the last.
    pub rounds: Vec<Iteration>,
    /// How writes are tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracking: Option<TrackingInfo>,
    /// Why it failed.
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
