// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the rules of hinting (docs/rules.md) that need driver, device and VMM together.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, FreePages, Run, Verify};
use harness::check::MemoryUsage;
use harness::guest::{Builder, Driver, Guest};
use harness::host::{activity, guest_memory_file};
use harness::pattern;
use harness::ranges::{PhysicalRange, RangeSet};
use harness::vmm::Vmm;
use harness::MIB;

/// Boots a user-mode Linux guest, fills and frees its memory, and loads `driver`. Returns the guest and its memory
/// usage.
fn uml_guest(artifacts: &Artifacts, driver: Driver) -> Result<(Guest, MemoryUsage)> {
    Builder::new(artifacts, Vmm::Uml).boot_filled(16 * MIB, driver)
}

#[test]
fn r1_the_daemon_sleeps_while_a_hint_round_waits_for_the_guest() -> Result<()> {
    /// Limits for an idle second: voluntary context switches and processor ticks. A polling loop exceeds them, even if
    /// it sleeps for a millisecond at a time.
    const SLEEPS: u64 = 5;
    const TICKS: u64 = 3;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    guest.load(Driver::Ours)?;
    // The guest is stopped: the hint round starts and gets no block for a second.
    guest.vmm().stop()?;
    guest.daemon()?.qmp().hint_start()?;
    check_idle(&mut guest, SLEEPS, TICKS).context("while the guest is silent")?;
    guest.vmm().signal(harness::process::Signal::SIGCONT)?;
    // The guest resumes, finishes the hint round, and keeps the hinted blocks.
    let hint_round = guest.daemon()?.qmp().wait_hint_status("finished")?;
    ensure!(
        hint_round.blocks > 0,
        "the guest hinted nothing when it went on: {hint_round:?}"
    );
    check_idle(&mut guest, SLEEPS, TICKS).context("while the guest holds its blocks")?;
    guest.power_off()?;
    Ok(())
}

fn check_idle(guest: &mut Guest, voluntary_switches: u64, ticks: u64) -> Result<()> {
    let notifications = guest.daemon()?.notifications()?;
    let process = guest.daemon()?.process().id();
    sleep(Duration::from_millis(200));
    let (before, since) = (activity(process)?, Instant::now());
    sleep(Duration::from_secs(1));
    let after = activity(process)?;
    // On a busy host the sleep may last longer.
    let seconds = since.elapsed().as_secs() + 1;
    let (voluntary_switches, ticks) = (voluntary_switches * seconds, ticks * seconds);
    let notified = guest.daemon()?.notifications()? - notifications;
    let (slept, ran) = (
        after.voluntary_switches - before.voluntary_switches,
        after.ticks - before.ticks,
    );
    ensure!(
        slept <= voluntary_switches,
        "the daemon woke up {slept} times in {seconds} seconds, with {notified} notifications"
    );
    ensure!(
        ran <= ticks,
        "the daemon ran for {ran} ticks in {seconds} seconds"
    );
    Ok(())
}

#[test]
fn r2_a_hint_round_that_follows_a_cancelled_one_at_once_is_complete() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) = uml_guest(&artifacts, driver)?;
        for pause_us in [0, 0, 50, 200, 1000, 5000] {
            let qmp = guest.daemon()?.qmp();
            let first = qmp.hint_start()?;
            sleep(Duration::from_micros(pause_us));
            qmp.hint_stop()?;
            let second = qmp.hint_start()?;
            ensure!(first != second, "the id {first:#x} was used twice");
            let hint_round = qmp.wait_hint_status("finished")?;
            ensure!(
                hint_round.id == Some(second),
                "the round is {:x?}, not {second:#x}",
                hint_round.id
            );
            let hinted = qmp.hinted_ranges()?.bytes();
            // The C driver keeps the blocks of the cancelled hint round and does not hint them again.
            let enough = if driver == Driver::Ours {
                before.free / 10 * 9
            } else {
                0
            };
            ensure!(
                hinted >= enough,
                "{driver:?}: {hinted} of {before:?} bytes {pause_us} us after a cancelled round"
            );
            qmp.hint_done()?;
            guest.check_memory(before)?;
        }
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

#[test]
fn r6_after_a_sync_the_guest_hints_again_under_a_new_id() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) = uml_guest(&artifacts, Driver::Ours)?;
    let qmp = guest.daemon()?.qmp();
    let first = qmp.hint_start()?;
    qmp.wait_hint_status("finished")?;
    qmp.hint_sync()?;
    let again = qmp.wait_hint_status("finished")?;
    ensure!(again.id != Some(first), "the id {first:#x} outlived a sync");
    ensure!(
        qmp.hinted_ranges()?.bytes() >= before.free / 10 * 9,
        "the hints were lost: {again:?}"
    );
    qmp.hint_done()?;
    guest.check_and_power_off(before)?;
    Ok(())
}

#[test]
fn r16_pages_return_when_a_hint_round_is_done_and_when_it_is_cancelled() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) = uml_guest(&artifacts, driver)?;
        guest.hint_all()?;
        check_hinted(&mut guest, before.free)?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before).context("after done")?;
        guest.hint_all()?;
        guest.daemon()?.qmp().hint_stop()?;
        check_hinted(&mut guest, before.free).context("a stop alone gives nothing back")?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before).context("after stop and done")?;
        for _ in 0..20 {
            let qmp = guest.daemon()?.qmp();
            qmp.hint_start()?;
            qmp.hint_stop()?;
            qmp.hint_done()?;
        }
        guest
            .check_and_power_off(before)
            .context("after rounds that were cancelled at once")?;
    }
    Ok(())
}

fn check_hinted(guest: &mut Guest, free: u64) -> Result<()> {
    let now = guest.mem_info()?.free();
    ensure!(
        now < free / 2,
        "the guest has {now} of {free} bytes free while it should hold what it hinted"
    );
    Ok(())
}

#[test]
fn r16_pages_return_when_the_module_is_removed() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
        guest.fill_and_free(16 * MIB, 8)?;
        let before = guest.settled_memory_usage()?;
        guest.load(driver)?;
        guest.hint_all()?;
        check_hinted(&mut guest, before.free)?;
        guest.unload(driver)?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

#[test]
fn r16_pages_return_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) = uml_guest(&artifacts, Driver::Ours)?;
    guest.hint_all()?;
    check_hinted(&mut guest, before.free)?;
    guest.daemon()?.process().kill()?;
    // User-mode Linux detects the end of the daemon and removes the device.
    guest.check_memory(before)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r16_a_guest_in_qemu_can_use_its_pages_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    guest.hint_all()?;
    check_hinted(&mut guest, before.free)?;
    guest.daemon()?.process().kill()?;
    // QEMU does not tell the guest. The shrinker reclaims hinted blocks for processes that need memory.
    let filled = guest.call(Fill {
        bytes: before.free - 64 * MIB,
        keep_every: 1,
        seed: 9,
    })?;
    let found = guest.call(Verify {
        workload: filled.workload,
    })?;
    ensure!(found.wrong == 0, "{found:?}");
    guest.call(Free {
        workload: filled.workload,
    })?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r17_a_hint_takes_no_page_away() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) = uml_guest(&artifacts, driver)?;
        let on_host = guest.host_memory_in_use()?;
        let hinted = guest.hint_all()?.bytes;
        let after = guest.host_memory_in_use()?;
        ensure!(
            after + MIB >= on_host,
            "{driver:?}: {hinted} bytes were hinted, and {} are gone",
            on_host - after
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

/// With `--discard-hinted` the device discards hinted pages only if the driver has promised to keep a hinted block
/// until the device has used its buffer. Our driver promises that, the C driver does not. The guest works correctly
/// afterwards.
#[test]
fn r17_a_hint_gives_memory_back_only_where_the_driver_keeps_its_blocks() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) = Builder::new(&artifacts, Vmm::Uml)
            .device_options(&["--discard-hinted"])
            .boot_filled(16 * MIB, driver)?;
        let on_host = guest.host_memory_in_use()?;
        let hinted = guest.hint_all()?.bytes;
        let after = guest.host_memory_in_use()?;
        let gone = on_host.saturating_sub(after);
        let enough = match driver {
            // The guest has used nearly all of its memory, so the hinted pages occupied host memory.
            Driver::Ours => gone >= hinted / 10 * 9,
            Driver::C => gone <= MIB,
        };
        ensure!(
            enough,
            "{driver:?}: {hinted} bytes were hinted, and {gone} are gone"
        );
        guest.daemon()?.qmp().hint_done()?;
        let filled = guest.call(Fill {
            bytes: before.free / 2,
            keep_every: 1,
            seed: 17,
        })?;
        let found = guest.call(Verify {
            workload: filled.workload,
        })?;
        ensure!(found.wrong == 0, "{driver:?}: {found:?}");
        guest.call(Free {
            workload: filled.workload,
        })?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

/// Pages of a guest by their contents, as the host sees them.
struct PageContents {
    /// Pages that hold the pattern of a process that has ended.
    old: RangeSet,
    zero: RangeSet,
}

/// Reads `ranges` of the guest's memory on the host and returns the pages by their contents. The offset of a page in
/// the memory file of user-mode Linux is its guest physical address.
fn read_pages(guest: &mut Guest, ranges: &RangeSet) -> Result<PageContents> {
    const PAGE: usize = 4096;
    let path = guest_memory_file(guest.vmm().id())?;
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut bytes = [0; PAGE];
    let (mut old, mut zero) = (Vec::new(), Vec::new());
    for range in ranges.ranges() {
        for start in (range.start..range.end()).step_by(PAGE) {
            file.read_exact_at(&mut bytes, start)
                .context("cannot read the guest's memory")?;
            let page = PhysicalRange {
                start,
                length: PAGE as u64,
            };
            if pattern::is_pattern(&bytes) {
                old.push(page);
            } else if bytes.iter().all(|byte| *byte == 0) {
                zero.push(page);
            }
        }
    }
    Ok(PageContents {
        old: old.into(),
        zero: zero.into(),
    })
}

/// Hinted pages that are reclaimed before DONE are cleared first. Pages that the driver keeps do not change, because a
/// hint does not modify memory. The driver clears a few pages ahead of the guest's needs.
#[test]
fn r17_what_the_guest_reclaims_before_done_is_initialised_and_the_rest_is_as_it_was() -> Result<()>
{
    const TAKEN: u64 = 64 * MIB;
    /// Memory that the guest may use meanwhile.
    const OWN_USE: u64 = MIB;
    /// The most memory that the driver clears ahead of the guest's needs.
    const CLEARED_AHEAD: u64 = 4 * MIB;
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, Vmm::Uml).memory(192 * MIB);
    let (mut guest, before) = builder.boot_filled(16 * MIB, Driver::Ours)?;
    guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?;
    let before_reclaim = read_pages(&mut guest, &hinted)?;
    ensure!(
        before_reclaim.old.bytes() >= hinted.bytes() / 10 * 8,
        "of {} hinted bytes only {} have been in use",
        hinted.bytes(),
        before_reclaim.old.bytes()
    );

    // The arguments of `scan`: no memory cgroup, node 0, the number of pages.
    let script = format!(
        "for file in /sys/kernel/debug/shrinker/virtio-balloon-rs-*/scan; do echo 0 0 {} > $file; done",
        TAKEN / 4096
    );
    let argv = ["sh", "-c", &script].map(str::to_owned).to_vec();
    let shrunk = guest.call(Run { argv })?;
    ensure!(shrunk.status == Some(0), "{shrunk:?}");
    let reclaimed = guest.counters()?.get("returned_pages")? * 4096;
    let back = guest.call(FreePages {})?.intersection(&hinted);
    let after = read_pages(&mut guest, &hinted)?;
    println!(
        "hinted {}, returned {reclaimed}, found free {}, with the old pattern {} then {}, zero {}",
        hinted.bytes(),
        back.bytes(),
        before_reclaim.old.bytes(),
        after.old.bytes(),
        after.zero.bytes()
    );
    ensure!(
        reclaimed >= TAKEN && back.bytes() + OWN_USE >= TAKEN,
        "{reclaimed} bytes were given back, {} of them are free",
        back.bytes()
    );
    let stale = after.old.intersection(&back);
    ensure!(
        stale.ranges().is_empty(),
        "given back with their old content: {:x?}",
        stale.ranges()
    );
    // The driver clears some pages ahead of the guest's needs.
    let changed = before_reclaim.old.difference(&after.old).difference(&back);
    let ahead = changed.intersection(&after.zero);
    let changed = changed.difference(&ahead);
    ensure!(
        changed.bytes() <= OWN_USE && ahead.bytes() <= CLEARED_AHEAD + OWN_USE,
        "held, and changed: {:x?}; cleared: {:x?}",
        changed.ranges(),
        ahead.ranges()
    );

    // After DONE the driver frees the other blocks unchanged.
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory_uncompacted(before)?;
    let done = read_pages(&mut guest, &hinted)?;
    let changed = after.old.difference(&done.old);
    // The driver may clear pages ahead after `after` was read.
    let ahead = changed.intersection(&done.zero);
    let changed = changed.difference(&ahead);
    ensure!(
        changed.bytes() <= OWN_USE && ahead.bytes() <= CLEARED_AHEAD + OWN_USE,
        "released after done, and changed: {:x?}; cleared: {:x?}",
        changed.ranges(),
        ahead.ranges()
    );
    guest.check_and_power_off(before)
}

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
