// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the things lie that guests are made of.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The environment variable that names the file which `cargo xtask test` has written.
pub const VARIABLE: &str = "VIRTIO_BALLOON_RS_ARTIFACTS";

/// Paths on the host; each part is there only if the command that wrote it needed it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Artifacts {
    /// The Debian root file system, which QEMU and busybox are taken from.
    pub rootfs: PathBuf,
    /// The agent, statically linked.
    pub agent: PathBuf,
    /// `vhost-device-balloon`.
    pub daemon: PathBuf,
    /// `balloonctl`.
    #[serde(default)]
    pub balloonctl: PathBuf,
    /// Programs that are run inside guests of QEMU.
    #[serde(default)]
    pub nested: Option<NestedPrograms>,
    /// The stock kernel, for QEMU.
    pub stock: Option<Kernel>,
    /// The user-mode Linux kernel.
    pub uml: Option<Kernel>,
    /// The debug kernel, which is user-mode Linux too.
    #[serde(default)]
    pub debug: Option<Kernel>,
    /// Debian's kernels of other series, for QEMU, by their series.
    #[serde(default)]
    pub series_kernels: BTreeMap<String, Kernel>,
}

/// A kernel and the balloon drivers built for it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Kernel {
    /// What the VMM boots, or, of user-mode Linux, the program itself.
    pub image: PathBuf,
    /// The kernel in `image`, unpacked; boots faster. `None` if it was not unpacked.
    #[serde(default)]
    pub unpacked: Option<PathBuf>,
    /// `virtio_balloon.ko`, uncompressed.
    pub c_driver: PathBuf,
    /// `virtio_balloon_rs.ko`.
    pub our_driver: Option<PathBuf>,
    /// More modules that a guest may be told to load, uncompressed.
    #[serde(default)]
    pub modules: Vec<PathBuf>,
    /// Modules that the agent's line to the host needs, in the order of loading.
    #[serde(default)]
    pub early: Vec<PathBuf>,
}

/// Programs that are run inside a guest of QEMU, statically linked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NestedPrograms {
    /// The one that knows what to do there.
    pub program: PathBuf,
    /// `vhost-device-balloon`.
    pub daemon: PathBuf,
    /// `balloonctl`.
    pub balloonctl: PathBuf,
}

impl Artifacts {
    /// Reads the file that [`VARIABLE`] names.
    ///
    /// # Errors
    ///
    /// If the variable is not set (the tests were not started through `cargo xtask test`) or the file cannot be read.
    pub fn load() -> Result<Self> {
        let path = std::env::var_os(VARIABLE).with_context(|| {
            format!("{VARIABLE} is not set: run the tests with `cargo xtask test`")
        })?;
        let path = PathBuf::from(path);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} does not say where things lie", path.display()))
    }
}
