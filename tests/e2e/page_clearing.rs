// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that a reclaimed page is cleared once: by the driver, or by the kernel that allocates it.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, Verify};
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// The shrinker reclaims hinted blocks for a process that needs memory. A kernel with `init_on_alloc`, as Debian's,
/// clears pages when it allocates them, so the driver does not. For other kernels the driver clears the pages before it
/// frees them.
#[test]
fn pages_are_cleared_once_in_qemu() -> Result<()> {
    const NEEDED: u64 = 100 * MIB;
    let artifacts = Artifacts::load()?;
    for (arguments, driver) in [
        ("init_on_alloc=1", Driver::C),
        ("init_on_alloc=1", Driver::Ours),
        ("init_on_alloc=0", Driver::C),
        ("init_on_alloc=0", Driver::Ours),
    ] {
        let builder = Builder::new(&artifacts, Vmm::Qemu).kernel_arguments(arguments);
        let (mut guest, before) = builder.boot_filled(64 * MIB, driver)?;
        guest.hint_all()?;
        let events = guest.vmstat_counters()?;
        let start = Instant::now();
        let filled = guest.call(Fill {
            bytes: NEEDED,
            keep_every: 1,
            seed: 42,
        })?;
        let took = start.elapsed();
        let after = guest.vmstat_counters()?;
        let more = |name: &str| {
            let count = |events: &BTreeMap<String, u64>| {
                let counts = events.iter().filter(|(key, _)| key.starts_with(name));
                counts.map(|(_, count)| count).sum::<u64>()
            };
            count(&after).saturating_sub(count(&events))
        };
        println!(
            "{driver:?}, {arguments}: {NEEDED} bytes in {took:?}, {} stalls, {} scanned",
            more("allocstall"),
            more("slabs_scanned")
        );
        if driver == Driver::Ours {
            // The counters are not read atomically, and pages may be reclaimed meanwhile.
            let deadline = Instant::now() + HANG_TIMEOUT;
            let reclaimed = loop {
                let counters = guest.counters()?;
                let (reclaimed, zeroed) = (
                    counters.get("returned_pages")?,
                    counters.get("zeroed_pages")?,
                );
                let wanted = if arguments.ends_with('1') {
                    0
                } else {
                    reclaimed
                };
                if zeroed == wanted {
                    println!("{reclaimed} pages went back, {zeroed} were cleared");
                    break reclaimed;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{zeroed} pages were cleared of {reclaimed}"
                );
                sleep(Duration::from_millis(20));
            };
            ensure!(
                reclaimed > NEEDED / 4096 / 2,
                "only {reclaimed} pages went back"
            );
        }
        let workload = filled.workload;
        let found = guest.call(Verify { workload })?;
        ensure!(
            found.wrong == 0 && found.pages == NEEDED / 4096,
            "{found:?}"
        );
        guest.call(Free { workload })?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}
