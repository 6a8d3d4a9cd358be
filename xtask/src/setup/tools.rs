// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tools of set-up: mmdebstrap and Debian's keys. Tools that the host lacks are downloaded as packages and unpacked
//! into the cache. Nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};
use nix::unistd::geteuid;

use super::cache::{Cache, Step};
use crate::run;

const PROGRAM: &str = "mmdebstrap";
const KEYS: &str = "usr/share/keyrings/debian-archive-keyring.gpg";
const KEYS_PACKAGE: &str = "debian-archive-keyring";

/// The paths of the tools.
pub struct Tools {
    /// mmdebstrap.
    pub mmdebstrap: PathBuf,
    /// The keys of Debian's archive.
    pub keys: PathBuf,
}

/// Finds the tools, and fetches those that the host lacks.
pub fn find(cache: &Cache) -> Result<Tools> {
    check_host()?;
    let host_keys = Path::new("/").join(KEYS);
    let mut packages = Vec::new();
    if !run::is_available(PROGRAM) {
        packages.push(PROGRAM);
    }
    if !host_keys.exists() {
        packages.push(KEYS_PACKAGE);
    }
    let mut tools = Tools {
        mmdebstrap: PROGRAM.into(),
        keys: host_keys,
    };
    if packages.is_empty() {
        return Ok(tools);
    }
    let description = format!(
        "{} from this system's package archive",
        packages.join(" and ")
    );
    let step = Step {
        name: "tools",
        description: &description,
        inputs: &[],
        recipe: &packages,
    };
    let entry = cache.ensure(&step, |folder, log| fetch(&packages, folder, log))?;
    if packages.contains(&PROGRAM) {
        tools.mmdebstrap = entry.path.join("usr/bin").join(PROGRAM);
        if !run::is_available(&tools.mmdebstrap.to_string_lossy()) {
            bail!("mmdebstrap does not start; it needs Perl: apt-get install perl");
        }
    }
    if packages.contains(&KEYS_PACKAGE) {
        tools.keys = entry.path.join(KEYS);
    }
    Ok(tools)
}

/// Fails if a program is missing, before set-up begins. The error names the package to install.
fn check_host() -> Result<()> {
    for (program, package) in [
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
        ("perl", "perl"),
        ("unshare", "util-linux"),
    ] {
        if !run::is_available(program) {
            bail!("{program} is missing. On Debian and its like: apt-get install {package}");
        }
    }
    if geteuid().is_root() {
        return Ok(());
    }
    // newuidmap has no harmless option, so only its presence is checked.
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|folder| folder.join("newuidmap").exists()) {
        bail!("set-up without being root needs newuidmap: sudo apt-get install uidmap");
    }
    Ok(())
}

/// Downloads and unpacks packages. The package lists are separate from the host's, so neither `apt-get update` nor root
/// is needed.
fn fetch(packages: &[&str], folder: &Path, log: &Path) -> Result<()> {
    let state = folder.join("apt");
    let downloads = folder.join("packages");
    for folder in [
        state.join("lists/partial"),
        state.join("cache/archives/partial"),
        downloads.clone(),
    ] {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.arg("-o").arg(format!(
            "Dir::State::Lists={}",
            state.join("lists").display()
        ));
        command
            .arg("-o")
            .arg(format!("Dir::Cache={}", state.join("cache").display()));
        command.args(["-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=true"]);
        command.args(arguments).current_dir(&downloads);
        command
    };
    run::to_log_file(
        "apt-get update (lists of our own)",
        &mut apt(&["update", "--error-on=any"]),
        log,
    )
    .or_else(|_| {
        run::to_log_file(
            "apt-get update (lists of our own)",
            &mut apt(&["update"]),
            log,
        )
    })?;
    let download = [&["download"], packages].concat();
    run::to_log_file("apt-get download", &mut apt(&download), log)?;
    for package in fs::read_dir(&downloads).context("cannot list the downloads")? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(package?.path()).arg(folder);
        run::output(&mut unpack)?;
    }
    fs::remove_dir_all(&state)
        .and_then(|()| fs::remove_dir_all(&downloads))
        .context("cannot clear the downloads away")
}
