// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests interrupted hint rounds: the module is unloaded, or a QMP client, the guest or the daemon ends.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::attempts::Attempts;
use harness::check::MemoryUsage;
use harness::guest::{Builder, Driver, Guest};
use harness::process::Signal;
use harness::vmm::uml::FOLDER;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

fn guest(artifacts: &Artifacts, vmm: Vmm) -> Result<Guest> {
    let mut guest = Builder::new(artifacts, vmm).boot()?;
    guest.fill_and_free(24 * MIB, 10)?;
    guest.kernel_log()?;
    Ok(guest)
}

#[test]
fn the_module_is_unloaded_in_a_hint_round_in_qemu() -> Result<()> {
    // A hint round of an emulated guest takes seconds.
    unload_during_hint_rounds(Vmm::Qemu, &[0, 1, 20, u64::MAX], Some("started"))
}

#[test]
fn the_module_is_unloaded_in_a_hint_round_in_user_mode_linux() -> Result<()> {
    // A hint round takes two milliseconds. The test cannot choose the state that an unload meets, so it unloads often.
    unload_during_hint_rounds(Vmm::Uml, &[0, 0, 0, 0, 1, 1, u64::MAX], None)
}

/// Unloads the driver during a hint round and loads it again, once for each of `blocks`: when the device has received
/// that many blocks, or the hint round has finished. Continues with `blocks` from the start until one unload began
/// while the hint round had the status `must_meet`.
fn unload_during_hint_rounds(vmm: Vmm, blocks: &[u64], must_meet: Option<&str>) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = guest(&artifacts, vmm)?;
    let before = guest.settled_memory_usage()?;
    let times = blocks.len();
    let mut attempts = Attempts::default();
    let mut met = Vec::new();
    for (time, &blocks) in blocks.iter().cycle().enumerate() {
        if time >= times && must_meet.is_none_or(|status| met.iter().any(|one| one == status)) {
            break;
        }
        ensure!(
            time < times || attempts.may_retry(0),
            "no unload met a round that was {must_meet:?}: {met:?}"
        );
        guest.load(Driver::Ours)?;
        let qmp = guest.daemon()?.qmp();
        qmp.hint_start()?;
        let hint_round = qmp.wait_hint("so many blocks", |now| {
            now.blocks >= blocks || now.status == "finished"
        })?;
        met.push(hint_round.status);
        guest.unload(Driver::Ours)?;
        guest.check_memory_and_log(before)?;
    }
    // After all unloads a hint round still hints everything.
    guest.load(Driver::Ours)?;
    guest.full_hint_round()?;
    guest.check_and_power_off(before)
}

#[test]
fn a_qmp_client_disconnects_in_a_hint_round() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = guest(&artifacts, Vmm::Uml)?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    // A stopped guest cannot finish the hint round before the client disconnects.
    guest.vmm().stop()?;
    let mut client = guest.daemon()?.connect()?;
    let id = client.hint_start()?;
    drop(client);
    let names_it =
        |line: &str| line.contains("client 2 disconnected") && line.contains(&format!("{id:#x}"));
    guest.daemon()?.process().output().wait_for(
        "a log line about the disconnected QMP client",
        names_it,
        HANG_TIMEOUT,
    )?;
    guest.vmm().signal(Signal::SIGCONT)?;
    // Another client can finish the hint round.
    let hint_round = guest.daemon()?.qmp().wait_hint_status("finished")?;
    ensure!(
        hint_round.id == Some(id) && hint_round.bytes >= before.free / 10 * 9,
        "{hint_round:?}"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_and_power_off(before)?;
    check_no_leftovers(&mut guest)
}

#[test]
fn the_guest_is_killed_in_a_hint_round() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = guest(&artifacts, vmm)?;
        guest.load(Driver::Ours)?;
        guest.vmm().stop()?;
        let id = guest.daemon()?.qmp().hint_start()?;
        guest.kill()?;
        let names_it = |line: &str| {
            line.contains(&format!("round {id:#x} ended")) && line.contains("front end")
        };
        guest.daemon()?.process().output().wait_for(
            "word of the guest's end",
            names_it,
            HANG_TIMEOUT,
        )?;
        check_no_leftovers(&mut guest).with_context(|| format!("{vmm:?}"))?;
    }
    Ok(())
}

/// Checks that the daemon exits after its guest has ended, and that no sockets or other files are left.
fn check_no_leftovers(guest: &mut Guest) -> Result<()> {
    let daemon = guest.daemon()?;
    let status = daemon.wait()?;
    ensure!(status.success(), "the daemon ended with {status}");
    ensure!(
        daemon.leftover_sockets().is_empty(),
        "the daemon left {:?}",
        daemon.leftover_sockets()
    );
    let mut files = guest.files()?;
    files.retain(|name| name != "initramfs.cpio" && name != FOLDER);
    ensure!(files.is_empty(), "{files:?} are left");
    Ok(())
}

#[test]
fn the_daemon_is_terminated_in_a_hint_round() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = guest(&artifacts, vmm)?;
        guest.load(Driver::Ours)?;
        let id = start_hint_round(&mut guest)?;
        let status = guest.daemon()?.terminate()?;
        ensure!(status.success(), "{vmm:?}: the daemon ended with {status}");
        let names_it = |line: &str| line.contains(&format!("round {id:#x} ended"));
        guest.daemon()?.process().output().wait_for(
            "word of the round's end",
            names_it,
            HANG_TIMEOUT,
        )?;
        let left = guest.daemon()?.leftover_sockets().len();
        ensure!(left == 0, "{vmm:?}: the daemon left {left} sockets");
        check_guest_survives(&mut guest).with_context(|| format!("{vmm:?}"))?;
    }
    Ok(())
}

#[test]
fn the_daemon_is_killed_in_a_hint_round() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = guest(&artifacts, vmm)?;
        guest.load(Driver::Ours)?;
        start_hint_round(&mut guest)?;
        guest.daemon()?.process().kill()?;
        check_guest_survives(&mut guest).with_context(|| format!("{vmm:?}"))?;
    }
    Ok(())
}

/// Starts a hint round. Returns when it has started (user-mode Linux) or finished (QEMU).
///
/// QEMU 11.1 aborts when a guest reads the configuration of a generic vhost-user device whose daemon has ended
/// ("Assertion `hdev->vhost_ops' failed"). The driver reads it when a hint round is announced, so the test waits longer
/// with QEMU.
fn start_hint_round(guest: &mut Guest) -> Result<u32> {
    let vmm = guest.vmm_kind();
    let qmp = guest.daemon()?.qmp();
    let id = qmp.hint_start()?;
    if vmm == Vmm::Qemu {
        qmp.wait_hint_status("finished")?;
    } else {
        qmp.wait_hint("started", |now| now.status != "requested")?;
    }
    Ok(id)
}

/// Checks a guest that has lost its device: the guest works, the module unloads, and all memory is back.
fn check_guest_survives(guest: &mut Guest) -> Result<()> {
    // Blocks in flight belong to the device until the module is unloaded, so only a part of memory is filled.
    let spare = guest.mem_info()?.total() / 2;
    guest.fill_and_free(spare, 11)?;
    guest.unload(Driver::Ours)?;
    guest.fill_and_free(48 * MIB, 12)?;
    // Processes and the per-processor page lists may use memory. The kernel may use no more than this.
    let total = guest.mem_info()?.total();
    let little = MemoryUsage {
        free: total / 10 * 9,
        used: total / 10,
    };
    guest.check_memory_with_tolerance(little, 0)?;
    guest.power_off()?;
    Ok(())
}
