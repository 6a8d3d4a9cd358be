// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What it costs to move a guest's memory: our daemon's migration beside QEMU's own, of guests that are made and used alike.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use guest_agent::calls::{WaitMemFree, WaitMemSettled};
use guest_migration::stream::{Address, Destination, Listener, Receiver, ReceiverOptions};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::artifacts::Artifacts;
use crate::guest::{Builder, Device, Driver, Guest};
use crate::host;
use crate::qmp::Qmp;
use crate::stress::{Stress, StressLoad};
use crate::vmm::Vmm;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// Bytes a second that either may send while the guest runs; it is QEMU's default.
pub const BANDWIDTH: u64 = 128 * MIB;
/// How long the guest may be paused. As in QEMU.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// After so many syncs a guest that writes faster than can be sent is paused however much is left.
const MAX_DIRTY_SYNCS: u64 = 8;

/// Who moves the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationEngine {
    /// Our daemon, to a receiver that writes a memory file.
    Ours,
    /// QEMU, with its own balloon device, to a process that reads all and keeps nothing.
    QemuOwn,
}

/// What the guest does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestWorkload {
    /// Nothing.
    Idle,
    /// [`Stress`], with a tenth of its memory.
    Stressed,
}

/// What one migration cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MigrationCost {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Pages that were never sent, neither with contents nor as zeros. Of QEMU, which does not say, at least so many.
    pub skipped: u64,
    /// From the command to the end.
    pub time: Duration,
    /// How long the guest was paused.
    pub downtime: Duration,
    /// Syncs of the dirty bitmap.
    pub dirty_syncs: u64,
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
pub struct MigrationBench {
    guest: Guest,
    engine: MigrationEngine,
    driver: Driver,
    /// The driver is loaded: with QEMU's own device there are hints exactly then.
    loaded: bool,
}

impl MigrationBench {
    /// Boots an emulated guest with `memory` bytes, which hints with `driver`.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn boot(
        artifacts: &Artifacts,
        engine: MigrationEngine,
        driver: Driver,
        memory: u64,
    ) -> Result<Self> {
        let builder = Builder::new(artifacts, Vmm::Qemu)
            .memory(memory)
            .qmp_socket();
        let builder = match engine {
            MigrationEngine::Ours => builder.device_options(&["--discard-hinted"]),
            MigrationEngine::QemuOwn => builder.device(Device::QemuOwn),
        };
        Ok(Self {
            guest: builder.boot()?,
            engine,
            driver,
            loaded: false,
        })
    }

    /// Has the guest fill nine tenths of its free memory and free it again, puts it into its `workload`, and moves its memory. It goes on
    /// afterwards. Returns what that cost.
    ///
    /// # Errors
    ///
    /// If the migration fails, or the guest.
    pub fn measure(&mut self, workload: GuestWorkload, hints: bool) -> Result<MigrationCost> {
        const SEED: u64 = 41;
        self.set_driver_loaded(self.engine == MigrationEngine::Ours || hints)?;
        self.guest.settled_memory_usage()?;
        let spare = self.guest.mem_info()?.free() / 10;
        self.guest.fill_and_free(spare, SEED)?;
        self.guest.settled_memory_usage()?;
        let stress = match workload {
            GuestWorkload::Idle => None,
            GuestWorkload::Stressed => {
                let load = StressLoad::new(self.guest.memory() / 10);
                let stress = Stress::start(&mut self.guest, load, SEED)?;
                stress.wait_compared(&mut self.guest, 100, HANG_TIMEOUT)?;
                Some(stress)
            }
        };
        let cost = match self.engine {
            MigrationEngine::Ours => self.migrate_with_daemon(hints),
            MigrationEngine::QemuOwn => self.migrate_with_qemu(workload, hints),
        }?;
        if let Some(stress) = stress {
            stress.end_and_verify(&mut self.guest)?;
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

    fn set_driver_loaded(&mut self, wanted: bool) -> Result<()> {
        if wanted != self.loaded {
            match (wanted, self.driver) {
                (true, driver) => self.guest.load(driver)?,
                (false, driver) => self.guest.unload(driver)?,
            }
            self.loaded = wanted;
        }
        Ok(())
    }

    fn migrate_with_daemon(&mut self, hints: bool) -> Result<MigrationCost> {
        let folder = tempfile::tempdir_in(host::memory_folder(self.guest.memory()))?;
        let address = Address::Unix(folder.path().join("stream"));
        let destination = Destination::with_file(folder.path().join("memory"));
        let receiver = Receiver::new(
            Listener::bind(&address)?,
            destination,
            ReceiverOptions::default(),
        )?;
        let received = thread::spawn(move || receiver.run());
        let parameters = json!({
            "max-bandwidth": BANDWIDTH,
            "downtime-limit": DOWNTIME_LIMIT_MS,
            "max-rounds": MAX_DIRTY_SYNCS,
            "free-page-hint": hints,
            "free-page-hint-wait": HANG_TIMEOUT_MS,
        });
        let vmm = self.guest.vmm_qmp_socket();
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
        Ok(MigrationCost {
            bytes: received.bytes,
            skipped: ram.skipped,
            time: Duration::from_millis(answer.total_time),
            downtime: Duration::from_millis(answer.downtime.unwrap_or_default()),
            dirty_syncs: ram.dirty_sync_count,
            tracking: tracking.mode,
        })
    }

    /// QEMU sends while hints come. So that they are not too late, it is made to wait for them by having next to no bandwidth
    /// until then: that is the best that it can do.
    fn migrate_with_qemu(&mut self, workload: GuestWorkload, hints: bool) -> Result<MigrationCost> {
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
                timeout_ms: HANG_TIMEOUT_MS,
            })?;
            if workload == GuestWorkload::Idle {
                self.guest.call(WaitMemSettled {
                    tolerance: MIB,
                    stable_samples: 30,
                    timeout_ms: HANG_TIMEOUT_MS,
                })?;
            }
            set(self.guest.monitor()?, json!({ "max-bandwidth": BANDWIDTH }))?;
        }
        let mut within_limit = true;
        let answer = wait_end(self.guest.monitor()?, |monitor, ram| {
            if within_limit && ram.dirty_sync_count > MAX_DIRTY_SYNCS {
                within_limit = false;
                set(monitor, json!({ "downtime-limit": 60_000 }))?;
            }
            Ok(())
        })?;
        wait_postmigrate(self.guest.monitor()?)?;
        self.guest.monitor()?.command("cont", json!({}))?;
        let ram = answer.ram.context("a migration without memory")?;
        Ok(MigrationCost {
            bytes: ram.transferred,
            skipped: (ram.total / ram.page_size).saturating_sub(ram.normal + ram.duplicate),
            time: Duration::from_millis(answer.total_time),
            downtime: Duration::from_millis(answer.downtime.unwrap_or_default()),
            dirty_syncs: ram.dirty_sync_count,
            tracking: "QEMU's own".to_owned(),
        })
    }
}

/// Waits for the migration's end, and shows `meanwhile` how it stands.
fn wait_end(
    client: &mut Qmp,
    mut meanwhile: impl FnMut(&mut Qmp, &Ram) -> Result<()>,
) -> Result<Answer> {
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        let answer: Answer = client.query("query-migrate")?;
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
            meanwhile(client, ram)?;
        }
        ensure!(
            Instant::now() < deadline,
            "the migration is not over after {HANG_TIMEOUT:?}: {answer:?}"
        );
        client.wait_event(
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
    let deadline = Instant::now() + HANG_TIMEOUT;
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
