// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests `balloonctl migrate-vm`: guests continue at the destination, or at the source after a rollback.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, ReadFile, Verify};
use harness::daemon::Daemon;
use harness::destination::Destination;
use harness::guest::{Builder, Driver, Guest, IncomingVm, SourceVm};
use harness::host::memory_folder;
use harness::process::{Process, Streams};
use harness::stress::{Stress, StressLoad};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

const MEMORY: u64 = 256 * MIB;
/// Memory that the workloads use.
const LOAD: u64 = 64 * MIB;
/// The size of the balloon.
const INFLATE_BY: u64 = 24 * MIB;
/// The number of pages that each workload must compare before and after each migration.
const PAGES: u64 = 500;
const FEATURES: [&str; 3] = ["stats", "must-tell-host", "free-page-hint"];

/// The environment variable with the number of migrations. The default is one.
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_MIGRATIONS";

fn times() -> Result<u32> {
    match std::env::var(TIMES_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{TIMES_VARIABLE} is not a number")),
        Err(_) => Ok(1),
    }
}

/// The report that `migrate-vm` prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrateVmReport {
    downtime_ms: u64,
    memory: guest_migration::status::MigrationInfo,
}

/// The destination: a VM that waits for a guest, and the process that receives the guest's memory.
struct DestinationVm {
    waiting: IncomingVm,
    destination: Destination,
}

impl DestinationVm {
    fn start(artifacts: &Artifacts) -> Result<Self> {
        let destination = Destination::start(&artifacts.balloonctl, MEMORY)?;
        let file = destination.memory_file();
        let waiting = builder(artifacts, &file).start_incoming()?;
        Ok(Self {
            waiting,
            destination,
        })
    }

    /// Returns the `migrate-vm` command that moves `guest` to this destination.
    fn command(&self, artifacts: &Artifacts, guest: &mut Guest, more: &[&str]) -> Result<Command> {
        let mut command = Command::new(&artifacts.balloonctl);
        let scratch = self.waiting.scratch();
        command.arg("--qmp").arg(guest.daemon()?.qmp_socket());
        command.args(["--json", "migrate-vm", "--to", &self.destination.uri()]);
        for (option, path) in [
            ("--source-qmp", guest.vmm_qmp_socket().context("no socket")?),
            ("--destination-qmp", self.waiting.vmm_qmp_socket()),
            ("--device-socket", scratch.path("balloon.sock")),
            ("--device-state", scratch.path("device-state")),
        ] {
            command.arg(option).arg(path);
        }
        // Long limits for hints and steps: load on the guest or the host must not fail the migration.
        command.args(["--hint-wait", &HANG_TIMEOUT_MS.to_string()]);
        command.args(["--step-limit", &HANG_TIMEOUT.as_secs().to_string()]);
        command.args(more);
        Ok(command)
    }
}

fn builder<'a>(artifacts: &'a Artifacts, memory: &'a Path) -> Builder<'a> {
    Builder::new(artifacts, Vmm::Qemu)
        .memory(MEMORY)
        .memory_file(memory)
        .hotplug_slot()
        .qmp_socket()
        .features(&FEATURES)
        .device_options(&["--persistent", "--discard-hinted"])
}

/// Waits until `balloonctl` exits. Returns its process, and the daemon of the destination if there is one.
///
/// Starts this daemon as soon as `balloonctl` has saved the device state. The daemon continues from that state.
fn wait(
    artifacts: &Artifacts,
    destination_vm: &DestinationVm,
    command: Command,
) -> Result<(Process, Option<Daemon>)> {
    let mut child = Process::start("balloonctl migrate-vm", command, Streams::Collected)?;
    let scratch = destination_vm.waiting.scratch();
    let state = scratch.path("device-state");
    let deadline = Instant::now() + HANG_TIMEOUT;
    let mut daemon = None;
    while child.status()?.is_none() {
        if daemon.is_none() && state.exists() {
            let options = ["--persistent", "--discard-hinted", "--device-state"];
            let path = state.to_str().context("a strange path")?;
            let options: Vec<&str> = options.into_iter().chain([path]).collect();
            daemon = Some(Daemon::start(
                &artifacts.daemon,
                scratch,
                &FEATURES,
                &options,
            )?);
        }
        if Instant::now() > deadline {
            bail!(
                "it was not done within {HANG_TIMEOUT:?}\n{}",
                child.diagnostics()
            );
        }
        sleep(Duration::from_millis(5));
    }
    Ok((child, daemon))
}

/// Migrates the guest. Returns the source VM and the destination, which has the guest's memory now.
fn migrate_vm(artifacts: &Artifacts, guest: &mut Guest) -> Result<(SourceVm, Destination)> {
    let mut destination_vm = DestinationVm::start(artifacts)?;
    let command = destination_vm.command(artifacts, guest, &["--downtime-limit", "100"])?;
    let (mut child, daemon) = wait(artifacts, &destination_vm, command)?;
    let ended = child.status()?.context("it runs")?;
    ensure!(ended.success(), "{}", child.diagnostics());
    let report: MigrateVmReport = serde_json::from_str(&child.output().text())
        .with_context(|| format!("a strange result\n{}", child.diagnostics()))?;
    destination_vm.destination.wait()?;
    let ram = &report.memory.ram;
    println!(
        "migrated in {} ms, {} iterations, {} MiB on the wire, {} pages skipped by hints; downtime {} ms",
        report.memory.total_time,
        report.memory.rounds.len(),
        ram.transferred / MIB,
        ram.skipped,
        report.downtime_ms
    );
    ensure!(ram.hinted > 0, "no hints were used: {:?}", report.memory);
    ensure!(
        ram.missed == 0,
        "tracking missed pages: {:?}",
        report.memory
    );
    let daemon = daemon.context("the state of the balloon was not saved")?;
    let source = guest.switch_to(destination_vm.waiting, daemon);
    Ok((source, destination_vm.destination))
}

/// The strongest test: the guest is migrated while it works. Its workloads check every page that they own, in memory
/// and in the page cache. They continue at the destination and find no wrong byte.
#[test]
fn r15_a_guest_in_qemu_goes_on_where_it_is_migrated_to() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let folder = TempDir::with_prefix_in("vballoon-here-", memory_folder(MEMORY))?;
    let file = folder.path().join("memory");
    let (mut guest, _) = builder(&artifacts, &file).boot_filled(24 * MIB, Driver::Ours)?;
    let balloon = guest.balloon_qmp()?;
    let target = balloon.balloon_actual()? - INFLATE_BY;
    balloon.set_balloon(target)?;
    balloon.wait_balloon(target, HANG_TIMEOUT)?;
    let stress = Stress::start(&mut guest, StressLoad::new(LOAD).with_rests(), 4)?;
    stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;
    let mut memory = None;
    for time in 0..times()? {
        let what = || format!("move {time}");
        let (mut source, now) = migrate_vm(&artifacts, &mut guest).with_context(what)?;
        check_source(&mut source).with_context(what)?;
        // The guest depends on nothing at the source any longer: the VMM ends here, and the memory file goes away.
        source.vmm.kill()?;
        drop((source, memory.replace(now)));
        guest.daemon()?.wait_driver().with_context(what)?;
        // R9: the balloon keeps its size.
        guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
        stress
            .wait_compared(&mut guest, PAGES, HANG_TIMEOUT)
            .with_context(what)?;
    }
    let done = stress.end_and_verify(&mut guest)?;
    println!("{done:?}");
    check_all_memory(&mut guest)?;
    guest.unload(Driver::Ours)?;
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

/// Checks that the source VM stays paused and that its daemon has no driver.
fn check_source(source: &mut SourceVm) -> Result<()> {
    #[derive(Debug, Deserialize)]
    struct RunState {
        status: String,
        running: bool,
    }
    let monitor = source.monitor.as_mut().context("no monitor")?;
    let state: RunState = monitor.query("query-status")?;
    ensure!(
        !state.running && state.status == "postmigrate",
        "the source is {state:?}"
    );
    let daemon = source.daemon.as_mut().context("no daemon")?;
    let status = daemon.virtio_status()?.status;
    ensure!(status != "running", "the source's balloon is {status}");
    Ok(())
}

/// Checks the guest's memory: reads the counts of the kernel's slab caches, and hints and then fills nearly all free
/// pages, including those hinted during the migration.
fn check_all_memory(guest: &mut Guest) -> Result<()> {
    let before = guest.settled_memory_usage()?;
    let slabs = guest.call(ReadFile {
        path: "/proc/slabinfo".into(),
    })?;
    ensure!(slabs.lines().count() > 50, "a strange slabinfo: {slabs}");
    guest.hint_all()?;
    guest.daemon()?.qmp().hint_done()?;
    let filled = guest.call(Fill {
        bytes: before.free - 40 * MIB,
        keep_every: 1,
        seed: 44,
    })?;
    let workload = filled.workload;
    let found = guest.call(Verify { workload })?;
    ensure!(found.wrong == 0 && found.pages == filled.pages, "{found:?}");
    guest.call(Free { workload })?;
    guest.settled_memory_usage()?;
    guest.check_log()
}

/// A dry run changes nothing. A migration that fails after the guest was paused and the balloon unplugged is rolled
/// back. The guest can still be migrated afterwards.
#[test]
fn a_guest_in_qemu_that_cannot_be_migrated_goes_on_where_it_is() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let folder = TempDir::with_prefix_in("vballoon-here-", memory_folder(MEMORY))?;
    let file = folder.path().join("memory");
    let mut guest = builder(&artifacts, &file).boot()?;
    guest.load(Driver::Ours)?;
    let stress = Stress::start(&mut guest, StressLoad::new(LOAD).with_rests(), 5)?;
    stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;

    let destination_vm = DestinationVm::start(&artifacts)?;
    let command = destination_vm.command(&artifacts, &mut guest, &["--dry-run"])?;
    let (mut child, daemon) = wait(&artifacts, &destination_vm, command)?;
    let ended = child.status()?.context("it runs")?;
    ensure!(
        ended.success() && daemon.is_none(),
        "{}",
        child.diagnostics()
    );
    let plan: Value = serde_json::from_str(&child.output().text())?;
    let steps = plan["steps"].as_array().context("no steps")?;
    let commands: Vec<&str> = steps
        .iter()
        .filter_map(|step| step["order"]["execute"].as_str())
        .collect();
    for command in [
        "device_del",
        "stop",
        "migrate-incoming",
        "device_add",
        "cont",
    ] {
        ensure!(commands.contains(&command), "{commands:?}");
    }

    let nowhere = format!("file:{}", folder.path().join("none/state").display());
    let command = destination_vm.command(&artifacts, &mut guest, &["--vm-state", &nowhere])?;
    let (mut child, daemon) = wait(&artifacts, &destination_vm, command)?;
    let ended = child.status()?.context("it runs")?;
    ensure!(ended.code() == Some(1), "{}", child.diagnostics());
    let log = child.output().text();
    for words in [
        "guest runs at the source again",
        "balloon is plugged in again at the source",
    ] {
        ensure!(log.contains(words), "{log}");
    }
    drop((daemon, destination_vm));
    guest.daemon()?.wait_driver()?;
    stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;

    let (source, _memory) = migrate_vm(&artifacts, &mut guest)?;
    drop(source);
    stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;
    stress.end_and_verify(&mut guest)?;
    check_all_memory(&mut guest)?;
    guest.power_off()?;
    Ok(())
}
