// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the driver's counters in debugfs against the device's.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::counters::Counters;
use harness::daemon::QueueStatus;
use harness::driver_cost::{measure_hint_round, NotificationSuppression};
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn the_drivers_counters_agree_with_the_devices() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    guest.load(Driver::Ours)?;
    let before = guest.counters()?;
    ensure!(before.get("balloon_pages")? == 0, "{before:?}");
    ensure!(before.get("rounds_started")? == 0, "{before:?}");

    let qmp = guest.daemon()?.qmp();
    let whole = qmp.balloon_actual()?;
    qmp.set_balloon(whole - 100 * MIB)?;
    qmp.wait_balloon(whole - 100 * MIB, HANG_TIMEOUT)?;
    qmp.hint_start()?;
    let hint_round = qmp.wait_hint_status("finished")?;
    // The driver counts a hint round after it has sent STOP.
    let after = guest.wait_counter("rounds_finished", 1, HANG_TIMEOUT)?;
    ensure!(after.get("balloon_pages")? == 100 * MIB / 4096, "{after:?}");
    ensure!(after.get("target_pages")? == 100 * MIB / 4096, "{after:?}");
    ensure!(after.get("inflate_requests")? >= 100, "{after:?}");
    ensure!(after.get("rounds_started")? == 1, "{after:?}");
    ensure!(after.get("rounds_finished")? == 1, "{after:?}");
    ensure!(
        after.get("hinted_blocks")? == hint_round.blocks
            && after.get("hinted_bytes")? == hint_round.bytes,
        "{after:?}, {hint_round:?}"
    );
    let by_order: u64 = (0..16)
        .map(|order| after.get(&format!("hinted_blocks_order_{order}")))
        .sum::<Result<_>>()?;
    ensure!(by_order == hint_round.blocks, "{after:?}");
    ensure!(
        after.get("hint_free_pages_low")? >= after.get("hint_reserve_pages")?,
        "the reserve was taken: {after:?}"
    );
    for queue in guest.daemon()?.virtio_status()?.queues {
        let key = format!("{}_notifications", queue.name.replace('-', "_"));
        let counted = guest.counters()?.get(&key)?;
        // The device wakes up once when the queue starts, and it may merge notifications. The driver sends a
        // notification only for a request.
        ensure!(
            queue.notifications <= counted + 1 && counted <= queue.requests,
            "{key} {counted}, and the device has {queue:?}"
        );
        ensure!((counted > 0) == (queue.requests > 0), "{key} {counted}");
    }
    let qmp = guest.daemon()?.qmp();
    qmp.hint_done()?;
    qmp.set_balloon(whole)?;
    qmp.wait_balloon(whole, HANG_TIMEOUT)?;
    let end = guest.counters()?;
    ensure!(end.get("balloon_pages")? == 0, "{end:?}");
    ensure!(end.get("deflate_requests")? >= 100, "{end:?}");
    guest.unload(Driver::Ours)?;
    ensure!(
        guest.devices_with_counters()?.is_empty(),
        "a folder is left"
    );
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn the_driver_counts_the_notifications_that_the_device_counts() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .device_options(NotificationSuppression::Never.options())
        .boot()?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    measure_hint_round(&mut guest)?;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    for target in [whole - 200 * MIB, whole] {
        let qmp = guest.daemon()?.qmp();
        qmp.set_balloon(target)?;
        qmp.wait_balloon(target, HANG_TIMEOUT)?;
    }
    // The device may read the last notifications late.
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        let counters = guest.counters()?;
        let queues = guest.daemon()?.virtio_status()?.queues;
        match agree(&counters, &queues) {
            Ok(()) => break,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(10)),
        }
    }
    guest.check_and_power_off(before)
}

/// Fails unless the driver and the device have counted the same notifications, at least one per queue.
fn agree(counters: &Counters, queues: &[QueueStatus]) -> Result<()> {
    for queue in queues {
        let name = queue.name.replace('-', "_");
        let driver = counters.get(&format!("{name}_notifications"))?;
        ensure!(
            driver == queue.notifications && driver > 0,
            "{name}: the driver counted {driver} notifications, the device {queue:?}"
        );
        // One interrupt may cover several signals of the device. No interrupt comes without a signal.
        let taken = counters.get(&format!("{name}_interrupts"))?;
        ensure!(
            taken <= queue.interrupts,
            "{name}: the driver took {taken} interrupts, the device gave {queue:?}"
        );
    }
    Ok(())
}
