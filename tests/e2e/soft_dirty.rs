// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests soft-dirty tracking in a QEMU guest: Debian's kernel has soft-dirty bits, which the host's may lack.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use harness::artifacts::{Artifacts, Kernel, VARIABLE};
use harness::calls::Run;
use harness::guest::{Builder, Device, Guest};
use harness::initramfs::NESTED_DIR;
use harness::scratch::Scratch;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// The timeout for a program in an emulated guest, which is the sum of many waits.
const TIMEOUT: Duration = Duration::from_secs(6 * HANG_TIMEOUT.as_secs());

#[test]
fn soft_dirty_bits_in_qemu_show_what_was_written_and_what_they_do_not_show_counts() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let nested = artifacts.nested.as_ref().context("not built")?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .device(Device::None)
        .memory(512 * MIB)
        .files(&[("/nested/nested", Path::new(&nested.program))])
        .boot()?;
    println!("{}", run(&mut guest, &["/nested/nested", "tracker"])?);
    guest.power_off()?;
    Ok(())
}

#[test]
fn soft_dirty_bits_in_qemu_migrate_a_guest_of_user_mode_linux_with_our_driver() -> Result<()> {
    migrate_nested("ours")
}

#[test]
#[ignore = "takes minutes: docs/testing.md"]
fn soft_dirty_bits_in_qemu_migrate_a_guest_of_user_mode_linux_with_the_c_driver() -> Result<()> {
    migrate_nested("c")
}

/// Migrates a user-mode Linux guest inside a QEMU guest, with our device and a receiver beside it.
fn migrate_nested(driver: &str) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let nested = artifacts.nested.as_ref().context("not built")?;
    let uml = artifacts
        .uml
        .as_ref()
        .context("no user-mode Linux kernel was set up")?;
    let our_driver = uml
        .our_driver
        .as_ref()
        .context("our driver was not built")?;
    let place = |name: &str| PathBuf::from(format!("{NESTED_DIR}/{name}"));
    let there = Artifacts {
        rootfs: "/".into(),
        agent: "/init".into(),
        daemon: place("vhost-device-balloon"),
        balloonctl: place("balloonctl"),
        uml: Some(Kernel {
            image: place("linux"),
            c_driver: place("virtio_balloon.ko"),
            our_driver: Some(place("virtio_balloon_rs.ko")),
            ..Kernel::default()
        }),
        ..Artifacts::default()
    };
    let scratch = Scratch::new()?;
    let description = scratch.path("artifacts.json");
    fs::write(&description, serde_json::to_string(&there)?)?;
    let busybox = artifacts.rootfs.join("usr/bin/busybox");
    let files: [(&str, &Path); 8] = [
        ("/nested/nested", &nested.program),
        ("/nested/vhost-device-balloon", &nested.daemon),
        ("/nested/balloonctl", &nested.balloonctl),
        ("/nested/linux", &uml.image),
        ("/nested/virtio_balloon.ko", &uml.c_driver),
        ("/nested/virtio_balloon_rs.ko", our_driver),
        ("/nested/artifacts.json", &description),
        ("/usr/bin/busybox", &busybox),
    ];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .device(Device::None)
        .memory(1536 * MIB)
        .files(&files)
        .boot()?;
    let set = format!("{VARIABLE}={NESTED_DIR}/artifacts.json");
    println!(
        "{}",
        run(&mut guest, &["env", &set, "/nested/nested", "move", driver])?
    );
    guest.power_off()?;
    Ok(())
}

/// Runs a program in the guest until it exits, and returns its output.
fn run(guest: &mut Guest, argv: &[&str]) -> Result<String> {
    let argv: Vec<String> = argv.iter().map(|&word| word.into()).collect();
    let done = guest
        .agent()
        .call_within(Run { argv: argv.clone() }, TIMEOUT)?;
    ensure!(
        done.status == Some(0),
        "{argv:?} ended with {:?}\n{}{}",
        done.status,
        done.stdout,
        done.stderr
    );
    Ok(done.stdout)
}
