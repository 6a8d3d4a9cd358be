// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests memory of the guest that goes offline during a hint round.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{PageUse, WriteFile};
use harness::guest::{Builder, Driver};
use harness::ranges::{PhysicalRange, RangeSet};
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::MIB;

/// Memory that can be unplugged is hinted, and its memory blocks go offline during the hint round.
#[test]
fn memory_with_hinted_blocks_goes_offline_in_qemu() -> Result<()> {
    const PLUGGED: u64 = 512 * MIB;
    const FOLDER: &str = "/sys/devices/system/memory";
    let artifacts = Artifacts::load()?;
    let backend = format!("memory-backend-memfd,id=dimm,size={PLUGGED},share=on");
    let arguments = ["-object", &backend, "-device", "pc-dimm,memdev=dimm"];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .kernel_arguments("memhp_default_state=online_kernel")
        .hardware(Hardware {
            hotplug_memory: 1024 * MIB,
            arguments: arguments.map(str::to_owned).to_vec(),
            ..Hardware::default()
        })
        .boot()?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    let hint_round = guest.hint_all()?;
    println!("{} hinted of {before:?}", hint_round.bytes);
    let list = format!("cd {FOLDER} && grep -l Normal */valid_zones && cat block_size_bytes");
    let listed = guest.shell(&list)?;
    let mut memory_blocks: Vec<&str> = listed.split_whitespace().collect();
    let size = memory_blocks
        .pop()
        .context("no size of a block of memory")?;
    let size = u64::from_str_radix(size, 16)?;
    ensure!(
        memory_blocks.len() as u64 == PLUGGED / size,
        "{memory_blocks:?}"
    );
    let pages = guest.call(PageUse {})?;
    let mut expected = 0;
    for memory_block in memory_blocks {
        let memory_block = memory_block.trim_end_matches("/valid_zones");
        let number: u64 = memory_block.trim_start_matches("memory").parse()?;
        let range = PhysicalRange {
            start: number * size,
            length: size,
        };
        let range = RangeSet::from(vec![range]);
        let hinted = pages.ballooned.intersection(&range).bytes();
        let free = pages.free.intersection(&range).bytes();
        println!("{memory_block}: {hinted} of {size} bytes are hinted, {free} free");
        // A memory block with other kernel allocations in it cannot go offline.
        if hinted + free < size {
            continue;
        }
        expected += u64::from(hinted > size / 2);
        for text in ["offline", "online_kernel"] {
            let path = format!("{FOLDER}/{memory_block}/state");
            let text = text.to_owned();
            guest
                .call(WriteFile { path, text })
                .with_context(|| format!("{memory_block} has hinted and free pages only"))?;
        }
    }
    ensure!(
        expected > 0,
        "no block of memory had hinted and free pages only"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_and_power_off(before)
}
