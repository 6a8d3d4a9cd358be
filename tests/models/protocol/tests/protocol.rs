// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the model says of the protocol as it is, and that it finds what is broken on purpose.
//!
//! `cargo test -p protocol-model -- --nocapture` prints how many states were seen, and the shortest way to each
//! mistake. With `--ignored --nocapture` the worlds are larger, and take minutes.

use std::thread;

use protocol_model::{properties, Driver, Instance, Mutation, Step, Tracking};
use stateright::{Checker, HasDiscoveries, Model};

/// How a migration may learn of writes and use hints: what the daemon does, and nothing else.
const SOUND: [Instance; 3] = [
    Instance::new(Driver::Reusing, Tracking::SoftDirty),
    Instance::new(Driver::Owning, Tracking::SoftDirty),
    Instance::new(Driver::Owning, Tracking::ContentAsSent).with_discard(),
];

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Goes through every state that can be reached, and finds each property in order.
fn explore(instance: Instance) {
    let checker = instance.checker().threads(threads()).spawn_bfs().join();
    println!(
        "{} states, {} of them different, of {instance:?}",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker.assert_properties();
}

/// Looks for a state in which `property` does not hold, and prints the shortest way there.
fn finds_violation(instance: Instance, property: &'static str) -> Vec<Step> {
    // One thread, so that the first way that is found is the shortest.
    let checker = instance
        .checker()
        .finish_when(HasDiscoveries::AllOf([property].into()))
        .spawn_bfs()
        .join();
    let Some(path) = checker.discovery(property) else {
        panic!(
            "not found in {} states of {instance:?}",
            checker.unique_state_count()
        );
    };
    let last = path.last_state().clone();
    let steps = path.into_actions();
    println!("{:?} breaks: {property}", instance.mutation);
    for (number, step) in steps.iter().enumerate() {
        println!("  {:>2}. {step:?}", number + 1);
    }
    println!(
        "  pages {:?}, at the destination {:?}\n",
        last.pages, last.migration.destination
    );
    steps
}

/// As [`finds_violation`], and the same world is in order when nothing is broken.
fn mutation_breaks(instance: Instance, property: &'static str) -> Vec<Step> {
    let steps = finds_violation(instance, property);
    let sound = instance.with_mutation(Mutation::None);
    let mut state = sound.init_states().into_iter();
    // The way to the mistake, as far as it can be gone at all without it, leads to none.
    assert!(state.all(|state| {
        let mut state = state;
        for step in &steps {
            let mut possible = Vec::new();
            sound.actions(&state, &mut possible);
            match sound.next_state(&state, *step) {
                Some(next) if possible.contains(step) => state = next,
                _ => break,
            }
        }
        (sound.property(property).condition)(&sound, &state)
    }));
    steps
}

const C_DRIVER: Instance = Instance::new(Driver::Reusing, Tracking::SoftDirty);

/// For mistakes that need no second migration, and a guest that does little.
const fn smaller(instance: Instance, guest_steps: u8) -> Instance {
    Instance {
        migrations: 1,
        guest_steps,
        ..instance
    }
}

/// For mistakes that need two migrations.
const TWO_MIGRATIONS: Instance = Instance {
    syncs: 0,
    guest_steps: 2,
    ..C_DRIVER
};

#[test]
fn no_page_is_missing_after_two_migrations_of_which_any_may_be_cancelled() {
    for instance in SOUND {
        explore(Instance {
            queue: 2,
            guest_steps: 1,
            ..instance
        });
    }
}

#[test]
fn no_page_is_missing_when_the_guest_writes_a_lot_or_the_driver_goes() {
    for instance in SOUND {
        explore(Instance {
            migrations: 1,
            queue: 2,
            guest_steps: 2,
            resets: 1,
            ..instance
        });
    }
    explore(Instance {
        migrations: 1,
        queue: 2,
        guest_steps: 3,
        ..C_DRIVER
    });
}

#[test]
fn no_page_is_missing_of_three() {
    explore(Instance {
        pages: 3,
        migrations: 1,
        syncs: 0,
        guest_steps: 2,
        ..C_DRIVER
    });
}

#[test]
#[ignore = "takes minutes"]
fn no_page_is_missing_in_larger_models() {
    for instance in SOUND {
        explore(Instance {
            guest_steps: 3,
            ..instance
        });
        explore(Instance {
            migrations: 1,
            syncs: 2,
            guest_steps: 3,
            values: 3,
            ..instance
        });
        explore(Instance {
            pages: 3,
            migrations: 1,
            guest_steps: 2,
            resets: 1,
            ..instance
        });
    }
}

#[test]
fn r2_a_page_is_missing_if_a_stale_start_is_taken_for_the_wanted_one() {
    let mutation = TWO_MIGRATIONS.with_mutation(Mutation::AcceptAnyStart);
    mutation_breaks(mutation, properties::ROUNDS);
    mutation_breaks(mutation, properties::COMPLETE);
}

#[test]
fn r2_a_round_ends_early_if_a_stale_stop_is_taken_for_that_of_the_wanted_one() {
    let mutation = TWO_MIGRATIONS.with_mutation(Mutation::AcceptAnyStop);
    mutation_breaks(mutation, properties::ROUNDS);
}

#[test]
fn r6_a_page_is_missing_if_hints_outlive_the_sync() {
    let mutation = smaller(C_DRIVER, 2).with_mutation(Mutation::HintsOutliveSync);
    mutation_breaks(mutation, properties::COMPLETE);
}

#[test]
fn r8_a_page_is_missing_if_each_migration_begins_at_the_same_id() {
    let mutation = TWO_MIGRATIONS.with_mutation(Mutation::ReuseIds);
    mutation_breaks(mutation, properties::IDS);
    mutation_breaks(mutation, properties::COMPLETE);
}

#[test]
fn r12_a_page_is_missing_if_the_count_drifts() {
    for instance in SOUND {
        let mutation = smaller(instance, 1).with_mutation(Mutation::CountClearBits);
        mutation_breaks(mutation, properties::COUNT);
        mutation_breaks(mutation, properties::COMPLETE);
    }
}

#[test]
fn r16_the_driver_keeps_its_pages_if_a_cancelled_migration_does_not_say_done() {
    let mutation = smaller(C_DRIVER, 1).with_mutation(Mutation::CancelWithoutDone);
    mutation_breaks(mutation, properties::RETURNED);
}

/// Linux's driver promises nothing, so the device must not discard.
#[test]
fn r17_a_page_in_use_is_changed_if_the_device_discards_what_the_driver_may_reuse() {
    finds_violation(
        smaller(C_DRIVER, 1).with_discard(),
        properties::NOT_CORRUPTED,
    );
}

/// Why content comparison ignores hints when the device does not discard: a page that was skipped, and filled with
/// the very bytes that it had before, looks clean.
#[test]
fn r17_a_page_is_missing_if_content_is_compared_and_hints_are_used_without_discarding() {
    for driver in [Driver::Owning, Driver::Reusing] {
        let unsound = smaller(Instance::new(driver, Tracking::ContentAsSeen), 2);
        finds_violation(unsound, properties::COMPLETE);
    }
}
