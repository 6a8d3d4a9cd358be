// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What must hold in every state, and what must be possible so that the rest means something.

use stateright::Property;

use crate::instance::Instance;
use crate::migration::MigrationPhase;
use crate::state::{ModelState, PageState};

/// No page that somebody will miss is missing at the destination.
pub const COMPLETE: &str = "the destination has every page that is in use";
/// R2.
pub const ROUNDS: &str = "R2: a block or a STOP counts for its own round only";
/// R8.
pub const IDS: &str = "R8: no id is issued while the driver may speak of it";
/// R12.
pub const COUNT: &str = "R12: the count is the number of set bits";
/// R16.
pub const RETURNED: &str = "R16: after a migration, when all is said, the driver holds nothing";
/// R17.
pub const NOT_CORRUPTED: &str = "R17: the device changes no page that is in use";
/// A hint has an effect.
pub const HINT_SKIPPED_PAGE: &str = "a migration completes that a hint has spared a page";
/// Both migrations can happen.
pub const TWICE: &str = "a second migration completes";

pub(crate) fn all() -> Vec<Property<Instance>> {
    vec![
        Property::always(COMPLETE, |_, state| complete(state)),
        Property::always(ROUNDS, |_, state: &ModelState| {
            !state.violations.hint_rounds_mixed
        }),
        Property::always(IDS, |_, state: &ModelState| !state.violations.id_reused),
        Property::always(COUNT, |_, state: &ModelState| {
            u32::from(state.migration.count) == state.migration.dirty.count_ones()
        }),
        Property::always(RETURNED, |_, state| returned(state)),
        Property::always(NOT_CORRUPTED, |_, state: &ModelState| {
            !state.violations.page_corrupted
        }),
        Property::sometimes(HINT_SKIPPED_PAGE, |_, state: &ModelState| {
            completed(state) && state.migration.hint_skipped_page
        }),
        Property::sometimes(TWICE, |instance: &Instance, state: &ModelState| {
            completed(state) && (instance.migrations < 2 || state.migration.remaining == 0)
        }),
    ]
}

fn completed(state: &ModelState) -> bool {
    state.migration.progress == MigrationPhase::Completed
}

/// At the moment of completion the guest stands still, and the destination is what it goes on from.
fn complete(state: &ModelState) -> bool {
    !completed(state)
        || state
            .pages
            .iter()
            .zip(&state.migration.destination)
            .all(|(page, there)| page.state != PageState::Used || page.value == *there)
}

fn returned(state: &ModelState) -> bool {
    let over = state.migration.progress == MigrationPhase::None;
    let silent = !state.config_changed && state.queue.is_empty() && state.pending_discard.is_none();
    !(over && silent)
        || state
            .pages
            .iter()
            .all(|page| !matches!(page.state, PageState::Hinted | PageState::ReleasePending))
}
