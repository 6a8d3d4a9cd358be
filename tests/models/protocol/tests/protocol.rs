// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the protocol model: all properties hold, and the model finds each deliberate fault.
//!
//! `cargo test -p protocol-model -- --nocapture` prints the number of states, and the shortest path to each violation.
//! With `--ignored --nocapture` the models are larger and take minutes.

use std::thread;

use protocol_model::{properties, Driver, Instance, Mutation, Step, Tracking};
use stateright::{Checker, HasDiscoveries, Model};

/// The combinations of driver, write tracking and discarding with which the daemon uses hints.
const SOUND: [Instance; 3] = [
    Instance::new(Driver::Reusing, Tracking::SoftDirty),
    Instance::new(Driver::Owning, Tracking::SoftDirty),
    Instance::new(Driver::Owning, Tracking::ContentAsSent).with_discard(),
];

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Explores every reachable state, and asserts all properties.
fn explore(instance: Instance) {
    let checker = instance.checker().threads(threads()).spawn_bfs().join();
    println!(
        "{} states, {} of them different, of {instance:?}",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker.assert_properties();
}

/// Finds a state in which `property` does not hold, prints the shortest path to it, and returns the steps of the path.
fn finds_violation(instance: Instance, property: &'static str) -> Vec<Step> {
    // With one thread, the first path that is found is the shortest.
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

/// As [`finds_violation`]. Also asserts that the same path does not violate `property` without the fault.
fn mutation_breaks(instance: Instance, property: &'static str) -> Vec<Step> {
    let steps = finds_violation(instance, property);
    let sound = instance.with_mutation(Mutation::None);
    let mut state = sound.init_states().into_iter();
    // Follow the path without the fault, up to the first step that is not possible.
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

/// Returns a smaller instance, for faults that need one migration and few steps of the guest.
const fn smaller(instance: Instance, guest_steps: u8) -> Instance {
    Instance {
        migrations: 1,
        guest_steps,
        ..instance
    }
}

/// An instance for faults that need two migrations.
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

/// The driver of Linux may reuse a hinted page before its buffer is used, so the device must not discard it.
#[test]
fn r17_a_page_in_use_is_changed_if_the_device_discards_what_the_driver_may_reuse() {
    finds_violation(
        smaller(C_DRIVER, 1).with_discard(),
        properties::NOT_CORRUPTED,
    );
}

/// Content tracking must ignore hints if the device does not discard. A page that was skipped and then filled with its
/// old content looks clean.
#[test]
fn r17_a_page_is_missing_if_content_is_compared_and_hints_are_used_without_discarding() {
    for driver in [Driver::Owning, Driver::Reusing] {
        let unsound = smaller(Instance::new(driver, Tracking::ContentAsSeen), 2);
        finds_violation(unsound, properties::COMPLETE);
    }
}
