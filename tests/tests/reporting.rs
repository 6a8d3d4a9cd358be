// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Free page reporting, and what the driver says of itself in debugfs.

use std::time::Duration;

use anyhow::{ensure, Result};
use tests::artifacts::Artifacts;
use tests::guest::{Builder, Driver};
use tests::vmm::Vmm;
use tests::MIB;

const BALLOON_LIMIT: Duration = Duration::from_secs(60);

/// Pages of 4 KiB in so many bytes.
const fn pages(bytes: u64) -> u64 {
    bytes / 4096
}

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
    qmp.balloon(whole - 100 * MIB)?;
    qmp.wait_balloon(whole - 100 * MIB, BALLOON_LIMIT)?;
    qmp.hint_start()?;
    let round = qmp.wait_hint_status("finished")?;
    let after = guest.counters()?;
    ensure!(after.get("balloon_pages")? == pages(100 * MIB), "{after:?}");
    ensure!(after.get("target_pages")? == pages(100 * MIB), "{after:?}");
    ensure!(after.get("inflate_requests")? >= 100, "{after:?}");
    ensure!(after.get("rounds_started")? == 1, "{after:?}");
    ensure!(after.get("rounds_finished")? == 1, "{after:?}");
    ensure!(
        after.get("hinted_blocks")? == round.blocks && after.get("hinted_bytes")? == round.bytes,
        "{after:?}, {round:?}"
    );
    let by_order: u64 = (0..16)
        .map(|order| after.get(&format!("hinted_blocks_order_{order}")))
        .sum::<Result<_>>()?;
    ensure!(by_order == round.blocks, "{after:?}");
    ensure!(
        after.get("hint_free_pages_low")? >= after.get("hint_reserve_pages")?,
        "the reserve was taken: {after:?}"
    );
    for queue in guest.daemon()?.virtio_status()?.queues {
        let key = format!("{}_notifications", queue.name.replace('-', "_"));
        let counted = guest.counters()?.get(&key)?;
        // The device wakes up once when the queue starts. It may take two notifications for one, and none is sent but
        // for a request.
        ensure!(
            queue.notifications <= counted + 1 && counted <= queue.requests,
            "{key} {counted}, and the device has {queue:?}"
        );
        ensure!((counted > 0) == (queue.requests > 0), "{key} {counted}");
    }
    let qmp = guest.daemon()?.qmp();
    qmp.hint_done()?;
    qmp.balloon(whole)?;
    qmp.wait_balloon(whole, BALLOON_LIMIT)?;
    let end = guest.counters()?;
    ensure!(end.get("balloon_pages")? == 0, "{end:?}");
    ensure!(end.get("deflate_requests")? >= 100, "{end:?}");
    guest.unload(Driver::Ours)?;
    ensure!(guest.counted_devices()?.is_empty(), "a folder is left");
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}
