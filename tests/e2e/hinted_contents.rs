// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the contents of hinted pages (R17 in docs/rules.md): what a hint changes, and what the guest finds afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, FreePages, Run, Verify};
use harness::guest::{Builder, Driver, Guest};
use harness::host::guest_memory_file;
use harness::pattern;
use harness::ranges::{PhysicalRange, RangeSet};
use harness::vmm::Vmm;
use harness::MIB;

#[test]
fn r17_a_hint_takes_no_page_away() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) =
            Builder::new(&artifacts, Vmm::Uml).boot_filled(16 * MIB, driver)?;
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
