// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests hint rounds and resizing while processes map, fill and compare memory all the time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{ChurnMemory, ChurnStats, ReadFile, StopChurn, WaitMemFree};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// The guest's memory, the number of processes, and the most memory that each process maps.
const MEMORY: u64 = 400 * MIB;
const PROCESSES: u64 = 3;
const EACH: u64 = 80 * MIB;
/// Memory that is left when the processes have mapped all they may and the balloon is inflated.
const LEFT: u64 = MEMORY / 10;
/// The pause between two hint rounds. Without it hint rounds would keep the only processor busy.
const PAUSE: Duration = Duration::from_millis(10);

#[test]
fn no_process_loses_a_page_while_our_driver_works_in_user_mode_linux() -> Result<()> {
    nothing_is_lost(Vmm::Uml, Driver::Ours, 400)
}

#[test]
fn no_process_loses_a_page_while_the_c_driver_works_in_user_mode_linux() -> Result<()> {
    nothing_is_lost(Vmm::Uml, Driver::C, 200)
}

#[test]
fn no_process_loses_a_page_while_our_driver_works_in_qemu() -> Result<()> {
    nothing_is_lost(Vmm::Qemu, Driver::Ours, 24)
}

#[test]
fn no_process_loses_a_page_while_the_c_driver_works_in_qemu() -> Result<()> {
    nothing_is_lost(Vmm::Qemu, Driver::C, 12)
}

/// No process may find a wrong page. With our driver there must be no OOM kill. With the C driver OOM kills are only
/// counted, because that driver takes nearly all free memory while it hints.
fn nothing_is_lost(vmm: Vmm, driver: Driver, hint_rounds: u32) -> Result<()> {
    let hint_rounds = vmm.repeats(hint_rounds);
    let artifacts = Artifacts::load()?;
    let (mut guest, before) = Builder::new(&artifacts, vmm)
        .memory(MEMORY)
        .features(&[
            "must-tell-host",
            "stats",
            "free-page-hint",
            "free-page-reporting",
        ])
        .boot_filled(24 * MIB, driver)?;
    guest.set_short_reporting_delay()?;
    let mut workloads = Vec::new();
    for seed in 1..=PROCESSES {
        workloads.push(guest.call(ChurnMemory {
            bytes: EACH,
            seed,
            rest: 0,
        })?);
    }
    let then = Instant::now();
    // Waits until the processes have mapped most of their memory.
    guest.call(WaitMemFree {
        at_least: 0,
        at_most: before.free - PROCESSES * EACH / 4 * 3,
        timeout_ms: HANG_TIMEOUT_MS,
    })?;
    println!("filled in {:?}", then.elapsed());
    let then = Instant::now();
    let inflate_by = before.free.saturating_sub(PROCESSES * EACH + LEFT) / MIB * MIB;
    ensure!(inflate_by > 0, "too little is free: {before:?}");
    let hinted = run_hint_rounds(&mut guest, hint_rounds, inflate_by)?;
    let took = then.elapsed();
    let mut all = ChurnStats {
        pieces: 0,
        bytes: 0,
        compared: 0,
        wrong: 0,
    };
    let mut killed = 0;
    for workload in workloads {
        match guest.call(StopChurn { workload }) {
            Ok(one) => {
                all.pieces += one.pieces;
                all.bytes += one.bytes;
                all.compared += one.compared;
                all.wrong += one.wrong;
            }
            Err(_) if driver == Driver::C => killed += 1,
            Err(error) => return Err(error),
        }
    }
    let kills = counted(&mut guest, "oom_kill")?;
    let stalls = counted(&mut guest, "allocstall_normal")?
        + counted(&mut guest, "allocstall_dma32").unwrap_or(0);
    println!(
        "{driver:?} driver, {vmm:?}: {hint_rounds} rounds in {took:?}, {} MiB hinted; {} MiB filled in {} pieces, {} of {} pages wrong; \
         {kills} OOM kills, {killed} processes lost, {stalls} allocation stalls",
        hinted / MIB,
        all.bytes / MIB,
        all.pieces,
        all.wrong,
        all.compared,
    );
    ensure!(all.wrong == 0 && all.compared > 0, "{all:?}");
    if driver == Driver::C {
        guest.power_off()?;
        return Ok(());
    }
    ensure!(kills == 0, "the OOM killer came {kills} times");
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

/// Runs hint rounds that finish, are cancelled or are restarted, while the target decreases and increases. Returns the
/// hinted bytes.
fn run_hint_rounds(guest: &mut Guest, hint_rounds: u32, inflate_by: u64) -> Result<u64> {
    let balloon = guest.balloon_qmp()?;
    let whole = balloon.balloon_actual()?;
    let mut hinted = 0;
    for hint_round in 0..hint_rounds {
        match hint_round % 6 {
            0 => balloon.set_balloon(whole - inflate_by)?,
            3 => balloon.set_balloon(whole)?,
            _ => {}
        }
        balloon.hint_start()?;
        match hint_round % 4 {
            // Cancels the hint round at any point.
            1 => balloon.hint_stop()?,
            2 => {
                balloon.hint_sync()?;
                hinted += balloon.wait_hint_status("finished")?.bytes;
            }
            _ => hinted += balloon.wait_hint_status("finished")?.bytes,
        }
        balloon.hint_done()?;
        sleep(PAUSE);
    }
    balloon.set_balloon(whole)?;
    balloon.wait_balloon(whole, HANG_TIMEOUT)?;
    Ok(hinted)
}

/// Returns a counter of `/proc/vmstat`.
fn counted(guest: &mut Guest, name: &str) -> Result<u64> {
    let text = guest.call(ReadFile {
        path: "/proc/vmstat".into(),
    })?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(key, _)| *key == name);
    let (_, value) = found.with_context(|| format!("/proc/vmstat has no {name}"))?;
    Ok(value.parse()?)
}
