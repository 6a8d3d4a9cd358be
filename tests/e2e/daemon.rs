// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests starting the daemon, without a guest.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::daemon::Daemon;
use harness::scratch::Scratch;

#[test]
fn a_daemon_starts_where_another_was_killed() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let mut first = Daemon::start(&artifacts.daemon, &scratch, &["stats"], &[])?;
    first.process().kill()?;
    let mut second = Daemon::start(&artifacts.daemon, &scratch, &["stats"], &[])?;
    ensure!(second.terminate()?.success(), "the second daemon failed");
    ensure!(
        scratch.contents()?.is_empty(),
        "{:?} are left",
        scratch.contents()?
    );
    Ok(())
}
