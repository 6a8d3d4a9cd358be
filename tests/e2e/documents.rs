// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the commands of the documents.

use std::env;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use harness::artifacts::{Artifacts, Kernel};
use harness::initramfs;
use harness::process::{self, Process, Streams};
use harness::scratch::Scratch;
use harness::vmm::qemu;
use harness::{HANG_TIMEOUT, MIB};

const README: &str = include_str!("../../README.md");
const TUTORIAL: &str = include_str!("../../docs/tutorial.md");

/// Runs the tutorial as a reader does, in one shell. The first step builds what the test has already.
#[test]
fn the_tutorials_commands_work_in_qemu() -> Result<()> {
    // If a command fails, the shell ends what it has started.
    const PRELUDE: &str =
        "set -e; trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf \"$T\"' EXIT\n";

    let artifacts = Artifacts::load()?;
    let (builds, blocks): (Vec<_>, Vec<_>) = blocks(TUTORIAL)
        .into_iter()
        .partition(|block| block.starts_with("make "));
    ensure!(builds.len() == 1 && blocks.len() > 5, "{blocks:?}");
    let scratch = Scratch::new()?;
    let repository = scratch.path("repository");
    let modules = repository.join("target/module/stock");
    fs::create_dir_all(&modules)?;
    let (_, module) = stock(&artifacts)?;
    symlink(module, modules.join("virtio_balloon_rs.ko"))?;
    let cache = artifacts.rootfs.ancestors().nth(2);
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("{PRELUDE}{}", blocks.concat())])
        .current_dir(&repository)
        .env(
            "XDG_CACHE_HOME",
            cache.context("the root file system is in no cache")?,
        )
        .env(
            "PATH",
            path_with(&[&artifacts.daemon, &artifacts.balloonctl])?,
        );
    let mut shell = Process::start("the tutorial's shell", command, Streams::Collected)?;
    let status = shell.wait(HANG_TIMEOUT);
    let succeeded = status.as_ref().is_ok_and(|status| status.success());
    if !succeeded {
        shell.kill()?;
    }
    ensure!(succeeded, "{status:?}\n{}", shell.diagnostics());
    fs::remove_dir_all(&repository)?;
    ensure!(
        scratch.contents()?.is_empty(),
        "{:?} are left",
        scratch.contents()?
    );
    Ok(())
}

/// Runs the README's commands as a reader does: daemon, QEMU and `balloonctl` in a terminal each, and the lines for the guest on its
/// console. The guest's disk is empty. Instead of it, QEMU boots the stock kernel and an initramfs with the C driver, which are added
/// to its command line.
#[test]
fn the_readmes_commands_work_in_qemu() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let blocks = blocks(README);
    let &[daemon, vmm, in_guest, control] = blocks.as_slice() else {
        anyhow::bail!("the README has other blocks to run: {blocks:?}");
    };
    let scratch = Scratch::new()?;
    let repository = scratch.path("repository");
    let built = repository.join("target/release");
    fs::create_dir_all(&built)?;
    symlink(&artifacts.daemon, built.join("vhost-device-balloon"))?;
    symlink(&artifacts.balloonctl, built.join("balloonctl"))?;
    fs::File::create(repository.join("guest.img"))?.set_len(MIB)?;
    let programs = scratch.path("programs");
    fs::create_dir_all(&programs)?;
    let (environment, qemu) = qemu_with_kernel(&artifacts, &scratch)?;
    write_program(&programs.join("qemu-system-x86_64"), &qemu)?;
    let path = path_with(&[&programs.join("qemu-system-x86_64")])?;
    let terminal = |name: &str, script: &str| {
        let mut command = Command::new("bash");
        command.args(["-e", "-c", script]).current_dir(&repository);
        command.env("PATH", &path).envs(environment.clone());
        Process::start(name, command, Streams::Collected)
    };

    let mut daemon = terminal("the daemon's terminal", daemon)?;
    let listens = |line: &str| line.contains("QMP: listening on");
    let listening = daemon.output().wait_for("socket", listens, HANG_TIMEOUT);
    listening.with_context(|| daemon.diagnostics())?;
    let mut vmm = terminal("QEMU's terminal", &format!("{KEYBOARD}{vmm}"))?;
    let outcome = use_guest(&mut vmm, &repository.join("keys"), in_guest, || {
        let mut shell = terminal("balloonctl's terminal", control)?;
        let status = shell.wait(HANG_TIMEOUT)?;
        let text = shell.output().text();
        let is_reached = text.contains("target 512 MiB, guest has 512 MiB");
        ensure!(status.success() && is_reached, "{}", shell.diagnostics());
        Ok(())
    });
    outcome.with_context(|| format!("{}{}", daemon.diagnostics(), vmm.diagnostics()))?;
    let status = daemon.wait(HANG_TIMEOUT)?;
    ensure!(status.success(), "{}", daemon.diagnostics());
    Ok(())
}

/// Gives a terminal a keyboard: what is written to the file `keys` is typed.
const KEYBOARD: &str = "mkfifo keys; exec <>keys\n";

/// Types the lines `in_guest` on the guest's console, runs `control`, and switches the guest off.
fn use_guest(
    vmm: &mut Process,
    keys: &Path,
    in_guest: &str,
    control: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let wait = |vmm: &Process, text: &str| {
        let has_text = |line: &str| line.contains(text);
        vmm.output().wait_for(text, has_text, HANG_TIMEOUT)
    };
    wait(vmm, "the guest is up")?;
    let mut keys = OpenOptions::new().write(true).open(keys)?;
    write!(keys, "{in_guest}lsmod\necho that was all\n")?;
    wait(vmm, "that was all")?;
    let text = vmm.output().text();
    let starts = |start: &str| text.lines().any(|line| line.starts_with(start));
    ensure!(!starts("failed: "), "a line failed in the guest");
    let (is_loaded, has_other) = (starts("virtio_balloon_rs "), starts("virtio_balloon "));
    ensure!(is_loaded && !has_other, "the guest has another driver");
    control()?;
    keys.write_all(b"poweroff -f\n")?;
    let status = vmm.wait(HANG_TIMEOUT)?;
    ensure!(status.success(), "QEMU ended: {status}");
    Ok(())
}

/// Returns environment and script of a program that runs QEMU with its arguments, and with a kernel that waits for lines on its console.
fn qemu_with_kernel(
    artifacts: &Artifacts,
    scratch: &Scratch,
) -> Result<(Vec<(String, PathBuf)>, String)> {
    /// The C driver is loaded and modprobe knows it, as in a guest of Debian.
    const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
modules=/lib/modules/$(uname -r)
mkdir -p $modules
cp /modules/virtio_balloon.ko $modules
echo virtio_balloon.ko: >$modules/modules.dep
modprobe virtio_balloon
cd /modules
stty -echo
echo the guest is up
while read -r line; do eval \"$line\" || echo \"failed: $line\"; done
";
    let (stock, module) = stock(artifacts)?;
    let init = scratch.path("init");
    write_program(&init, INIT)?;
    let initramfs = scratch.path("initramfs");
    let busybox = artifacts.rootfs.join("usr/bin/busybox");
    initramfs::write(&initramfs, &init, &busybox, &[&stock.c_driver, module], &[])?;
    let mut command = qemu::program(&artifacts.rootfs);
    let kernel = stock.unpacked.as_ref().unwrap_or(&stock.image);
    command.arg("-kernel").arg(kernel);
    command.arg("-initrd").arg(initramfs).args([
        "-append",
        "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests",
    ]);
    let variables = command.get_envs().filter_map(|(name, value)| {
        let name = name.to_string_lossy().into_owned();
        Some((name, PathBuf::from(value?)))
    });
    let script = format!(
        "#!/bin/sh\nexec {} \"$@\"\n",
        process::command_line(&command)
    );
    Ok((variables.collect(), script))
}

fn write_program(path: &Path, script: &str) -> Result<()> {
    fs::write(path, script).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o755))?;
    Ok(())
}

/// Returns the stock kernel and our module for it.
fn stock(artifacts: &Artifacts) -> Result<(&Kernel, &Path)> {
    let stock = artifacts.stock.as_ref().context("no stock kernel")?;
    let module = stock.our_driver.as_ref().context("no module")?;
    Ok((stock, module))
}

/// Returns the blocks of a document that are marked to be run.
fn blocks(text: &str) -> Vec<&str> {
    let starts = text.split("\n```sh run\n").skip(1);
    starts
        .filter_map(|block| Some(&block[..=block.find("\n```")?]))
        .collect()
}

/// Returns a search path that finds these programs first.
fn path_with(programs: &[&Path]) -> Result<std::ffi::OsString> {
    let folders = programs.iter().filter_map(|program| program.parent());
    let usual = env::var_os("PATH").unwrap_or_default();
    let all = folders.map(Path::to_owned).chain(env::split_paths(&usual));
    env::join_paths(all).context("a folder has a colon in its name")
}
