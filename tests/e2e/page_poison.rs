// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests PAGE_POISON (R3 in docs/rules.md): guests that clear, poison or keep the contents of their free pages.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;

/// A guest that fills its free pages tells the device the fill value, and its hints count (R3). A guest that does not
/// fill them declines the feature.
fn poison_is_said_and_hints_count(
    vmm: Vmm,
    arguments: &str,
    drivers: &[Driver],
    poison: Option<u32>,
) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .features(&["stats", "free-page-hint", "page-poison", "must-tell-host"])
        .kernel_arguments(arguments)
        .boot()?;
    for &driver in drivers {
        guest.load(driver)?;
        let before = guest.settled_memory_usage()?;
        let status = guest.daemon()?.virtio_status()?;
        ensure!(
            status.has_feature("page-poison") == poison.is_some()
                && status.has_feature("must-tell-host"),
            "{driver:?}: {status:?}"
        );
        ensure!(status.poison == poison, "{driver:?}: {status:?}");
        let hint_round = guest.hint_all()?;
        ensure!(
            hint_round.bytes >= before.free / 10 * 9
                && hint_round.pages_cleared * 4096 == hint_round.bytes,
            "{driver:?}: {before:?}, {hint_round:?}"
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before)?;
        guest.unload(driver)?;
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r3_a_guest_in_qemu_that_clears_its_free_pages_says_so_and_its_hints_count() -> Result<()> {
    let arguments = "init_on_free=1 init_on_alloc=0";
    poison_is_said_and_hints_count(Vmm::Qemu, arguments, Driver::each(), Some(0))
}

#[test]
fn r3_a_guest_with_the_debug_kernel_that_poisons_its_free_pages_says_so_and_its_hints_count(
) -> Result<()> {
    /// The kernel's `PAGE_POISON` byte, four times.
    const POISON: u32 = 0xaaaa_aaaa;
    let arguments = "page_poison=1";
    poison_is_said_and_hints_count(Vmm::Uml, arguments, Driver::each(), Some(POISON))
}

#[test]
fn r3_a_guest_that_does_not_fill_its_free_pages_declines_poison() -> Result<()> {
    // One boot per driver. Both drivers clear the feature when they validate features, so the kernel finalizes features
    // twice. User-mode Linux then drops VHOST_USER_F_PROTOCOL_FEATURES, and the next driver gets no configuration
    // changes.
    for &driver in Driver::each() {
        poison_is_said_and_hints_count(Vmm::Uml, "", &[driver], None)?;
    }
    Ok(())
}
