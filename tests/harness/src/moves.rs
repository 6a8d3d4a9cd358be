// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What it costs to move a guest's memory: our daemon's migration beside QEMU's own, of guests that are made and used alike.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use guest_agent::calls::{WaitMemFree, WaitMemSettled};
use migration::stream::{Address, Destination, Listener, Receiver, ReceiverOptions};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::artifacts::Artifacts;
use crate::guest::{Builder, Device, Driver, Guest};
use crate::host;
use crate::qmp::Qmp;
use crate::stress::{Load, Stress};
use crate::vmm::Vmm;
use crate::{HANG_LIMIT, HANG_LIMIT_MS, MIB};

/// Bytes a second that either may send while the guest runs; it is QEMU's default.
pub const BANDWIDTH: u64 = 128 * MIB;
/// How long the guest may be paused. As in QEMU.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// After so many syncs a guest that writes faster than can be sent is paused however much is left.
const MAX_ROUNDS: u64 = 8;

/// Who moves the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// Our daemon, to a receiver that writes a memory file.
    Ours,
    /// QEMU, with its own balloon device, to a process that reads all and keeps nothing.
    QemuOwn,
}

/// What the guest does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guise {
    /// Nothing.
    Idle,
    /// [`Stress`], with a tenth of its memory.
    Stressed,
}

/// What one migration cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Pages that were never sent, neither with contents nor as zeros. Of QEMU, which does not say, at least so many.
    pub skipped: u64,
    /// From the command to the end.
    pub time: Duration,
    /// How long the guest was paused.
    pub downtime: Duration,
    /// Syncs of the dirty bitmap.
    pub rounds: u64,
    /// How writes were tracked, if that is said.
    pub tracking: String,
}

/// What QEMU and our daemon both answer to `query-migrate`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    status: String,
    #[serde(default)]
    total_time: u64,
    #[serde(default)]
    downtime: Option<u64>,
    #[serde(default)]
    ram: Option<Ram>,
    #[serde(default)]
    tracking: Option<Tracking>,
    #[serde(default)]
    error_desc: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Ram {
    total: u64,
    transferred: u64,
    normal: u64,
    duplicate: u64,
    page_size: u64,
    dirty_sync_count: u64,
    /// QEMU has or had something else by this name.
    #[serde(default)]
    skipped: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Tracking {
    mode: String,
    free_page_hint: bool,
    reason: String,
}

/// A guest whose memory is moved again and again.
#[derive(Debug)]
pub struct Moved {
    guest: Guest,
    mover: Mover,
    driver: Driver,
    /// The driver is loaded: with QEMU's own device there are hints exactly then.
    loaded: bool,
}

impl Moved {
    /// Boots an emulated guest with `memory` bytes, which hints with `driver`.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn boot(artifacts: &Artifacts, mover: Mover, driver: Driver, memory: u64) -> Result<Self> {
        let builder = Builder::new(artifacts, Vmm::Qemu)
            .memory(memory)
            .operators();
        let builder = match mover {
            Mover::Ours => builder.device_options(&["--discard-hinted"]),
            Mover::QemuOwn => builder.device(Device::QemuOwn),
        };
        Ok(Self {
            guest: builder.boot()?,
            mover,
            driver,
            loaded: false,
        })
    }

    /// Has the guest fill nine tenths of its free memory and free it again, puts it into its `guise`, and moves its memory. It goes on
    /// afterwards. Returns what that cost.
    ///
    /// # Errors
    ///
    /// If the migration fails, or the guest.
    pub fn cost(&mut self, guise: Guise, hints: bool) -> Result<Cost> {
        const SEED: u64 = 41;
        self.want_driver(self.mover == Mover::Ours || hints)?;
        self.guest.settled()?;
        let spare = self.guest.mem_info()?.free() / 10;
        self.guest.fill_and_free(spare, SEED)?;
        self.guest.settled()?;
        let stress = match guise {
            Guise::Idle => None,
            Guise::Stressed => {
                let load = Load::of(self.guest.memory() / 10);
                let stress = Stress::start(&mut self.guest, load, SEED)?;
                stress.wait_compared(&mut self.guest, 100, HANG_LIMIT)?;
                Some(stress)
            }
        };
        let cost = match self.mover {
            Mover::Ours => self.ours(hints),
            Mover::QemuOwn => self.qemus_own(guise, hints),
        }?;
        if let Some(stress) = stress {
            stress.end_whole(&mut self.guest)?;
        }
        Ok(cost)
    }

    /// Switches the guest off.
    ///
    /// # Errors
    ///
    /// If it does not go.
    pub fn power_off(mut self) -> Result<()> {
        self.guest.power_off().map(drop)
    }

    fn want_driver(&mut self, wanted: bool) -> Result<()> {
        if wanted != self.loaded {
            match (wanted, self.driver) {
                (true, driver) => self.guest.load(driver)?,
                (false, driver) => self.guest.unload(driver)?,
            }
            self.loaded = wanted;
        }
        Ok(())
    }

    fn ours(&mut self, hints: bool) -> Result<Cost> {
        let folder = tempfile::tempdir_in(host::memory_folder(self.guest.memory()))?;
        let address = Address::Unix(folder.path().join("stream"));
        let destination = Destination::single(folder.path().join("memory"));
        let receiver = Receiver::new(
            Listener::bind(&address)?,
            destination,
            ReceiverOptions::default(),
        )?;
        let received = thread::spawn(move || receiver.run());
        let parameters = json!({
            "max-bandwidth": BANDWIDTH,
            "downtime-limit": DOWNTIME_LIMIT_MS,
            "max-rounds": MAX_ROUNDS,
            "free-page-hint": hints,
            "free-page-hint-wait": HANG_LIMIT_MS,
        });
        let vmm = self.guest.operators_socket();
        let daemon = self.guest.daemon()?.qmp();
        daemon.command("migrate-set-parameters", parameters)?;
        daemon.command(
            "migrate",
            json!({ "uri": address.to_string(), "vmm-qmp": vmm }),
        )?;
        let answer = wait_end(daemon, |_, _| Ok(()))?;
        let received = received
            .join()
            .map_err(|_| anyhow!("the receiver panicked"))??;
        self.guest.monitor()?.command("cont", json!({}))?;
        let ram = answer.ram.context("a migration without memory")?;
        let tracking = answer.tracking.context("a migration without tracking")?;
        ensure!(
            tracking.free_page_hint == hints,
            "hints were to be {hints}: {}",
            tracking.reason
        );
        Ok(Cost {
            bytes: received.bytes,
            skipped: ram.skipped,
            time: Duration::from_millis(answer.total_time),
            downtime: Duration::from_millis(answer.downtime.unwrap_or_default()),
            rounds: ram.dirty_sync_count,
            tracking: tracking.mode,
        })
    }

    /// QEMU sends while hints come. So that they are not too late, it is made to wait for them by having next to no bandwidth
    /// until then: that is the best that it can do.
    fn qemus_own(&mut self, guise: Guise, hints: bool) -> Result<Cost> {
        let free = self.guest.mem_info()?.free();
        let set = |monitor: &mut Qmp, parameters: Value| {
            monitor
                .command("migrate-set-parameters", parameters)
                .map(drop)
        };
        let bandwidth = if hints { MIB } else { BANDWIDTH };
        let monitor = self.guest.monitor()?;
        set(
            monitor,
            json!({ "max-bandwidth": bandwidth, "downtime-limit": DOWNTIME_LIMIT_MS }),
        )?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        monitor.command("migrate-set-capabilities", events)?;
        monitor.command("migrate", json!({ "uri": "exec:cat >/dev/null" }))?;
        if hints {
            self.guest.call(WaitMemFree {
                at_least: 0,
                at_most: free / 4,
                limit_ms: HANG_LIMIT_MS,
            })?;
            if guise == Guise::Idle {
                self.guest.call(WaitMemSettled {
                    tolerance: MIB,
                    quiet_looks: 30,
                    limit_ms: HANG_LIMIT_MS,
                })?;
            }
            set(self.guest.monitor()?, json!({ "max-bandwidth": BANDWIDTH }))?;
        }
        let mut patient = true;
        let answer = wait_end(self.guest.monitor()?, |monitor, ram| {
            if patient && ram.dirty_sync_count > MAX_ROUNDS {
                patient = false;
                set(monitor, json!({ "downtime-limit": 60_000 }))?;
            }
            Ok(())
        })?;
        wait_postmigrate(self.guest.monitor()?)?;
        self.guest.monitor()?.command("cont", json!({}))?;
        let ram = answer.ram.context("a migration without memory")?;
        Ok(Cost {
            bytes: ram.transferred,
            skipped: (ram.total / ram.page_size).saturating_sub(ram.normal + ram.duplicate),
            time: Duration::from_millis(answer.total_time),
            downtime: Duration::from_millis(answer.downtime.unwrap_or_default()),
            rounds: ram.dirty_sync_count,
            tracking: "QEMU's own".to_owned(),
        })
    }
}

/// Waits for the migration's end, and shows `meanwhile` how it stands.
fn wait_end(
    peer: &mut Qmp,
    mut meanwhile: impl FnMut(&mut Qmp, &Ram) -> Result<()>,
) -> Result<Answer> {
    let deadline = Instant::now() + HANG_LIMIT;
    loop {
        let answer: Answer = peer.query("query-migrate")?;
        match answer.status.as_str() {
            "completed" => return Ok(answer),
            status @ ("failed" | "cancelled" | "none") => bail!(
                "the migration is {status}: {}",
                answer
                    .error_desc
                    .as_deref()
                    .unwrap_or("no reason was given")
            ),
            _ => {}
        }
        if let Some(ram) = &answer.ram {
            meanwhile(peer, ram)?;
        }
        ensure!(
            Instant::now() < deadline,
            "the migration is not over after {HANG_LIMIT:?}: {answer:?}"
        );
        peer.wait_event(
            |event| event.name == "MIGRATION",
            Duration::from_millis(100),
        )?;
    }
}

/// QEMU says that its migration is over a little before the guest can go on.
fn wait_postmigrate(monitor: &mut Qmp) -> Result<()> {
    #[derive(Deserialize)]
    struct RunState {
        status: String,
    }
    let deadline = Instant::now() + HANG_LIMIT;
    loop {
        let state: RunState = monitor.query("query-status")?;
        if state.status == "postmigrate" {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "QEMU is still {} after its migration",
            state.status
        );
        monitor.wait_event(|_| true, Duration::from_millis(20))?;
    }
}
