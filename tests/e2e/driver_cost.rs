// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares the costs of our driver with those of the C driver. Costs are counts, not times, so host load does not
//! change them.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::driver_cost::{measure_driver, DriverCosts, ExitCounts, NotificationSuppression};
use harness::guest::Driver;
use harness::MIB;

const MEMORY: u64 = 768 * MIB;
const INFLATED: u64 = 512 * MIB;
const REPEATS: usize = 3;

/// Returns the costs of the C driver and of our driver, in this order.
fn both(suppression: NotificationSuppression) -> Result<(DriverCosts, DriverCosts)> {
    let artifacts = Artifacts::load()?;
    let of = |driver| measure_driver(&artifacts, driver, suppression, MEMORY, INFLATED, REPEATS);
    let (c, ours) = (of(Driver::C)?, of(Driver::Ours)?);
    println!("C: {c:#?}\nours: {ours:#?}");
    Ok((c, ours))
}

/// Fails unless `ours` is at most one `part`th of `c`.
fn at_most(what: &str, ours: u64, c: u64, part: u64) -> Result<()> {
    ensure!(
        ours * part <= c,
        "{what}: {ours}, and the C driver's {c}; a {part}th of that was to be enough"
    );
    Ok(())
}

#[test]
fn unsuppressed_our_driver_notifies_a_tenth_as_often_as_the_c_driver_to_hint_and_a_quarter_to_inflate(
) -> Result<()> {
    let (c, ours) = both(NotificationSuppression::Never)?;
    // The C driver notifies for each request. Equal counts show that no notification was lost in counting.
    ensure!(
        c.hint.counts.notifications == c.hint.counts.requests,
        "{c:?}"
    );
    ensure!(
        c.inflate.counts.notifications == c.inflate.counts.requests,
        "{c:?}"
    );
    ensure!(ours.hint.bytes * 10 >= c.hint.bytes * 9, "{ours:?} {c:?}");
    let calls = |counts: ExitCounts| counts.notifications + counts.interrupts;
    let (mine, theirs) = (ours.hint.counts, c.hint.counts);
    at_most(
        "notifications to hint",
        mine.notifications,
        theirs.notifications,
        10,
    )?;
    at_most(
        "notifications and interrupts to hint",
        calls(mine),
        calls(theirs),
        10,
    )?;
    for (what, mine, theirs) in [
        ("inflate", ours.inflate.counts, c.inflate.counts),
        ("deflate", ours.deflate.counts, c.deflate.counts),
    ] {
        let (notifications, interrupts) = (
            format!("notifications to {what}"),
            format!("interrupts to {what}"),
        );
        at_most(&notifications, mine.notifications, theirs.notifications, 4)?;
        at_most(&interrupts, mine.interrupts, theirs.interrupts, 4)?;
        at_most(&format!("exits to {what}"), mine.exits(), theirs.exits(), 4)?;
    }
    Ok(())
}

#[test]
fn with_event_index_our_driver_notifies_no_more_often_than_the_c_driver() -> Result<()> {
    let (c, ours) = both(NotificationSuppression::EventIdx)?;
    // The number of the C driver's notifications for hints depends on scheduling: a device that is still processing the
    // queue needs no kick. The number of its requests does not. Our driver notifies no more often than without event
    // index.
    let mine = ours.hint.counts;
    at_most(
        "notifications and interrupts to hint, of as many requests,",
        mine.notifications + mine.interrupts,
        c.hint.counts.requests,
        10,
    )?;
    at_most(
        "exits to inflate",
        ours.inflate.counts.exits(),
        c.inflate.counts.exits(),
        4,
    )?;
    at_most(
        "exits to deflate",
        ours.deflate.counts.exits(),
        c.deflate.counts.exits(),
        4,
    )
}
