// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Soft-dirty bits, where they are to be had: in a guest of QEMU with Debian's kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use tests::artifacts::{Artifacts, Kernel, VARIABLE};
use tests::calls::Run;
use tests::guest::{Builder, Device, Guest};
use tests::initramfs::INSIDE;
use tests::scratch::Scratch;
use tests::vmm::Vmm;
use tests::{HANG_LIMIT, MIB};

/// How long a program may take inside an emulated guest before it is taken for hung. It is the sum of many waits.
const LIMIT: Duration = Duration::from_secs(6 * HANG_LIMIT.as_secs());

#[test]
fn soft_dirty_bits_in_qemu_show_what_was_written_and_what_they_do_not_show_counts() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let inside = artifacts.inside.as_ref().context("not built")?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .device(Device::None)
        .memory(512 * MIB)
        .files(&[("/inside/inside", Path::new(&inside.program))])
        .boot()?;
    println!("{}", run(&mut guest, &["/inside/inside", "tracker"])?);
    guest.power_off()?;
    Ok(())
}

#[test]
fn soft_dirty_bits_in_qemu_move_a_guest_of_user_mode_linux_with_our_driver() -> Result<()> {
    moved_inside("ours")
}

#[test]
#[ignore = "takes minutes: docs/testing.md"]
fn soft_dirty_bits_in_qemu_move_a_guest_of_user_mode_linux_with_the_c_driver() -> Result<()> {
    moved_inside("c")
}

/// A guest in a guest, with our device and a receiver beside it.
fn moved_inside(driver: &str) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let inside = artifacts.inside.as_ref().context("not built")?;
    let uml = artifacts
        .uml
        .as_ref()
        .context("no user-mode Linux kernel was set up")?;
    let our_driver = uml
        .our_driver
        .as_ref()
        .context("our driver was not built")?;
    let place = |name: &str| PathBuf::from(format!("{INSIDE}/{name}"));
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
        ("/inside/inside", &inside.program),
        ("/inside/vhost-device-balloon", &inside.daemon),
        ("/inside/balloonctl", &inside.balloonctl),
        ("/inside/linux", &uml.image),
        ("/inside/virtio_balloon.ko", &uml.c_driver),
        ("/inside/virtio_balloon_rs.ko", our_driver),
        ("/inside/artifacts.json", &description),
        ("/usr/bin/busybox", &busybox),
    ];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .device(Device::None)
        .memory(1536 * MIB)
        .files(&files)
        .boot()?;
    let set = format!("{VARIABLE}={INSIDE}/artifacts.json");
    println!(
        "{}",
        run(&mut guest, &["env", &set, "/inside/inside", "move", driver])?
    );
    guest.power_off()?;
    Ok(())
}

/// Runs a program in the guest to its end, and returns what it said.
fn run(guest: &mut Guest, argv: &[&str]) -> Result<String> {
    let argv: Vec<String> = argv.iter().map(|&word| word.into()).collect();
    let done = guest
        .agent()
        .call_within(Run { argv: argv.clone() }, LIMIT)?;
    ensure!(
        done.status == Some(0),
        "{argv:?} ended with {:?}\n{}{}",
        done.status,
        done.stdout,
        done.stderr
    );
    Ok(done.stdout)
}
