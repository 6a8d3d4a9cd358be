// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernels of other series than the stock kernel's, as clients of the device with balloon drivers of their
//! own. Our driver is built for one of them, too. Also modules of the stock kernel that only some guests load.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Result};

use super::cache::{Cache, CacheEntry, Step};
use super::{rootfs, tools, unpack_source, BuildEnv, Kernel, ENTER, STOCK};
use crate::paths;
use crate::run;
use crate::sandbox::Sandbox;

const FETCH: &str = include_str!("../../scripts/fetch-kernel.sh");
const UNCOMPRESS: &str = "find /out/modules -name '*.xz' -exec xz -d {} +";
/// The modules that guests may load. A kernel with a module built in has no file for it.
const MODULES: &str =
    "virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console \
                       virtio_balloon virtio_blk virtio_mem";
/// The modules for the agent's connection to the host, in the order of loading.
const CONSOLE_MODULES: [&str; 6] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
];

/// A kernel of another series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelSeries {
    /// Debian 12's.
    V6_1,
    /// Debian 13's.
    V6_12,
    /// The series before the stock kernel's. Our driver is built for it, too.
    V7_2,
}

/// The parts of a kernel of another series.
pub struct SeriesKernel {
    /// The kernel image to boot.
    pub image: PathBuf,
    /// The folder of the kernel's modules, uncompressed.
    pub modules: PathBuf,
    /// The modules for the agent's connection to the host, in the order of loading.
    pub early: Vec<PathBuf>,
    /// The build environment for our driver, if our driver can be built for this kernel.
    pub build: Option<BuildEnv>,
}

impl KernelSeries {
    /// All series.
    pub const ALL: [Self; 3] = [Self::V6_1, Self::V6_12, Self::V7_2];

    /// Returns the name of the series, which tests use, too.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::V7_2 => "trixie-backports",
        }
    }

    fn has_rust(self) -> bool {
        self == Self::V7_2
    }
}

/// Sets up a kernel of another series, unless that is done already.
pub fn ensure(series: KernelSeries) -> Result<SeriesKernel> {
    let cache = Cache::open(paths::cache()?)?;
    let tools = tools::find(&cache)?;
    let rootfs = rootfs::make(&cache, &tools)?;
    let fetched = fetch(&cache, &rootfs, &tools.keys, series)?;
    let build = if series.has_rust() {
        Some(make_tree(&cache, &rootfs, &fetched, series)?)
    } else {
        None
    };
    let modules = fetched.path.join("modules");
    Ok(SeriesKernel {
        image: fetched.path.join("vmlinuz"),
        early: CONSOLE_MODULES
            .map(|name| modules.join(format!("{name}.ko")))
            .into_iter()
            .filter(|path| path.exists())
            .collect(),
        modules,
        build,
    })
}

fn fetch(
    cache: &Cache,
    rootfs: &CacheEntry,
    keys: &Path,
    series: KernelSeries,
) -> Result<CacheEntry> {
    let name = format!("linux-{}", series.name());
    let source = if series.has_rust() { "1" } else { "0" };
    let description = format!(
        "Debian's kernel of series {} ({} MB to download)",
        series.name(),
        if series.has_rust() { 230 } else { 40 }
    );
    let step = Step {
        name: &name,
        description: &description,
        inputs: &[],
        recipe: &[
            FETCH,
            UNCOMPRESS,
            MODULES,
            rootfs::MIRROR,
            series.name(),
            series.suite(),
            source,
        ],
    };
    cache.ensure(&step, |folder, log| {
        let mut command = Command::new("sh");
        command.args(["-euc", FETCH]).env("LC_ALL", "C.UTF-8");
        command.env("FOLDER", folder).env("KEYS", keys);
        command
            .env("MIRROR", rootfs::MIRROR)
            .env("SUITE", series.suite());
        command.env("SERIES", series.name()).env("SOURCE", source);
        command.env("MODULES", MODULES);
        run::to_log_file("fetching packages", &mut command, log)?;
        let sandbox = Sandbox::new(&rootfs.path).bind_rw(folder, "/out");
        run::output(&mut sandbox.command(UNCOMPRESS))?;
        ensure!(
            folder.join("modules/virtio_balloon.ko").exists(),
            "the packages of series {} have no virtio_balloon.ko",
            series.name()
        );
        Ok(())
    })
}

/// Makes the build tree as for the stock kernel, from the files of this kernel.
fn make_tree(
    cache: &Cache,
    rootfs: &CacheEntry,
    fetched: &CacheEntry,
    series: KernelSeries,
) -> Result<BuildEnv> {
    let name = format!("source-{}", series.name());
    let source = unpack_source(cache, &name, rootfs, Some(fetched))?;
    let name = format!("stock-{}", series.name());
    let description = format!(
        "the Rust metadata of the kernel of series {}, rebuilt from its source",
        series.name()
    );
    let step = Step {
        name: &name,
        description: &description,
        inputs: &[rootfs, fetched, &source],
        recipe: &[STOCK, ENTER],
    };
    let entry = cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path)
            .bind_ro(&fetched.path, "/kernel")
            .bind_ro(&source.path, "/src/linux")
            .bind_rw(folder, Kernel::Stock.sandbox_path());
        run::to_log_file("make", &mut sandbox.command(STOCK), log)
    })?;
    Ok(BuildEnv {
        rootfs: rootfs.path.clone(),
        source: source.path,
        stock: Some(entry.path),
        uml: None,
        debug: None,
    })
}

/// Returns a folder with uncompressed modules of the stock kernel that only some guests load.
pub fn stock_modules() -> Result<PathBuf> {
    const NAMES: &str = "virtio_blk virtio_mem";
    const TAKE: &str = "for name in $NAMES; do
        find /kernel/modules -name \"$name.ko.xz\" -exec xz -dc {} \\; >\"/out/$name.ko\"
        [ -s \"/out/$name.ko\" ] || { echo \"the stock kernel has no $name.ko\" >&2; exit 1; }
    done";
    let cache = Cache::open(paths::cache()?)?;
    let rootfs = rootfs::make(&cache, &tools::find(&cache)?)?;
    let step = Step {
        name: "stock-modules",
        description: "modules of the stock kernel, uncompressed",
        inputs: &[&rootfs],
        recipe: &[TAKE, NAMES],
    };
    let entry = cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path).bind_rw(folder, "/out");
        run::to_log_file("xz", &mut sandbox.env("NAMES", NAMES).command(TAKE), log)
    })?;
    Ok(entry.path)
}
