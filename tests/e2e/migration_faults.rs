// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests migrations that fail midway. Each time the guest continues unharmed at the source and has its hinted blocks
//! back (R16), and an error says what happened.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::attempts::Attempts;
use harness::destination::{uri, Destination};
use harness::guest::Driver;
use harness::migration::{MigrationInfo, MigrationStatus};
use harness::pattern::next_random;
use harness::process::Signal;
use harness::proxy::{FaultProxy, ProxyFault};
use harness::scratch::Scratch;
use harness::stressed_guest::StressedGuest;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};
use serde_json::json;

/// The number of faults at random points, unless the environment variable sets it.
const TIMES: u32 = 24;
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_CUTS";

fn times() -> Result<u32> {
    match std::env::var(TIMES_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{TIMES_VARIABLE} is not a number")),
        Err(_) => Ok(Vmm::Uml.repeats(TIMES)),
    }
}

/// Limits the bandwidth, so that each migration lasts long enough to be interrupted.
fn limit_bandwidth(stressed_guest: &mut StressedGuest) -> Result<()> {
    let parameters =
        json!({ "max-bandwidth": 16 * MIB, "downtime-limit": 0, "max-rounds": 100_000 });
    stressed_guest
        .guest
        .daemon()?
        .qmp()
        .migrate_set_parameters(parameters)
}

/// Starts a proxy to `destination` that becomes slow after a little more than `bytes`. A migration through it cannot
/// complete before the test acts.
fn slow_proxy(scratch: &Scratch, destination: &Destination, bytes: u64) -> Result<FaultProxy> {
    /// The daemon sends chunks of up to 1 MiB and counts them after sending.
    const MORE: u64 = 2 * MIB;
    let socket = scratch.path(&format!("wire-{bytes}"));
    FaultProxy::start(
        socket,
        &destination.socket(),
        bytes + MORE,
        ProxyFault::Slow,
    )
}

/// Waits until the migration has transferred `bytes`.
fn wait_sent(stressed_guest: &mut StressedGuest, bytes: u64) -> Result<MigrationInfo> {
    stressed_guest.guest.daemon()?.qmp().wait_migration(
        "enough bytes sent",
        |now| now.status == MigrationStatus::Active && now.ram.transferred >= bytes,
        HANG_TIMEOUT,
    )
}

/// Checks that the migration has failed with one of `words` in its error, and that the guest runs. Returns the error.
fn check_failed(stressed_guest: &mut StressedGuest, words: &[&str]) -> Result<String> {
    let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
    let why = status.error_desc.clone().unwrap_or_default();
    ensure!(
        status.status == MigrationStatus::Failed && words.iter().any(|word| why.contains(word)),
        "it was to fail with one of {words:?}: {status:?}"
    );
    ensure!(
        !stressed_guest.guest.is_paused()?,
        "the guest is paused: {why}"
    );
    Ok(why)
}

/// Texts by which an error may describe a lost connection.
const CONNECTION_LOST: [&str; 5] = ["Broken pipe", "reset", "closed", "gone", "end of"];

#[test]
fn r16_a_connection_that_is_cut_at_a_random_point_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    let parameters = json!({ "downtime-limit": 20, "max-rounds": 3 });
    stressed_guest
        .guest
        .daemon()?
        .qmp()
        .migrate_set_parameters(parameters)?;
    // Measures a complete migration.
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let mut whole = stressed_guest
        .guest
        .migrate_to(&mut destination)?
        .ram
        .transferred;
    stressed_guest.guest.resume()?;
    stressed_guest.check_unharmed()?;
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
            turn < times || attempts.may_retry(met.len() as u64),
            "only {} were cut",
            met.len()
        );
        seed = next_random(seed);
        // In the header, in the first iteration, and anywhere.
        let bytes = match turn % 6 {
            0 => seed % 256,
            1 => seed % (whole / 4),
            _ => seed % (whole / 8 * 7),
        };
        let what = format!("turn {turn}, cut after {bytes} bytes");
        let mut destination =
            Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
        let proxy = FaultProxy::start(
            scratch.path(&format!("wire-{turn}")),
            &destination.socket(),
            bytes,
            ProxyFault::Cut,
        )?;
        stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
        let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
        let state = status.rounds.len();
        if status.status == MigrationStatus::Completed {
            // The guest has written less than during the measured migration.
            ensure!(!proxy.has_failed(), "{what}: {status:?}");
            whole = whole.min(status.ram.transferred);
            destination.wait()?;
            stressed_guest.guest.resume()?;
        } else {
            let why = check_failed(&mut stressed_guest, &CONNECTION_LOST)
                .with_context(|| what.clone())?;
            met.push((bytes, state));
            drop(proxy);
            let text = destination.wait_failure().with_context(|| what.clone())?;
            ensure!(!text.is_empty(), "{what}: {why}");
        }
        if turn % 6 == 0 {
            stressed_guest.check_unharmed().with_context(|| what)?;
        }
    }
    println!("cut at (bytes, iterations begun): {met:?}");
    stressed_guest.end().map(drop)
}

#[test]
fn r16_a_migration_that_is_cancelled_at_a_random_point_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    limit_bandwidth(&mut stressed_guest)?;
    let mut seed = std::process::id().into();
    println!("seed {seed}");
    let mut slowest = Duration::ZERO;
    for turn in 0..times()? / 2 {
        seed = next_random(seed);
        let mut destination =
            Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
        // Every third proxy stalls. The others become slow, so that no migration completes before the test cancels it.
        let (bytes, fault) = if turn % 3 == 0 {
            (seed % (4 * MIB), ProxyFault::Stall)
        } else {
            (8 * MIB, ProxyFault::Slow)
        };
        let proxy = FaultProxy::start(
            scratch.path(&format!("wire-{turn}")),
            &destination.socket(),
            bytes,
            fault,
        )?;
        stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
        sleep(Duration::from_micros(seed % 300_000));
        let then = Instant::now();
        stressed_guest.guest.daemon()?.qmp().migrate_cancel()?;
        let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
        slowest = slowest.max(then.elapsed());
        ensure!(status.status == MigrationStatus::Cancelled, "{status:?}");
        ensure!(!stressed_guest.guest.is_paused()?, "the guest is paused");
        drop(proxy);
        destination.wait_failure()?;
        if turn % 4 == 0 {
            stressed_guest.check_unharmed()?;
        }
    }
    println!("the slowest took {slowest:?}");
    stressed_guest.end().map(drop)
}

/// Starts a migration through a proxy that holds. Returns when the guest is paused, or about to be paused, for the last
/// iteration. The last iteration cannot be over then, because the proxy forwards little data between two queries.
fn migrate_until_switchover(stressed_guest: &mut StressedGuest, proxy: &FaultProxy) -> Result<()> {
    const AT_ONCE: u64 = 1 << 16;
    // One iteration. All later writes are found and sent while the guest is paused.
    let parameters = json!({ "max-bandwidth": 0, "downtime-limit": 0, "max-rounds": 1 });
    let qmp = stressed_guest.guest.daemon()?.qmp();
    qmp.migrate_set_parameters(parameters)?;
    stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        let now = stressed_guest.guest.daemon()?.qmp().query_migrate()?;
        if now.status == MigrationStatus::Device {
            return Ok(());
        }
        ensure!(
            !now.status.is_over() && Instant::now() < deadline,
            "the guest was to be paused: {now:?}"
        );
        proxy.allow_bytes(AT_ONCE);
    }
}

#[test]
fn r16_a_connection_that_is_cut_while_the_guest_is_paused_lets_it_go_on() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    for turn in 0..2 {
        let mut destination =
            Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
        let socket = scratch.path(&format!("wire-{turn}"));
        let proxy = FaultProxy::start(socket, &destination.socket(), 0, ProxyFault::Hold)?;
        migrate_until_switchover(&mut stressed_guest, &proxy)?;
        proxy.cut();
        println!("{}", check_failed(&mut stressed_guest, &CONNECTION_LOST)?);
        let status = stressed_guest.guest.daemon()?.qmp().query_migrate()?;
        ensure!(status.downtime.is_some(), "it was not paused: {status:?}");
        destination.wait_failure()?;
        stressed_guest.check_unharmed()?;
    }
    stressed_guest.end().map(drop)
}

/// If the daemon is killed while the guest is paused, nothing resumes the processes that it has stopped. After SIGCONT
/// the guest continues unharmed.
#[test]
fn r16_a_guest_whose_daemon_is_killed_while_it_is_paused_goes_on_when_it_is_told_to() -> Result<()>
{
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let proxy = FaultProxy::start(
        scratch.path("wire"),
        &destination.socket(),
        0,
        ProxyFault::Hold,
    )?;
    migrate_until_switchover(&mut stressed_guest, &proxy)?;
    stressed_guest.guest.daemon()?.process().kill()?;
    // The destination receives the data in transit, and then the end of the stream.
    proxy.allow_bytes(u64::MAX);
    println!("{}", destination.wait_failure()?);
    // User-mode Linux may stop late, or the daemon may not have stopped it yet.
    stressed_guest.guest.vmm().signal(Signal::SIGCONT)?;
    stressed_guest.check_progress()?;
    stressed_guest.end_without_device().map(drop)
}

#[test]
fn r16_a_destination_that_is_killed_or_not_there_harms_nobody() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    limit_bandwidth(&mut stressed_guest)?;
    for bytes in [1, 2 * MIB, 8 * MIB] {
        let mut destination =
            Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
        let proxy = slow_proxy(&scratch, &destination, bytes)?;
        stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
        wait_sent(&mut stressed_guest, bytes)?;
        destination.process().kill()?;
        let why = check_failed(&mut stressed_guest, &CONNECTION_LOST)?;
        println!("killed after {bytes} bytes: {why}");
        ensure!(destination.is_incomplete(), "a part passes for a whole");
        stressed_guest.check_unharmed()?;
    }
    // First nothing listens, then a listener that is no receiver.
    stressed_guest
        .guest
        .start_migration(&uri(&scratch.path("absent")))?;
    println!("{}", check_failed(&mut stressed_guest, &["No such file"])?);
    let listener = std::os::unix::net::UnixListener::bind(scratch.path("somebody"))?;
    stressed_guest
        .guest
        .start_migration(&uri(&scratch.path("somebody")))?;
    let (mut somebody, _) = listener.accept()?;
    std::io::Write::write_all(&mut somebody, b"HTTP/1.1 400 Bad Request\r\n\r\n")?;
    drop(somebody);
    let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{:?}", status.error_desc);
    ensure!(
        status.status == MigrationStatus::Failed && status.error_desc.is_some(),
        "{status:?}"
    );
    stressed_guest.check_unharmed()?;
    stressed_guest.end().map(drop)
}

#[test]
fn r16_a_daemon_that_is_killed_in_a_migration_leaves_its_guest_working() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    limit_bandwidth(&mut stressed_guest)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let proxy = slow_proxy(&scratch, &destination, 2 * MIB)?;
    stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
    wait_sent(&mut stressed_guest, 2 * MIB)?;
    stressed_guest.guest.daemon()?.process().kill()?;
    proxy.allow_bytes(u64::MAX);
    println!("{}", destination.wait_failure()?);
    stressed_guest.check_progress()?;
    stressed_guest.end_without_device().map(drop)
}

#[test]
fn r16_a_daemon_that_is_told_to_end_in_a_migration_says_so_and_leaves_its_guest_working(
) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    limit_bandwidth(&mut stressed_guest)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let proxy = slow_proxy(&scratch, &destination, 2 * MIB)?;
    stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
    wait_sent(&mut stressed_guest, 2 * MIB)?;
    let status = stressed_guest.guest.daemon()?.terminate()?;
    ensure!(status.success(), "the daemon ended with {status}");
    proxy.allow_bytes(u64::MAX);
    println!("{}", destination.wait_failure()?);
    stressed_guest.check_progress()?;
    stressed_guest.end_without_device().map(drop)
}

#[test]
fn a_guest_that_is_killed_in_a_migration_fails_it() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &["--persistent"])?;
    limit_bandwidth(&mut stressed_guest)?;
    let scratch = Scratch::new()?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let proxy = slow_proxy(&scratch, &destination, 2 * MIB)?;
    stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
    wait_sent(&mut stressed_guest, 2 * MIB)?;
    stressed_guest.guest.kill()?;
    let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{:?}", status.error_desc);
    ensure!(
        status.status == MigrationStatus::Failed
            && status
                .error_desc
                .as_ref()
                .is_some_and(|why| why.contains("front end disconnected during migration")),
        "{status:?}"
    );
    proxy.allow_bytes(u64::MAX);
    println!("{}", destination.wait_failure()?);
    Ok(())
}

#[test]
fn r16_a_module_that_is_unloaded_in_a_migration_leaves_nothing_behind() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let scratch = Scratch::new()?;
    for bytes in [0, 1, 4 * MIB, 16 * MIB] {
        limit_bandwidth(&mut stressed_guest)?;
        let mut destination =
            Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
        let proxy = slow_proxy(&scratch, &destination, bytes)?;
        stressed_guest.guest.start_migration(&uri(proxy.socket()))?;
        if bytes > 0 {
            wait_sent(&mut stressed_guest, bytes)?;
        }
        stressed_guest.guest.unload(Driver::Ours)?;
        // Without hints the migration may continue, or fail with a reason.
        let qmp = stressed_guest.guest.daemon()?.qmp();
        sleep(Duration::from_millis(100));
        if !qmp.query_migrate()?.status.is_over() {
            qmp.migrate_cancel()?;
        }
        let status = qmp.wait_migration_end()?;
        println!("{bytes}: {:?} {:?}", status.status, status.error_desc);
        ensure!(
            matches!(
                status.status,
                MigrationStatus::Failed | MigrationStatus::Cancelled
            ),
            "{status:?}"
        );
        proxy.allow_bytes(u64::MAX);
        destination.wait_failure()?;
        stressed_guest.check_unharmed()?;
        stressed_guest.guest.load(Driver::Ours)?;
    }
    stressed_guest.end().map(drop)
}
