// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that go on where `balloonctl migrate-vm` has moved them.

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
/// What is worked on.
const LOAD: u64 = 64 * MIB;
/// What the balloon has.
const INFLATE_BY: u64 = 24 * MIB;
/// How many pages each workload is to compare at each place.
const PAGES: u64 = 500;
const FEATURES: [&str; 3] = ["stats", "must-tell-host", "free-page-hint"];

/// How often the guest is moved: once, or as often as the environment says.
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_MIGRATIONS";

fn times() -> Result<u32> {
    match std::env::var(TIMES_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{TIMES_VARIABLE} is not a number")),
        Err(_) => Ok(1),
    }
}

/// What `migrate-vm` says at the end.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrateVmReport {
    downtime_ms: u64,
    memory: guest_migration::status::MigrationInfo,
}

/// A machine that waits, and who receives its memory.
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

    /// The command that moves a guest to it.
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
        // Whatever the guest and the host have to do meanwhile, hints are waited for, and steps are.
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

/// Waits until `balloonctl` has ended, and returns whether it was content, and what it said.
///
/// Once it has saved the state of the balloon, a fresh daemon goes on from that.
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

/// Moves the guest. Returns what it has left, and the memory that it has now.
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
        "moved in {} ms, {} rounds, {} MiB on the wire, {} pages skipped by hints; stood still for {} ms",
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

/// The strongest check: a guest that works is moved, and its own checks of every page that it has, in memory and in the
/// page cache, go on at the destination and find no wrong byte.
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
    let stress = Stress::start(&mut guest, StressLoad::new(LOAD), 4)?;
    stress.wait_compared(&mut guest, PAGES, HANG_TIMEOUT)?;
    let mut memory = None;
    for time in 0..times()? {
        let what = || format!("move {time}");
        let (mut source, now) = migrate_vm(&artifacts, &mut guest).with_context(what)?;
        check_source(&mut source).with_context(what)?;
        // The guest has nothing there any more: neither a process nor, at the end of this, a file.
        source.vmm.kill()?;
        drop((source, memory.replace(now)));
        guest.daemon()?.wait_driver().with_context(what)?;
        // R9: the balloon is as large as it was.
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

/// The source stands still for good, and its daemon has no driver any more.
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

/// Memory is in order: each object of the kernel's caches, and each free page, those hinted on the way among them.
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

/// A dry run changes nothing; a move that fails when the guest has stood still already, and has no balloon any more, is
/// undone; and then the guest can still be moved.
#[test]
fn a_guest_in_qemu_that_cannot_be_migrated_goes_on_where_it_is() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let folder = TempDir::with_prefix_in("vballoon-here-", memory_folder(MEMORY))?;
    let file = folder.path().join("memory");
    let mut guest = builder(&artifacts, &file).boot()?;
    guest.load(Driver::Ours)?;
    let stress = Stress::start(&mut guest, StressLoad::new(LOAD), 5)?;
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
        "the guest goes on at the source",
        "the balloon is plugged in again at the source",
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
