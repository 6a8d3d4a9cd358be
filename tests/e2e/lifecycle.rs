// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver from its loading to its end, and all that may happen to it, its device and its guest in between.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use shared_abi::config::Config;
use shared_abi::features::Features;
use tests::artifacts::Artifacts;
use tests::calls::{
    Fill, Filled, Free, KernelLine, ReadFile, Run, Verify, WaitMemSettled, WriteFile,
};
use tests::check::complaints;
use tests::guest::{Builder, Device, Driver, Guest};
use tests::mute::Mute;
use tests::scratch::Scratch;
use tests::vmm::hardware::Hardware;
use tests::vmm::Vmm;
use tests::{HANG_LIMIT, HANG_LIMIT_MS, MIB};

const ALL: [&str; 5] = [
    "must-tell-host",
    "stats",
    "deflate-on-oom",
    "free-page-hint",
    "free-page-reporting",
];
const INFLATE_BY: u64 = 100 * MIB;

/// A machine with a balloon that has whatever we know, and with QEMU's device whatever that knows.
fn builder(artifacts: &Artifacts, vmm: Vmm, device: Device) -> Builder<'_> {
    let builder = Builder::new(artifacts, vmm)
        .device(device)
        // See the pairs.
        .kernel_arguments("init_on_alloc=0");
    match device {
        Device::QemuOwn => builder.device_options(&["free-page-reporting=on", "deflate-on-oom=on"]),
        _ => builder.features(&ALL),
    }
}

/// Asks for [`INFLATE_BY`] bytes and waits for them; returns the target.
fn inflate(guest: &mut Guest) -> Result<u64> {
    let balloon = guest.balloon()?;
    let target = balloon.balloon_actual()? - INFLATE_BY;
    balloon.balloon(target)?;
    balloon.wait_balloon(target, HANG_LIMIT)?;
    Ok(target)
}

/// Fills so much memory, and finds it as it was.
fn memory_holds(guest: &mut Guest, bytes: u64, seed: u64) -> Result<Filled> {
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
    sleeps(Device::Ours)
}

#[test]
fn a_guest_sleeps_with_an_inflated_balloon_of_qemus_device() -> Result<()> {
    sleeps(Device::QemuOwn)
}

/// The guest sleeps (S3), the balloon inflated, and, with our device, blocks held. When it wakes the balloon is filled
/// again, and everything works.
///
/// Once, and it is not switched off: the machine that Linux wakes to does not sleep again, nor does it switch off, with
/// or without a balloon (QEMU 11.1).
fn sleeps(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, device).sleeps().boot()?;
    guest.hurry_reporting()?;
    guest.fill_and_free(24 * MIB, 21)?;
    let before = guest.settled()?;
    guest.load(Driver::Ours)?;
    let target = inflate(&mut guest)?;
    if device == Device::Ours {
        let held = guest.hint_all()?;
        ensure!(held.bytes > 0, "nothing is held: {held:?}");
    }
    let then = Instant::now();
    guest.sleep_and_wake()?;
    guest.wait_new_drivers_balloon(target, HANG_LIMIT)?;
    println!("{device:?}: target again after {:?}", then.elapsed());
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_whole(before)?;
    guest.kill()?;
    Ok(())
}

#[test]
fn a_balloon_of_our_device_in_qemu_is_pulled_while_it_works() -> Result<()> {
    pulled(Device::Ours)
}

#[test]
fn a_balloon_of_qemus_device_is_pulled_while_it_works() -> Result<()> {
    pulled(Device::QemuOwn)
}

/// The balloon is pulled while it is being inflated, and, if it is ours (QEMU pulls nothing while it migrates), in
/// the middle of a round; each time the guest has its memory back, and the next balloon works.
fn pulled(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, Device::None).slot().boot()?;
    guest.fill_and_free(24 * MIB, 22)?;
    guest.load(Driver::Ours)?;
    let before = guest.settled()?;
    let features = ["stats", "free-page-hint"];
    for pages in [0, 1, 4096, 40_000] {
        guest.plug(device, &features, &[])?;
        let whole = guest.memory();
        guest.balloon()?.balloon(whole - 300 * MIB)?;
        guest.wait_counter("balloon_pages", pages, HANG_LIMIT)?;
        guest.unplug()?;
        guest
            .check_whole(before)
            .with_context(|| format!("pulled with {pages} pages"))?;
    }
    for blocks in [0, 1, 30, u64::MAX] {
        if device != Device::Ours {
            break;
        }
        guest.plug(device, &features, &[])?;
        let balloon = guest.balloon()?;
        balloon.hint_start()?;
        let round = balloon.wait_hint("so many blocks", |now| {
            now.blocks >= blocks || now.status == "finished"
        })?;
        guest.unplug()?;
        guest
            .check_whole(before)
            .with_context(|| format!("pulled at {round:?}"))?;
    }
    guest.plug(device, &features, &[])?;
    guest.exercise()?;
    guest.unplug()?;
    guest.unload(Driver::Ours)?;
    guest.farewell(before)
}

#[test]
fn the_driver_is_unbound_and_bound_while_it_works() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = builder(&artifacts, vmm, Device::Ours).boot()?;
        guest.hurry_reporting()?;
        guest.load(Driver::Ours)?;
        // Measured while unbound: pages in a report count as used.
        let name = guest.balloon_device()?.name;
        rebind(&mut guest, "unbind", &name)?;
        let before = guest.settled()?;
        rebind(&mut guest, "bind", &name)?;
        guest.daemon()?.wait_driver()?;
        let whole = guest.balloon()?.balloon_actual()?;
        let times = vmm.repeats(if vmm == Vmm::Uml { 40 } else { 6 });
        for time in 0..times {
            let name = guest.balloon_device()?.name;
            let balloon = guest.balloon()?;
            balloon.balloon(whole - INFLATE_BY)?;
            if time % 2 == 1 {
                balloon.hint_start()?;
            }
            rebind(&mut guest, "unbind", &name)?;
            guest
                .check_memory(before)
                .with_context(|| format!("{vmm:?}, time {time}"))?;
            guest.balloon()?.balloon(whole)?;
            rebind(&mut guest, "bind", &name)?;
            guest.daemon()?.wait_driver()?;
        }
        guest.exercise()?;
        guest.unload(Driver::Ours)?;
        guest.farewell(before)?;
    }
    Ok(())
}

fn rebind(guest: &mut Guest, what: &str, name: &str) -> Result<()> {
    guest.call(WriteFile {
        path: format!("/sys/bus/virtio/drivers/{}/{what}", Driver::Ours.module()),
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

/// The guest starts another kernel (kexec) while the balloon is inflated and, with our device, blocks are held. The new
/// kernel has all memory, and its driver fills the balloon.
fn a_new_kernel_takes_over(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, Vmm::Qemu, device)
        .next_kernel()
        .boot()?;
    guest.load(Driver::Ours)?;
    let target = inflate(&mut guest)?;
    if device == Device::Ours {
        let held = guest.hint_all()?;
        ensure!(held.bytes > 0, "nothing is held: {held:?}");
    }
    guest.check_log()?;
    let then = Instant::now();
    guest.start_next_kernel()?;
    println!("{device:?}: a new kernel after {:?}", then.elapsed());
    guest.hurry_reporting()?;
    let before = guest.settled()?;
    let filled = memory_holds(&mut guest, before.free - 48 * MIB, 23)?;
    ensure!(
        filled.pages * 4096 > guest.memory() / 10 * 7,
        "only {} pages could be filled",
        filled.pages
    );
    guest.load(Driver::Ours)?;
    guest.wait_new_drivers_balloon(target, HANG_LIMIT)?;
    if device == Device::Ours {
        guest.daemon()?.qmp().hint_done()?;
    }
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.farewell(before)
}

/// A device that never answers does not keep a guest from starting another kernel, with a report, requests and hints
/// under way; the new kernel has all memory, and a driver that can go.
#[test]
fn a_new_kernel_in_qemu_takes_over_from_a_silent_host() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = Config {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..Config::default()
    };
    let features = Features::FREE_PAGE_HINT
        | Features::STATS_VQ
        | Features::DEFLATE_ON_OOM
        | Features::MUST_TELL_HOST
        | Features::REPORTING;
    let mute = Mute::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .foreign(mute.socket())
        .kernel_arguments("init_on_alloc=0")
        .next_kernel()
        .boot()?;
    guest.hurry_reporting()?;
    guest.load(Driver::Ours)?;
    for queue in ["inflate", "free_page", "reporting"] {
        guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_LIMIT)?;
    }
    let log = guest.kernel_log()?;
    let others = complaints_of_mute(&log);
    ensure!(others.is_empty(), "{others:?}");
    guest.start_next_kernel()?;
    let before = guest.settled()?;
    memory_holds(&mut guest, before.free - 48 * MIB, 27)?;
    guest.load(Driver::Ours)?;
    guest.wait_counter("inflate_notifications", 1, HANG_LIMIT)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}

/// Returns the kernel's complaints, without the warning about a report that the device does not answer: the driver logs it after ten
/// seconds, and a test may take shorter or longer.
fn complaints_of_mute(log: &[KernelLine]) -> Vec<&str> {
    const NO_ANSWER: &str = "the free pages that were reported last stay with the device";
    let texts = complaints(log).into_iter().map(|line| line.text.as_str());
    texts.filter(|text| !text.contains(NO_ANSWER)).collect()
}

/// A host that takes no page, no hint, no report and no statistics costs the guest what is in flight, no more, and the
/// module can go: the driver waits two seconds for a host that must take pages back, and not for ever.
#[test]
fn a_host_that_never_answers_leaves_the_guest_alive() -> Result<()> {
    const PAGES: u32 = 30_000;
    const ROUND: u32 = 0x8000_0000;
    let artifacts = Artifacts::load()?;
    let hint = Features::FREE_PAGE_HINT;
    let most = hint | Features::STATS_VQ | Features::DEFLATE_ON_OOM | Features::MUST_TELL_HOST;
    let all = (most | Features::REPORTING, PAGES, ROUND);
    let sorts = [(Features::NONE, PAGES, 0), (hint, 0, ROUND), all];
    for &vmm in Vmm::each() {
        // One boot of an emulated machine must do.
        let sorts = if vmm == Vmm::Uml { &sorts[..] } else { &[all] };
        for &(features, num_pages, round) in sorts {
            let scratch = Scratch::new()?;
            let config = Config {
                num_pages,
                free_page_hint_cmd_id: round,
                ..Config::default()
            };
            let mute = Mute::start(&scratch, features, config)?;
            let mut guest = Builder::new(&artifacts, vmm)
                .foreign(mute.socket())
                .boot()?;
            guest.hurry_reporting()?;
            let before = guest.settled()?;
            guest.load(Driver::Ours)?;
            // Inflation and hinting are both in progress.
            for (queue, wanted) in [("inflate", num_pages), ("free_page", round)] {
                if wanted > 0 {
                    guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_LIMIT)?;
                }
            }
            // A third of what is left once it has all that it can have in flight.
            let left = guest.call(WaitMemSettled {
                tolerance: MIB,
                quiet_looks: 30,
                limit_ms: HANG_LIMIT_MS,
            })?;
            guest.fill_and_free(left.free() - left.free() / 3, 24)?;
            let left = guest.settled()?.free;
            mute.wait_kick()?;
            let then = Instant::now();
            let what =
                || format!("{vmm:?}, features {features}, {num_pages} pages, round {round:#x}");
            guest.unload(Driver::Ours).with_context(what)?;
            let took = then.elapsed();
            println!(
                "{}: {} MiB in flight, unloaded in {took:?}",
                what(),
                (before.free - left) / MIB
            );
            guest.check_memory(before).with_context(what)?;
            // What it did not take back it did not acknowledge: that is worth a warning, and no other.
            let log = guest.kernel_log()?;
            let (expected, others): (Vec<_>, Vec<_>) = complaints_of_mute(&log)
                .into_iter()
                .partition(|text| text.contains("the host does not take its pages back"));
            ensure!(others.is_empty(), "{}: {others:?}", what());
            ensure!(
                expected.len() == usize::from(num_pages > 0),
                "{}: {expected:?}",
                what()
            );
            memory_holds(&mut guest, 64 * MIB, 25)?;
            guest.check_log().with_context(what)?;
            guest.power_off()?;
        }
    }
    Ok(())
}

/// The driver drains a balloon of any size in small steps: the kernel takes pages out of it with interrupts off. The guest's
/// clock counts instructions, so that the host's other work does not count. `VIRTIO_BALLOON_RS_LARGE=1` has a balloon of 15 GiB
/// in a guest of 16 GiB.
#[test]
fn a_balloon_is_drained_in_small_steps_in_qemu() -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    /// The most pages that may be taken out at a time.
    const AT_A_TIME: u64 = 32;
    /// The longest time with interrupts off, in the guest's time, which is a nanosecond for each instruction.
    const LONGEST_US: f64 = 1000.0;
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    // The kernel keeps a part for itself.
    let (memory, balloon) = if std::env::var_os("VIRTIO_BALLOON_RS_LARGE").is_some() {
        (16 * 1024 * MIB, 15 * 1024 * MIB)
    } else {
        (512 * MIB, 256 * MIB)
    };
    let num_pages = u32::try_from(balloon / 4096)?;
    let config = Config {
        num_pages,
        ..Config::default()
    };
    let mute = Mute::silent_after(u64::MAX, &scratch, Features::NONE, config)?;
    // Nobody touches the pages: the guest's memory stays sparse.
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .memory(memory)
        .foreign(mute.socket())
        .kernel_arguments("init_on_alloc=0")
        .hardware(Hardware {
            arguments: ["-icount", "shift=0"].map(str::to_owned).to_vec(),
            ..Hardware::default()
        })
        .boot()?;
    guest.load(Driver::Ours)?;
    guest.wait_counter("balloon_pages", u64::from(num_pages), HANG_LIMIT)?;
    mute.fall_silent();
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

/// A silent host does not keep a guest from its sleep. (With reports under way the kernel refuses to sleep, after twenty
/// seconds and with a message: it waits for its own reporting, whatever the driver.)
#[test]
fn a_guest_in_qemu_of_a_silent_host_sleeps() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = Config {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..Config::default()
    };
    let features = Features::FREE_PAGE_HINT | Features::STATS_VQ | Features::DEFLATE_ON_OOM;
    let mute = Mute::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .foreign(mute.socket())
        .sleeps()
        .boot()?;
    let before = guest.settled()?;
    guest.load(Driver::Ours)?;
    // The driver has given what it could: it waits for the host.
    guest.fill_and_free(before.free / 2, 26)?;
    let then = Instant::now();
    guest.sleep_and_wake()?;
    let took = then.elapsed();
    println!("slept and woke in {took:?}");
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}

#[test]
fn two_hundred_lives_leave_nothing_behind_in_user_mode_linux() -> Result<()> {
    lives(Vmm::Uml, 200)
}

#[test]
fn a_few_lives_leave_nothing_behind_in_qemu() -> Result<()> {
    lives(Vmm::Qemu, 8)
}

/// What a life might leave behind.
#[derive(Debug)]
struct Use {
    /// What the kernel has in use.
    used: u64,
    slab: u64,
    unreclaimable: u64,
    vmalloc: u64,
}

fn in_use(guest: &mut Guest) -> Result<Use> {
    let used = guest.settled()?.used;
    let memory = guest.mem_info()?;
    Ok(Use {
        used,
        slab: memory.field("Slab"),
        unreclaimable: memory.field("SUnreclaim"),
        vmalloc: vmalloc(guest)?,
    })
}

/// Bytes of the kernel's virtual mappings, of which a module has some.
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

/// Loads the driver, inflates, hints, deflates and unloads it, over and over.
fn lives(vmm: Vmm, times: u32) -> Result<()> {
    /// The first ones fill caches that stay.
    const FIRST: u32 = 4;
    let times = vmm.repeats(times);
    let artifacts = Artifacts::load()?;
    let mut guest = builder(&artifacts, vmm, Device::Ours)
        .memory(256 * MIB)
        .boot()?;
    guest.hurry_reporting()?;
    let then = Instant::now();
    let mut first = None;
    for time in 0..times {
        guest.load(Driver::Ours)?;
        let balloon = guest.balloon()?;
        let whole = balloon.balloon_actual()?;
        balloon.balloon(whole - 16 * MIB)?;
        balloon.wait_balloon(whole - 16 * MIB, HANG_LIMIT)?;
        guest.hint_all()?;
        let balloon = guest.balloon()?;
        balloon.balloon(whole)?;
        balloon.wait_balloon(whole, HANG_LIMIT)?;
        // Every other life ends with its blocks held.
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
    // What the last life freed may be given back a little later.
    let deadline = Instant::now() + HANG_LIMIT;
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

/// Fails if so many lives have left something behind.
fn has_not_grown(vmm: Vmm, lives: u64, first: &Use, last: &Use) -> Result<()> {
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
        // One page a life would show. But the stock kernel takes memory for modules' code 2 MiB at a time.
        let least = if (vmm, what) == (Vmm::Qemu, "vmalloc") {
            3 * MIB
        } else {
            MIB / 4
        };
        let allowed = (lives * 4096 / 2).max(least);
        ensure!(
            after <= before + allowed,
            "{what} has grown from {before} to {after}"
        );
    }
    Ok(())
}
