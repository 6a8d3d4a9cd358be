// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest and its kernel can still do while hinted blocks are held.

use anyhow::{ensure, Result};
use tests::artifacts::Artifacts;
use tests::calls::Run;
use tests::guest::{Builder, Driver, Guest};
use tests::vmm::Vmm;
use tests::zones::ZoneInfo;
use tests::MIB;

/// Has a shell of the guest do something, and returns what it says.
fn shell(guest: &mut Guest, script: &str) -> Result<String> {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let done = guest.call(Run { argv })?;
    ensure!(done.status == Some(0), "{script}: {done:?}");
    Ok(done.stdout)
}

fn summary(zones: &[ZoneInfo]) -> String {
    let one = |zone: &ZoneInfo| {
        format!(
            "{}:{} free {} (CMA {}), min {} low {} high {} managed {} reserve {:?}; ",
            zone.node, zone.name, zone.free, zone.free_cma, zone.min, zone.low, zone.high, zone.managed, zone.lowmem_reserve
        )
    };
    zones.iter().map(one).collect()
}

/// CMA stays whole while a round is held: what is in it can be had by those for whom it is kept. The rest is hinted all the
/// same.
#[test]
fn hinting_keeps_out_of_cma_in_qemu() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in [Driver::C, Driver::Ours] {
        let builder = Builder::new(&artifacts, Vmm::Qemu)
            .memory(1024 * MIB)
            .kernel_arguments("cma=256M init_on_alloc=0");
        let (mut guest, free) = builder.boot_used(128 * MIB, driver)?;
        let before = guest.mem_info()?.field("CmaFree");
        let zones_before = guest.zones()?;
        let round = guest.hint_all()?;
        let held = guest.mem_info()?.field("CmaFree");
        let zones = guest.zones()?;
        println!(
            "{driver:?}: CmaFree {before}, then {held}; {} hinted of {free}\n{}\n{}",
            round.bytes,
            summary(&zones_before),
            summary(&zones)
        );
        ensure!(before > 250 * MIB, "only {before} bytes of CMA were free");
        ensure!(
            before.abs_diff(held) < MIB,
            "{driver:?}: CmaFree fell from {before} to {held}"
        );
        let hintable = (free - before) / 10 * 8;
        ensure!(
            driver == Driver::C || round.bytes > hintable,
            "only {} bytes were hinted of {} outside of CMA",
            round.bytes,
            free - before
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.farewell(free)?;
    }
    Ok(())
}

/// Half of memory is for movable pages only, which hinting does not use. The rest is all that the kernel has, and enough of
/// it is left: files can be made without anybody having to wait for memory.
#[test]
fn the_reserve_is_where_the_kernel_can_use_it_in_qemu() -> Result<()> {
    const FILES: u32 = 15_000;
    let artifacts = Artifacts::load()?;
    for driver in [Driver::C, Driver::Ours] {
        let builder = Builder::new(&artifacts, Vmm::Qemu)
            .memory(1024 * MIB)
            .kernel_arguments("movablecore=512M");
        let (mut guest, free) = builder.boot_used(128 * MIB, driver)?;
        let before = guest.zones()?;
        let round = guest.hint_all()?;
        let held = guest.zones()?;
        let events = guest.vm_events()?;
        let start = std::time::Instant::now();
        shell(
            &mut guest,
            &format!("mkdir /tmp/files && cd /tmp/files && seq 1 {FILES} | xargs touch"),
        )?;
        let took = start.elapsed();
        let after = guest.vm_events()?;
        println!(
            "{driver:?}: {} hinted of {free}; {FILES} files in {took:?}\nbefore {}\nheld   {}\nafter  {}",
            round.bytes,
            summary(&before),
            summary(&held),
            summary(&guest.zones()?)
        );
        for (name, count) in &after {
            let moved = count - events.get(name).copied().unwrap_or_default().min(*count);
            if moved > 0 && (name.starts_with("allocstall") || name.starts_with("pgscan") || name.starts_with("pgsteal") || name.starts_with("slabs") || name.contains("kswapd") || name.starts_with("balloon")) {
                println!("  {name} +{moved}");
            }
        }
        shell(&mut guest, "rm -r /tmp/files")?;
        guest.daemon()?.qmp().hint_done()?;
        guest.farewell(free)?;
    }
    Ok(())
}
