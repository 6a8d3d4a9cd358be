// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests pausing a guest by stopping its processes, many times and at any point of its work. The guest does not notice,
//! and nothing writes to its memory while it is paused.

use std::fs::{File, OpenOptions};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_migration::dirty_tracking::SentTable;
use guest_migration::vm::{ProcessVm, Vm};
use guest_migration::{Layout, Memory, RamBlock};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device};
use harness::host::guest_memory_file;
use harness::stress::{Stress, StressLoad};
use harness::vmm::uml::TRACES;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

const MEMORY: u64 = 256 * MIB;
/// One pause in this many is long enough to read all memory twice.
const CHECK_EVERY: u32 = 50;
/// The number of pages that each workload must compare after such a pause.
const PAGES: u64 = 100;

#[test]
fn user_mode_linux_does_not_notice_that_its_processes_are_stopped() -> Result<()> {
    // The debug kernel has two processors, which need seccomp.
    let arguments = if Vmm::is_debug_only() { "" } else { TRACES };
    paused_again_and_again(Vmm::Uml, arguments, 300)
}

#[test]
fn user_mode_linux_with_filtered_processes_does_not_notice_either() -> Result<()> {
    paused_again_and_again(Vmm::Uml, "seccomp=on", 200)
}

#[test]
fn a_guest_in_qemu_does_not_notice_that_its_process_is_stopped() -> Result<()> {
    paused_again_and_again(Vmm::Qemu, "", 100)
}

fn paused_again_and_again(vmm: Vmm, arguments: &str, cycles: u32) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .device(Device::None)
        .memory(MEMORY)
        .kernel_arguments(arguments)
        .boot()?;
    let memory = memory_of(guest.vmm().id())?;
    let before = guest.settled_memory_usage()?;
    let stress = Stress::start(&mut guest, StressLoad::new(before.free / 2), 1)?;
    let mut vm = ProcessVm::new(&memory, std::process::id())?;
    let mut detector = WriteDetector::new(&memory)?;
    let (mut longest, mut all, mut most) = (Duration::ZERO, Duration::ZERO, 0);
    let cycles = vmm.repeats(cycles);
    for cycle in 0..cycles {
        // Varies the point of the pause relative to the guest's timers.
        sleep(Duration::from_micros(u64::from(cycle % 17) * 300));
        let then = Instant::now();
        vm.pause()?;
        let took = then.elapsed();
        (longest, all) = (longest.max(took), all + took);
        let paused = vm.paused_pids();
        ensure!(paused.contains(&guest.vmm().id()), "{paused:?}");
        most = most.max(paused.len());
        if cycle % CHECK_EVERY == 0 {
            detector.check_no_writes()?;
        }
        vm.resume()?;
        if cycle % CHECK_EVERY == 0 {
            stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;
        }
    }
    // Dropping the `ProcessVm` resumes the guest.
    vm.pause()?;
    drop(vm);
    let done = stress.end_and_verify(&mut guest)?;
    println!(
        "{vmm:?} {arguments}: {cycles} pauses of up to {most} processes, each within {:?} on average and {longest:?} at most; \
         {} pages compared",
        all / cycles,
        done.compared
    );
    guest.check_and_power_off(before)
}

/// Opens the guest's memory file as one RAM block.
fn memory_of(vmm: u32) -> Result<Memory> {
    let path = guest_memory_file(vmm)?;
    let file = open(&path)?;
    let block = RamBlock::new("ram", file.metadata()?.len())?;
    Ok(Memory::new(Layout::new([block], [])?.into(), vec![file])?)
}

fn open(path: &std::path::Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Detects writes to the guest's memory.
struct WriteDetector<'a> {
    memory: &'a Memory,
    seen: SentTable,
}

impl<'a> WriteDetector<'a> {
    fn new(memory: &'a Memory) -> Result<Self> {
        let seen = SentTable::new(memory.layout())?;
        Ok(Self { memory, seen })
    }

    /// Reads all memory twice. Fails if nothing has changed since the last call, or if anything changes in between.
    fn check_no_writes(&mut self) -> Result<()> {
        let mut changed = Vec::new();
        self.seen.compare(self.memory, |run| changed.push(run))?;
        ensure!(
            !changed.is_empty(),
            "the guest has not written anything since the last pause"
        );
        let mut bytes = Vec::new();
        for run in changed.drain(..) {
            bytes.resize(usize::try_from(run.length())?, 0);
            self.memory.read(run, &mut bytes)?;
            self.seen.record_sent(run, &bytes);
        }
        self.seen.compare(self.memory, |run| changed.push(run))?;
        ensure!(
            changed.is_empty(),
            "written while all processes were stopped: {changed:?}"
        );
        Ok(())
    }
}
