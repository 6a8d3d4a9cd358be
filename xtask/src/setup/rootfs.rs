// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes the Debian root file system: compilers, QEMU, and the parts of the stock kernel.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::geteuid;

use super::cache::{Cache, CacheEntry, Step};
use super::tools::Tools;
use crate::run;
use crate::sandbox::unshare;

/// The Debian suite. Only the kernel and QEMU come from its backports.
const SUITE: &str = "trixie";
/// The Debian mirror.
pub const MIRROR: &str = "http://deb.debian.org/debian";
/// The only pinned version. The newest kernel of this series is used.
const KERNEL_SERIES: &str = "7.3";
const PACKAGES: &str =
    "bc,bindgen,bison,busybox-static,flex,gcc,kmod,libc6-dev,libelf-dev,libssl-dev,make,pahole,perl,\
    python3-minimal,qemu-system-x86,rsync,rust-clippy,rust-src,rustc,rustfmt,xz-utils";
const KERNEL_PACKAGES: &str = include_str!("../../scripts/kernel-packages.sh");
/// Folders that must exist for mounts.
const MOUNT_POINTS: [&str; 6] = ["src/linux", "src/stock", "src/uml", "repo", "out", "proc"];

/// Makes the root file system, unless it is there already.
pub fn make(cache: &Cache, tools: &Tools) -> Result<CacheEntry> {
    let preferences =
        format!("Package: src:qemu src:seabios qemu-*\nPin: release n={SUITE}-backports\nPin-Priority: 900\n");
    let step = Step {
        name: "rootfs",
        description:
            "Debian with compilers, QEMU and the stock kernel's packages (0.6 GB to download)",
        inputs: &[],
        recipe: &[
            SUITE,
            MIRROR,
            KERNEL_SERIES,
            PACKAGES,
            &preferences,
            KERNEL_PACKAGES,
            &MOUNT_POINTS.join(" "),
        ],
    };
    cache.ensure(&step, |folder, log| {
        let aside = folder.with_extension("parts");
        fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
        fs::write(aside.join("preferences"), &preferences)
            .context("cannot write the preferences")?;
        fs::write(aside.join("kernel-packages.sh"), KERNEL_PACKAGES)
            .context("cannot write a script")?;
        let made = if geteuid().is_root() {
            run::to_log_file("mmdebstrap", &mut as_root(tools, &aside, folder), log)
        } else {
            as_user(tools, &aside, folder, log)
        };
        made?;
        for point in MOUNT_POINTS {
            fs::create_dir_all(folder.join(point))
                .with_context(|| format!("cannot make /{point}"))?;
        }
        fs::remove_dir_all(&aside).context("cannot clear parts away")
    })
}

/// Returns the command for root. Its mounts and processes are in namespaces of their own, which end with it.
fn as_root(tools: &Tools, aside: &Path, target: &Path) -> Command {
    let mut command = unshare(&[
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
    ]);
    command
        .arg(&tools.mmdebstrap)
        .arg("--mode=root")
        .arg("--format=directory");
    arguments(&mut command, tools, aside, target);
    command
}

/// Makes the root file system as a user that is not root. mmdebstrap makes namespaces with the user ids that newuidmap
/// grants. The files are then unpacked as the user's own, without the devices, which only root may make.
fn as_user(tools: &Tools, aside: &Path, target: &Path, log: &Path) -> Result<()> {
    let archive = aside.join("rootfs.tar");
    let mut command = Command::new(&tools.mmdebstrap);
    command.arg("--mode=unshare").arg("--format=tar");
    arguments(&mut command, tools, aside, &archive);
    run::to_log_file("mmdebstrap", &mut command, log)?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--exclude=./dev/*", "--no-same-owner", "-xf"])
        .arg(&archive)
        .arg("-C")
        .arg(target);
    run::to_log_file("unpacking", &mut unpack, log)
}

fn arguments(command: &mut Command, tools: &Tools, aside: &Path, target: &Path) {
    command.args([
        "--variant=apt",
        "--aptopt=APT::Install-Recommends \"false\"",
    ]);
    command.arg(format!("--include={PACKAGES}"));
    // Hooks run in a shell that has the path of the new system as $1. Paths of our own files are in variables.
    command.env("PARTS", aside).env("SERIES", KERNEL_SERIES);
    command.arg("--setup-hook=cp \"$PARTS/preferences\" \"$1/etc/apt/preferences.d/backports\"");
    command.arg("--customize-hook=chroot \"$1\" sh -s \"$SERIES\" <\"$PARTS/kernel-packages.sh\"");
    command.arg(SUITE).arg(target);
    for suite in [SUITE.to_owned(), format!("{SUITE}-backports")] {
        command.arg(format!(
            "deb [signed-by={}] {MIRROR} {suite} main",
            tools.keys.display()
        ));
    }
}
