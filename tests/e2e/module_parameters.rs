// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the parameters of our kernel module.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::MIB;

#[test]
fn parameters_are_clamped_and_keep_hinting_off_the_reserve() -> Result<()> {
    const RESERVE: u64 = 200 * MIB;
    /// Pages of the reserve that the guest's own programs may have used since. The driver's counter is exact.
    const OWN_USE: u64 = 2 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    for (parameters, min_order, expected_warning) in [
        ("hint_reserve_mib=200 hint_min_order=8", 8, None),
        (
            "hint_reserve_mib=200 hint_min_order=77",
            10,
            Some("hint_min_order=77"),
        ),
        (
            "hint_reserve_mib=200 hint_min_order=8 host_timeout_ms=0",
            8,
            Some("host_timeout_ms=0 is out of range (1 to 600000); using 1"),
        ),
    ] {
        guest.load_with(Driver::Ours, parameters)?;
        let before = guest.settled_memory_usage()?;
        let qmp = guest.daemon()?.qmp();
        qmp.hint_start()?;
        let hint_round = qmp.wait_hint_status("finished")?;
        let left = guest.mem_info()?.free();
        ensure!(
            (RESERVE - OWN_USE..=RESERVE + 16 * MIB).contains(&left),
            "{left} bytes were left of {before:?}: {hint_round:?}"
        );
        let counters = guest.counters()?;
        ensure!(
            counters.get("hint_reserve_pages")? == RESERVE / 4096,
            "{counters:?}"
        );
        ensure!(
            counters.get("hint_free_pages_low")? >= RESERVE / 4096,
            "{counters:?}"
        );
        for order in 0..min_order {
            let blocks = counters.get(&format!("hinted_blocks_order_{order}"))?;
            ensure!(blocks == 0, "{blocks} blocks of order {order} were hinted");
        }
        guest.daemon()?.qmp().hint_done()?;
        guest.unload(Driver::Ours)?;
        guest.check_memory(before)?;
        match expected_warning {
            None => guest.check_log()?,
            Some(expected_warning) => {
                let log = guest.kernel_log()?;
                ensure!(
                    log.iter().any(|line| line.text.contains(expected_warning)),
                    "{log:?}"
                );
            }
        }
    }
    for wrong in [
        "hint_min_order=-1",
        "hint_reserve_mib=much",
        "hint_min_order=256",
        "host_timeout_ms=-1",
    ] {
        ensure!(
            guest.load_with(Driver::Ours, wrong).is_err(),
            "the module takes {wrong}"
        );
    }
    guest.power_off()?;
    Ok(())
}
