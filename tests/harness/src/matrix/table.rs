// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rows of the matrix.

use super::scenarios::{DimmUnplug, Reset, Scenario};
use super::Pair::{CInQemu, Ours, OursInQemu, C};
use super::Row;
use crate::vmm::hardware::{Hardware, MemoryBackend};
use crate::MIB;

/// Returns all rows.
#[must_use]
pub fn rows() -> Vec<Row> {
    let mut rows = rings();
    rows.extend(kernels());
    rows.extend(zones());
    rows.extend(memory());
    rows.extend(machines());
    rows.extend(memory_hotplug());
    rows.extend(resets());
    rows
}

/// Returns the default hardware with one change.
fn hardware(change: impl FnOnce(&mut Hardware)) -> Hardware {
    let mut hardware = Hardware::default();
    change(&mut hardware);
    hardware
}

fn rings() -> Vec<Row> {
    const FOR_EVER: &str =
        "the C driver never ends a round: it needs two entries to hint a block, and tries for ever";
    const NO_PACKED: &str =
        "vhost-user-test-device offers what the daemon does, whose library has no packed rings";
    const NO_VECTORS: &str =
        "vhost-user-test-device-pci has no property `vectors`: see `pci=nomsi`";
    vec![
        Row::new("a ring of 1 entry")
            .properties(&["vq_size=1"])
            .with(&[Ours])
            .not_runnable(C, FOR_EVER),
        Row::new("rings of 2 entries")
            .properties(&["vq_size=2"])
            .by_default(Ours)
            .with(&[C]),
        Row::new("rings of 4 entries")
            .properties(&["vq_size=4"])
            .with(&[Ours, C]),
        Row::new("rings of 8 entries")
            .properties(&["vq_size=8"])
            .by_default(Ours)
            .with(&[C]),
        Row::new("rings of 16 entries")
            .properties(&["vq_size=16"])
            .with(&[Ours, C]),
        Row::new("rings of 64 entries")
            .properties(&["vq_size=64"])
            .with(&[Ours, C]),
        Row::new("rings of 128 entries").with(&[Ours, C, OursInQemu, CInQemu]),
        Row::new("rings of 256 entries")
            .properties(&["vq_size=256"])
            .with(&[Ours, C]),
        Row::new("rings of 1024 entries")
            .properties(&["vq_size=1024"])
            .by_default(Ours)
            .with(&[C]),
        Row::new("`packed=on`")
            .properties(&["packed=on"])
            .not_runnable(Ours, NO_PACKED)
            .not_runnable(C, NO_PACKED)
            .with(&[OursInQemu, CInQemu]),
        Row::new("`event_idx=off`")
            .properties(&["event_idx=off"])
            .with(&[Ours, C, OursInQemu, CInQemu]),
        Row::new("`vectors=0`")
            .properties(&["vectors=0"])
            .not_runnable(Ours, NO_VECTORS)
            .not_runnable(C, NO_VECTORS)
            .with(&[OursInQemu, CInQemu]),
        Row::new("`pci=nomsi`: one interrupt for all queues")
            .arguments("pci=nomsi")
            .by_default(Ours)
            .with(&[C]),
        Row::new(
            "`iommu_platform=on`, which QEMU refuses with our device, and drivers with QEMU's",
        )
        .properties(&["iommu_platform=on"])
        .scenario(Scenario::BehindIommu)
        .with(&[Ours, OursInQemu, CInQemu]),
    ]
}

fn kernels() -> Vec<Row> {
    const NO_RUST: &str = "our driver needs a kernel of series 7.2 or 7.3 with Rust";
    vec![
        Row::new("Debian 12's kernel, series 6.1")
            .series("6.1")
            .not_runnable(Ours, NO_RUST)
            .by_default(C),
        Row::new("Debian 13's kernel, series 6.12")
            .series("6.12")
            .not_runnable(Ours, NO_RUST)
            .by_default(C),
        Row::new("the kernel of series 7.2")
            .series("7.2")
            .with(&[Ours, C, OursInQemu]),
        Row::new("`init_on_alloc=0`")
            .arguments("init_on_alloc=0")
            .with(&[Ours, C]),
        Row::new("`init_on_alloc=1 init_on_free=1`")
            .arguments("init_on_alloc=1 init_on_free=1")
            .features(&[
                "stats",
                "free-page-hint",
                "free-page-reporting",
                "page-poison",
            ])
            .with(&[Ours, C]),
        Row::new("`init_on_alloc=0 init_on_free=1`")
            .arguments("init_on_alloc=0 init_on_free=1")
            .features(&[
                "stats",
                "free-page-hint",
                "free-page-reporting",
                "page-poison",
            ])
            .with(&[Ours, C]),
    ]
}

fn zones() -> Vec<Row> {
    vec![
        Row::new("`cma=128M`")
            .arguments("cma=128M")
            .by_default(Ours)
            .with(&[C]),
        Row::new("`hugetlb_cma=1G`, and its page taken with a balloon and in mid-round")
            .arguments("hugetlb_cma=1G nokaslr init_on_alloc=0")
            .memory(5 * 1024)
            .scenario(Scenario::GiganticPage)
            .with(&[Ours, C]),
        Row::new("`movablecore=512M` of 1 GiB")
            .memory(1024)
            .arguments("movablecore=512M")
            .by_default(Ours)
            .with(&[C]),
        Row::new("`kernelcore=256M` of 512 MiB")
            .arguments("kernelcore=256M")
            .with(&[Ours, C]),
        Row::new("two NUMA nodes, each with its memory backend")
            .hardware(hardware(|hardware| hardware.numa_nodes = 2))
            .by_default(Ours)
            .with(&[C]),
    ]
}

fn memory() -> Vec<Row> {
    const FOR_EVER: &str =
        "the C driver waits for ever for the answer to its first report of free pages, and cannot be removed";
    let backing = |memory| hardware(|hardware| hardware.memory = memory);
    vec![
        Row::new(
            "64 MiB of memory, in user-mode Linux: Debian's kernel does not start with so little",
        )
        .memory(64)
        .in_user_mode_linux()
        // There may be no free block of the order that the kernel reports.
        .features(&["stats", "free-page-hint"])
        .with(&[Ours, C]),
        Row::new("128 MiB of memory")
            .memory(128)
            .features(&["stats", "free-page-hint"])
            .with(&[Ours, C]),
        Row::new("5 GiB of memory, across the hole below 4 GiB")
            .memory(5 * 1024)
            .arguments("init_on_alloc=0")
            .by_default(Ours)
            .with(&[C]),
        Row::new("16 GiB of memory, sparse")
            .memory(16 * 1024)
            .arguments("init_on_alloc=0")
            .with(&[Ours, C]),
        Row::new("memory on hugetlbfs")
            .hardware(backing(MemoryBackend::HugePages))
            .scenario(Scenario::OnHugePages)
            .with(&[Ours, C]),
        Row::new("memory in a file on a disk")
            .scenario(Scenario::OnDisk)
            .with(&[Ours, C]),
        Row::new("memory that is preallocated")
            .hardware(backing(MemoryBackend::Preallocated))
            .with(&[Ours, C]),
        Row::new("memory that is locked (`mem-lock=on`)")
            .hardware(hardware(|hardware| hardware.mem_lock = true))
            .scenario(Scenario::Locked)
            .with(&[Ours, C]),
        Row::new("memory that is private (`share=off`), which QEMU does not share with a vhost-user device")
            .hardware(backing(MemoryBackend::Private))
            .scenario(Scenario::Private)
            .with(&[Ours, OursInQemu, CInQemu])
            .not_runnable(C, FOR_EVER),
    ]
}

fn machines() -> Vec<Row> {
    let with_vga = |machine| {
        hardware(|hardware| {
            hardware.machine = machine;
            hardware.default_devices = true;
            hardware.arguments = ["-vga", "std"].map(str::to_owned).to_vec();
        })
    };
    vec![
        Row::new("q35 with VGA and all that it has unasked")
            .hardware(with_vga(None))
            .with(&[Ours, C]),
        Row::new("QEMU's default machine (`pc`) with VGA")
            .hardware(with_vga(Some("pc")))
            .by_default(Ours)
            .with(&[C]),
        Row::new("two processors")
            .hardware(hardware(|hardware| hardware.processors = 2))
            .by_default(Ours)
            .with(&[C]),
        Row::new("two balloons")
            .features(&["stats", "free-page-hint"])
            .scenario(Scenario::TwoBalloons)
            .with(&[Ours, C]),
        Row::new("swap on a disk, and a balloon that needs it")
            .features(&["stats"])
            .scenario(Scenario::Swap)
            .with(&[Ours, C]),
    ]
}

fn memory_hotplug() -> Vec<Row> {
    const MOVABLE: &str = "memhp_default_state=online_movable";
    let row = |name, dimm| {
        Row::new(name)
            .arguments(MOVABLE)
            .hardware(hardware(|hardware| hardware.hotplug_memory = 1024 * MIB))
            .features(&["stats", "free-page-hint"])
            .scenario(Scenario::DimmUnplug(dimm))
    };
    vec![
        row(
            "a DIMM plugged, and unplugged while inflated",
            DimmUnplug::Inflated,
        )
        .with(&[Ours, C]),
        row("a DIMM unplugged while deflating", DimmUnplug::Deflating).with(&[Ours, C]),
        row(
            "a DIMM plugged and unplugged in mid-round",
            DimmUnplug::DuringHintRound,
        )
        .with(&[Ours, C]),
        row(
            "a DIMM unplugged in a migration",
            DimmUnplug::DuringMigration,
        )
        .with(&[Ours, C]),
        row(
            "a part of a DIMM, of hinted blocks, taken offline in mid-round",
            DimmUnplug::HintedOffline,
        )
        .arguments("memhp_default_state=online_kernel")
        .with(&[Ours]),
        Row::new("virtio-mem beside us, grown, and shrunk while inflated")
            .arguments(MOVABLE)
            .hardware(hardware(|hardware| {
                hardware.hotplug_memory = 1024 * MIB;
                hardware.arguments = [
                    "-object",
                    "memory-backend-memfd,id=vmem,size=512M,share=on",
                    "-device",
                    "virtio-mem-pci,id=vmem0,memdev=vmem,requested-size=256M",
                ]
                .map(str::to_owned)
                .to_vec();
            }))
            .scenario(Scenario::VirtioMem)
            .with(&[Ours, C]),
    ]
}

fn resets() -> Vec<Row> {
    let row = |name, reset| {
        Row::new(name)
            .hardware(hardware(|hardware| hardware.allow_reboot = true))
            .features(&["stats", "free-page-hint"])
            .scenario(Scenario::Reset(reset))
    };
    vec![
        row("`system_reset` with an empty balloon", Reset::Idle).with(&[Ours, C]),
        row("`system_reset` while inflating", Reset::Inflating).with(&[Ours, C]),
        row("`system_reset` while inflated", Reset::Inflated).with(&[Ours, C]),
        row("`system_reset` in mid-round", Reset::DuringHintRound).with(&[Ours, C]),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_row_has_a_name_of_its_own_and_no_pair_twice() {
        let rows = rows();
        let names: BTreeSet<&str> = rows.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), rows.len());
        for row in rows {
            let pairs: BTreeSet<&str> = row.entries.iter().map(|entry| entry.pair.name()).collect();
            assert!(
                pairs.len() == row.entries.len() && !pairs.is_empty(),
                "{}",
                row.name
            );
        }
    }
}
