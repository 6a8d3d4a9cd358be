// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests removing the driver while the balloon is large.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{ReadFile, Run, WriteFile};
use harness::guest::{Builder, Driver};
use harness::scratch::Scratch;
use harness::silent_device::SilentDevice;
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;

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
