// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What must hold in every state, and what must be possible so that the rest means something.

use stateright::Property;

use crate::instance::Instance;
use crate::migration::Progress;
use crate::world::{State, World};

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
pub const UNHARMED: &str = "R17: the device changes no page that is in use";
/// A hint has an effect.
pub const SPARED: &str = "a migration completes that a hint has spared a page";
/// Both migrations can happen.
pub const TWICE: &str = "a second migration completes";

pub(crate) fn all() -> Vec<Property<Instance>> {
    vec![
        Property::always(COMPLETE, |_, world| complete(world)),
        Property::always(ROUNDS, |_, world: &World| !world.sins.rounds_mixed),
        Property::always(IDS, |_, world: &World| !world.sins.id_reused),
        Property::always(COUNT, |_, world: &World| {
            u32::from(world.migration.count) == world.migration.dirty.count_ones()
        }),
        Property::always(RETURNED, |_, world| returned(world)),
        Property::always(UNHARMED, |_, world: &World| !world.sins.page_harmed),
        Property::sometimes(SPARED, |_, world: &World| {
            completed(world) && world.migration.spared
        }),
        Property::sometimes(TWICE, |instance: &Instance, world: &World| {
            completed(world) && (instance.migrations < 2 || world.migration.left == 0)
        }),
    ]
}

fn completed(world: &World) -> bool {
    world.migration.progress == Progress::Completed
}

/// At the moment of completion the guest stands still, and the destination is what it goes on from.
fn complete(world: &World) -> bool {
    !completed(world)
        || world
            .pages
            .iter()
            .zip(&world.migration.destination)
            .all(|(page, there)| page.state != State::Used || page.value == *there)
}

fn returned(world: &World) -> bool {
    let over = world.migration.progress == Progress::None;
    let silent = !world.config_changed && world.queue.is_empty() && world.in_hand.is_none();
    !(over && silent)
        || world
            .pages
            .iter()
            .all(|page| !matches!(page.state, State::Held | State::Releasing))
}
