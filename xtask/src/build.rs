// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds everything that guests need: the daemon, `balloonctl`, the guest agent and the kernel module.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use harness::artifacts::{Artifacts, Kernel as GuestKernel, NestedPrograms};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::extract_vmlinux;
use crate::module;
use crate::paths;
use crate::progress::say;
use crate::run;
use crate::setup::{BuildEnv, Kernel};

/// The target of guest programs. Guests are x86-64, as the host must be.
pub const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The profile of the host programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// With all checks, for tests.
    Dev,
    /// As users run them.
    Release,
}

/// Returns a cargo command in the repository.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::repository()?);
    Ok(command)
}

/// Returns cargo's target folder.
pub fn target_folder() -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let text = run::output(cargo()?.args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("strange output of cargo metadata")?;
    Ok(metadata.target_directory)
}

/// Builds everything that guests with these kernels need.
pub fn artifacts(build_env: &BuildEnv, kernels: &[Kernel], profile: Profile) -> Result<Artifacts> {
    say("building the programs of the host and the guest");
    let daemon = program("vhost-device-balloon", profile)?;
    let balloonctl = program("balloonctl", profile)?;
    let agent = agent()?;
    let mut artifacts = Artifacts {
        rootfs: build_env.rootfs.clone(),
        agent,
        daemon,
        balloonctl,
        nested: None,
        stock: None,
        uml: None,
        debug: None,
        series_kernels: BTreeMap::new(),
    };
    for &kernel in kernels {
        say(format_args!(
            "building the module for the {} kernel",
            kernel.name()
        ));
        let our_driver = Some(module::make(build_env, kernel, false)?);
        let sample_driver = match kernel {
            Kernel::Stock => Some(module::sample(build_env, false)?),
            Kernel::Uml | Kernel::Debug => None,
        };
        let tree = build_env.tree(kernel)?;
        let (image, unpacked, c_driver) = match kernel {
            Kernel::Stock => {
                let parts = build_env.rootfs.join("kernel");
                let image = parts.join("vmlinuz");
                let unpacked = extract_vmlinux::ensure(&image, &target_folder()?)?;
                (image, unpacked, parts.join("virtio_balloon.ko"))
            }
            Kernel::Uml | Kernel::Debug => (
                tree.join("linux"),
                None,
                tree.join("drivers/virtio/virtio_balloon.ko"),
            ),
        };
        let slot = match kernel {
            Kernel::Stock => &mut artifacts.stock,
            Kernel::Uml => &mut artifacts.uml,
            Kernel::Debug => &mut artifacts.debug,
        };
        *slot = Some(GuestKernel {
            image,
            unpacked,
            c_driver,
            our_driver,
            sample_driver,
            modules: Vec::new(),
            early: Vec::new(),
        });
    }
    Ok(artifacts)
}

/// Writes the artifacts to a file for the test program, and returns its path. Other artifacts get another path, so
/// concurrent runs do not share a file.
pub fn write_artifacts(artifacts: &Artifacts) -> Result<PathBuf> {
    let text = serde_json::to_string_pretty(artifacts).context("cannot encode paths")?;
    let digest = Sha256::digest(text.as_bytes());
    let name: String = digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let folder = target_folder()?;
    let path = folder.join(format!("artifacts-{name}.json"));
    let draft = folder.join(format!("artifacts-{name}.{}", std::process::id()));
    fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, &path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Builds the host program `name` of the package with the same name, and returns its path.
fn program(name: &str, profile: Profile) -> Result<PathBuf> {
    let mut command = cargo()?;
    command.args(["build", "--quiet", "--package", name]);
    let folder = match profile {
        Profile::Dev => "debug",
        Profile::Release => {
            command.arg("--release");
            "release"
        }
    };
    run::inherit_output(&mut command)?;
    Ok(target_folder()?.join(folder).join(name))
}

fn agent() -> Result<PathBuf> {
    for_guests("guest-agent", "guest-agent")
}

/// Builds the programs that run user-mode Linux inside a QEMU guest.
pub fn nested() -> Result<NestedPrograms> {
    say("building what is run inside a guest");
    Ok(NestedPrograms {
        program: for_guests("harness", "nested")?,
        daemon: for_guests("vhost-device-balloon", "vhost-device-balloon")?,
        balloonctl: for_guests("balloonctl", "balloonctl")?,
    })
}

/// Builds a program for guests and returns its path. The program is static, because the initramfs has no libraries. It
/// has a target folder of its own, so its flags do not cause rebuilds of other programs.
fn for_guests(package: &str, program: &str) -> Result<PathBuf> {
    let folder = target_folder()?.join("agent");
    let mut command = cargo()?;
    command.args(["build", "--quiet", "--release"]);
    command.args(["--package", package, "--bin", program]);
    command
        .args(["--target", GUEST_TARGET, "--target-dir"])
        .arg(&folder);
    let flags = format!("target.{GUEST_TARGET}.rustflags=['-Ctarget-feature=+crt-static']");
    command.args(["--config", &flags, "--config", "profile.release.strip=true"]);
    command
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    run::inherit_output(&mut command)?;
    Ok(folder.join(GUEST_TARGET).join("release").join(program))
}
