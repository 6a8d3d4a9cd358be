// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests whose memory is moved while they work.

use anyhow::{ensure, Result};
use tests::artifacts::Artifacts;
use tests::calls::{DropMemoryCaches, PageUse};
use tests::guest::{Builder, Driver};
use tests::vmm::Vmm;
use tests::MIB;

/// What the proofs below rest on: the flags of a page tell whether somebody relies on what it holds.
#[test]
fn r15_no_flag_says_that_a_hinted_page_is_in_use() -> Result<()> {
    /// What the guest may use for itself meanwhile.
    const OWN_USE: u64 = 4 * MIB;
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        for &driver in Driver::each() {
            if vmm == Vmm::Qemu && driver == Driver::C {
                // Its blocks are the kernel's as much as ours are: user-mode Linux shows that.
                continue;
            }
            let (mut guest, free) = Builder::new(&artifacts, vmm)
                .memory(256 * MIB)
                .boot_used(16 * MIB, driver)?;
            guest.hint_all()?;
            let hinted = guest.daemon()?.qmp().hinted_ranges()?;
            let held = guest.call(PageUse {})?;
            let wrong = held.used.intersection(&hinted);
            ensure!(
                wrong.ranges().is_empty(),
                "{vmm:?}, {driver:?}: hinted, and in use: {:x?}",
                wrong.ranges()
            );
            ensure!(held.used.bytes() > 4 * MIB, "{}", held.used.bytes());
            guest.daemon()?.qmp().hint_done()?;
            guest.check_free(free)?;
            guest.call(DropMemoryCaches {})?;
            let done = guest.call(PageUse {})?;
            let lost = hinted.without(&done.free);
            println!(
                "{vmm:?}, {driver:?}: {} bytes hinted, {} in use; {} of the former not free after the round",
                hinted.bytes(),
                held.used.bytes(),
                lost.bytes()
            );
            ensure!(
                lost.bytes() <= OWN_USE,
                "{vmm:?}, {driver:?}: hinted, and not free any more: {:x?}",
                lost.ranges()
            );
            guest.farewell(free)?;
        }
    }
    Ok(())
}
