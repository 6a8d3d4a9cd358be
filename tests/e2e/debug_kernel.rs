// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that only the debug kernel makes possible: it tracks page owners, finds leaks and poisons free pages.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::debug_kernel::OWNER_TRACKING;
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};
use shared_abi::features::Features;

/// The guest's memory. The kernel reports free pages of a zone only while the zone has 32 blocks of the reporting order
/// free above its low watermark, so a smaller guest would report nothing.
const MEMORY: u64 = 256 * MIB;
/// All features that our device offers. [`FILL`] has the kernel clear the pages that it frees, so the driver accepts
/// all of them.
const FEATURES: [&str; 6] = [
    "must-tell-host",
    "stats",
    "deflate-on-oom",
    "free-page-hint",
    "page-poison",
    "free-page-reporting",
];
const FILL: &str = "init_on_free=1";

/// Boots a guest with the debug kernel and a device that offers [`FEATURES`].
pub(crate) fn guest(arguments: &str) -> Result<Guest> {
    let artifacts = Artifacts::load()?;
    let arguments = format!("{FILL} {arguments}");
    let mut guest = Builder::new(&artifacts, Vmm::Debug)
        .memory(MEMORY)
        .features(&FEATURES)
        .kernel_arguments(&arguments)
        .boot()?;
    guest.set_short_reporting_delay()?;
    Ok(guest)
}

/// Loads our driver, checks that it accepts all [`FEATURES`], and exercises the balloon.
pub(crate) fn load_and_exercise(guest: &mut Guest) -> Result<()> {
    guest.load(Driver::Ours)?;
    let agreed = guest.exercise()?;
    let names: Vec<_> = agreed.names().collect();
    ensure!(
        FEATURES.iter().all(|feature| names.contains(feature)),
        "the driver took only {names:?}"
    );
    Ok(())
}

#[test]
fn no_page_and_no_object_is_left_of_our_driver_on_the_debug_kernel() -> Result<()> {
    let mut guest = guest(OWNER_TRACKING)?;
    let before = guest.settled_memory_usage()?;
    load_and_exercise(&mut guest)?;
    let name = Driver::Ours.module_name();
    let code = guest.module_code(Driver::Ours)?;

    // The page owner attributes the balloon's pages to the driver.
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = whole - 16 * MIB;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    let owned = guest.pages_owned(name, &code)?;
    let pages: u64 = owned.iter().map(|owner| owner.pages).sum();
    ensure!(
        pages >= 16 * MIB / 4096,
        "{pages} pages have an owner, of 16 MiB in the balloon"
    );

    // Unbinds with a full balloon, then in a hint round, then when idle.
    guest.unbind()?;
    guest.bind()?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.daemon()?.qmp().hint_start()?;
    guest.unbind()?;
    guest.bind()?;
    guest.unbind()?;
    let owned = guest.pages_owned(name, &code)?;
    ensure!(owned.is_empty(), "the driver has no device, but {owned:#?}");
    let leaks = guest.leaks()?;
    ensure!(leaks.is_empty(), "nothing points to {leaks:#?}");

    guest.unload(Driver::Ours)?;
    let owned = guest.pages_owned(name, &code)?;
    ensure!(owned.is_empty(), "the driver has gone, but {owned:#?}");
    let leaks = guest.leaks()?;
    ensure!(leaks.is_empty(), "nothing points to {leaks:#?}");
    guest.check_and_power_off(before)
}

#[test]
fn no_page_is_written_to_while_it_is_free_on_the_debug_kernel() -> Result<()> {
    let artifacts = Artifacts::load()?;
    // The kernel fills each freed page with a pattern and checks the pattern when it allocates the page.
    let mut guest = Builder::new(&artifacts, Vmm::Debug)
        .memory(MEMORY)
        .features(&FEATURES)
        .kernel_arguments("page_poison=1")
        .boot()?;
    guest.set_short_reporting_delay()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let agreed = guest.features()?;
    ensure!(agreed.contains(Features::PAGE_POISON), "{agreed}");
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    for target in [whole - 64 * MIB, whole] {
        guest.balloon_qmp()?.set_balloon(target)?;
        guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    }
    let empty = guest.settled_memory_usage()?;
    guest.retry_full_hint_round(empty)?;
    guest.fill_and_free(24 * MIB, 12)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
