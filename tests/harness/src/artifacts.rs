// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The paths of the files that guests are made of.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The environment variable that names the file with the paths. `cargo xtask test` writes the file.
pub const VARIABLE: &str = "VIRTIO_BALLOON_RS_ARTIFACTS";

/// Paths on the host. An optional path is set only if the `xtask` command needed it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Artifacts {
    /// The Debian root file system, which contains QEMU and busybox.
    pub rootfs: PathBuf,
    /// The guest agent, statically linked.
    pub agent: PathBuf,
    /// `vhost-device-balloon`.
    pub daemon: PathBuf,
    /// `balloonctl`.
    #[serde(default)]
    pub balloonctl: PathBuf,
    /// Programs that run inside guests of QEMU.
    #[serde(default)]
    pub nested: Option<NestedPrograms>,
    /// The stock kernel, for QEMU.
    pub stock: Option<Kernel>,
    /// The user-mode Linux kernel.
    pub uml: Option<Kernel>,
    /// The debug kernel, which is also user-mode Linux.
    #[serde(default)]
    pub debug: Option<Kernel>,
    /// Debian's kernels of other series, for QEMU, by series.
    #[serde(default)]
    pub series_kernels: BTreeMap<String, Kernel>,
}

/// A kernel and the balloon drivers built for it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Kernel {
    /// The image that the VMM boots, or the program of user-mode Linux.
    pub image: PathBuf,
    /// The kernel in `image`, unpacked, which boots faster. `None` if the kernel was not unpacked.
    #[serde(default)]
    pub unpacked: Option<PathBuf>,
    /// `virtio_balloon.ko`, uncompressed.
    pub c_driver: PathBuf,
    /// `virtio_balloon_rs.ko`.
    pub our_driver: Option<PathBuf>,
    /// `virtio_rng_sample.ko`, only for the stock kernel.
    #[serde(default)]
    pub sample_driver: Option<PathBuf>,
    /// Other modules that a guest can load, uncompressed.
    #[serde(default)]
    pub modules: Vec<PathBuf>,
    /// The modules that the agent's connection to the host needs, in loading order.
    #[serde(default)]
    pub early: Vec<PathBuf>,
}

/// Programs that run inside a guest of QEMU, statically linked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NestedPrograms {
    /// The `nested` program, which runs the tests inside the guest.
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
    /// Fails if the variable is not set (the tests were not started through `cargo xtask test`) or the file cannot be
    /// read.
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
