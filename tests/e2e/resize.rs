// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests targets of the balloon: one that is reached with hinted blocks, one that is set during a migration, and one
//! that is out of reach.

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::destination::{uri, Destination};
use harness::guest::{Builder, Driver};
use harness::migration::MigrationStatus;
use harness::proxy::{FaultProxy, ProxyFault};
use harness::scratch::Scratch;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};
use serde_json::json;

#[test]
fn our_balloon_inflates_out_of_hinted_blocks_in_user_mode_linux() -> Result<()> {
    inflates_out_of_hinted_blocks(Vmm::Uml)
}

#[test]
fn our_balloon_inflates_out_of_hinted_blocks_in_qemu() -> Result<()> {
    inflates_out_of_hinted_blocks(Vmm::Qemu)
}

/// Hinted blocks are unused free memory: the balloon inflates out of them without a shortage and before DONE.
fn inflates_out_of_hinted_blocks(vmm: Vmm) -> Result<()> {
    const BEYOND_FREE: u64 = 64 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let hint_round = guest.hint_all()?;
    // More than the page allocator has free.
    let by = (guest.mem_info()?.free() + BEYOND_FREE) / MIB * MIB;
    ensure!(by <= hint_round.bytes, "only {hint_round:?} for {by}");
    let since = Instant::now();
    guest.balloon_qmp()?.set_balloon(whole - by)?;
    guest
        .balloon_qmp()?
        .wait_balloon(whole - by, HANG_TIMEOUT)?;
    println!("{by} bytes in {:?} in {vmm:?}", since.elapsed());
    let counters = guest.counters()?;
    ensure!(counters.get("shortages")? == 0, "{counters:?}");
    let inflated = counters.get("hinted_pages_inflated")? * 4096;
    ensure!(inflated >= BEYOND_FREE, "{counters:?}");
    let log = guest.kernel_log()?;
    ensure!(
        !log.iter().any(|line| line.text.contains("puff")),
        "{log:?}"
    );

    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

#[test]
fn our_balloon_reaches_its_target_in_a_slow_migration_in_qemu() -> Result<()> {
    reaches_target_in_migration(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_drivers_balloon_reaches_its_target_in_a_slow_migration_in_qemu() -> Result<()> {
    reaches_target_in_migration(Vmm::Qemu, Driver::C)
}

/// A migration with a bandwidth of 8 MiB/s keeps the hinted blocks for long. The balloon reaches a target meanwhile that
/// takes more than the guest has free. Prints how long that takes.
fn reaches_target_in_migration(vmm: Vmm, driver: Driver) -> Result<()> {
    const BEYOND_FREE: u64 = 32 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .device_options(&["--discard-hinted"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let parameters =
        json!({ "max-bandwidth": 8 * MIB, "downtime-limit": 0, "max-rounds": 100_000 });
    guest.daemon()?.qmp().migrate_set_parameters(parameters)?;
    let scratch = Scratch::new()?;
    let destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
    // The migration must not end before the target is reached.
    let proxy = FaultProxy::start(
        scratch.path("wire"),
        &destination.socket(),
        4 * MIB,
        ProxyFault::Slow,
    )?;
    guest.start_migration(&uri(proxy.socket()))?;
    guest.daemon()?.qmp().wait_migration(
        "some bytes sent",
        |now| now.status == MigrationStatus::Active && now.ram.transferred > MIB,
        HANG_TIMEOUT,
    )?;
    let free = guest.mem_info()?.free();
    let by = match driver {
        Driver::Ours => free + BEYOND_FREE,
        // The C driver takes hinted blocks back only when the guest runs out of memory.
        Driver::C => free / 2,
    } / MIB
        * MIB;
    let since = Instant::now();
    guest.balloon_qmp()?.set_balloon(whole - by)?;
    guest
        .balloon_qmp()?
        .wait_balloon(whole - by, HANG_TIMEOUT)?;
    println!(
        "{driver:?} in {vmm:?}: {by} bytes of {free} free in {:?}",
        since.elapsed()
    );
    let status = guest.daemon()?.qmp().query_migrate()?;
    ensure!(status.status == MigrationStatus::Active, "{status:?}");
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        ensure!(counters.get("shortages")? == 0, "{counters:?}");
        ensure!(counters.get("hinted_pages_inflated")? > 0, "{counters:?}");
    }
    guest.daemon()?.qmp().migrate_cancel()?;
    guest.daemon()?.qmp().wait_migration_end()?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.check_memory(before)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

#[test]
fn our_balloon_comes_back_from_a_target_out_of_reach_in_user_mode_linux() -> Result<()> {
    balloon_comes_back(Vmm::Uml, Driver::Ours)
}

#[test]
fn our_balloon_comes_back_from_a_target_out_of_reach_in_qemu() -> Result<()> {
    balloon_comes_back(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_drivers_balloon_comes_back_from_a_target_out_of_reach_in_qemu() -> Result<()> {
    balloon_comes_back(Vmm::Qemu, Driver::C)
}

/// When the host withdraws a target that is out of reach, the guest gets all of its memory back. Prints how long that
/// takes. `VIRTIO_BALLOON_RS_TIMES` sets the number of attempts.
fn balloon_comes_back(vmm: Vmm, driver: Driver) -> Result<()> {
    const TIMES: u32 = 4;
    const OUT_OF_REACH: u64 = 8 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let times = std::env::var("VIRTIO_BALLOON_RS_TIMES").ok();
    let times = times.map_or(Ok(vmm.repeats(TIMES)), |times| times.parse())?;
    let mut longest = Duration::ZERO;
    for _ in 0..times {
        if driver == Driver::Ours {
            let before = guest.counters()?.get("shortages")?;
            guest.balloon_qmp()?.set_balloon(OUT_OF_REACH)?;
            guest.wait_counter("shortages", before + 1, HANG_TIMEOUT)?;
        } else {
            guest.kernel_log()?;
            guest.balloon_qmp()?.set_balloon(OUT_OF_REACH)?;
            guest.wait_kernel_log("Out of puff", HANG_TIMEOUT)?;
        }
        let since = Instant::now();
        guest.balloon_qmp()?.set_balloon(whole)?;
        guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
        longest = longest.max(since.elapsed());
    }
    println!("{driver:?} in {vmm:?}: back within {longest:?}, {times} times");
    guest.check_memory(before)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}
