// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages between the device process and the helper process.

use std::path::PathBuf;
use std::time::Duration;

use guest_migration::status::MigrationInfo;
use guest_migration::vm::PausedGuest;
use guest_migration::{Layout, LayoutError, PageRun, RamBlock, Region, WaitOutcome};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Timeout of a write to the other process, and of a quiesced device. Only a process that hangs exceeds it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);

/// The most runs of pages in a message.
pub(super) const MAX_RUNS: usize = 1024;

/// The task of a helper process: its first message.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Task {
    /// Migrates a guest. The memory files follow on the other socket.
    Migrate(Box<MigrationTask>),
    /// Resumes the guest that a completed migration has left paused.
    Resume(PausedGuest),
}

/// The task of a migration.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct MigrationTask {
    pub(super) layout: LayoutParts,
    /// Address of the destination.
    pub(super) uri: String,
    /// The VMM's QMP socket.
    pub(super) vmm_qmp: Option<PathBuf>,
    /// All parameters, as QMP clients see them.
    pub(super) parameters: Map<String, Value>,
    pub(super) capabilities: Vec<(String, bool)>,
    /// Whether hinted blocks are discarded before the guest may use them again.
    pub(super) discards: bool,
    /// Why hints are not available, if they are not.
    pub(super) hints_unavailable: Option<String>,
}

/// A layout of guest memory. Unlike [`Layout`], it may be invalid.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayoutParts {
    /// Name and bytes of each RAM block.
    blocks: Vec<(String, u64)>,
    /// Start, bytes, RAM block, and offset in the RAM block of each region.
    regions: Vec<(u64, u64, usize, u64)>,
}

impl From<&Layout> for LayoutParts {
    fn from(layout: &Layout) -> Self {
        let blocks = layout.blocks().iter();
        let regions = layout.regions().iter();
        Self {
            blocks: blocks.map(|it| (it.name().into(), it.length())).collect(),
            regions: regions
                .map(|it| (it.start(), it.length(), it.block(), it.offset()))
                .collect(),
        }
    }
}

impl TryFrom<LayoutParts> for Layout {
    type Error = LayoutError;

    fn try_from(parts: LayoutParts) -> Result<Self, LayoutError> {
        let blocks = parts.blocks.iter();
        let blocks = blocks.map(|(name, length)| RamBlock::new(name, *length));
        let regions = parts.regions.iter().map(|(start, length, block, offset)| {
            Ok(Region::new(*start, *length)?.backed_by(*block, *offset))
        });
        Self::new(
            blocks.collect::<Result<Vec<_>, _>>()?,
            regions.collect::<Result<Vec<_>, LayoutError>>()?,
        )
    }
}

/// A message to the helper process that runs a migration.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum ToHelper {
    /// These pages were hinted in the open window.
    Hints(Vec<Run>),
    /// The guest has given all hints of the hint round, or will give none, for this reason.
    RoundEnded(Option<String>),
    /// These pages were punched.
    Punched(Vec<Run>),
    /// The answer to a request.
    Answer(Result<(), String>),
}

/// A message of the helper process that runs a migration.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum FromHelper {
    /// Whether a hint may only spare a page that is discarded.
    NeedDiscard(bool),
    /// A request, which is answered.
    Request(Request),
    /// The status of the migration in progress.
    Status(Box<MigrationInfo>),
    /// This number of dirty syncs is done.
    Pass(u64),
    /// The migration has ended: the last message.
    End(Box<End>),
}

/// A request of the helper process.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    /// Requests hints.
    Open,
    /// Ends the hint round.
    Close,
    /// Tells the guest that it may reuse all hinted pages.
    Done,
    /// Keeps the device from writing to guest memory, until [`Request::Release`].
    Quiesce,
    /// Lets the device write to guest memory again.
    Release,
}

/// How a migration has ended.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct End {
    pub(super) status: MigrationInfo,
    /// The guest that a completed migration has left paused, with how it was paused, for the user.
    pub(super) paused: Option<(String, PausedGuest)>,
}

/// A message on the socket of commands to the helper process.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Command {
    /// The packet carries memory files, in the order of the RAM blocks.
    Files,
    /// Cancels the migration.
    Cancel,
    /// The guest is paused: `migrate-continue`.
    Continue,
}

/// A run of pages: RAM block, first page, number of pages.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Run(usize, u64, u64);

impl From<PageRun> for Run {
    fn from(run: PageRun) -> Self {
        Self(run.block, run.first, run.pages)
    }
}

impl From<Run> for PageRun {
    fn from(Run(block, first, pages): Run) -> Self {
        Self {
            block,
            first,
            pages,
        }
    }
}

impl From<WaitOutcome> for ToHelper {
    fn from(outcome: WaitOutcome) -> Self {
        Self::RoundEnded(match outcome {
            WaitOutcome::Lost(why) => Some(why),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_arrives_as_it_was_sent_and_an_invalid_one_is_refused() {
        let region = Region::new(0x1000, 0x4000).unwrap().backed_by(0, 0x2000);
        let layout = Layout::new([RamBlock::new("ram", 0x6000).unwrap()], [region]).unwrap();
        let sent = serde_json::to_string(&LayoutParts::from(&layout)).unwrap();
        let received: LayoutParts = serde_json::from_str(&sent).unwrap();
        assert_eq!(Layout::try_from(received).unwrap(), layout);
        for wrong in [
            LayoutParts {
                blocks: vec![("ram".into(), 0x1001)],
                regions: vec![],
            },
            LayoutParts {
                blocks: vec![("ram".into(), 0x1000)],
                regions: vec![(0, 0x1000, 7, 0)],
            },
            LayoutParts {
                blocks: vec![("ram".into(), 0x1000)],
                regions: vec![(!0xfff, 0x1000, 0, 0)],
            },
        ] {
            assert!(Layout::try_from(wrong).is_err());
        }
    }
}
