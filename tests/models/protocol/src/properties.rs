// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The properties of the model.
//!
//! Most must hold in every state. The last two must hold in some state, so that the others are not vacuous.

use stateright::Property;

use crate::instance::Instance;
use crate::migration::MigrationPhase;
use crate::state::{ModelState, PageState};

/// The destination has the content of every page in use.
pub const COMPLETE: &str = "the destination has every page that is in use";
/// Rule R2: messages count for their own hint round only.
pub const ROUNDS: &str = "R2: a block or a STOP counts for its own round only";
/// Rule R8: a command id that the driver may still use is not issued again.
pub const IDS: &str = "R8: no id is issued while the driver may speak of it";
/// Rule R12: the dirty count is exact.
pub const COUNT: &str = "R12: the count is the number of set bits";
/// Rule R16: the driver releases its hinted blocks after a migration.
pub const RETURNED: &str = "R16: after a migration, when all is said, the driver holds nothing";
/// Rule R17: the device does not change a page in use.
pub const NOT_CORRUPTED: &str = "R17: the device changes no page that is in use";
/// Some migration completes after a hint has cleared a dirty bit.
pub const HINT_SKIPPED_PAGE: &str = "a migration completes that a hint has spared a page";
/// The last of the instance's migrations can complete.
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

/// Returns whether the destination is complete, if the migration is. At completion the guest is paused, and the
/// destination continues with the pages that it has.
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
