// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machines that are reset.

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{Fill, Free, Verify};

use super::{boot, builder, TIMEOUT};
use crate::artifacts::Artifacts;
use crate::matrix::Cell;
use crate::MIB;

/// The state of the driver when the machine is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The balloon is empty.
    Idle,
    /// The balloon is inflating.
    Inflating,
    /// The balloon is at its target.
    Inflated,
    /// The driver keeps its hinted blocks.
    DuringHintRound,
}

/// Resets the machine. The new kernel has no driver and all memory. It then loads a driver, and the balloon reaches its
/// target.
pub fn reset(artifacts: &Artifacts, cell: &Cell, reset: Reset) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder(artifacts, cell))?;
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let mut target = whole;
    match reset {
        Reset::Idle => {}
        Reset::Inflating => {
            target -= before.free / 2 / MIB * MIB;
            guest.balloon_qmp()?.set_balloon(target)?;
            guest.balloon_qmp()?.wait_balloon_below(whole, TIMEOUT)?;
        }
        Reset::Inflated => {
            target -= before.free / 2 / MIB * MIB;
            guest.balloon_qmp()?.set_balloon(target)?;
            guest.balloon_qmp()?.wait_balloon(target, TIMEOUT)?;
        }
        Reset::DuringHintRound => {
            let hint_round = guest.hint_all()?;
            ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
        }
    }
    guest.check_log()?;
    guest.reset().context("resetting the machine")?;

    let status = guest.daemon()?.virtio_status()?;
    ensure!(status.status == "no-driver", "{status:?}");
    guest.check_memory(before).context("without a driver")?;
    let filled = guest.call(Fill {
        bytes: before.free - 48 * MIB,
        keep_every: 1,
        seed: 33,
    })?;
    let workload = filled.workload;
    let found = guest.call(Verify { workload })?;
    ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
    guest.call(Free { workload })?;

    guest.load(driver)?;
    guest
        .wait_balloon_after_reload(target, TIMEOUT)
        .context("with a driver again")?;
    if reset == Reset::DuringHintRound {
        guest.daemon()?.qmp().hint_done()?;
    }
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, TIMEOUT)?;
    guest.check_memory(before)?;
    guest.exercise_fully()?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}
