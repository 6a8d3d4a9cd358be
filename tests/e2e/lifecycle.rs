// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the life cycle of the driver: load, bind, suspend, unplug, kexec and unload, with devices that answer and
//! devices that do not.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{
    Fill, Filled, Free, KernelLogRecord, ReadFile, Run, Verify, WaitMemSettled, WriteFile,
};
use harness::check::kernel_warnings;
use harness::guest::{Builder, Device, Driver, Guest};
use harness::scratch::Scratch;
use harness::silent_device::SilentDevice;
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;

const ALL: [&str; 5] = [
    "must-tell-host",
    "stats",
    "deflate-on-oom",
    "free-page-hint",
    "free-page-reporting",
];
const INFLATE_BY: u64 = 100 * MIB;

/// Returns a builder for a guest whose balloon has all features of the device.
fn builder(artifacts: &Artifacts, vmm: Vmm, device: Device) -> Builder<'_> {
    let builder = Builder::new(artifacts, vmm)
        .device(device)
        // See interoperability.rs.
        .kernel_arguments("init_on_alloc=0");
    match device {
        Device::QemuOwn => builder.device_options(&["free-page-reporting=on", "deflate-on-oom=on"]),
        _ => builder.features(&ALL),
    }
}

/// Inflates the balloon by [`INFLATE_BY`] bytes and waits until it has its size. Returns the target.
fn inflate(guest: &mut Guest) -> Result<u64> {
    let balloon = guest.balloon_qmp()?;
    let target = balloon.balloon_actual()? - INFLATE_BY;
    balloon.set_balloon(target)?;
    balloon.wait_balloon(target, HANG_TIMEOUT)?;
    Ok(target)
}

/// Fills `bytes` of memory, verifies them, and frees them.
fn fill_and_verify(guest: &mut Guest, bytes: u64, seed: u64) -> Result<Filled> {
    let filled = guest.call(Fill {
        bytes,
        keep_every: 1,
        seed,
    })?;
    let workload = filled.workload;
    let found = guest.call(Verify { workload })?;
    ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
    guest.call(Free { workload })?;
    Ok(filled)
}

#[test]
fn a_guest_in_qemu_sleeps_with_an_inflated_balloon_of_our_device() -> Result<()> {
    suspends_inflated(Device::Ours)
}

#[test]
fn a_guest_sleeps_with_an_inflated_balloon_of_qemus_device() -> Result<()> {
    suspends_inflated(Device::QemuOwn)
}

/// Suspends the guest (S3) with an inflated balloon and, with our device, with hinted blocks. After the resume the
/// driver fills the balloon again, and everything works.
///
/// The guest is suspended once, and then killed: with QEMU 11.1, a machine that Linux has resumed can neither suspend
/// again nor power off, with or without a balloon.
fn suspends_inflated(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, device)
        .suspendable()
        .boot()?;
    guest.set_short_reporting_delay()?;
    guest.fill_and_free(24 * MIB, 21)?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let target = inflate(&mut guest)?;
    if device == Device::Ours {
        let hint_round = guest.hint_all()?;
        ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
    }
    let then = Instant::now();
    guest.suspend_and_resume()?;
    guest.wait_balloon_after_reload(target, HANG_TIMEOUT)?;
    println!("{device:?}: target again after {:?}", then.elapsed());
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_memory_and_log(before)?;
    guest.kill()?;
    Ok(())
}

#[test]
fn a_balloon_of_our_device_in_qemu_is_unplugged_while_it_works() -> Result<()> {
    unplugged(Device::Ours)
}

#[test]
fn a_balloon_of_qemus_device_is_unplugged_while_it_works() -> Result<()> {
    unplugged(Device::QemuOwn)
}

/// Unplugs the balloon while it inflates and, with our device, during a hint round. (QEMU's own device hints only
/// during a migration, when QEMU refuses to unplug.) Each time the guest gets its memory back, and the next balloon
/// works.
fn unplugged(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, Device::None)
        .hotplug_slot()
        .boot()?;
    guest.fill_and_free(24 * MIB, 22)?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    let features = ["stats", "free-page-hint"];
    for pages in [0, 1, 4096, 40_000] {
        guest.plug(device, &features, &[])?;
        let whole = guest.memory();
        guest.balloon_qmp()?.set_balloon(whole - 300 * MIB)?;
        guest.wait_counter("balloon_pages", pages, HANG_TIMEOUT)?;
        guest.unplug()?;
        guest
            .check_memory_and_log(before)
            .with_context(|| format!("pulled with {pages} pages"))?;
    }
    for blocks in [0, 1, 30, u64::MAX] {
        if device != Device::Ours {
            break;
        }
        guest.plug(device, &features, &[])?;
        let balloon = guest.balloon_qmp()?;
        balloon.hint_start()?;
        let hint_round = balloon.wait_hint("so many blocks", |now| {
            now.blocks >= blocks || now.status == "finished"
        })?;
        guest.unplug()?;
        guest
            .check_memory_and_log(before)
            .with_context(|| format!("pulled at {hint_round:?}"))?;
    }
    guest.plug(device, &features, &[])?;
    guest.exercise()?;
    guest.unplug()?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

#[test]
fn the_driver_is_unbound_and_bound_while_it_works() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = builder(&artifacts, vmm, Device::Ours).boot()?;
        guest.set_short_reporting_delay()?;
        guest.load(Driver::Ours)?;
        // Measured while unbound: pages in a report count as used.
        let name = guest.balloon_device()?.name;
        rebind(&mut guest, "unbind", &name)?;
        let before = guest.settled_memory_usage()?;
        rebind(&mut guest, "bind", &name)?;
        guest.daemon()?.wait_driver()?;
        let whole = guest.balloon_qmp()?.balloon_actual()?;
        let times = vmm.repeats(if vmm == Vmm::Uml { 40 } else { 6 });
        for time in 0..times {
            let name = guest.balloon_device()?.name;
            let balloon = guest.balloon_qmp()?;
            balloon.set_balloon(whole - INFLATE_BY)?;
            if time % 2 == 1 {
                balloon.hint_start()?;
            }
            rebind(&mut guest, "unbind", &name)?;
            guest
                .check_memory(before)
                .with_context(|| format!("{vmm:?}, time {time}"))?;
            guest.balloon_qmp()?.set_balloon(whole)?;
            rebind(&mut guest, "bind", &name)?;
            guest.daemon()?.wait_driver()?;
        }
        guest.exercise()?;
        guest.unload(Driver::Ours)?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

fn rebind(guest: &mut Guest, what: &str, name: &str) -> Result<()> {
    guest.call(WriteFile {
        path: format!(
            "/sys/bus/virtio/drivers/{}/{what}",
            Driver::Ours.module_name()
        ),
        text: name.to_owned(),
    })
}

#[test]
fn a_new_kernel_in_qemu_takes_over_a_balloon_of_our_device() -> Result<()> {
    a_new_kernel_takes_over(Device::Ours)
}

#[test]
fn a_new_kernel_takes_over_a_balloon_of_qemus_device() -> Result<()> {
    a_new_kernel_takes_over(Device::QemuOwn)
}

/// The guest starts another kernel (kexec) with an inflated balloon and, with our device, with hinted blocks. The new
/// kernel has all memory, and its driver fills the balloon again.
fn a_new_kernel_takes_over(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, device)
        .kexec_kernel()
        .boot()?;
    guest.load(Driver::Ours)?;
    let target = inflate(&mut guest)?;
    if device == Device::Ours {
        let hint_round = guest.hint_all()?;
        ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
    }
    guest.check_log()?;
    let then = Instant::now();
    guest.kexec()?;
    println!("{device:?}: a new kernel after {:?}", then.elapsed());
    guest.set_short_reporting_delay()?;
    let before = guest.settled_memory_usage()?;
    let filled = fill_and_verify(&mut guest, before.free - 48 * MIB, 23)?;
    ensure!(
        filled.pages * 4096 > guest.memory() / 10 * 7,
        "only {} pages could be filled",
        filled.pages
    );
    guest.load(Driver::Ours)?;
    guest.wait_balloon_after_reload(target, HANG_TIMEOUT)?;
    if device == Device::Ours {
        guest.daemon()?.qmp().hint_done()?;
    }
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

/// A device that never answers does not prevent kexec, with a report, requests and hints in flight. The new kernel has
/// all memory, and its driver can be unloaded.
#[test]
fn a_new_kernel_in_qemu_takes_over_from_a_silent_host() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = ConfigSpace {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..ConfigSpace::default()
    };
    let features = Features::FREE_PAGE_HINT
        | Features::STATS_VQ
        | Features::DEFLATE_ON_OOM
        | Features::MUST_TELL_HOST
        | Features::REPORTING;
    let silent_device = SilentDevice::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .external_device(silent_device.socket())
        .kernel_arguments("init_on_alloc=0")
        .kexec_kernel()
        .boot()?;
    guest.set_short_reporting_delay()?;
    guest.load(Driver::Ours)?;
    for queue in ["inflate", "free_page", "reporting"] {
        guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_TIMEOUT)?;
    }
    let log = guest.kernel_log()?;
    let others = warnings_of_silent_device(&log);
    ensure!(others.is_empty(), "{others:?}");
    guest.kexec()?;
    let before = guest.settled_memory_usage()?;
    fill_and_verify(&mut guest, before.free - 48 * MIB, 27)?;
    guest.load(Driver::Ours)?;
    guest.wait_counter("inflate_notifications", 1, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}

/// Returns the kernel's warnings, without the one about a report that the device does not answer. The driver logs that
/// one after the total timeout, ten seconds by default, so a test may see it or not.
fn warnings_of_silent_device(log: &[KernelLogRecord]) -> Vec<&str> {
    const NO_ANSWER: &str = "the free pages that were reported last stay with the device";
    let texts = kernel_warnings(log)
        .into_iter()
        .map(|line| line.text.as_str());
    texts.filter(|text| !text.contains(NO_ANSWER)).collect()
}

/// A host that never answers costs the guest only the pages in flight, and the module can be unloaded. The driver waits
/// for a host that must acknowledge pages for `host_timeout_ms`, two seconds here, and then resets the device.
#[test]
fn a_host_that_never_answers_leaves_the_guest_alive() -> Result<()> {
    const PAGES: u32 = 30_000;
    const CMD_ID: u32 = 0x8000_0000;
    let artifacts = Artifacts::load()?;
    let hint = Features::FREE_PAGE_HINT;
    let most = hint | Features::STATS_VQ | Features::DEFLATE_ON_OOM | Features::MUST_TELL_HOST;
    let all = (most | Features::REPORTING, PAGES, CMD_ID);
    let sorts = [(Features::NONE, PAGES, 0), (hint, 0, CMD_ID), all];
    for &vmm in Vmm::each() {
        // An emulated machine boots slowly, so it gets one case.
        let sorts = if vmm == Vmm::Uml { &sorts[..] } else { &[all] };
        for &(features, num_pages, cmd_id) in sorts {
            let scratch = Scratch::new()?;
            let config = ConfigSpace {
                num_pages,
                free_page_hint_cmd_id: cmd_id,
                ..ConfigSpace::default()
            };
            let silent_device = SilentDevice::start(&scratch, features, config)?;
            let mut guest = Builder::new(&artifacts, vmm)
                .external_device(silent_device.socket())
                .boot()?;
            guest.set_short_reporting_delay()?;
            let before = guest.settled_memory_usage()?;
            guest.load(Driver::Ours)?;
            // Inflation and hinting are both in progress.
            for (queue, wanted) in [("inflate", num_pages), ("free_page", cmd_id)] {
                if wanted > 0 {
                    guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_TIMEOUT)?;
                }
            }
            // Fills a third of the memory that is left once the driver has all the pages in flight that it can have.
            let left = guest.call(WaitMemSettled {
                tolerance: MIB,
                stable_samples: 30,
                timeout_ms: HANG_TIMEOUT_MS,
            })?;
            guest.fill_and_free(left.free() - left.free() / 3, 24)?;
            let left = guest.settled_memory_usage()?.free;
            silent_device.wait_kick()?;
            let then = Instant::now();
            let what =
                || format!("{vmm:?}, features {features}, {num_pages} pages, round {cmd_id:#x}");
            guest.unload(Driver::Ours).with_context(what)?;
            let took = then.elapsed();
            println!(
                "{}: {} MiB in flight, unloaded in {took:?}",
                what(),
                (before.free - left) / MIB
            );
            guest.check_memory(before).with_context(what)?;
            // The device has not acknowledged the pages in flight. The driver warns about that, and about nothing else.
            let log = guest.kernel_log()?;
            let (expected, others): (Vec<_>, Vec<_>) = warnings_of_silent_device(&log)
                .into_iter()
                .partition(|text| text.contains("the host does not take its pages back"));
            ensure!(others.is_empty(), "{}: {others:?}", what());
            ensure!(
                expected.len() == usize::from(num_pages > 0),
                "{}: {expected:?}",
                what()
            );
            fill_and_verify(&mut guest, 64 * MIB, 25)?;
            guest.check_log().with_context(what)?;
            guest.power_off()?;
        }
    }
    Ok(())
}

/// The driver drains a balloon of any size in small steps, because the kernel dequeues balloon pages with interrupts
/// off. The guest's clock counts instructions, so host load does not change the times. `VIRTIO_BALLOON_RS_LARGE=1`
/// selects a balloon of 15 GiB in a guest of 16 GiB.
#[test]
fn a_balloon_is_drained_in_small_steps_in_qemu() -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    /// The most pages that the driver may dequeue at a time.
    const AT_A_TIME: u64 = 32;
    /// The longest time with interrupts off, in microseconds of guest time. A guest instruction takes a nanosecond.
    const LONGEST_US: f64 = 1000.0;
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    // The balloon is smaller than memory: the kernel needs a part.
    let (memory, balloon) = if std::env::var_os("VIRTIO_BALLOON_RS_LARGE").is_some() {
        (16 * 1024 * MIB, 15 * 1024 * MIB)
    } else {
        (512 * MIB, 256 * MIB)
    };
    let num_pages = u32::try_from(balloon / 4096)?;
    let config = ConfigSpace {
        num_pages,
        ..ConfigSpace::default()
    };
    let silent_device =
        SilentDevice::start_silent_after(u64::MAX, &scratch, Features::NONE, config)?;
    // Nothing touches the pages, so the guest's memory file stays sparse.
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .memory(memory)
        .external_device(silent_device.socket())
        .kernel_arguments("init_on_alloc=0")
        .hardware(Hardware {
            arguments: ["-icount", "shift=0"].map(str::to_owned).to_vec(),
            ..Hardware::default()
        })
        .boot()?;
    guest.load(Driver::Ours)?;
    guest.wait_counter("balloon_pages", u64::from(num_pages), HANG_TIMEOUT)?;
    silent_device.stop_answering();
    let argv = ["mount", "-t", "tracefs", "tracefs", TRACING].map(str::to_owned);
    guest.call(Run {
        argv: argv.to_vec(),
    })?;
    for (file, text) in [
        (
            "kprobe_events",
            "r:drained balloon_page_list_dequeue pages=$retval",
        ),
        ("events/kprobes/drained/enable", "1"),
        ("set_graph_function", "balloon_page_list_dequeue"),
        ("max_graph_depth", "1"),
        ("current_tracer", "function_graph"),
    ] {
        guest.call(WriteFile {
            path: format!("{TRACING}/{file}"),
            text: text.to_owned(),
        })?;
    }
    guest.unload(Driver::Ours)?;
    let path = format!("{TRACING}/trace");
    let trace = guest.call(ReadFile { path })?;
    let mut drained = Vec::new();
    let mut longest = 0.0_f64;
    for line in trace.lines() {
        if let Some((_, pages)) = line.rsplit_once("pages=") {
            let word = pages.split_whitespace().next().unwrap_or_default();
            let pages = match word.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => word.parse(),
            };
            drained.push(pages.with_context(|| format!("no number of pages: {line}"))?);
        } else if let Some((before, _)) = line.split_once(" us ") {
            let number = before.rsplit(' ').next().and_then(|word| word.parse().ok());
            longest = number.map_or(longest, |number| longest.max(number));
        }
    }
    let most = drained.iter().max().context("nothing was drained")?;
    println!(
        "{} pages a time at most, {} times in the trace, {longest} us at most",
        most,
        drained.len()
    );
    ensure!(*most <= AT_A_TIME, "{most} pages were taken out at once");
    ensure!(
        longest > 0.0 && longest < LONGEST_US,
        "interrupts were off for {longest} us"
    );
    guest.power_off()?;
    Ok(())
}

/// A device that never answers does not prevent suspend. The test does not offer reporting: with a report in flight the
/// kernel waits for its reporting, with any driver, and refuses to suspend after twenty seconds.
#[test]
fn a_guest_in_qemu_of_a_silent_host_sleeps() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = ConfigSpace {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..ConfigSpace::default()
    };
    let features = Features::FREE_PAGE_HINT | Features::STATS_VQ | Features::DEFLATE_ON_OOM;
    let silent_device = SilentDevice::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .external_device(silent_device.socket())
        .suspendable()
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    // The driver has made available all the pages that it could, and waits for the device.
    guest.fill_and_free(before.free / 2, 26)?;
    let then = Instant::now();
    guest.suspend_and_resume()?;
    let took = then.elapsed();
    println!("slept and woke in {took:?}");
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}

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
    let mut guest = builder(&artifacts, vmm, Device::Ours)
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
