// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that loading and unloading the driver many times leaks no memory.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::ReadFile;
use harness::guest::{Builder, Device, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn two_hundred_load_cycles_leak_nothing_in_user_mode_linux() -> Result<()> {
    load_cycles(Vmm::Uml, 200)
}

#[test]
fn a_few_load_cycles_leak_nothing_in_qemu() -> Result<()> {
    load_cycles(Vmm::Qemu, 8)
}

/// Memory that load cycles could leak, in bytes.
#[derive(Debug)]
struct MemoryFootprint {
    /// Memory that the kernel has in use.
    used: u64,
    slab: u64,
    unreclaimable: u64,
    vmalloc: u64,
}

fn in_use(guest: &mut Guest) -> Result<MemoryFootprint> {
    let used = guest.settled_memory_usage()?.used;
    let memory = guest.mem_info()?;
    Ok(MemoryFootprint {
        used,
        slab: memory.field("Slab"),
        unreclaimable: memory.field("SUnreclaim"),
        vmalloc: vmalloc(guest)?,
    })
}

/// Returns the bytes of the kernel's virtual mappings, which include those of modules.
fn vmalloc(guest: &mut Guest) -> Result<u64> {
    let text = guest.call(ReadFile {
        path: "/proc/vmallocinfo".into(),
    })?;
    let bytes = text.lines().map(|line| {
        let words = line.split_whitespace().nth(1);
        words
            .and_then(|word| word.parse::<u64>().ok())
            .unwrap_or_default()
    });
    Ok(bytes.sum())
}

/// Loads the driver, inflates, hints, deflates and unloads it, `times` times.
fn load_cycles(vmm: Vmm, times: u32) -> Result<()> {
    /// The number of first cycles, which fill caches that the kernel keeps.
    const FIRST: u32 = 4;
    let times = vmm.repeats(times);
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::with_all_features(&artifacts, vmm, Device::Ours)
        .memory(256 * MIB)
        .boot()?;
    guest.set_short_reporting_delay()?;
    let then = Instant::now();
    let mut first = None;
    for time in 0..times {
        guest.load(Driver::Ours)?;
        let balloon = guest.balloon_qmp()?;
        let whole = balloon.balloon_actual()?;
        balloon.set_balloon(whole - 16 * MIB)?;
        balloon.wait_balloon(whole - 16 * MIB, HANG_TIMEOUT)?;
        guest.hint_all()?;
        let balloon = guest.balloon_qmp()?;
        balloon.set_balloon(whole)?;
        balloon.wait_balloon(whole, HANG_TIMEOUT)?;
        // Every other cycle unloads the driver with hinted blocks.
        if time % 2 == 0 {
            balloon.hint_done()?;
        }
        guest
            .unload(Driver::Ours)
            .with_context(|| format!("life {time}"))?;
        if time + 1 == FIRST {
            first = Some(in_use(&mut guest)?);
        }
    }
    let took = then.elapsed();
    let first = first.context("too few lives")?;
    println!("{vmm:?}: {times} lives in {took:?}\nafter {FIRST}: {first:?}");
    // The kernel may free memory of the last cycle a little later.
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        let last = in_use(&mut guest)?;
        match has_not_grown(vmm, u64::from(times - FIRST), &first, &last) {
            Ok(()) => {
                println!("after all: {last:?}");
                break;
            }
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(100)),
        }
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

/// Fails if memory use has grown over `load_cycles` cycles.
fn has_not_grown(
    vmm: Vmm,
    load_cycles: u64,
    first: &MemoryFootprint,
    last: &MemoryFootprint,
) -> Result<()> {
    ensure!(
        last.used <= first.used + MIB,
        "the kernel has {last:?} in use, and had {first:?}"
    );
    for (what, before, after) in [
        ("slab", first.slab, last.slab),
        (
            "unreclaimable slab",
            first.unreclaimable,
            last.unreclaimable,
        ),
        ("vmalloc", first.vmalloc, last.vmalloc),
    ] {
        // A leak of one page per cycle exceeds the limit. The stock kernel allocates memory for module code in units of
        // 2 MiB.
        let least = if (vmm, what) == (Vmm::Qemu, "vmalloc") {
            3 * MIB
        } else {
            MIB / 4
        };
        let allowed = (load_cycles * 4096 / 2).max(least);
        ensure!(
            after <= before + allowed,
            "{what} has grown from {before} to {after}"
        );
    }
    Ok(())
}
