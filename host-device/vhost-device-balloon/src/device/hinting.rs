// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting: rounds, and what the driver's blocks do to the dirty bitmap.
//!
//! The protocol is [`shared_abi::hinting::device`]; the bitmap and the time in which hints count are
//! [`guest_migration`]. This file joins the two: a block that the protocol accepts becomes a call of
//! [`HintWindow::hint`], and there is a window exactly while a round is wanted.
//!
//! A hint spares *sending* a page (R17). It changes the page only if the driver has accepted
//! [`KEEPS_HINTED_UNTIL_RETURNED`](shared_abi::features::Features::KEEPS_HINTED_UNTIL_RETURNED): any other driver
//! may have given a block to somebody else before the device gets to see the hint. See [`Hinting::handle_free_block`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_migration::{DirtyBitmap, HintError, HintWindow, Hinted, SyncPhase};
use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting::device::{Action, Event, Ignored, Phase, State};
use thiserror::Error;

use super::request::{RequestError, Segment};
use crate::memory::{Ram, RamLayoutError};

/// The most bytes that one request discards: what is given back takes time for each page, and the device is locked
/// meanwhile. Linux hints 4 MiB in a request.
pub const MAX_DISCARD: u64 = 256 << 20;

/// Why a hinting command of the operator cannot be done.
#[derive(Debug, Error)]
pub enum HintingError {
    /// There is nobody to ask.
    #[error("no front end is connected: start the VMM with this device's socket first")]
    NoFrontEnd,
    /// The daemon does not offer the feature.
    #[error(
        "free page hinting is not offered: restart vhost-device-balloon with --free-page-hint"
    )]
    NotOffered,
    /// The driver does not know the feature.
    #[error("the guest's driver did not accept free page hinting: it needs a driver that knows VIRTIO_BALLOON_F_FREE_PAGE_HINT")]
    NotNegotiated,
    /// There is no driver, or the guest is paused.
    #[error("the guest's driver is not running: load it, or let the guest run, and try again")]
    NoDriver,
    /// The front end's memory does not fit a bitmap.
    #[error("guest memory cannot be tracked: {0}")]
    Memory(#[from] RamLayoutError),
    /// The driver has answered none of the ids that were issued.
    #[error("no command id is free: the driver has not answered any of the last 2^31")]
    IdsExhausted,
    /// A migration has hinting.
    #[error("a migration is under way, and hinting is its own: wait for its end, or give it up with migrate-cancel")]
    Migrating,
    /// The memory has changed under a migration.
    #[error("the guest's memory is not that any more which is being migrated")]
    MemoryChanged,
    /// A sync without a round.
    #[error("no round of hinting is under way: start one with free-page-hint-start")]
    NoHintRound,
}

/// The right to change the dirty bitmap, in the form that the state of the round allows.
#[derive(Debug)]
enum BitmapAccess {
    /// A round is wanted: hints clear bits.
    Hint(HintWindow),
    /// No round is wanted: the bitmap stands as it is.
    Sync(SyncPhase),
    /// A migration has hinting. The window is here while it is open, and waits to be taken back after its round has
    /// ended, for whatever reason.
    Claimed(Option<HintWindow>),
}

impl BitmapAccess {
    fn bitmap(&self) -> Option<&DirtyBitmap> {
        match self {
            Self::Sync(sync) => Some(sync.bitmap()),
            other => other.window().map(|window| &**window.bitmap()),
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

/// What one round has brought.
#[derive(Clone, Copy, Debug)]
struct HintRound {
    id: HintId,
    requested: Instant,
    /// From the request to the driver's STOP, or to the operator's end if that came first.
    duration: Option<Duration>,
    blocks: u64,
    bytes: u64,
    cleared: u64,
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
        }
    }

    fn end(&mut self) {
        self.duration
            .get_or_insert_with(|| self.requested.elapsed());
    }
}

/// The state of hinting as an operator sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HintingStatus {
    /// How far the round has come.
    pub phase: Phase,
    /// The last round's id, also when it has ended.
    pub id: Option<HintId>,
    /// Blocks that counted in the last round.
    pub blocks: u64,
    /// Bytes in these blocks.
    pub bytes: u64,
    /// Dirty bits that these blocks cleared.
    pub pages_cleared: u64,
    /// Pages of guest memory, 0 if no round was ever started.
    pub pages_total: u64,
    /// Pages that are still to be sent.
    pub pages_dirty: u64,
    /// From the request to the driver's STOP; up to now if it has not come.
    pub duration: Duration,
    /// Bytes that hints have given back to the host, in all rounds.
    pub bytes_discarded: u64,
    /// Blocks that did not count, in all rounds.
    pub ignored_blocks: u64,
    /// Command ids that did not count, in all rounds.
    pub stale_commands: u64,
}

/// What changed, for the caller to pass on.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct HintingChanges {
    /// Config space shows another command id.
    pub config: bool,
    /// The phase is another one.
    pub phase: bool,
}

/// Rounds of hinting.
#[derive(Debug, Default)]
pub struct Hinting {
    state: State,
    bitmap_access: Option<BitmapAccess>,
    hint_round: Option<HintRound>,
    bytes_discarded: u64,
    ignored_blocks: u64,
    stale_commands: u64,
}

impl Hinting {
    /// Hinting that goes on after another device's: the next round gets the id `next`, and with `over` the driver is
    /// shown that no earlier one is of use any more.
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

    /// The id that the next round gets.
    pub fn next_id(&self) -> HintId {
        self.state.next_id()
    }

    /// The command id for config space.
    pub fn cmd_id(&self) -> CommandId {
        self.state.command()
    }

    /// How far the round has come.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// Bytes that hints have given back to the host, in all rounds.
    pub fn bytes_discarded(&self) -> u64 {
        self.bytes_discarded
    }

    /// The state as an operator sees it.
    pub fn status(&self) -> HintingStatus {
        let bitmap = self.bitmap_access.as_ref().and_then(BitmapAccess::bitmap);
        let hint_round = self.hint_round.as_ref();
        HintingStatus {
            phase: self.phase(),
            id: hint_round.map(|hint_round| hint_round.id),
            blocks: hint_round.map_or(0, |hint_round| hint_round.blocks),
            bytes: hint_round.map_or(0, |hint_round| hint_round.bytes),
            pages_cleared: hint_round.map_or(0, |hint_round| hint_round.cleared),
            pages_total: bitmap.map_or(0, DirtyBitmap::pages),
            pages_dirty: bitmap.map_or(0, DirtyBitmap::dirty_pages),
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

    /// The runs of pages that hints have spared, as (guest physical address, bytes): at most `limit` of those
    /// that end after the address `from`.
    pub fn hinted_ranges(&self, from: u64, limit: usize) -> Vec<(u64, u64)> {
        let bitmap = self.bitmap_access.as_ref().and_then(BitmapAccess::bitmap);
        bitmap.map_or_else(Vec::new, |bitmap| {
            let regions = bitmap.layout().regions().iter();
            regions
                .flat_map(|region| {
                    let start = region.start().wrapping_sub(region.offset());
                    bitmap
                        .skipped_in(region)
                        .map(move |run| (start.wrapping_add(run.offset()), run.length()))
                })
                .skip_while(|(start, length)| start.saturating_add(*length) <= from)
                .take(limit)
                .collect()
        })
    }

    /// Begins a migration's first round: every page is dirty, and hints are wanted. A round that is under way
    /// is cancelled first.
    ///
    /// # Errors
    ///
    /// If the memory cannot be tracked, or no id is free. A round that was under way has ended then.
    pub fn start(&mut self, ram: &Ram) -> Result<HintingChanges, HintingError> {
        let sync = SyncPhase::new(&Arc::new(ram.layout()?)).map_err(RamLayoutError::from)?;
        sync.set_all();
        self.bitmap_access = Some(BitmapAccess::Sync(sync));
        self.start_hint_round(Event::Start)
    }

    /// A dirty sync: the window closes, the id dies, and a new window opens under a new id. What earlier hints
    /// cleared stays clear.
    ///
    /// # Errors
    ///
    /// If no round is under way, or no id is free.
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

    /// Hints are of no use now. The driver keeps its blocks.
    pub fn stop(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Stop)
    }

    /// Hinted blocks are of no more use: the driver takes them back.
    pub fn done(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Done)
    }

    /// The driver is gone, and with it what it held.
    pub fn reset(&mut self) -> HintingChanges {
        self.end_hint_round(Event::Reset)
    }

    /// The memory is another one: the bitmap means nothing any more.
    pub fn handle_memory_change(&mut self) -> HintingChanges {
        let changes = self.stop();
        // A migration's window is the migration's to take back.
        if !matches!(self.bitmap_access, Some(BitmapAccess::Claimed(_))) {
            self.bitmap_access = None;
        }
        changes
    }

    /// Lends hinting to a migration. A round that is under way ends.
    pub fn claim(&mut self) -> HintingChanges {
        let changes = self.stop();
        self.bitmap_access = Some(BitmapAccess::Claimed(None));
        changes
    }

    /// Takes hinting back from a migration.
    pub fn release_claim(&mut self) {
        self.bitmap_access = None;
    }

    /// Whether the driver was ever asked for hints.
    pub fn has_requested_hints(&self) -> bool {
        self.hint_round.is_some()
    }

    /// Asks for hints under a new id, which count in `window`.
    ///
    /// # Errors
    ///
    /// If no id is free. The window comes back.
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
                self.bitmap_access = Some(BitmapAccess::Claimed(Some(window)));
                Ok(changes)
            }
            Err(error) => Err((window, error)),
        }
    }

    /// A dirty sync of the migration begins: the id dies, and its window, if one was open, goes back.
    pub fn close_window(&mut self) -> (Option<HintWindow>, HintingChanges) {
        let changes = self.end_hint_round(Event::SyncStarts);
        match &mut self.bitmap_access {
            Some(BitmapAccess::Claimed(window)) => (window.take(), changes),
            _ => (None, changes),
        }
    }

    /// The driver sent a command id.
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

    /// The driver sent a block of free pages. Its buffer is still the device's.
    ///
    /// With `discard` the memory of a block that counts is given back to the host, and reads as zeros before the
    /// driver gets it back. Only a driver that keeps the block until then allows that (R17). Exactly the pages that
    /// were made zero are struck out of the dirty bitmap: who compares what the destination has with what the guest
    /// has may rely on it. What the host cannot free, and what is beyond [`MAX_DISCARD`], stays to be sent.
    ///
    /// A sender may be reading such a page at the same moment, because it took the page's dirty bit earlier. It
    /// reads the old bytes, zeros, or some of each, and any of these will do: nobody relies on the content of a page
    /// that is free, and whoever gets the page next writes to it first. A tracker that compares content notes the
    /// bytes that were really sent, so it finds the page changed if they differ from the zeros, or from what the
    /// guest writes there later; a tracker that notices writes sees those.
    ///
    /// # Errors
    ///
    /// Names the first segment that is not in guest memory or cannot be discarded. The others count.
    pub fn handle_free_block(
        &mut self,
        segments: &[Segment],
        discard: Option<&Ram>,
    ) -> Result<(), RequestError> {
        let action = self.step(Event::FreeBlock);
        let window = self.bitmap_access.as_ref().and_then(BitmapAccess::window);
        let (Some(Action::UseFreeBlock(_)), Some(window)) = (action, window) else {
            self.ignored_blocks = self.ignored_blocks.saturating_add(1);
            return Ok(());
        };
        let mut result = Ok(());
        let mut allowance = MAX_DISCARD;
        for segment in segments {
            let (start, length) = (segment.address, u64::from(segment.length));
            let hinted = match discard {
                None => window.hint(start, length).map_err(RequestError::from),
                Some(ram) => {
                    let length = length.min(allowance);
                    allowance -= length;
                    hint_and_discard(window, ram, start, length)
                }
            };
            match hinted {
                Ok(hinted) => {
                    if discard.is_some() {
                        let bytes = hinted.pages * guest_migration::PAGE_SIZE;
                        self.bytes_discarded = self.bytes_discarded.saturating_add(bytes);
                    }
                    if let Some(hint_round) = &mut self.hint_round {
                        hint_round.bytes = hint_round
                            .bytes
                            .saturating_add(hinted.pages * guest_migration::PAGE_SIZE);
                        hint_round.cleared = hint_round.cleared.saturating_add(hinted.cleared);
                    }
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        match (&result, &mut self.hint_round) {
            (Ok(()), Some(hint_round)) => hint_round.blocks = hint_round.blocks.saturating_add(1),
            _ => self.ignored_blocks = self.ignored_blocks.saturating_add(1),
        }
        result
    }

    fn step(&mut self, event: Event) -> Option<Action> {
        let (state, action) = self.state.step(event);
        self.state = state;
        if let Some(Action::Ignore(ignored)) = action {
            log_ignored(ignored);
        }
        action
    }

    /// Takes an event that brings no new id.
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

    /// Takes an event that brings a new id, and opens the window for it.
    fn start_hint_round(&mut self, event: Event) -> Result<HintingChanges, HintingError> {
        let cmd_id = self.cmd_id();
        let action = self.step(event);
        self.bitmap_access = self.bitmap_access.take().map(BitmapAccess::close);
        match (action, self.phase().id()) {
            (Some(Action::IdsExhausted), _) | (_, None) => Err(HintingError::IdsExhausted),
            (_, Some(id)) => {
                self.bitmap_access = self.bitmap_access.take().map(BitmapAccess::open);
                self.hint_round = Some(HintRound::new(id));
                Ok(HintingChanges {
                    config: cmd_id != self.cmd_id(),
                    phase: true,
                })
            }
        }
    }
}

/// Makes the whole pages of a range zero, and strikes those out that are.
///
/// In this order: a page whose memory the host did not take back is still to be sent.
fn hint_and_discard(
    window: &HintWindow,
    ram: &Ram,
    start: u64,
    length: u64,
) -> Result<Hinted, RequestError> {
    // The whole range goes through the same checks as without discarding (R5), before anything is touched.
    let end = start
        .checked_add(length)
        .ok_or(HintError::Wraps { start, length })?;
    if length > 0 && !ram.overlaps(&(start..end)) {
        return Err(HintError::Outside { start, length }.into());
    }
    let mut all = Hinted {
        ignored_bytes: length,
        ..Hinted::default()
    };
    for part in ram.discard(start..end)? {
        let hinted = window.hint(part.start, part.end.saturating_sub(part.start))?;
        all.pages += hinted.pages;
        all.cleared += hinted.cleared;
        all.ignored_bytes = all
            .ignored_bytes
            .saturating_sub(hinted.pages * guest_migration::PAGE_SIZE);
    }
    Ok(all)
}

fn log_ignored(ignored: Ignored) {
    // A round that was cut short leaves these behind; they are no errors.
    tracing::trace!("ignored on the free page queue: {ignored:?}");
}
