// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The initramfs of a guest: the agent, busybox, and modules to load.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{trailer, Builder};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Returns the path of a module in the guest.
#[must_use]
pub fn module_path(file_name: &str) -> String {
    format!("/modules/{file_name}")
}

/// Returns the path in the guest of the early module with this `number`. The agent loads early modules before it
/// connects to the host.
#[must_use]
pub fn early_path(number: usize) -> String {
    format!("{}/{number:02}.ko", guest_agent::protocol::EARLY_MODULES)
}

/// The path in the guest of the kernel for kexec.
pub const KEXEC_KERNEL: &str = "/next/kernel";
/// The path in the guest of the initramfs for kexec.
pub const KEXEC_INITRAMFS: &str = "/next/initramfs";

/// The folder in the guest of the programs that run inside a guest of QEMU.
pub const NESTED_DIR: &str = "/nested";

/// Writes an initramfs to `target`. `more` adds files: each pair is the path in the guest and the path on the host.
///
/// # Errors
///
/// Fails if a file cannot be read or written.
pub fn write(
    target: &Path,
    agent: &Path,
    busybox: &Path,
    modules: &[&Path],
    more: &[(&str, &Path)],
) -> Result<()> {
    let file = File::create(target).with_context(|| format!("cannot make {}", target.display()))?;
    let mut archive = BufWriter::new(file);
    let own = [
        "bin", "dev", "nested", "modules", "early", "next", "proc", "sys", "tmp", "usr", "usr/bin",
    ];
    for folder in own {
        archive = add(archive, Builder::new(folder).mode(FOLDER), &[])?;
    }
    // The kernel opens this device as the standard streams of the first process.
    let console = Builder::new("dev/console")
        .mode(CHARACTER_DEVICE)
        .rdev_major(5)
        .rdev_minor(1);
    archive = add(archive, console, &[])?;
    archive = add_file(archive, "init", agent)?;
    archive = add_file(archive, "bin/busybox", busybox)?;
    for module in modules {
        let name = module
            .file_name()
            .context("a module has no name")?
            .to_string_lossy();
        archive = add_file(archive, module_path(&name).trim_start_matches('/'), module)?;
    }
    for (name, source) in more {
        archive = add_file(archive, name.trim_start_matches('/'), source)?;
    }
    trailer(archive)
        .and_then(|mut archive| archive.flush())
        .context("cannot write the initramfs")
}

fn add<W: Write>(archive: W, entry: Builder, bytes: &[u8]) -> Result<W> {
    let length = u32::try_from(bytes.len()).context("a file is too long for an initramfs")?;
    let mut writer = entry.write(archive, length);
    writer
        .write_all(bytes)
        .and_then(|()| writer.finish())
        .context("cannot write the initramfs")
}

fn add_file<W: Write>(archive: W, name: &str, source: &Path) -> Result<W> {
    let bytes = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
    add(archive, Builder::new(name).mode(PROGRAM), &bytes)
}
