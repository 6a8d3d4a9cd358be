// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hot-plug and hot-unplug of memory.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{FreePages, PageUse, ReadFile, WriteFile};
use guest_agent::ranges::{PhysicalRange, RangeSet};
use serde_json::{json, Value};

use super::{boot, builder, TIMEOUT};
use crate::artifacts::Artifacts;
use crate::destination::{uri, Destination};
use crate::guest::{Driver, Guest};
use crate::matrix::Cell;
use crate::migration::MigrationStatus;
use crate::proxy::{FaultProxy, ProxyFault};
use crate::scratch::Scratch;
use crate::MIB;

/// The state of the driver when a DIMM is unplugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DimmUnplug {
    /// The balloon is at its target, and has pages in the DIMM.
    Inflated,
    /// The balloon is deflating.
    Deflating,
    /// The driver keeps its hinted blocks.
    DuringHintRound,
    /// The guest is being migrated.
    DuringMigration,
    /// The driver keeps hinted blocks in the DIMM, and a part of the DIMM with such blocks is taken offline.
    HintedOffline,
}

const NAME: &str = "dimm0";
const SIZE: u64 = 256 * MIB;

pub fn dimm(artifacts: &Artifacts, cell: &Cell, dimm: DimmUnplug) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let (mut guest, mut before) = boot(builder(artifacts, cell))?;
    guest.load(driver)?;
    match dimm {
        DimmUnplug::Inflated => inflated(&mut guest, driver, before.free)?,
        DimmUnplug::Deflating => deflating(&mut guest, driver)?,
        DimmUnplug::DuringHintRound => during_hint_round(&mut guest)?,
        DimmUnplug::DuringMigration => during_migration(&mut guest, artifacts)?,
        DimmUnplug::HintedOffline => before.used += hinted_offline(&mut guest)?,
    }
    guest.check_memory(before)?;
    guest.exercise_fully()?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

/// Page migration moves the balloon's pages out of the DIMM. The balloon keeps its size. Prints the time.
fn inflated(guest: &mut Guest, driver: Driver, free: u64) -> Result<()> {
    let more = plug(guest, SIZE)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let half = (free + SIZE) / 2 / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(whole - half)?;
    guest.balloon_qmp()?.wait_balloon(whole - half, TIMEOUT)?;
    let there = guest.call(PageUse {})?.ballooned.intersection(&more);
    ensure!(there.bytes() > 0, "no page of the balloon is in the DIMM");
    let migrated = guest.vmstat_counter("balloon_migrate")?;
    let since = Instant::now();
    unplug(guest)?;
    println!(
        "{driver:?}: unplugged after {:?}, {} pages migrated of {} in the DIMM",
        since.elapsed(),
        guest.vmstat_counter("balloon_migrate")? - migrated,
        there.bytes() / 4096
    );
    let ballooned = guest.call(PageUse {})?.ballooned;
    ensure!(
        ballooned.intersection(&more).bytes() == 0 && ballooned.bytes() == half,
        "{} bytes are in the balloon, and not {half}",
        ballooned.bytes()
    );
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        ensure!(
            counters.get("balloon_pages")? * 4096 == half,
            "{counters:?}"
        );
        ensure!(counters.get("shortages")? == 0, "{counters:?}");
    }
    // The balloon has the same pages, and the machine is smaller.
    let whole = guest.balloon_qmp()?.balloon_actual()? + half;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, TIMEOUT)
}

/// The kernel migrates balloon pages out of the DIMM while the driver takes pages out of the balloon. Neither blocks
/// the other. Prints the times of both.
fn deflating(guest: &mut Guest, driver: Driver) -> Result<()> {
    const LEFT: u64 = 96 * MIB;
    let empty = guest.balloon_qmp()?.balloon_actual()?;
    plug(guest, 2 * SIZE)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let before = guest.settled_memory_usage()?;
    let full = whole - (before.free - LEFT) / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(full)?;
    guest.balloon_qmp()?.wait_balloon(full, TIMEOUT)?;
    guest.kernel_log()?;
    let migrated = guest.vmstat_counter("balloon_migrate")?;
    let since = Instant::now();
    guest.balloon_qmp()?.set_balloon(whole)?;
    unplug(guest)?;
    let unplugged = since.elapsed();
    let migrated = guest.vmstat_counter("balloon_migrate")? - migrated;
    let deadline = Instant::now() + TIMEOUT;
    while guest.vmstat_counter("nr_balloon_pages")? > 0 {
        ensure!(Instant::now() < deadline, "pages stay in the balloon");
        sleep(Duration::from_millis(10));
    }
    // The driver reports the size later. Without the DIMM it equals the initial size.
    guest.balloon_qmp()?.wait_balloon(empty, TIMEOUT)?;
    println!(
        "{driver:?}: unplugged after {unplugged:?}, {migrated} pages migrated, deflated after {:?}",
        since.elapsed()
    );
    let log = guest.kernel_log()?;
    ensure!(
        !log.iter().any(|line| line.text.contains("puff")),
        "{log:?}"
    );
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        ensure!(counters.get("shortages")? == 0, "{counters:?}");
    }
    Ok(())
}

/// A DIMM is plugged and unplugged during a hint round. The guest gets its hinted blocks back.
fn during_hint_round(guest: &mut Guest) -> Result<()> {
    let before = guest.settled_memory_usage()?;
    for hinted_first in [true, false] {
        if hinted_first {
            guest.hint_all()?;
        }
        plug(guest, SIZE)?;
        if !hinted_first {
            guest.hint_all()?;
        }
        let hint_round = guest.daemon()?.qmp().hint_status()?;
        ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
        unplug(guest)?;
        guest.daemon()?.qmp().hint_done()?;
        guest
            .check_memory(before)
            .with_context(|| format!("{hint_round:?}"))?;
    }
    Ok(())
}

/// A DIMM is plugged during one migration and unplugged during another. Each migration fails with the reason, and the
/// guest runs and gets its hinted blocks back.
fn during_migration(guest: &mut Guest, artifacts: &Artifacts) -> Result<()> {
    let slowly = json!({ "max-bandwidth": MIB, "downtime-limit": 0, "max-rounds": 100_000 });
    guest.daemon()?.qmp().migrate_set_parameters(slowly)?;
    let scratch = Scratch::new()?;
    for ram_blocks in [1, 2] {
        let memory = guest.memory() + SIZE;
        let destination =
            Destination::start_with_ram_blocks(&artifacts.balloonctl, memory, ram_blocks)?;
        // Slow: the migration must not end before the DIMM is plugged or unplugged.
        let proxy = FaultProxy::start(
            scratch.path(&format!("wire-{ram_blocks}")),
            &destination.socket(),
            4 * MIB,
            ProxyFault::Slow,
        )?;
        guest.start_migration(&uri(proxy.socket()))?;
        guest.daemon()?.qmp().wait_migration(
            "some bytes sent",
            |now| now.status == MigrationStatus::Active && now.ram.transferred > MIB,
            TIMEOUT,
        )?;
        if ram_blocks == 1 {
            plug(guest, SIZE)?;
        } else {
            unplug(guest)?;
        }
        let status = guest.daemon()?.qmp().wait_migration_end()?;
        let why = status.error_desc.clone().unwrap_or_default();
        ensure!(
            status.status == MigrationStatus::Failed && why.contains("layout of guest memory"),
            "it was to fail, and to say that the guest's memory has changed: {status:?}"
        );
        ensure!(!guest.is_paused()?, "the guest is paused: {why}");
    }
    Ok(())
}

/// A part of a DIMM that was completely free before a hint round is taken offline during the hint round.
///
/// The DIMM stays, because the kernel uses its other parts. Returns the size of its page structures, in bytes.
fn hinted_offline(guest: &mut Guest) -> Result<u64> {
    let before = guest.settled_memory_usage()?.used;
    let more = plug(guest, 2 * SIZE)?;
    let structures = guest.settled_memory_usage()?.used.saturating_sub(before);
    let unused = guest.call(FreePages {})?;
    let whole = memory_blocks(guest)?.into_iter().find(|(_, memory_block)| {
        let memory_block: RangeSet = [*memory_block].into_iter().collect();
        memory_block.difference(&more).bytes() == 0 && memory_block.difference(&unused).bytes() == 0
    });
    let (name, memory_block) = whole.context("the guest uses all parts of a DIMM that is new")?;
    guest.hint_all()?;
    guest
        .call(WriteFile {
            path: format!("{MEMORY_BLOCKS_DIR}/{name}/state"),
            text: "offline".to_owned(),
        })
        .with_context(|| format!("{name} ({memory_block:x?}) in mid-round"))?;
    guest.daemon()?.qmp().hint_done()?;
    guest.call(WriteFile {
        path: format!("{MEMORY_BLOCKS_DIR}/{name}/state"),
        text: "online_kernel".to_owned(),
    })?;
    Ok(structures)
}

/// virtio-mem grows while the driver is loaded, and the guest is exercised. virtio-mem shrinks while half of the free
/// memory is in the balloon.
pub fn virtio_mem(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder(artifacts, cell))?;
    guest.load(driver)?;
    let total = guest.mem_info()?.total();
    guest.load_module("virtio_mem")?;
    wait_virtio_mem(&mut guest, SIZE)?;
    wait_total(&mut guest, total + SIZE)?;
    guest.exercise_fully()?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let half = (before.free + SIZE) / 2 / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(whole - half)?;
    guest.balloon_qmp()?.wait_balloon(whole - half, TIMEOUT)?;
    let path = "/machine/peripheral/vmem0";
    let set = json!({ "path": path, "property": "requested-size", "value": 0 });
    guest.monitor()?.command("qom-set", set)?;
    wait_virtio_mem(&mut guest, 0)?;
    let ballooned = guest.call(PageUse {})?.ballooned.bytes();
    ensure!(
        ballooned == half,
        "{ballooned} bytes are in the balloon, and not {half}"
    );
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, TIMEOUT)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

fn wait_virtio_mem(guest: &mut Guest, size: u64) -> Result<()> {
    let get = json!({ "path": "/machine/peripheral/vmem0", "property": "size" });
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = guest.monitor()?.command("qom-get", get.clone())?;
        if now.as_u64() == Some(size) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "virtio-mem has {now} bytes, and not {size}, after {TIMEOUT:?}"
        );
        sleep(Duration::from_millis(50));
    }
}

/// Waits until the guest manages `bytes` bytes, within 16 MiB. The guest may need a part of plugged memory for its own
/// management.
fn wait_total(guest: &mut Guest, bytes: u64) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = guest.mem_info()?.total();
        if now.abs_diff(bytes) < 16 * MIB {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the guest manages {now} bytes, and not {bytes}, after {TIMEOUT:?}"
        );
        sleep(Duration::from_millis(50));
    }
}

/// Plugs a DIMM, waits until all of it is online, and returns its guest physical ranges.
fn plug(guest: &mut Guest, size: u64) -> Result<RangeSet> {
    let before = guest.mem_info()?.total();
    let old: BTreeSet<String> = memory_blocks(guest)?
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let monitor = guest.monitor()?;
    let backend = json!({
        "qom-type": "memory-backend-memfd", "id": format!("{NAME}-memory"), "size": size, "share": true,
    });
    monitor.command("object-add", backend)?;
    let memory = format!("{NAME}-memory");
    let device = json!({ "driver": "pc-dimm", "id": NAME, "memdev": memory });
    monitor.command("device_add", device)?;
    wait_total(guest, before + size).context("a DIMM was plugged in")?;
    let new = memory_blocks(guest)?
        .into_iter()
        .filter(|(name, _)| !old.contains(name));
    let new: RangeSet = new.map(|(_, memory_block)| memory_block).collect();
    ensure!(new.bytes() == size, "the guest has {new:x?} of a DIMM");
    Ok(new)
}

/// Unplugs the DIMM.
fn unplug(guest: &mut Guest) -> Result<()> {
    let monitor = guest.monitor()?;
    monitor.clear_events();
    monitor.command("device_del", json!({ "id": NAME }))?;
    let of_dimm = |data: &Value| data.get("device").and_then(Value::as_str) == Some(NAME);
    let event = monitor.wait_event(
        |event| {
            let names = [
                "DEVICE_DELETED",
                "DEVICE_UNPLUG_GUEST_ERROR",
                "MEM_UNPLUG_ERROR",
            ];
            names.contains(&event.name.as_str()) && of_dimm(&event.data)
        },
        TIMEOUT,
    )?;
    let event = event.with_context(|| format!("the guest kept the DIMM for {TIMEOUT:?}"))?;
    if event.name != "DEVICE_DELETED" {
        bail!("the guest does not let the DIMM go: {event:?}");
    }
    monitor
        .command("object-del", json!({ "id": format!("{NAME}-memory") }))
        .map(drop)
}

const MEMORY_BLOCKS_DIR: &str = "/sys/devices/system/memory";

/// Returns the guest's memory blocks, which can be taken offline one by one, with their names.
fn memory_blocks(guest: &mut Guest) -> Result<Vec<(String, PhysicalRange)>> {
    let path = format!("{MEMORY_BLOCKS_DIR}/block_size_bytes");
    let size = guest.call(ReadFile { path })?;
    let size = u64::from_str_radix(size.trim(), 16).context("a strange size")?;
    let names = guest.list_folder(MEMORY_BLOCKS_DIR)?;
    let memory_blocks = names.into_iter().filter_map(|name| {
        let number: u64 = name.strip_prefix("memory")?.parse().ok()?;
        let start = number * size;
        Some((
            name,
            PhysicalRange {
                start,
                length: size,
            },
        ))
    });
    Ok(memory_blocks.collect())
}
