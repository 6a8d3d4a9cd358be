// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the driver's tracepoints.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{ReadFile, Run, WriteFile};
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Runs in QEMU only: the stock kernel has tracepoints, user-mode Linux has none.
#[test]
fn tracepoints_show_hinting_and_resizing_in_qemu() -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu).boot()?;
    guest.load(Driver::Ours)?;
    let argv = ["mount", "-t", "tracefs", "tracefs", TRACING].map(str::to_owned);
    guest.call(Run {
        argv: argv.to_vec(),
    })?;
    guest.call(WriteFile {
        path: format!("{TRACING}/events/virtio_balloon_rs/enable"),
        text: "1".to_owned(),
    })?;
    let qmp = guest.daemon()?.qmp();
    let id = qmp.hint_start()?;
    let hint_round = qmp.wait_hint_status("finished")?;
    qmp.hint_done()?;
    let whole = qmp.balloon_actual()?;
    qmp.set_balloon(whole - 4 * MIB)?;
    qmp.wait_balloon(whole - 4 * MIB, HANG_TIMEOUT)?;
    let path = format!("{TRACING}/trace");
    let trace = guest.call(ReadFile { path })?;
    let count = |text: &str| trace.lines().filter(|line| line.contains(text)).count();
    let blocks = count("balloon_hint_block: virtio");
    ensure!(
        blocks as u64 == hint_round.blocks,
        "{blocks} lines: {hint_round:?}"
    );
    ensure!(count(&format!(" id={id:#x} reserve=")) == 1, "{trace}");
    ensure!(count("balloon_hint_stop: virtio") == 1, "{trace}");
    for event in ["balloon_request", "balloon_acknowledge"] {
        // The driver may take the pages of a request from hinted blocks. The request is smaller when these blocks run
        // out.
        let lines = trace.lines().filter(|line| line.contains(event));
        let inflated = lines.filter_map(|line| line.split_once("queue=inflate pages="));
        let pages: Option<u64> = inflated
            .map(|(_, pages)| pages.trim().parse::<u64>().ok())
            .sum();
        ensure!(
            pages == Some(1024),
            "{pages:?} of {event} for 4 MiB:\n{trace}"
        );
    }
    guest.unload(Driver::Ours)?;
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}
