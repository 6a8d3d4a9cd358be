// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting: hint rounds, and the effect of hinted blocks on the dirty bitmap.
//!
//! [`shared_abi::hinting::device`] implements the protocol. [`guest_migration`] implements the dirty bitmap and the
//! hint window. This module connects them: each block that the protocol accepts becomes a call of
//! [`HintWindow::hint`]. A window is open while a hint round is in progress. Under a migration's claim, the migration
//! opens and closes the window.
//!
//! A hint spares *sending* a page (R17). It changes the page only if the driver has accepted
//! [`KEEPS_HINTED_UNTIL_RETURNED`](shared_abi::features::Features::KEEPS_HINTED_UNTIL_RETURNED). With any other
//! driver, the guest may already use a block again when the device sees the hint. See [`Hinting::hint`].

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_migration::{DirtyBitmap, HintWindow, Hinted, Region, SyncPhase};
use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting::device::{Action, Event, Ignored, Phase, State};
use thiserror::Error;

use super::request::RequestError;
use crate::memory::{HoleRecorder, Ram, RamLayoutError};

/// The most bytes that one request discards. Discarding takes time for each page, and the driver waits for its buffer
/// meanwhile. Linux hints 4 MiB per request.
pub const MAX_DISCARD: u64 = 256 << 20;

/// Why a hinting command fails.
#[derive(Debug, Error)]
pub enum HintingError {
    /// No front end is connected.
    #[error("no front end is connected: start the VMM with this device's socket first")]
    NoFrontEnd,
    /// The daemon does not offer the feature.
    #[error(
        "free page hinting is not offered: restart vhost-device-balloon with --free-page-hint"
    )]
    NotOffered,
    /// The driver did not accept the feature.
    #[error("driver did not accept free page hinting: load a driver that supports VIRTIO_BALLOON_F_FREE_PAGE_HINT")]
    NotNegotiated,
    /// No driver runs, or the guest is paused.
    #[error("driver is not running: load it, or resume the guest, and try again")]
    NoDriver,
    /// Guest memory cannot be tracked in a dirty bitmap.
    #[error("guest memory cannot be tracked: {0}")]
    Memory(#[from] RamLayoutError),
    /// No id is free: the driver has answered none of the last 2^31.
    #[error("no hint id is free: driver answered none of the last 2^31")]
    IdsExhausted,
    /// A migration has claimed hinting.
    #[error("a migration is in progress and has claimed hinting: wait for its end, or cancel it with migrate-cancel")]
    Migrating,
    /// Guest memory changed during the migration.
    #[error("guest memory regions changed during migration")]
    MemoryChanged,
    /// A dirty sync was requested without a hint round.
    #[error("no hint round is in progress: start one with free-page-hint-start")]
    NoHintRound,
}

/// Access to the dirty bitmap, in the form that the state of the hint round allows.
#[derive(Debug)]
enum BitmapAccess {
    /// A hint round is in progress: hints clear dirty bits.
    Hint(HintWindow),
    /// No hint round is in progress: the bitmap does not change.
    Sync(SyncPhase),
    /// A migration has claimed hinting. Holds the migration's window from [`Hinting::open_window`] until
    /// [`Hinting::close_window`] returns it, even if the hint round ends earlier.
    Claimed(Option<HintWindow>),
}

impl BitmapAccess {
    fn bitmap(&self) -> Option<&Arc<DirtyBitmap>> {
        match self {
            Self::Sync(sync) => Some(sync.bitmap()),
            other => other.window().map(HintWindow::bitmap),
        }
    }

    fn window(&self) -> Option<&HintWindow> {
        match self {
            Self::Hint(window) => Some(window),
            Self::Claimed(window) => window.as_ref(),
            Self::Sync(_) => None,
        }
    }

    fn open(self) -> Self {
        match self {
            Self::Sync(sync) => Self::Hint(sync.finish()),
            open => open,
        }
    }

    fn close(self) -> Self {
        match self {
            Self::Hint(window) => Self::Sync(window.close()),
            closed => closed,
        }
    }
}

/// Results of one hint round.
#[derive(Clone, Copy, Debug)]
struct HintRound {
    id: HintId,
    requested: Instant,
    /// Time from the request to the driver's STOP, or to the end of the round by the device if that came first.
    duration: Option<Duration>,
    blocks: u64,
    bytes: u64,
    cleared: u64,
    /// Pages that the dirty bitmap covers.
    total: u64,
}

impl HintRound {
    fn new(id: HintId) -> Self {
        Self {
            id,
            requested: Instant::now(),
            duration: None,
            blocks: 0,
            bytes: 0,
            cleared: 0,
            total: 0,
        }
    }

    fn end(&mut self) {
        self.duration
            .get_or_insert_with(|| self.requested.elapsed());
    }
}

/// State of hinting, as QMP clients see it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HintingStatus {
    /// Phase of the hint round.
    pub phase: Phase,
    /// Id of the last hint round, even if it has ended.
    pub id: Option<HintId>,
    /// Blocks that were accepted in the last hint round.
    pub blocks: u64,
    /// Bytes in the whole pages that were hinted in the last hint round.
    pub bytes: u64,
    /// Dirty bits that these hints cleared.
    pub pages_cleared: u64,
    /// Pages that the dirty bitmap covers, or covered in the last hint round: all RAM blocks. 0 before the first hint
    /// round.
    pub pages_total: u64,
    /// Pages that are still dirty. 0 without a bitmap: before the first hint round, after a change of guest memory,
    /// after a migration, and while a migration holds the window.
    pub pages_dirty: u64,
    /// Time from the request to the driver's STOP, or to the end of the round by the device if that came first. The
    /// time so far, while the round is in progress.
    pub duration: Duration,
    /// Bytes that hints have discarded, in all hint rounds.
    pub bytes_discarded: u64,
    /// Blocks that were ignored or rejected, in all hint rounds.
    pub ignored_blocks: u64,
    /// Command ids that were ignored, in all hint rounds.
    pub stale_commands: u64,
}

/// How hinted blocks are discarded.
pub struct Discard<'a> {
    /// The memory to discard.
    pub ram: &'a mut Ram,
    /// Whether a page that cannot be discarded is not sent either. This must be false while a migration finds written
    /// pages by their content.
    pub spares_rest: bool,
}

/// A dirty bitmap with all pages dirty, for [`Hinting::start`]. Making it takes time for each page of guest memory, and
/// needs no lock.
#[derive(Debug)]
pub struct FreshBitmap {
    ram: Ram,
    sync: SyncPhase,
}

impl FreshBitmap {
    /// Creates the bitmap of the memory `ram`.
    ///
    /// # Errors
    ///
    /// If guest memory cannot be tracked.
    pub fn new(ram: Ram) -> Result<Self, HintingError> {
        let sync = SyncPhase::new(&Arc::new(ram.layout()?)).map_err(RamLayoutError::from)?;
        sync.set_all();
        Ok(Self { ram, sync })
    }

    /// Returns whether the bitmap is that of `ram`.
    pub fn covers(&self, ram: &Ram) -> bool {
        self.ram.has_same_layout(ram)
    }
}

/// Memory that the device no longer uses. Freeing it takes time for each page of guest memory, so this is done after
/// the device's lock is released.
#[derive(Debug)]
#[allow(dead_code, reason = "it is only dropped")]
pub struct Retired(RetiredMemory);

#[derive(Debug)]
#[allow(dead_code, reason = "it is only dropped")]
enum RetiredMemory {
    Bitmap(BitmapAccess),
    HoleRecorder(HoleRecorder),
}

/// Returns the runs of pages that hints have skipped, as (guest physical address, bytes): at most `limit` runs after
/// the address `from`. Takes time for each page of guest memory, and needs no lock.
pub fn hinted_ranges(bitmap: &DirtyBitmap, from: u64, limit: usize) -> Vec<(u64, u64)> {
    let regions = bitmap.layout().regions().iter();
    regions
        .filter(|region| region.end() > from)
        .filter_map(|region| {
            // What is before the page of `from` need not be searched.
            let before = from.saturating_sub(region.start());
            let before = before / guest_migration::PAGE_SIZE * guest_migration::PAGE_SIZE;
            let start = region.start().checked_add(before)?;
            let rest = Region::new(start, region.end().checked_sub(start)?).ok()?;
            Some(rest.backed_by(region.block(), region.offset().checked_add(before)?))
        })
        .flat_map(|region| {
            let start = region.start().wrapping_sub(region.offset());
            bitmap
                .skipped_in(&region)
                .map(move |run| (start.wrapping_add(run.offset()), run.length()))
        })
        .take(limit)
        .collect()
}

/// Changes that an operation made. The caller publishes them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct HintingChanges {
    /// Whether config space shows a different command id.
    pub config: bool,
    /// Whether the phase changed.
    pub phase: bool,
}

/// The device's side of free page hinting: protocol state, dirty bitmap and counters.
#[derive(Debug, Default)]
pub struct Hinting {
    state: State,
    bitmap_access: Option<BitmapAccess>,
    hint_round: Option<HintRound>,
    bytes_discarded: u64,
    ignored_blocks: u64,
    stale_commands: u64,
    retired: Vec<Retired>,
}

impl Hinting {
    /// Creates the hinting state that continues another device's. The next hint round gets the id `next`. With `over`,
    /// config space shows DONE, so that the driver frees the blocks that it hinted before.
    pub fn from_saved_state(next: HintId, over: bool) -> Self {
        let mut hinting = Self {
            state: State::with_next_id(next),
            ..Self::default()
        };
        if over {
            hinting.step(Event::Done);
        }
        hinting
    }

    /// Returns the id of the next hint round.
    pub fn next_id(&self) -> HintId {
        self.state.next_id()
    }

    /// Returns the command id that config space shows.
    pub fn cmd_id(&self) -> CommandId {
        self.state.command()
    }

    /// Returns the phase of the hint round.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// Returns the number of bytes that hints have discarded, in all hint rounds.
    pub fn bytes_discarded(&self) -> u64 {
        self.bytes_discarded
    }

    /// Returns the state, as QMP clients see it.
    pub fn status(&self) -> HintingStatus {
        let bitmap = self.bitmap_access.as_ref().and_then(BitmapAccess::bitmap);
        let hint_round = self.hint_round.as_ref();
        HintingStatus {
            phase: self.phase(),
            id: hint_round.map(|hint_round| hint_round.id),
            blocks: hint_round.map_or(0, |hint_round| hint_round.blocks),
            bytes: hint_round.map_or(0, |hint_round| hint_round.bytes),
            pages_cleared: hint_round.map_or(0, |hint_round| hint_round.cleared),
            pages_total: bitmap.map_or_else(
                || hint_round.map_or(0, |hint_round| hint_round.total),
                |bitmap| bitmap.pages(),
            ),
            pages_dirty: bitmap.map_or(0, |bitmap| bitmap.dirty_pages()),
            duration: hint_round.map_or(Duration::ZERO, |hint_round| {
                hint_round
                    .duration
                    .unwrap_or_else(|| hint_round.requested.elapsed())
            }),
            bytes_discarded: self.bytes_discarded,
            ignored_blocks: self.ignored_blocks,
            stale_commands: self.stale_commands,
        }
    }

    /// Returns the dirty bitmap, if there is one, to read it without the device's lock.
    pub fn bitmap(&self) -> Option<Arc<DirtyBitmap>> {
        let bitmap = self.bitmap_access.as_ref().and_then(BitmapAccess::bitmap);
        bitmap.cloned()
    }

    /// Returns the memory to free after the device's lock is released.
    pub fn take_retired(&mut self) -> Vec<Retired> {
        std::mem::take(&mut self.retired)
    }

    /// Retires the record of punched holes of a migration that has ended.
    pub fn retire_hole_recorder(&mut self, hole_recorder: Option<HoleRecorder>) {
        let retired = hole_recorder.map(RetiredMemory::HoleRecorder).map(Retired);
        self.retired.extend(retired);
    }

    fn set_bitmap_access(&mut self, bitmap_access: Option<BitmapAccess>) {
        let old = std::mem::replace(&mut self.bitmap_access, bitmap_access);
        let retired = old.map(RetiredMemory::Bitmap).map(Retired);
        self.retired.extend(retired);
    }

    /// Starts the first hint round of a migration, with all pages dirty. Cancels a hint round in progress.
    ///
    /// # Errors
    ///
    /// If no id is free; a hint round in progress has ended.
    pub fn start(&mut self, fresh: FreshBitmap) -> Result<HintingChanges, HintingError> {
        self.set_bitmap_access(Some(BitmapAccess::Sync(fresh.sync)));
        self.start_hint_round(Event::Start)
    }

    /// Performs a dirty sync: closes the window, invalidates the id, and opens a new window under a new id. Bits that
    /// earlier hints cleared stay clear.
    ///
    /// # Errors
    ///
    /// If no hint round is in progress, or no id is free. Without a free id, the hint round in progress has ended.
    pub fn sync(&mut self) -> Result<HintingChanges, HintingError> {
        if self.phase().id().is_none() {
            return Err(HintingError::NoHintRound);
        }
        let closed = self.end_hint_round(Event::SyncStarts);
        let opened = self.start_hint_round(Event::SyncEnds)?;
        Ok(HintingChanges {
            config: closed.config || opened.config,
            phase: true,
        })
    }

    /// Stops the hint round: config space shows STOP, and the driver keeps its hinted blocks. Does nothing after DONE.
    pub fn stop(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Stop)
    }

    /// Ends hinting: config space shows DONE, and the driver frees its hinted blocks.
    pub fn done(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Done)
    }

    /// Handles a reset of the driver: ends the hint round, and config space shows STOP. Ids continue (R8).
    pub fn reset(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Reset)
    }

    /// Handles a change of guest memory: ends the hint round, and drops the dirty bitmap of the old memory.
    pub fn handle_memory_change(&mut self) -> HintingChanges {
        let changes = self.stop();
        // A migration's window stays here until the migration closes it.
        if !matches!(self.bitmap_access, Some(BitmapAccess::Claimed(_))) {
            self.set_bitmap_access(None);
        }
        changes
    }

    /// Gives hinting to a migration. Ends a hint round in progress.
    pub fn claim(&mut self) -> HintingChanges {
        let changes = self.stop();
        self.set_bitmap_access(Some(BitmapAccess::Claimed(None)));
        changes
    }

    /// Ends a migration's use of hinting.
    pub fn release_claim(&mut self) {
        self.set_bitmap_access(None);
    }

    /// Returns whether any hint round was requested since the daemon started, from this driver or from an earlier one.
    pub fn has_requested_hints(&self) -> bool {
        self.hint_round.is_some()
    }

    /// Requests hints under a new id, and applies them to `window`.
    ///
    /// # Errors
    ///
    /// If no id is free. The error contains the window.
    pub fn open_window(
        &mut self,
        window: HintWindow,
    ) -> Result<HintingChanges, (HintWindow, HintingError)> {
        let event = match self.phase() {
            Phase::Syncing => Event::SyncEnds,
            _ => Event::Start,
        };
        match self.start_hint_round(event) {
            Ok(changes) => {
                if let Some(hint_round) = &mut self.hint_round {
                    hint_round.total = window.bitmap().pages();
                }
                self.set_bitmap_access(Some(BitmapAccess::Claimed(Some(window))));
                Ok(changes)
            }
            Err(error) => Err((window, error)),
        }
    }

    /// Starts a dirty sync of the migration: invalidates the id, and returns the window if it was open.
    pub fn close_window(&mut self) -> (Option<HintWindow>, HintingChanges) {
        let changes = self.end_hint_round(Event::SyncStarts);
        match &mut self.bitmap_access {
            Some(BitmapAccess::Claimed(window)) => (window.take(), changes),
            _ => (None, changes),
        }
    }

    /// Handles a command id that the driver sent.
    pub fn handle_cmd_id(&mut self, cmd_id: CommandId) -> HintingChanges {
        let before = self.phase();
        let action = self.step(Event::Command(cmd_id));
        if let Some(Action::Ignore(_)) = action {
            self.stale_commands = self.stale_commands.saturating_add(1);
        }
        if let (Some(Action::HintRoundFinished(_)), Some(hint_round)) =
            (action, self.hint_round.as_mut())
        {
            hint_round.end();
        }
        HintingChanges {
            config: false,
            phase: before != self.phase(),
        }
    }

    /// Returns whether a block of free pages counts now. The driver sent the block, and the device owns its buffer.
    pub fn accepts_free_block(&mut self) -> bool {
        let action = self.step(Event::FreeBlock);
        let window = self.bitmap_access.as_ref().and_then(BitmapAccess::window);
        matches!(action, Some(Action::UseFreeBlock(_))) && window.is_some()
    }

    /// Counts a block that does not count as a hint, or not completely.
    pub fn ignore_free_block(&mut self) {
        self.ignored_blocks = self.ignored_blocks.saturating_add(1);
    }

    /// Counts a block that was hinted: with or without errors.
    pub fn end_free_block(&mut self, valid: bool) {
        match &mut self.hint_round {
            Some(hint_round) if valid => hint_round.blocks = hint_round.blocks.saturating_add(1),
            _ => self.ignore_free_block(),
        }
    }

    /// Applies a part of an accepted block: addresses in one region of guest memory. The caller has just checked
    /// [`accepts_free_block`](Self::accepts_free_block) under the same lock, so the window is that of the hint round.
    ///
    /// With `discard`, the memory is discarded: it reads as zeros before the driver gets the buffer back. Only a driver
    /// that keeps the block until then allows this (R17). Exactly the discarded pages are cleared in the dirty bitmap,
    /// and a comparison of source and destination memory relies on that. With [`Discard::spares_rest`], pages that the
    /// host cannot free are cleared as well: for example hints below the size of a huge page.
    ///
    /// A sender that took the dirty bit of a page earlier may read the page at the same time. It reads the old bytes,
    /// zeros, or a mix of both. All of these are correct: the content of a free page is irrelevant, and the next user
    /// of the page writes it first. A tracker that compares content records the bytes that were sent. It finds the
    /// page changed if these bytes differ from the zeros, or from a later write of the guest. A tracker that detects
    /// writes finds the later write.
    ///
    /// # Errors
    ///
    /// If the host cannot discard the memory, or the hint window does not cover it.
    pub fn hint(
        &mut self,
        part: Range<u64>,
        discard: Option<Discard<'_>>,
    ) -> Result<(), RequestError> {
        let window = self.bitmap_access.as_ref().and_then(BitmapAccess::window);
        let Some(window) = window else {
            return Ok(());
        };
        let hinted = match discard {
            None => window.hint(part.start, part.end.saturating_sub(part.start))?,
            Some(discard) => discard_and_hint(window, discard, part, &mut self.bytes_discarded)?,
        };
        let bytes = hinted.pages * guest_migration::PAGE_SIZE;
        if let Some(hint_round) = &mut self.hint_round {
            hint_round.bytes = hint_round.bytes.saturating_add(bytes);
            hint_round.cleared = hint_round.cleared.saturating_add(hinted.cleared);
        }
        Ok(())
    }

    fn step(&mut self, event: Event) -> Option<Action> {
        let (state, action) = self.state.step(event);
        self.state = state;
        if let Some(Action::Ignore(ignored)) = action {
            log_ignored(ignored);
        }
        action
    }

    /// Applies an event that issues no new id. Closes the window, unless a migration owns it.
    fn end_hint_round(&mut self, event: Event) -> HintingChanges {
        let (phase, cmd_id) = (self.phase(), self.cmd_id());
        self.step(event);
        if let Some(hint_round) = &mut self.hint_round {
            hint_round.end();
        }
        self.bitmap_access = self.bitmap_access.take().map(BitmapAccess::close);
        HintingChanges {
            config: cmd_id != self.cmd_id(),
            phase: phase != self.phase(),
        }
    }

    /// Applies an event that issues a new id, and opens the window, unless a migration owns it.
    fn start_hint_round(&mut self, event: Event) -> Result<HintingChanges, HintingError> {
        let cmd_id = self.cmd_id();
        let action = self.step(event);
        self.bitmap_access = self.bitmap_access.take().map(BitmapAccess::close);
        match (action, self.phase().id()) {
            (Some(Action::IdsExhausted), _) | (_, None) => Err(HintingError::IdsExhausted),
            (_, Some(id)) => {
                self.bitmap_access = self.bitmap_access.take().map(BitmapAccess::open);
                let mut hint_round = HintRound::new(id);
                hint_round.total = self.bitmap().map_or(0, |bitmap| bitmap.pages());
                self.hint_round = Some(hint_round);
                Ok(HintingChanges {
                    config: cmd_id != self.cmd_id(),
                    phase: true,
                })
            }
        }
    }
}

/// Discards the whole pages of a range, and clears the dirty bits of the discarded pages. Adds their bytes to `discarded`.
///
/// The discard comes first, so that a page that the host did not free stays dirty.
fn discard_and_hint(
    window: &HintWindow,
    discard: Discard<'_>,
    range: Range<u64>,
    discarded: &mut u64,
) -> Result<Hinted, RequestError> {
    let length = range.end.saturating_sub(range.start);
    let mut all = Hinted::default();
    for part in discard.ram.discard(range.clone())? {
        let hinted = window.hint(part.start, part.end.saturating_sub(part.start))?;
        let bytes = hinted.pages * guest_migration::PAGE_SIZE;
        *discarded = discarded.saturating_add(bytes);
        all.pages += hinted.pages;
        all.cleared += hinted.cleared;
    }
    if discard.spares_rest {
        let hinted = window.hint(range.start, length)?;
        all = Hinted {
            cleared: all.cleared + hinted.cleared,
            ..hinted
        };
    }
    Ok(all)
}

fn log_ignored(ignored: Ignored) {
    // An interrupted hint round leaves such entries on the queue. They are no errors.
    tracing::trace!("free-page queue: ignored {ignored:?}");
}
