// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of live migration: our daemon and QEMU migrate guests with the same configuration and the same workload.

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

/// The bandwidth limit while the guest runs, in bytes per second. The value is QEMU's default.
pub const BANDWIDTH: u64 = 128 * MIB;
/// The downtime limit, as in QEMU.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// The maximum number of dirty syncs. After it, a guest that writes faster than the migration sends is paused,
/// regardless of how much is left to send.
const MAX_DIRTY_SYNCS: u64 = 8;

/// The program that migrates the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationEngine {
    /// Our daemon, to a receiver that writes a memory file.
    Ours,
    /// QEMU, with its own balloon device, to a process that discards the stream.
    QemuOwn,
}

/// The guest's workload during the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestWorkload {
    /// Nothing.
    Idle,
    /// [`Stress`], with a tenth of the guest's memory.
    Stressed,
}

/// The cost of a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MigrationCost {
    /// The number of bytes on the wire.
    pub bytes: u64,
    /// The number of pages that were never sent, either with contents or as zero pages. QEMU does not report it, so for
    /// QEMU the value is a minimum.
    pub skipped: u64,
    /// The time from the command to the end.
    pub time: Duration,
    /// The downtime.
    pub downtime: Duration,
    /// The number of dirty syncs.
    pub dirty_syncs: u64,
    /// The mode of dirty tracking.
    pub tracking: String,
}

/// The answer to `query-migrate`, from QEMU or from our daemon.
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
    /// Skipped pages. QEMU uses or has used this name for another value.
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

/// A guest whose memory is migrated repeatedly.
#[derive(Debug)]
pub struct MigrationBench {
    guest: Guest,
    engine: MigrationEngine,
    driver: Driver,
    /// Whether the driver is loaded. With QEMU's own device, the guest hints if and only if the driver is loaded.
    loaded: bool,
}

impl MigrationBench {
    /// Boots a guest of QEMU with `memory` bytes of memory. The guest hints with `driver`.
    ///
    /// # Errors
    ///
    /// Fails if the guest does not come up.
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

    /// Makes the guest fill and free nine tenths of its free memory, starts `workload`, migrates the memory and resumes
    /// the guest. Returns the cost of the migration.
    ///
    /// # Errors
    ///
    /// Fails if the migration or the workload fails.
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
    /// Same as [`Guest::power_off`].
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

    /// Migrates with QEMU.
    ///
    /// QEMU sends pages while hints arrive. A low bandwidth until the guest has hinted prevents that hints are too
    /// late. This gives QEMU its best result.
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

/// Waits until the migration has completed. Passes the state of the migration to `meanwhile` until then.
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

/// Waits until the guest can be resumed. QEMU reports the end of the migration a moment before that.
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
