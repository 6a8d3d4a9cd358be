// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Migrations in whose middle something goes wrong. Each time the guest at the source goes on unharmed, has back what it
//! hinted (R16), and an error says what happened.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde_json::json;
use tests::artifacts::Artifacts;
use tests::attempts::Attempts;
use tests::destination::{uri, Destination};
use tests::guest::{Builder, Driver};
use tests::migration::{State, Status};
use tests::pattern::next_random;
use tests::process::Signal;
use tests::scratch::Scratch;
use tests::stress::Load;
use tests::vmm::Vmm;
use tests::wire::{Failure, Wire};
use tests::working::Working;
use tests::{HANG_LIMIT, MIB};

/// Small, so that there can be many migrations: what goes wrong does not depend on it.
const MEMORY: u64 = 160 * MIB;
const LOAD: u64 = 32 * MIB;

/// How often a fault at a random point is tried: some times, or as often as the environment says.
const TIMES: u32 = 24;
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_CUTS";

fn working(artifacts: &Artifacts, options: &[&str]) -> Result<Working> {
    let mut all = vec!["--discard-hinted"];
    all.extend(options);
    let builder = Builder::new(artifacts, Vmm::Uml)
        .memory(MEMORY)
        .device_options(&all);
    Working::start(builder, Driver::Ours, Load::of(LOAD), 16)
}

fn times() -> Result<u32> {
    match std::env::var(TIMES_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{TIMES_VARIABLE} is not a number")),
        Err(_) => Ok(Vmm::Uml.repeats(TIMES)),
    }
}

/// Has each migration last long enough to do something in its middle.
fn slowly(working: &mut Working) -> Result<()> {
    let parameters =
        json!({ "max-bandwidth": 16 * MIB, "downtime-limit": 0, "max-rounds": 100_000 });
    working.guest.daemon()?.qmp().migrate_parameters(parameters)
}

/// Returns a line to `destination` that becomes slow after a little more than `bytes`: a migration over it cannot complete before the
/// test acts.
fn slow_line(scratch: &Scratch, destination: &Destination, bytes: u64) -> Result<Wire> {
    /// The daemon sends pieces of up to 1 MiB, and counts them afterwards.
    const MORE: u64 = 2 * MIB;
    let socket = scratch.path(&format!("wire-{bytes}"));
    Wire::start(socket, &destination.socket(), bytes + MORE, Failure::Slow)
}

/// Waits until so many bytes are on their way.
fn wait_sent(working: &mut Working, bytes: u64) -> Result<Status> {
    working.guest.daemon()?.qmp().wait_migration(
        "so many bytes sent",
        |now| now.status == State::Active && now.ram.transferred >= bytes,
        HANG_LIMIT,
    )
}

/// The migration must have failed, with a reason that holds one of `words`, and the guest run on.
fn has_failed(working: &mut Working, words: &[&str]) -> Result<String> {
    let status = working.guest.daemon()?.qmp().wait_migration_end()?;
    let why = status.error_desc.clone().unwrap_or_default();
    ensure!(
        status.status == State::Failed && words.iter().any(|word| why.contains(word)),
        "it was to fail with one of {words:?}: {status:?}"
    );
    ensure!(!working.guest.is_paused()?, "the guest stands still: {why}");
    Ok(why)
}

/// What an error may call a line that is gone.
const GONE: [&str; 5] = ["Broken pipe", "reset", "closed", "gone", "end of"];

#[test]
fn r16_a_line_that_is_cut_at_a_random_point_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    let parameters = json!({ "downtime-limit": 20, "max-rounds": 3 });
    working
        .guest
        .daemon()?
        .qmp()
        .migrate_parameters(parameters)?;
    // What a whole one takes.
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let mut whole = working.guest.migrate_to(&mut destination)?.ram.transferred;
    working.guest.resume()?;
    working.is_unharmed()?;
    let mut seed = std::process::id().into();
    println!("a whole migration takes {whole} bytes; seed {seed}");
    let mut met = Vec::new();
    let times = times()? as usize;
    let mut attempts = Attempts::default();
    for turn in 0.. {
        if met.len() == times {
            break;
        }
        ensure!(
            turn < times || attempts.may_go_on(met.len() as u64),
            "only {} were cut",
            met.len()
        );
        seed = next_random(seed);
        // In the header, in the first round, and anywhere.
        let bytes = match turn % 6 {
            0 => seed % 256,
            1 => seed % (whole / 4),
            _ => seed % (whole / 8 * 7),
        };
        let what = format!("turn {turn}, cut after {bytes} bytes");
        let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
        let wire = Wire::start(
            scratch.path(&format!("wire-{turn}")),
            &destination.socket(),
            bytes,
            Failure::Cut,
        )?;
        working.guest.start_migration(&uri(wire.socket()))?;
        let status = working.guest.daemon()?.qmp().wait_migration_end()?;
        let state = status.rounds.len();
        if status.status == State::Completed {
            // The guest has written less than it had before.
            ensure!(!wire.has_failed(), "{what}: {status:?}");
            whole = whole.min(status.ram.transferred);
            destination.wait()?;
            working.guest.resume()?;
        } else {
            let why = has_failed(&mut working, &GONE).with_context(|| what.clone())?;
            met.push((bytes, state));
            drop(wire);
            let text = destination.wait_failure().with_context(|| what.clone())?;
            ensure!(!text.is_empty(), "{what}: {why}");
        }
        if turn % 6 == 0 {
            working.is_unharmed().with_context(|| what)?;
        }
    }
    println!("cut at (bytes, rounds begun): {met:?}");
    working.end().map(drop)
}

#[test]
fn r16_a_migration_that_is_given_up_at_a_random_point_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    slowly(&mut working)?;
    let mut seed = std::process::id().into();
    println!("seed {seed}");
    let mut slowest = Duration::ZERO;
    for turn in 0..times()? / 2 {
        seed = next_random(seed);
        let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
        // Every third line stalls. The others become slow: the migration must not complete before it is cancelled.
        let (bytes, failure) = if turn % 3 == 0 {
            (seed % (4 * MIB), Failure::Stall)
        } else {
            (8 * MIB, Failure::Slow)
        };
        let wire = Wire::start(
            scratch.path(&format!("wire-{turn}")),
            &destination.socket(),
            bytes,
            failure,
        )?;
        working.guest.start_migration(&uri(wire.socket()))?;
        sleep(Duration::from_micros(seed % 300_000));
        let then = Instant::now();
        working.guest.daemon()?.qmp().migrate_cancel()?;
        let status = working.guest.daemon()?.qmp().wait_migration_end()?;
        slowest = slowest.max(then.elapsed());
        ensure!(status.status == State::Cancelled, "{status:?}");
        ensure!(!working.guest.is_paused()?, "the guest stands still");
        drop(wire);
        destination.wait_failure()?;
        if turn % 4 == 0 {
            working.is_unharmed()?;
        }
    }
    println!("the slowest took {slowest:?}");
    working.end().map(drop)
}

/// Begins a migration over a line that holds, and returns when the guest is paused, or about to be, for the last of it. The end of it
/// cannot have passed then: the line carries little between two looks.
fn paused_on_the_way(working: &mut Working, wire: &Wire) -> Result<()> {
    const AT_ONCE: u64 = 1 << 16;
    // One round, and all that was written meanwhile is to be found and sent with the guest paused.
    let parameters = json!({ "max-bandwidth": 0, "downtime-limit": 0, "max-rounds": 1 });
    let qmp = working.guest.daemon()?.qmp();
    qmp.migrate_parameters(parameters)?;
    working.guest.start_migration(&uri(wire.socket()))?;
    let deadline = Instant::now() + HANG_LIMIT;
    loop {
        let now = working.guest.daemon()?.qmp().migration()?;
        if now.status == State::Device {
            return Ok(());
        }
        ensure!(
            !now.status.is_over() && Instant::now() < deadline,
            "the guest was to be paused: {now:?}"
        );
        wire.let_pass(AT_ONCE);
    }
}

#[test]
fn r16_a_line_that_is_cut_while_the_guest_is_paused_lets_it_go_on() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    for turn in 0..2 {
        let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
        let socket = scratch.path(&format!("wire-{turn}"));
        let wire = Wire::start(socket, &destination.socket(), 0, Failure::Hold)?;
        paused_on_the_way(&mut working, &wire)?;
        wire.cut();
        println!("{}", has_failed(&mut working, &GONE)?);
        let status = working.guest.daemon()?.qmp().migration()?;
        ensure!(status.downtime.is_some(), "it was not paused: {status:?}");
        destination.wait_failure()?;
        working.is_unharmed()?;
    }
    working.end().map(drop)
}

/// Nobody is left then who would let the processes go on that it has stopped; whoever does finds a guest that is whole.
#[test]
fn r16_a_guest_whose_daemon_is_killed_while_it_is_paused_goes_on_when_it_is_told_to() -> Result<()>
{
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let wire = Wire::start(
        scratch.path("wire"),
        &destination.socket(),
        0,
        Failure::Hold,
    )?;
    paused_on_the_way(&mut working, &wire)?;
    working.guest.daemon()?.process().kill()?;
    // What is on the way may come, and then the end.
    wire.let_pass(u64::MAX);
    println!("{}", destination.wait_failure()?);
    // User-mode Linux may be late to stop or may not have been told to.
    working.guest.vmm().signal(Signal::SIGCONT)?;
    working.go_on()?;
    working.end_without_device().map(drop)
}

#[test]
fn r16_a_destination_that_is_killed_or_not_there_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    slowly(&mut working)?;
    for bytes in [1, 2 * MIB, 8 * MIB] {
        let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
        let wire = slow_line(&scratch, &destination, bytes)?;
        working.guest.start_migration(&uri(wire.socket()))?;
        wait_sent(&mut working, bytes)?;
        destination.process().kill()?;
        let why = has_failed(&mut working, &GONE)?;
        println!("killed after {bytes} bytes: {why}");
        ensure!(destination.is_incomplete(), "a part passes for a whole");
        working.is_unharmed()?;
    }
    // Nobody listens; somebody listens who is no receiver.
    working
        .guest
        .start_migration(&uri(&scratch.path("nobody")))?;
    println!("{}", has_failed(&mut working, &["No such file"])?);
    let listener = std::os::unix::net::UnixListener::bind(scratch.path("somebody"))?;
    working
        .guest
        .start_migration(&uri(&scratch.path("somebody")))?;
    let (mut somebody, _) = listener.accept()?;
    std::io::Write::write_all(&mut somebody, b"HTTP/1.1 400 Bad Request\r\n\r\n")?;
    drop(somebody);
    let status = working.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{:?}", status.error_desc);
    ensure!(
        status.status == State::Failed && status.error_desc.is_some(),
        "{status:?}"
    );
    working.is_unharmed()?;
    working.end().map(drop)
}

#[test]
fn r16_a_daemon_that_is_killed_in_a_migration_leaves_its_guest_working() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    slowly(&mut working)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let wire = slow_line(&scratch, &destination, 2 * MIB)?;
    working.guest.start_migration(&uri(wire.socket()))?;
    wait_sent(&mut working, 2 * MIB)?;
    working.guest.daemon()?.process().kill()?;
    wire.let_pass(u64::MAX);
    println!("{}", destination.wait_failure()?);
    working.go_on()?;
    working.end_without_device().map(drop)
}

#[test]
fn r16_a_daemon_that_is_told_to_end_in_a_migration_says_so_and_leaves_its_guest_working(
) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    slowly(&mut working)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let wire = slow_line(&scratch, &destination, 2 * MIB)?;
    working.guest.start_migration(&uri(wire.socket()))?;
    wait_sent(&mut working, 2 * MIB)?;
    let status = working.guest.daemon()?.terminate()?;
    ensure!(status.success(), "the daemon ended with {status}");
    wire.let_pass(u64::MAX);
    println!("{}", destination.wait_failure()?);
    working.go_on()?;
    working.end_without_device().map(drop)
}

#[test]
fn a_guest_that_is_killed_in_a_migration_fails_it() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &["--persistent"])?;
    slowly(&mut working)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let wire = slow_line(&scratch, &destination, 2 * MIB)?;
    working.guest.start_migration(&uri(wire.socket()))?;
    wait_sent(&mut working, 2 * MIB)?;
    working.guest.kill()?;
    let status = working.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{:?}", status.error_desc);
    ensure!(
        status.status == State::Failed
            && status
                .error_desc
                .as_ref()
                .is_some_and(|why| why.contains("lost its guest")),
        "{status:?}"
    );
    wire.let_pass(u64::MAX);
    println!("{}", destination.wait_failure()?);
    Ok(())
}

#[test]
fn r16_a_module_that_goes_in_a_migration_leaves_nothing_behind() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    for bytes in [0, 1, 4 * MIB, 16 * MIB] {
        slowly(&mut working)?;
        let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
        let wire = slow_line(&scratch, &destination, bytes)?;
        working.guest.start_migration(&uri(wire.socket()))?;
        if bytes > 0 {
            wait_sent(&mut working, bytes)?;
        }
        working.guest.unload(Driver::Ours)?;
        // Without hints it may go on, or say why it does not.
        let qmp = working.guest.daemon()?.qmp();
        sleep(Duration::from_millis(100));
        if !qmp.migration()?.status.is_over() {
            qmp.migrate_cancel()?;
        }
        let status = qmp.wait_migration_end()?;
        println!("{bytes}: {:?} {:?}", status.status, status.error_desc);
        ensure!(
            matches!(status.status, State::Failed | State::Cancelled),
            "{status:?}"
        );
        wire.let_pass(u64::MAX);
        destination.wait_failure()?;
        working.is_unharmed()?;
        working.guest.load(Driver::Ours)?;
    }
    working.end().map(drop)
}

/// A migration without a word from the guest is late by the limit, and whole.
#[test]
fn r14_a_guest_that_never_answers_delays_its_migration_by_the_limit_at_most() -> Result<()> {
    /// Longer than the limit that there is without this.
    const WAIT: Duration = Duration::from_secs(3);
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    let parameters = json!({ "free-page-hint-wait": WAIT.as_millis() as u64, "max-rounds": 3 });
    working
        .guest
        .daemon()?
        .qmp()
        .migrate_parameters(parameters)?;
    // It stands still: whatever it is asked, it is silent.
    working.guest.vmm().stop()?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    let status = working.guest.migrate_to(&mut destination)?;
    let outcome = working.guest.outcome(&destination)?;
    working.guest.resume()?;
    working.guest.vmm().signal(Signal::SIGCONT)?;
    let waits = status.rounds.iter().map(|round| round.hint_wait_us);
    let waits: Vec<_> = waits.map(Duration::from_micros).collect();
    println!("waited {waits:?} of {} ms in all", status.total_time);
    // A wait without a limit would never end.
    ensure!(
        waits.first().is_some_and(|wait| *wait >= WAIT),
        "it waited for {waits:?}: {status:#?}"
    );
    ensure!(
        outcome.different.ranges().is_empty(),
        "{:x?}",
        outcome.different
    );
    working.is_unharmed()?;
    working.end().map(drop)
}

#[test]
fn a_guest_without_a_driver_is_moved_without_hints() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut working = working(&artifacts, &[])?;
    working.guest.unload(Driver::Ours)?;
    let mut destination = Destination::start(&artifacts.balloonctl, working.guest.memory())?;
    working.guest.start_migration(&destination.uri())?;
    let status = working.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{status:?}");
    ensure!(status.status == State::Completed, "{status:?}");
    destination.wait()?;
    let outcome = working.guest.outcome(&destination)?;
    ensure!(outcome.different.ranges().is_empty(), "{outcome:?}");
    working.guest.resume()?;
    working.guest.load(Driver::Ours)?;
    working.end().map(drop)
}
